"""Predictive uncertainty against the dense J P Jᵀ, closed forms and Monte Carlo."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from loko import LoKO
from loko.prediction import expected_sigmoid, expected_softmax
from tests.oracle import covariance_of, jacobian
from tests.test_filter import OBSERVATIONS, Tiny, close, rows
from tests.test_optimizer import COVARIANCES, assert_same, snapshot


def trained(observation: str, outputs: int, **settings: Any) -> tuple[LoKO, nn.Module]:
    model = Tiny(outputs)
    optimizer = LoKO(model, observation=observation, **settings)
    x, y = rows(observation, outputs, 12)
    for i in range(0, 12, 3):
        optimizer.step(lambda i=i: (model(x[i : i + 3]), y[i : i + 3]))
    return optimizer, model


def dense(optimizer: LoKO, model: nn.Module, x: Tensor) -> Tensor:
    """J P Jᵀ of each row by jacrev and the P that the state stands for."""
    names = {id(p): name for name, p in model.named_parameters()}
    _, J = jacobian(model, [names[id(p)] for g in optimizer.param_groups for p in g["params"]], x)
    return J @ covariance_of(optimizer) @ J.mT


@pytest.mark.parametrize("covariance", COVARIANCES, ids=str)
@pytest.mark.parametrize(("observation", "outputs"), OBSERVATIONS)
def test_covariance_of_the_outputs_is_the_dense_one(observation: str, outputs: int, covariance: dict[str, Any]) -> None:
    optimizer, model = trained(observation, outputs, **covariance)
    x = rows(observation, outputs, 5, seed=3)[0]
    prediction = optimizer.predict(lambda: model(x))
    want = dense(optimizer, model, x)
    if observation == "categorical":
        centre = torch.eye(outputs, dtype=torch.float64) - 1 / outputs
        want = centre @ want @ centre
    close(prediction.covariance, want, 1e-6)
    assert torch.equal(prediction.outputs, model(x).detach())
    assert not prediction.outputs.requires_grad


@pytest.mark.parametrize("covariance", COVARIANCES, ids=str)
def test_nothing_is_learned(covariance: dict[str, Any]) -> None:
    optimizer, model = trained("categorical", 3, **covariance)
    before = copy.deepcopy(snapshot(optimizer, model))
    counters = optimizer.state_dict()["filter"]["counters"]
    x, y = rows("categorical", 3, 6, seed=3)
    for batch in (x, x[:1], x[:0]):
        prediction = optimizer.predict(lambda batch=batch: model(batch))
        assert prediction.covariance.shape == (len(batch), 3, 3)
        assert prediction.mean.shape == (len(batch), 3)
    assert_same(snapshot(optimizer, model), before)
    assert optimizer.state_dict()["filter"]["counters"] == counters
    assert all(p.grad is None for p in model.parameters())
    twin = copy.deepcopy(model)
    other = LoKO(twin, **covariance)
    other.load_state_dict(optimizer.state_dict())
    optimizer.step(lambda: (model(x), y))
    other.step(lambda: (twin(x), y))
    assert_same(snapshot(optimizer, model), snapshot(other, twin))


def test_gaussian_labels_are_exact() -> None:
    optimizer, model = trained("gaussian", 2)
    x = rows("gaussian", 2, 4, seed=3)[0]
    noise = optimizer.state_dict()["filter"]["noise"]
    for calibrated, factor in ((False, 1.0), (True, optimizer.diagnostics()["consistency"])):
        prediction = optimizer.predict(lambda: model(x), calibrated=calibrated)
        assert prediction.factor == factor
        close(prediction.mean, model(x).detach())
        close(prediction.label_covariance, factor * (dense(optimizer, model, x) + noise), 1e-6)


def test_the_factor_finds_the_scale_of_the_noise() -> None:
    """P and R a hundred times too large or small: the innovations tell, and the predicted variance is right again."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(400, 2, 3, generator=g, dtype=torch.float64)
    y = x @ torch.randn(3, 1, generator=g, dtype=torch.float64) + torch.randn(400, 2, 1, generator=g).double()
    found = []
    for wrong in (0.01, 1.0, 100.0):
        torch.manual_seed(0)
        model = nn.Linear(3, 1, bias=False).double()
        optimizer = LoKO(
            model, observation="gaussian", noise="fixed", initial_noise=wrong, initial_covariance=wrong, rank=6,
            scale_adaptation=0.0,
        )  # fmt: skip
        for rows_of_x, rows_of_y in zip(x, y, strict=True):
            optimizer.step(lambda a=rows_of_x, b=rows_of_y, m=model: (m(a), b))
        found.append(optimizer.predict(lambda m=model: m(x[0])).label_covariance.mean())
    close(torch.stack(found), torch.full((3,), float(found[1])).double(), 1e-5)
    assert float(found[1]) == pytest.approx(1.0, abs=0.25)


def test_bayesian_linear_regression() -> None:
    """A linear model with known noise: the predictive distribution in closed form."""
    x, y = rows("gaussian", 1, 20)
    model = nn.Linear(3, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    p0, r0 = 2.0, 0.25
    settings = {"initial_noise": r0, "initial_covariance": p0, "rank": 20, "direction_decay": 1.0}
    optimizer = LoKO(model, observation="gaussian", noise="fixed", **settings)
    optimizer.step(lambda: (model(x), y))
    posterior = torch.linalg.inv(torch.eye(3).double() / p0 + x.mT @ x / r0)
    prediction = optimizer.predict(lambda: model(x[:4]), calibrated=False)
    close(prediction.mean, x[:4] @ posterior @ x.mT @ y / r0, 1e-5)
    variance = (x[:4] @ posterior * x[:4]).sum(1) + r0
    close(prediction.label_covariance[:, 0, 0], variance, 1e-5)


def gaussians(classes: int, scale: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    mean = 2 * torch.randn(40, classes, generator=g, dtype=torch.float64)
    root = scale * torch.randn(40, classes, classes, generator=g, dtype=torch.float64) / classes**0.5
    return mean, root


def sampled(mean: Tensor, root: Tensor, link: Any) -> Tensor:
    noise = torch.randn(20_000, *mean.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    return link(mean + torch.einsum("bij,sbj->sbi", root, noise)).mean(0)


@pytest.mark.parametrize("scale", [0.5, 1.5, 3.0])
@pytest.mark.parametrize("classes", [2, 3, 10])
def test_expected_softmax_is_that_of_monte_carlo(classes: int, scale: float) -> None:
    mean, root = gaussians(classes, scale)
    want = sampled(mean, root, lambda z: z.softmax(-1))
    got = expected_softmax(mean, root @ root.mT)
    assert torch.allclose(got.sum(1), torch.ones(40).double())
    assert float((got - want).abs().max()) < 0.02
    assert float((got - want).abs().mean()) < 0.1 * float((mean.softmax(-1) - want).abs().mean())


def test_expected_sigmoid_is_that_of_quadrature() -> None:
    z = torch.linspace(-12, 12, 20_001, dtype=torch.float64)
    density = (-z.square() / 2).exp()
    for mean, variance in ((0.0, 4.0), (1.0, 0.25), (-2.0, 9.0), (3.0, 0.0)):
        want = ((mean + variance**0.5 * z).sigmoid() * density).sum() / density.sum()
        got = expected_sigmoid(torch.tensor([[mean]]), torch.tensor([[variance]]).double())
        assert float(got) == pytest.approx(float(want), abs=2e-3)


def test_closed_forms() -> None:
    mean, root = gaussians(5, 1.0)
    covariance = root @ root.mT
    close(expected_softmax(mean, torch.zeros_like(covariance)), mean.softmax(-1))
    assert torch.equal(expected_softmax(mean, covariance), expected_softmax(mean, covariance))
    even = expected_softmax(torch.zeros(1, 2).double(), torch.eye(2).double()[None])
    close(even, torch.full_like(even, 0.5))


def test_the_more_is_known_the_smaller_the_covariance() -> None:
    model = Tiny(3)
    optimizer = LoKO(
        model, initial_covariance=0.3, scale_adaptation=0.0
    )  # by rows alone, which only add to what is known
    x, y = rows("categorical", 3, 24)
    before = optimizer.predict(lambda: model(x[:4]))
    twin = copy.deepcopy(model)
    for i in range(0, 24, 4):
        optimizer.step(lambda i=i: (model(x[i : i + 4]), y[i : i + 4]))
    model.load_state_dict(twin.state_dict())  # the same J
    after = optimizer.predict(lambda: model(x[:4]))
    assert float(torch.linalg.eigvalsh(before.covariance - after.covariance).min()) > -1e-6
    assert float(after.covariance.diagonal(dim1=1, dim2=2).sum()) < float(
        before.covariance.diagonal(dim1=1, dim2=2).sum()
    )


def test_refusals() -> None:
    model = Tiny(3)
    x, _ = rows("categorical", 3, 2)
    with pytest.raises(RuntimeError, match="make a step first"):
        LoKO(model, initial_covariance="auto").predict(lambda: model(x))
    with pytest.raises(ValueError, match=r"shape \(rows, outputs\), got \(3,\)"):
        LoKO(model, initial_covariance=0.3).predict(lambda: model(x)[0])
