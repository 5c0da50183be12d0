"""Observation models: links are derivatives, dropped classes carry nothing, labels are checked by name."""

from __future__ import annotations

import pytest
import torch
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
