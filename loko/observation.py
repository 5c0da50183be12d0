"""Observation models: what a label says about the outputs of a model, and where that is linearised.

Each model offers the same four functions, all on outputs (B, C) and labels (B, …):

* ``contrast(C)`` (m × C): which m combinations of the C outputs are observed;
* ``check(outputs, labels)``: raises on labels the model cannot mean;
* ``mean(outputs)`` (B × m): the prediction ŷ, float64;
* ``target(labels, C)`` (B × m): the observation y, float64;
* ``link(mean)`` (B × m × m): ∂mean/∂(contrast outputs), as a function of the mean.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from loko.filter import Linearization

__all__ = ["OBSERVATIONS", "Bernoulli", "Categorical", "Gaussian", "ObservationModel", "linearize"]


class ObservationModel(Protocol):
    """What the optimizer asks of an observation model."""

    def contrast(self, num_outputs: int) -> Tensor: ...
    def check(self, outputs: Tensor, labels: Tensor) -> None: ...
    def mean(self, outputs: Tensor) -> Tensor: ...
    def target(self, labels: Tensor, num_outputs: int) -> Tensor: ...
    def link(self, mean: Tensor) -> Tensor: ...
    def initial_noise(self, num_outputs: int, scale: float | None) -> Tensor: ...


@dataclass(frozen=True)
class Categorical:
    """One of C classes; the outputs are logits.

    Softmax probabilities sum to one, so C − 1 of them carry everything: the class ``reference`` is dropped, and the
    observed outputs are the differences ``z_c − z_reference``. Which class is dropped changes nothing when the initial
    noise is ``r₀ (I − 11ᵀ/C)`` on all classes, and it is (FILTER §5).
    """

    reference: int = -1

    def _kept(self, num_outputs: int) -> list[int]:
        return [c for c in range(num_outputs) if c != self.reference % num_outputs]

    def contrast(self, num_outputs: int) -> Tensor:
        """Differences to the reference class, (C − 1, C)."""
        if num_outputs < 2:
            raise ValueError(
                f"a categorical observation needs at least 2 outputs, the model gives {num_outputs}; "
                "use observation='bernoulli' for one yes/no output or 'gaussian' for regression"
            )
        rows = torch.eye(num_outputs, dtype=torch.float64)[self._kept(num_outputs)]
        rows[:, self.reference % num_outputs] = -1.0
        return rows

    def check(self, outputs: Tensor, labels: Tensor) -> None:
        """Labels are integers in [0, C), one a row."""
        batch, classes = outputs.shape
        if labels.shape != (batch,) or labels.is_floating_point() or labels.dtype == torch.bool:
            raise ValueError(
                f"categorical labels must be integers of shape ({batch},), one a row of the outputs; "
                f"got {labels.dtype} of shape {tuple(labels.shape)}"
            )
        wrong = (labels < 0) | (labels >= classes)
        if bool(wrong.any()):
            row = int(wrong.nonzero()[0, 0])
            raise ValueError(f"label {int(labels[row])} in row {row} of the batch is outside [0, {classes})")

    def mean(self, outputs: Tensor) -> Tensor:
        return outputs.double().softmax(-1)[:, self._kept(outputs.shape[1])]

    def target(self, labels: Tensor, num_outputs: int) -> Tensor:
        return torch.nn.functional.one_hot(labels.long(), num_outputs).double()[:, self._kept(num_outputs)]

    def link(self, mean: Tensor) -> Tensor:
        """diag(π) − π πᵀ."""
        return torch.diag_embed(mean) - mean[:, :, None] * mean[:, None, :]

    def initial_noise(self, num_outputs: int, scale: float | None) -> Tensor:
        """``r₀ (I − 11ᵀ/C)`` with the reference dropped; r₀ = 1/C is the covariance of a uniform prediction."""
        scale = 1.0 / num_outputs if scale is None else scale
        size = num_outputs - 1
        return scale * (torch.eye(size, dtype=torch.float64) - 1.0 / num_outputs)


@dataclass(frozen=True)
class Bernoulli:
    """C independent yes/no labels a row (multi-label); the outputs are logits."""

    def contrast(self, num_outputs: int) -> Tensor:
        return torch.eye(num_outputs, dtype=torch.float64)

    def check(self, outputs: Tensor, labels: Tensor) -> None:
        """Labels are 0 or 1, in the shape of the outputs."""
        _check_shape("bernoulli", outputs, labels)
        wrong = (labels != 0) & (labels != 1)
        if bool(wrong.any()):
            row, column = wrong.nonzero()[0].tolist()
            raise ValueError(f"label {labels[row, column].item()} in row {row}, output {column}, is neither 0 nor 1")

    def mean(self, outputs: Tensor) -> Tensor:
        return outputs.double().sigmoid()

    def target(self, labels: Tensor, num_outputs: int) -> Tensor:
        return labels.double()

    def link(self, mean: Tensor) -> Tensor:
        return torch.diag_embed(mean * (1 - mean))

    def initial_noise(self, num_outputs: int, scale: float | None) -> Tensor:
        """r₀ I; r₀ = ¼ is the variance of an even coin."""
        return (0.25 if scale is None else scale) * torch.eye(num_outputs, dtype=torch.float64)


@dataclass(frozen=True)
class Gaussian:
    """C real outputs (regression). The link is the identity, so tangent and secant are the same."""

    def contrast(self, num_outputs: int) -> Tensor:
        return torch.eye(num_outputs, dtype=torch.float64)

    def check(self, outputs: Tensor, labels: Tensor) -> None:
        """Labels are finite, in the shape of the outputs."""
        _check_shape("gaussian", outputs, labels)
        if not bool(torch.isfinite(labels).all()):
            row = int((~torch.isfinite(labels)).nonzero()[0, 0])
            raise ValueError(f"the label in row {row} of the batch is not finite")

    def mean(self, outputs: Tensor) -> Tensor:
        return outputs.double()

    def target(self, labels: Tensor, num_outputs: int) -> Tensor:
        return labels.double()

    def link(self, mean: Tensor) -> Tensor:
        return torch.eye(mean.shape[1], dtype=mean.dtype, device=mean.device).expand(len(mean), -1, -1)

    def initial_noise(self, num_outputs: int, scale: float | None) -> Tensor:
        """r₀ I; r₀ = 1 suits standardised targets."""
        return (1.0 if scale is None else scale) * torch.eye(num_outputs, dtype=torch.float64)


OBSERVATIONS: dict[str, Callable[[], ObservationModel]] = {
    "categorical": Categorical,
    "bernoulli": Bernoulli,
    "gaussian": Gaussian,
}


def linearize(model: ObservationModel, outputs: Tensor, labels: Tensor, weight: float) -> Linearization:
    """Residual and link of a batch (FILTER §3, "where to linearise").

    The link is taken at ``ȳ = (1 − ω) ŷ + ω y``: ω = 0 is the tangent at the prediction (arXiv 2410.11551); ω > 0 a
    secant, through which a confidently wrong sample still has a Jacobian, and teaches.

    Args:
        outputs: (B, C), detached.
        labels: as ``model`` wants them.
        weight: ω in [0, 1].
    """
    mean = model.mean(outputs)
    target = model.target(labels, outputs.shape[1]).to(mean.device)
    return Linearization(residual=target - mean, link=model.link(torch.lerp(mean, target, weight)))


def _check_shape(name: str, outputs: Tensor, labels: Tensor) -> None:
    if labels.shape != outputs.shape:
        raise ValueError(
            f"{name} labels must have the shape of the outputs, {tuple(outputs.shape)}; got {tuple(labels.shape)}"
        )
