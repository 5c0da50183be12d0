"""Observation models: links are derivatives, dropped classes carry nothing, labels are checked by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from loko.observation import OBSERVATIONS, Bernoulli, Categorical, Gaussian, linearize
from tests.test_filter import close


@pytest.mark.parametrize(
    ("model", "labels"),
    [
        (Categorical(), torch.tensor([0, 3])),
        (Categorical(1), torch.tensor([0, 3])),
        (Bernoulli(), torch.tensor([[0, 1, 1, 0], [1, 0, 0, 0]])),
        (Gaussian(), torch.randn(2, 4)),
    ],
)
def test_the_link_is_the_derivative_of_the_mean(model: object, labels: Tensor) -> None:
    outputs = torch.randn(2, 4, dtype=torch.float64)
    contrast = model.contrast(4)
    derivative = torch.stack([torch.func.jacrev(lambda z: model.mean(z[None])[0])(z) for z in outputs])
    observed = linearize(model, outputs, labels, 0.0)
    close(observed.link @ contrast, derivative)
    close(observed.residual, model.target(labels, 4) - model.mean(outputs))
    between = linearize(model, outputs, labels, 0.25).link
    close(between, model.link(0.75 * model.mean(outputs) + 0.25 * model.target(labels, 4)))
    assert len(model.initial_noise(4, None)) == len(contrast)
    assert bool((torch.linalg.eigvalsh(model.initial_noise(4, 0.7)) > 0).all())


@pytest.mark.parametrize("reference", [0, 2, -1])
def test_initial_noise_is_r0_on_all_classes_with_one_dropped(reference: int) -> None:
    whole = 0.7 * (torch.eye(4, dtype=torch.float64) - 0.25)
    kept = [c for c in range(4) if c != reference % 4]
    close(Categorical(reference).initial_noise(4, 0.7), whole[kept][:, kept])
    uniform = torch.full((1, 4), 0.25, dtype=torch.float64)
    close(Categorical(reference).initial_noise(4, None), Categorical(reference).link(uniform[:, kept])[0])


@pytest.mark.parametrize(
    ("kind", "outputs", "labels", "message"),
    [
        ("categorical", (2, 3), torch.tensor([0, 3]), r"label 3 in row 1 of the batch is outside \[0, 3\)"),
        ("categorical", (2, 3), torch.tensor([-1, 2]), r"label -1 in row 0"),
        ("categorical", (2, 3), torch.tensor([-100, 2]), r"label -100 in row 0"),
        ("categorical", (2, 3), torch.tensor([0.0, 1.0]), r"must be integers of shape \(2,\).*float32"),
        ("categorical", (2, 3), torch.tensor([True, False]), "must be integers"),
        ("categorical", (2, 3), torch.tensor([[0], [1]]), r"got torch.int64 of shape \(2, 1\)"),
        ("categorical", (2, 3), torch.tensor([0]), "one a row"),
        ("bernoulli", (2, 2), torch.tensor([[0, 1], [1, 2]]), "label 2 in row 1, output 1, is neither 0 nor 1"),
        ("bernoulli", (2, 2), torch.tensor([[0, 1.0], [torch.nan, 1]]), "label nan in row 1, output 0"),
        ("bernoulli", (2, 2), torch.tensor([0, 1]), r"shape of the outputs, \(2, 2\); got \(2,\)"),
        ("gaussian", (2, 1), torch.tensor([0.0, 1.0]), r"shape of the outputs, \(2, 1\); got \(2,\)"),
        ("gaussian", (2, 1), torch.tensor([[0.0], [torch.inf]]), "label in row 1 of the batch is not finite"),
    ],
)
def test_labels_the_model_cannot_mean(kind: str, outputs: tuple[int, int], labels: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OBSERVATIONS[kind]().check(torch.zeros(outputs), labels)


def test_a_categorical_needs_two_outputs() -> None:
    with pytest.raises(ValueError, match="at least 2 outputs, the model gives 1; use observation='bernoulli'"):
        Categorical().contrast(1)


def test_the_secant_of_a_gaussian_is_its_tangent() -> None:
    outputs, labels = torch.randn(5, 3), torch.randn(5, 3)
    tangent, secant = (linearize(Gaussian(), outputs, labels, weight) for weight in (0.0, 0.7))
    assert torch.equal(tangent.link, secant.link)
    assert torch.equal(tangent.residual, secant.residual)


@given(st.lists(st.floats(-8, 8), min_size=1, max_size=5), st.floats(0.01, 0.45), st.data())
def test_the_bernoulli_secant_is_the_chord_by_the_midpoint_rule(logits: list[float], weight: float, data: Any) -> None:
    """docs/filter.md §3: never below the chord from ŷ to ŷ + 2ω e, and above by no more than the rule's own error."""
    labels = torch.tensor([data.draw(st.lists(st.integers(0, 1), min_size=len(logits), max_size=len(logits)))])
    outputs = torch.tensor([logits], dtype=torch.float64)
    observed = linearize(Bernoulli(), outputs, labels, weight)
    slope = observed.link.diagonal(dim1=-2, dim2=-1)
    close(observed.link, torch.diag_embed(slope))  # no label in the chord of another
    start, move = outputs.sigmoid(), 2 * weight * observed.residual
    chord = move / ((start + move).logit() - outputs)
    curvature = torch.stack([2 / m**3 + 2 / (1 - m) ** 3 for m in (start, start + move)]).amax(0)
    rounding = 1e-6
    assert bool((slope >= chord * (1 - rounding)).all())
    assert bool((slope <= chord * (1 + move.square() * curvature * slope / 24 + rounding)).all())


def test_a_certain_and_wrong_row_has_a_secant_and_no_tangent() -> None:
    outputs, labels = torch.tensor([[40.0, -40.0]], dtype=torch.float64), torch.tensor([[0, 1]])
    close(linearize(Bernoulli(), outputs, labels, 0.25).link, 3 / 16 * torch.eye(2, dtype=torch.float64)[None])
    assert float(linearize(Bernoulli(), outputs, labels, 0.0).link.abs().max()) < 1e-15
