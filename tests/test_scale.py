"""The scale of P: its trace is the derivative it claims to be, and it mends a start that is wrong."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from loko import LoKO
from loko.covariance import COVARIANCES, Covariance, Projection
from loko.filter import Innovation, Linearization, innovate
from loko.observation import Categorical, linearize, narrow
from loko.scale import LIMIT, Scale
from tests.test_covariance import posterior

COUNT, OUTPUTS, ROWS = 12, 3, 4


def covariance(kind: str, seed: int = 0) -> Covariance:
    """One that has learned something: W of a low rank is not empty."""
    torch.manual_seed(seed)
    start = COVARIANCES[kind].start(0.5 + torch.rand(COUNT, dtype=torch.float64), 4)
    jacobian = torch.randn(ROWS * OUTPUTS, COUNT, dtype=torch.float64)
    link = torch.eye(OUTPUTS, dtype=torch.float64).expand(ROWS, -1, -1)
    return posterior(start.project(jacobian), link / 2)


def learned(
    scale: Scale, rate: float, jacobian: Tensor, prior: Projection, observed: Linearization, innovation: Innovation
) -> Scale:
    """The scale after a batch, as a step has it."""
    moved = jacobian @ scale.trace
    return scale.update(rate, observed, moved, prior.mean_step(scale.change(prior.outputs, innovation, moved)))


@pytest.mark.parametrize("kind", ["diagonal", "low_rank"])
def test_the_trace_is_the_derivative_of_the_parameters(kind: str) -> None:
    """Outputs linear in θ, fixed R: perturb log P, and with it θ along the trace of before, and run the step."""
    prior, rows = covariance(kind), torch.Generator().manual_seed(1)
    theta, trace = (torch.randn(COUNT, generator=rows, dtype=torch.float64) for _ in range(2))
    jacobian = torch.randn(ROWS * OUTPUTS, COUNT, generator=rows, dtype=torch.float64)
    target = torch.randn(ROWS, OUTPUTS, generator=rows, dtype=torch.float64)
    noise = 0.7 * torch.eye(OUTPUTS, dtype=torch.float64)

    def step(epsilon: float) -> tuple[Tensor, Linearization, Innovation]:
        at = theta + epsilon * trace
        link = torch.eye(OUTPUTS, dtype=torch.float64).expand(ROWS, -1, -1)
        observed = Linearization(target - (jacobian @ at).view(ROWS, OUTPUTS), link)
        seen = prior.predict(math.exp(-epsilon), 0.0).project(jacobian)
        innovation = innovate(seen.outputs, observed, noise)
        return at + seen.mean_step(innovation.weights), observed, innovation

    _, observed, innovation = step(0.0)
    # What is left of the trace when the step begins is what it forgot before.
    updated = learned(Scale(trace / 0.95), 0.1, jacobian, prior.project(jacobian), observed, innovation)
    expected = (step(1e-5)[0] - step(-1e-5)[0]) / 2e-5
    torch.testing.assert_close(updated.trace, expected, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("kind", ["diagonal", "low_rank"])
def test_the_scale_is_a_state_beside_the_parameters(kind: str) -> None:
    """One dense Kalman update of (θ, log s) with the covariance diag(P, μ²), where θ follows log s along h."""
    prior, rate, rows = covariance(kind), 0.3, torch.Generator().manual_seed(5)
    jacobian = torch.randn(ROWS * OUTPUTS, COUNT, generator=rows, dtype=torch.float64)
    scale = Scale(torch.randn(COUNT, generator=rows, dtype=torch.float64))
    residual = torch.randn(ROWS, OUTPUTS, generator=rows, dtype=torch.float64)
    observed = Linearization(residual, torch.eye(OUTPUTS, dtype=torch.float64).expand(ROWS, -1, -1))
    noise = 0.7 * torch.eye(OUTPUTS, dtype=torch.float64)

    seen, moved = prior.project(jacobian), jacobian @ scale.trace
    innovation = innovate(seen.outputs + scale.spread(rate, moved), observed, noise)
    delta = seen.mean_step(innovation.weights) + scale.shift(rate, moved, innovation) * scale.trace

    dense = torch.stack([seen.mean_step(row) for row in torch.linalg.inv(jacobian)])  # P, by its columns
    joint = torch.block_diag(dense, torch.tensor([[rate**2]], dtype=torch.float64))
    follow = torch.cat([torch.eye(COUNT, dtype=torch.float64), scale.trace[:, None]], 1)  # (θ, log s) to θ
    rows_of = jacobian @ follow
    gain = joint @ rows_of.mT @ torch.linalg.inv(rows_of @ joint @ rows_of.mT + torch.block_diag(*[noise] * ROWS))
    torch.testing.assert_close(delta, follow @ gain @ residual.flatten())


@pytest.mark.parametrize("narrowed", [False, True])
def test_the_hypergradient_is_that_of_the_mean_negative_log_likelihood(narrowed: bool) -> None:
    rows = torch.Generator().manual_seed(2)
    weights = torch.randn(ROWS, OUTPUTS, COUNT, generator=rows, dtype=torch.float64)
    theta, trace = (torch.randn(COUNT, generator=rows, dtype=torch.float64) for _ in range(2))
    labels = torch.tensor([0, 2, 1, 1])

    def loss(epsilon: float) -> Tensor:
        return nn.functional.cross_entropy(weights @ (theta + epsilon * trace), labels)

    model, outputs = Categorical(), weights @ theta
    observed, directions = linearize(model, outputs, labels, 0.25), model.contrast(OUTPUTS)
    if narrowed:  # τ so small that every direction stays, in a basis of each row's own
        noise = model.initial_noise(OUTPUTS, None)
        observed, directions, _ = narrow(
            model, outputs, labels, 0.25, free=OUTPUTS - 1, tolerance=1e-300, limit=None, noise=noise
        )
    jacobian = (directions @ weights).reshape(-1, COUNT)
    prior = covariance("diagonal").project(jacobian)
    innovation = innovate(prior.outputs, observed, model.initial_noise(OUTPUTS, None))
    updated = learned(Scale(trace), 0.1, jacobian, prior, observed, innovation)
    gradient = float((loss(1e-5) - loss(-1e-5)) / 2e-5)
    assert math.copysign(math.sqrt(updated.square / 0.05), updated.mean) == pytest.approx(gradient, rel=1e-7)
    assert updated.step == pytest.approx(math.copysign(0.1, -gradient))  # the first is normalised by itself


def test_a_scale_without_a_past_stays_and_none_passes_the_limit() -> None:
    torch.manual_seed(3)
    jacobian = torch.randn(ROWS * 2, COUNT, dtype=torch.float64)
    prior = covariance("diagonal").project(jacobian)
    observed = linearize(
        Categorical(), torch.randn(ROWS, OUTPUTS, dtype=torch.float64), torch.tensor([0, 1, 2, 0]), 0.0
    )
    innovation = innovate(prior.outputs, observed, Categorical().initial_noise(OUTPUTS, None))
    first = learned(Scale(torch.zeros(COUNT, dtype=torch.float64)), 1.0, jacobian, prior, observed, innovation)
    assert (first.step, first.log, first.steps) == (0.0, 0.0, 0)
    assert bool(first.trace.any())
    for log in (LIMIT, -LIMIT):
        for direction in (1.0, -1.0):
            scale = learned(Scale(direction * first.trace, log=log), 1.0, jacobian, prior, observed, innovation)
            assert abs(scale.log) <= LIMIT
            assert scale.log == pytest.approx(log + scale.step)


def stream(rows: int, noise: float = 1.5, flip: int | None = None) -> list[tuple[Tensor, Tensor]]:
    """Three classes in eight dimensions, with noise; their names change places at ``flip``."""
    generator = torch.Generator().manual_seed(4)
    centres = torch.randn(3, 8, generator=generator)
    labels = torch.randint(3, (rows,), generator=generator)
    inputs = centres[labels] + noise * torch.randn(rows, 8, generator=generator)
    if flip is not None:
        labels[flip:] = (labels[flip:] + 1) % 3
    return list(zip(inputs.split(4), labels.split(4), strict=True))


def online_loss(p0: float, adaptation: float, batches: list[tuple[Tensor, Tensor]]) -> float:
    model = nn.Linear(8, 3)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    optimizer = LoKO(model, initial_covariance=p0, noise_decay=0.95, scale_adaptation=adaptation)
    losses = [
        nn.functional.cross_entropy(optimizer.step(lambda x=x, y=y: (model(x), y)), y, reduction="sum")
        for x, y in batches
    ]
    return float(torch.stack(losses).sum()) / sum(len(y) for _, y in batches)


@pytest.mark.parametrize(("p0", "noise", "left"), [(1e-4, 3.0, 0.3), (100.0, 6.0, 0.75)])
def test_a_start_that_is_wrong_is_mended(p0: float, noise: float, left: float) -> None:
    """Too small where there is much to learn; too large where there is little, half of which ``ema`` noise mends."""
    batches = stream(400, noise)
    best = min(online_loss(p, 0.0, batches) for p in (0.01, 0.1, 1.0))
    fixed, adapted = online_loss(p0, 0.0, batches), online_loss(p0, 0.2, batches)
    assert adapted - best < left * (fixed - best)


def test_after_a_drift_the_steps_grow_again() -> None:
    batches = stream(800, flip=400)
    assert online_loss(0.1, 0.2, batches) < online_loss(0.1, 0.0, batches)
