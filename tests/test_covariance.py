"""Covariances: what predict, truncation, clamps and slices do, and what float32 must survive."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from loko import LoKO
from loko.covariance import CEILING, COVARIANCES, FLOOR, Covariance, Diagonal, LowRank, Projection, initial_variance
from loko.filter import Innovation, cholesky, whitened_innovation
from tests.test_filter import close

KINDS = [("diagonal", 0), ("low_rank", 0), ("low_rank", 4)]


def dense(covariance: Covariance) -> Tensor:
    if isinstance(covariance, Diagonal):
        return torch.diag(covariance.variance)
    assert isinstance(covariance, LowRank)
    return torch.linalg.inv(torch.diag(covariance.precision) + covariance.factor.T @ covariance.factor)


def posterior(prior: Projection, root: Tensor, decay: float = 1.0) -> Any:
    """What a batch with this root makes of the covariance."""
    factor, _ = cholesky(whitened_innovation(prior.outputs, root))
    innovation = Innovation(torch.zeros(len(prior.outputs)).double(), root, factor, torch.tensor(0.0), 0)
    return prior.condition(innovation, decay)


def random_low_rank(size: int = 9, rank: int = 3, seed: int = 0) -> LowRank:
    g = torch.Generator().manual_seed(seed)
    return LowRank(
        torch.rand(size, generator=g, dtype=torch.float64) + 0.5,
        torch.randn(rank, size, generator=g, dtype=torch.float64),
    )


@pytest.mark.parametrize("rank", [0, 3])
def test_low_rank_predict_project_and_marginal_are_exact(rank: int) -> None:
    covariance = random_low_rank(rank=rank)
    P = dense(covariance)
    q, decay = torch.rand(9).double(), 0.5 + torch.rand(9).double() / 2
    scale = torch.diag(decay.rsqrt())
    close(dense(covariance.predict(decay, q)), scale @ P @ scale + torch.diag(q))
    close(dense(covariance.predict(0.9, 0.0)), P / 0.9)
    close(dense(covariance.predict(1.0, 0.3)), P + 0.3 * torch.eye(9).double())
    J, w = torch.randn(4, 9).double(), torch.randn(4).double()
    close(covariance.project(J).outputs, J @ P @ J.T)
    close(covariance.project(J).mean_step(w), P @ J.T @ w)
    several = torch.stack([w, -2 * w.flip(0)])
    close(covariance.project(J).mean_step(several), several @ J @ P)
    close(covariance.marginal(), P.diagonal())


def test_truncation_keeps_the_strongest_directions_and_the_diagonal_of_the_precision() -> None:
    covariance, J = random_low_rank(), torch.randn(4, 9).double()
    G = torch.randn(2, 2, 2).double()
    after = posterior(covariance.project(J), G)
    rows = torch.cat([covariance.factor, torch.block_diag(*G) @ J])
    scale = covariance.precision.sqrt()  # strength is measured against what is known already
    _, values, vectors = torch.linalg.svd(rows / scale, full_matrices=False)
    strong = values[:3, None] * vectors[:3] * scale
    weak = values[3:, None] * vectors[3:] * scale
    close(after.factor.T @ after.factor, strong.T @ strong)
    close(after.precision, covariance.precision + weak.square().sum(0))
    before = torch.diag(covariance.precision) + rows.T @ rows
    close(after.precision + after.factor.square().sum(0), before.diagonal())


@pytest.mark.parametrize("count", [4, 20])
def test_directions_decay_into_the_diagonal(count: int) -> None:
    """From all directions kept to none, the diagonal filter; the diagonal of the precision is always the same."""
    prior = random_low_rank().project(torch.randn(count, 9).double())
    G = torch.randn(count // 2, 2, 2).double()
    kept, fading, gone = (posterior(prior, G, decay) for decay in (1.0, 0.7, 0.0))
    close(fading.factor, math.sqrt(0.7) * kept.factor)
    for less in (fading, gone):
        close(less.precision + less.factor.square().sum(0), kept.precision + kept.factor.square().sum(0))
    assert not gone.factor.any()


@pytest.mark.parametrize("count", [2, 20])
@pytest.mark.parametrize(("kind", "rank"), KINDS)
def test_blocks_of_columns_together_are_the_whole(
    kind: str, rank: int, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    start, root = torch.rand(30).double() + 0.1, torch.randn(count // 2, 2, 2).double()
    jacobians, w = torch.randn(3, count, 30).double(), torch.randn(count).double()

    def steps() -> list[Tensor]:
        covariance, found = COVARIANCES[kind].start(start, rank), []
        for jacobian in jacobians:
            prior = covariance.project(jacobian)
            found += [prior.outputs, prior.mean_step(w)]
            covariance = posterior(prior, root)
        return [*found, dense(covariance)]

    whole = steps()
    monkeypatch.setattr("loko.covariance._WHOLE_ELEMENTS", 0)
    monkeypatch.setattr("loko.covariance._BLOCK_ELEMENTS", {"cpu": 100})
    for mine, theirs in zip(steps(), whole, strict=True):
        close(mine, theirs)


@pytest.mark.parametrize(("kind", "rank"), KINDS)
def test_the_units_of_the_parameters_change_nothing(kind: str, rank: int) -> None:
    """A parameter counted in thousandths has a thousandfold standard deviation and a thousandth of the slope."""
    torch.manual_seed(0)
    units = torch.logspace(-3, 3, 9, dtype=torch.float64)
    J, G, w = torch.randn(4, 9).double(), torch.randn(2, 2, 2).double(), torch.randn(4).double()
    plain = COVARIANCES[kind].start(torch.rand(9).double() + 0.1, rank)
    scaled = COVARIANCES[kind].start(plain.marginal() * units**2, rank)
    for _ in range(3):
        first, second = plain.project(J), scaled.project(J / units)
        close(second.outputs, first.outputs)
        close(second.mean_step(w) / units, first.mean_step(w))
        plain, scaled = posterior(first, G), posterior(second, G)
        close(scaled.marginal() / units**2, plain.marginal())


@pytest.mark.parametrize(("kind", "rank"), KINDS)
def test_slices_together_are_the_whole(kind: str, rank: int) -> None:
    """Each slice by itself, with the sums over slices added up beforehand, as ranks do by all-reduce."""
    whole = COVARIANCES[kind].start(torch.rand(9).double() + 0.1, rank)
    J, G, w = torch.randn(4, 9).double(), torch.randn(2, 2, 2).double(), torch.randn(4).double()
    for _ in range(2):
        sums: list[Tensor] = []

        def note(partial: Tensor, sums: list[Tensor] = sums) -> Tensor:
            sums.append(partial.clone())
            return partial

        def step(covariance: Covariance, J: Tensor, reduce: Any) -> tuple[Covariance, Tensor]:
            prior = covariance.predict(0.9, 0.1, reduce).project(J, reduce)
            return posterior(prior, G), prior.mean_step(w)

        after, delta = step(whole, J, note)
        parts = []
        for columns in (slice(0, 5), slice(5, 5), slice(5, 9)):  # the middle rank owns nothing
            state = {key: value[..., columns] for key, value in whole.state().items()}
            replay = iter(sums)
            parts.append(
                step(type(whole).from_state(state), J[:, columns], lambda partial, replay=replay: next(replay).clone())
            )
        close(torch.cat([part[1] for part in parts]), delta)
        for key, value in after.state().items():
            close(torch.cat([part[0].state()[key] for part in parts], -1), value)
        whole = after


@pytest.mark.parametrize(("kind", "rank"), KINDS)
def test_float32_survives_outputs_far_more_certain_than_it_can_resolve(kind: str, rank: int) -> None:
    """p₀ / R = 1e9: a difference of float32 numbers would be zero or negative, and the filter dead or diverged."""
    torch.manual_seed(0)
    model, truth = nn.Linear(1, 2), torch.randn(2, 1)
    optimizer = LoKO(
        model,
        covariance=kind,
        rank=rank,
        noise="fixed",
        initial_noise=1e-9,
        initial_covariance=1.0,
        observation="gaussian",
    )
    for _ in range(200):
        x = torch.randn(4, 1)
        y = x @ truth.T + 0.25
        optimizer.step(lambda x=x, y=y: (model(x), y))
    assert float((model.weight.detach() - truth).norm()) < 1e-5
    assert float((model.bias.detach() - 0.25).norm()) < 1e-5
    diagnostics = optimizer.diagnostics()
    assert (diagnostics["skipped_rows"], diagnostics["floored"]) == (0, 0)


@pytest.mark.parametrize(("kind", "rank"), KINDS)
def test_forgetting_does_not_blow_up_what_no_row_excites(kind: str, rank: int) -> None:
    """Embedding rows never looked up grow by 1/λ a step: 0.5⁻²⁰⁰ is beyond float32, and inf · 0 would be NaN."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 3), nn.Flatten(), nn.Linear(3, 2))
    optimizer = LoKO(model, covariance=kind, rank=rank, forgetting=0.5, max_skipped=0)
    for step in range(200):
        ids = torch.tensor([[step % 3], [0]])
        optimizer.step(lambda ids=ids: (model(ids), torch.tensor([1, 0])))
    state = optimizer.state_dict()["filter"]["covariance"]
    assert all(bool((value.abs() < 1.01 * CEILING).all()) for value in state.values())
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_clamps_are_where_they_say_and_counted() -> None:
    assert Diagonal(torch.tensor([FLOOR, 1.0])).at_floor() == 1
    assert LowRank(torch.tensor([1.0, 1 / FLOOR]), torch.zeros(0, 2)).at_floor() == 1
    certain = LowRank(torch.full((2,), 1e19), torch.zeros(0, 2)).project(torch.full((1, 2), 1e15))
    assert posterior(certain, torch.ones(1, 1, 1).double()).at_floor() == 2
    assert torch.equal(Diagonal(torch.ones(2)).predict(1e-30, 0.0).variance, torch.full((2,), CEILING))
    assert torch.equal(
        LowRank(torch.ones(2), torch.zeros(0, 2)).predict(1e-30, 0.0).marginal(), torch.full((2,), CEILING)
    )
    huge = Diagonal(torch.full((2,), 1e20)).project(torch.tensor([[1.0, 0.0]]))  # p² is beyond float32
    after = posterior(huge, torch.ones(1, 1, 1).double()).variance
    assert after[1] == 1e20
    assert 0 < float(after[0]) < 1e14


def test_a_gram_matrix_that_overflows_shows_in_the_posterior() -> None:
    projection = LowRank(torch.full((2,), 1e19), torch.zeros(1, 2)).project(torch.full((1, 2), 1e30))
    assert posterior(projection, torch.ones(1, 1, 1).double()).precision.isnan().all()


def test_initial_variance() -> None:
    g = torch.Generator().manual_seed(0)
    assert torch.equal(initial_variance(3, 0.5, "constant", g), torch.full((3,), 0.5))
    uniform = initial_variance(20_000, 2.0, "uniform", g)
    assert float(uniform.min()) > 0
    assert float(uniform.max()) <= 2.0
    assert float(uniform.mean()) == pytest.approx(1.0, abs=0.02)
    with pytest.raises(ValueError, match="'normal'; allowed: 'constant', 'uniform'"):
        initial_variance(3, 1.0, "normal", g)
