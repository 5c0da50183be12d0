"""Noise estimators where they have a closed form, and at the edges: certain models, unseen classes, decay of zero."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from loko import LoKO
from loko.filter import Linearization
from loko.noise import NOISES, Categorical, CategoricalEma, Ema, EmaResidual, Fixed
from loko.observation import Categorical as Classes
from loko.observation import linearize
from tests.test_filter import Tiny, close, rows, run


def batch(count: int = 3, size: int = 2) -> tuple[torch.Tensor, Linearization]:
    torch.manual_seed(0)
    half = torch.randn(count * size, count * size, dtype=torch.float64)
    link = torch.randn(count, size, size, dtype=torch.float64)
    return half @ half.T, Linearization(torch.randn(count, size, dtype=torch.float64), link @ link.mT)


def test_averages_against_a_loop() -> None:
    K, observed = batch()
    start = torch.eye(2, dtype=torch.float64)
    matched, blocks = torch.zeros(2, 2).double(), torch.zeros(2, 2).double()
    for b in range(3):
        block = K[2 * b : 2 * b + 2, 2 * b : 2 * b + 2]
        e, link = observed.residual[b], observed.link[b]
        matched += (torch.outer(e, e) + link @ block @ link.T) / 3
        blocks += block / 3
    close(Ema(0.9).innovate(start, K, observed)[1], 0.9 * start + 0.1 * matched)
    close(Ema(0.0).innovate(start, K, observed)[1], matched)
    close(CategoricalEma(0.9, 0.3).innovate(start, K, observed)[1], 0.9 * start + 0.1 * 0.3 * blocks)
    close(EmaResidual(0.9).relearn(start, K, observed), 0.9 * start + 0.1 * matched)
    assert EmaResidual(0.9).innovate(start, K, observed)[1] is start  # R moves only after the update
    assert Fixed().innovate(start, K, observed)[1] is start


def test_no_excess_is_categorical() -> None:
    K, observed = batch()
    zero = Categorical().initial(torch.eye(2).double())
    plain, excess = (noise.innovate(zero, K, observed)[0] for noise in (Categorical(), CategoricalEma(0.9, 0.0)))
    close(excess.weights, plain.weights)
    close(excess.root.mT @ excess.root, plain.root.mT @ plain.root)


def test_ema_bounds_the_gain_however_large_the_covariance() -> None:
    """With R ≥ (1 − β) H P Hᵀ, a row's own prediction moves by at most e / (1 + (1 − β)) of a linear model's output."""
    moved = []
    for p0 in (1.0, 1e6):
        torch.manual_seed(0)
        model = nn.Linear(3, 1, dtype=torch.float64)
        optimizer = LoKO(model, initial_covariance=p0, observation="gaussian", noise_decay=0.5, covariance="diagonal")
        x, y = torch.ones(1, 3).double(), torch.full((1, 1), 5.0).double()
        before = optimizer.step(lambda model=model, x=x, y=y: (model(x), y))
        moved.append(float((model(x).detach() - before) / (y - before)))
    assert moved[0] < moved[1] < 1 / 1.5


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("rank", [0, 8])
def test_a_long_run_of_one_label_leaves_a_filter_that_still_learns(noise: str, rank: int) -> None:
    """R collapses while the model is certain and right; the first surprise must give finite numbers, and teach."""
    torch.manual_seed(0)
    model = Tiny(2).float()
    optimizer = LoKO(model, noise=noise, rank=rank, noise_decay=0.5, max_skipped=0)
    x = torch.randn(400, 3)
    for i in range(0, 400, 4):
        optimizer.step(lambda i=i: (model(x[i : i + 4]), torch.zeros(4, dtype=torch.long)))
    first = float(model(x[:1]).detach().softmax(-1)[0, 1])
    for _ in range(10):
        optimizer.step(lambda: (model(x[:1]), torch.ones(1, dtype=torch.long)))
    assert float(model(x[:1]).detach().softmax(-1)[0, 1]) > first
    assert all(bool(p.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("gap", [5.0, 40.0, 800.0])
def test_saturated_softmax(noise: str, gap: float) -> None:
    """Probabilities of 1e-3, 1e-18 and exactly zero, right and wrong, with any reference class."""
    for reference in range(3):
        model = Tiny(3)
        with torch.no_grad():
            model.head.weight.zero_()
            model.head.bias.copy_(torch.tensor([0.0, -gap, gap]))
        x, _ = rows("categorical", 3, 6)
        batches = [(x[:3], torch.tensor([2, 2, 2])), (x[3:], torch.tensor([0, 1, 2]))]
        theta, P, R, optimizer = run(
            model, batches, noise=noise, linearization=0.25, observation=Classes(reference), max_skipped=0
        )
        assert all(bool(value.isfinite().all()) for value in (theta, P, R))
        assert bool((P.diagonal() > 0).all())
        assert optimizer.diagnostics()["skipped_rows"] == 0


def test_a_class_never_seen_does_not_break_the_noise() -> None:
    """Its row of R falls to nothing; dropped as the reference, it leaves the others nearly singular."""
    thetas = []
    for reference in (0, 2):
        torch.manual_seed(0)
        model = Tiny(3)
        optimizer = LoKO(model, noise_decay=0.5, observation=Classes(reference), max_skipped=0)
        x = torch.randn(300, 3, dtype=torch.float64)
        y = (x[:, 0] > 0).long()
        for i in range(0, 300, 4):
            optimizer.step(lambda m=model, x=x[i : i + 4], y=y[i : i + 4]: (m(x), y))
        assert float((model(x).argmax(-1) == y).double().mean()) > 0.9
        thetas.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    close(thetas[1], thetas[0], 1e-4)


def test_a_certain_row_teaches_through_the_secant_and_not_through_the_tangent() -> None:
    outputs, labels = torch.tensor([[60.0, 0.0]]), torch.tensor([1])
    assert float(linearize(Classes(), outputs, labels, 0.0).link.abs().max()) < 1e-20
    assert float(linearize(Classes(), outputs, labels, 0.25).link[0, 0, 0]) == pytest.approx(0.25 * 0.75)
