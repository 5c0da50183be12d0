"""Few directions of many outputs: exact where nothing is left out, within the stated bound where something is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from loko import LoKO
from loko.observation import OBSERVATIONS, Bernoulli, Categorical, linearize, narrow, outputs_needed

CLASSES = 6


def dense_output_covariance(link: Tensor, directions: Tensor, logits_covariance: Tensor) -> Tensor:
    """H P Hᵀ of one sample from the covariance of its logits (C, C)."""
    jacobian = link @ directions
    return jacobian @ logits_covariance @ jacobian.mT


def case(seed: int, spread: float = 3.0) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    outputs = spread * torch.randn(4, CLASSES, generator=g, dtype=torch.float64)
    labels = torch.randint(0, CLASSES, (4,), generator=g)
    half = torch.randn(CLASSES, CLASSES, generator=g, dtype=torch.float64)
    return outputs, labels, half @ half.mT


@given(
    seed=st.integers(0, 10_000), tolerance=st.sampled_from([0.01, 0.05, 0.2, 0.5]), weight=st.sampled_from([0.0, 0.25])
)
def test_what_is_left_out_stays_within_the_bound(seed: int, tolerance: float, weight: float) -> None:
    model = Categorical()
    outputs, labels, P = case(seed)
    noise = model.initial_noise(CLASSES, None)
    exact = linearize(model, outputs, labels, weight)
    free = outputs_needed(model, outputs, tolerance)
    narrowed, directions, first = narrow(
        model, outputs, labels, weight, free=free, tolerance=tolerance, limit=None, noise=noise
    )
    assert first == free <= directions.shape[1]
    torch.testing.assert_close(narrowed.residual, exact.residual)
    contrast = model.contrast(CLASSES)
    point = torch.lerp(model.full_mean(outputs), model.full_target(labels, CLASSES), weight)
    centred = torch.eye(CLASSES, dtype=torch.float64) - point[:, None, :]
    for row in range(len(outputs)):
        S = dense_output_covariance(exact.link[row], contrast, P)
        S_narrowed = dense_output_covariance(narrowed.link[row], directions[row], P)
        v = float((centred[row] @ P @ centred[row].mT).diagonal().max())
        largest = float(model.full_mean(outputs)[row].max())
        left = tolerance * (1 + weight * (1 - largest) / largest)
        bound = 4 * left * v**0.5 * float(torch.linalg.matrix_norm(S, 2)) ** 0.5 + 4 * left**2 * v
        assert float(torch.linalg.matrix_norm(S - S_narrowed, 2)) <= bound


@given(seed=st.integers(0, 10_000), limit=st.integers(1, 3), observation=st.sampled_from(["categorical", "bernoulli"]))
def test_one_of_too_few_directions_carries_the_whole_gradient(seed: int, limit: int, observation: str) -> None:
    model = OBSERVATIONS[observation]()
    outputs, classes, _ = case(seed, spread=1.0)
    labels = classes if observation == "categorical" else (outputs.sign() > 0).double()
    noise = model.initial_noise(CLASSES, None)
    exact = linearize(model, outputs, labels, 0.25)
    narrowed, directions, first = narrow(
        model, outputs, labels, 0.25, free=len(model.contrast(CLASSES)), tolerance=0.0, limit=limit, noise=noise
    )
    assert directions.shape == (4, limit, CLASSES)
    assert first == limit - 1
    contrast = model.contrast(CLASSES)
    whitened = torch.linalg.solve(noise, exact.residual.mT).mT[..., None]
    want = (exact.link @ contrast).mT @ whitened  # Hᵀ R⁻¹ e before Jᵀ, (B, C, 1)
    got = (narrowed.link @ directions).mT @ whitened
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-8 * float(want.norm()))


@pytest.mark.parametrize("covariance", ["diagonal", "low_rank"])
@pytest.mark.parametrize("noise", ["ema", "ema_residual", "fixed", "categorical"])
@pytest.mark.parametrize("observation", ["categorical", "bernoulli"])
def test_nothing_left_out_is_the_exact_filter(covariance: str, noise: str, observation: str) -> None:
    """Other directions span the same outputs, so θ, P and R come out the same."""
    settings: dict[str, Any] = {"covariance": covariance, "noise": noise, "observation": observation}
    found = [learn(settings | {"output_tolerance": tolerance}) for tolerance in (0.0, 1e-12)]
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-9)


def learn(settings: dict[str, Any]) -> list[Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, CLASSES)).double()
    optimizer = LoKO(model, **settings)
    for _ in range(5):
        x = torch.randn(3, 3, dtype=torch.float64)
        labels = torch.randint(0, CLASSES, (3,))
        y = labels if settings["observation"] == "categorical" else nn.functional.one_hot(labels, CLASSES).double()
        optimizer.step(lambda x=x, y=y: (model(x), y))
    state = optimizer.state_dict()["filter"]
    covariance = state["covariance"]
    # The sign and mix of low-rank directions is free; what they stand for is not.
    P = covariance["variance"] if "variance" in covariance else covariance["factor"].mT @ covariance["factor"]
    return [torch.cat([p.detach().flatten() for p in model.parameters()]), P, state["noise"]]


def test_fewer_directions_mean_fewer_backward_passes() -> None:
    """Confident rows need one direction where the exact filter takes C − 1."""
    outputs = torch.zeros(2, CLASSES, dtype=torch.float64)
    outputs[:, 0] = 9.0
    labels = torch.tensor([0, 0])
    noise = Categorical().initial_noise(CLASSES, None)
    free = outputs_needed(Categorical(), outputs, 0.01)
    _, directions, _ = narrow(Categorical(), outputs, labels, 0.0, free=free, tolerance=0.01, limit=None, noise=noise)
    assert directions.shape[1] == free == 1
    free, noise = outputs_needed(Bernoulli(), outputs, 0.0), torch.eye(6).double()
    _, directions, _ = narrow(Bernoulli(), outputs, outputs, 0.0, free=free, tolerance=0.0, limit=None, noise=noise)
    assert directions.shape[1] == free == CLASSES


@given(seed=st.integers(0, 10_000), tolerance=st.sampled_from([0.01, 0.05, 0.2]), limit=st.sampled_from([None, 2]))
def test_the_first_directions_owe_nothing_to_the_labels(seed: int, tolerance: float, limit: int | None) -> None:
    """Whatever the labels, they are the same; and a label without probability has one of its own."""
    model = Categorical()
    outputs, labels, _ = case(seed)
    free = outputs_needed(model, outputs, tolerance)
    noise = model.initial_noise(CLASSES, None)
    found = [
        narrow(model, outputs, y, 0.25, free=free, tolerance=tolerance, limit=limit, noise=noise)
        for y in (labels, (labels + 1) % CLASSES, outputs.argmin(1))
    ]
    common = min(first for _, _, first in found)
    for _, directions, _ in found:
        torch.testing.assert_close(directions[:, :common].abs(), found[0][1][:, :common].abs())  # up to their sign
    if limit is None:
        _, directions, _ = found[2]
        least = nn.functional.one_hot(outputs.argmin(1), CLASSES) - model.full_mean(outputs)
        within = (directions.mT @ directions @ least[..., None])[..., 0]
        torch.testing.assert_close(within, least)


@pytest.mark.parametrize(
    "settings",
    [{"noise": "categorical_ema", "max_outputs": 2}, {"observation": "gaussian", "max_outputs": 2}],
)
def test_settings_that_do_not_go_together_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="leave it out"):
        LoKO(nn.Linear(2, 3), **settings)


def test_memory_for_the_jacobian_is_bounded_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Linear(3, CLASSES).double()
    megabytes_an_output = 4 * sum(p.numel() for p in model.parameters()) * 8 / 2**20
    optimizer = LoKO(model, output_tolerance=0.0, jacobian_megabytes=2 * megabytes_an_output)
    seen: list[int] = []
    jacobian = optimizer._engine.jacobian
    optimizer._engine.jacobian = lambda outputs, directions: (  # type: ignore[method-assign]
        seen.append(directions.shape[-2]) or jacobian(outputs, directions)  # type: ignore[func-returns-value]
    )
    for _ in range(3):
        x, y = torch.randn(4, 3, dtype=torch.float64), torch.randint(0, CLASSES, (4,))
        optimizer.step(lambda x=x, y=y: (model(x), y))
    assert seen == [2, 2, 2]
    assert sum("at most 2 outputs" in message for message in caplog.messages) == 1
