"""Observation models: what a label says about the outputs of a model, and where that is linearised.

Each model offers the same functions, all on outputs (B, C) and labels (B, …):

* ``contrast(C)`` (m × C): which m combinations of the C outputs are observed;
* ``check(outputs, labels)``: raises on labels the model cannot mean;
* ``mean(outputs)`` (B × m): the prediction ŷ, float64;
* ``target(labels, C)`` (B × m): the observation y, float64;
* ``link(mean)`` (B × m × m): ∂mean/∂(contrast outputs), as a function of the mean;

and ``expect(outputs, covariance, noise)``: mean (B × C) and covariance (B × C × C) of the label where the outputs are
uncertain.

With many outputs most of them hardly vary, and a backward pass for each is wasted. :func:`narrow` observes fewer
directions, chosen for each sample, and needs of a model the same on all C outputs: ``full_mean``, ``full_target``,
``times_link``, and which outputs matter (``importance``, ``implied``, ``seeds``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from loko.filter import Linearization, cholesky
from loko.prediction import expected_sigmoid, expected_softmax

__all__ = [
    "OBSERVATIONS",
    "Bernoulli",
    "Categorical",
    "Gaussian",
    "ObservationModel",
    "linearize",
    "narrow",
    "outputs_needed",
]


class ObservationModel(Protocol):
    """What the optimizer asks of an observation model."""

    @property
    def implied(self) -> int: ...
    def contrast(self, num_outputs: int) -> Tensor: ...
    def check(self, outputs: Tensor, labels: Tensor) -> None: ...
    def mean(self, outputs: Tensor) -> Tensor: ...
    def target(self, labels: Tensor, num_outputs: int) -> Tensor: ...
    def link(self, mean: Tensor) -> Tensor: ...
    def initial_noise(self, num_outputs: int, scale: float | None) -> Tensor: ...
    def kept(self, num_outputs: int) -> list[int]: ...
    def full_mean(self, outputs: Tensor) -> Tensor: ...
    def full_target(self, labels: Tensor, num_outputs: int) -> Tensor: ...
    def times_link(self, point: Tensor, matrix: Tensor) -> Tensor: ...
    def importance(self, point: Tensor) -> Tensor: ...
    def seeds(self, point: Tensor, chosen: Tensor) -> Tensor: ...
    def expect(self, outputs: Tensor, covariance: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class Categorical:
    """One of C classes; the outputs are logits.

    Softmax probabilities sum to one, so C − 1 of them carry everything: the class ``reference`` is dropped, and the
    observed outputs are the differences ``z_c − z_reference``. Which class is dropped changes nothing when the initial
    noise is ``r₀ (I − 11ᵀ/C)`` on all classes, and it is (docs/filter.md §5).
    """

    reference: int = -1

    def kept(self, num_outputs: int) -> list[int]:
        """The classes that are observed: all but the reference."""
        return [c for c in range(num_outputs) if c != self.reference % num_outputs]

    def contrast(self, num_outputs: int) -> Tensor:
        """Differences to the reference class, (C − 1, C)."""
        if num_outputs < 2:
            raise ValueError(
                f"a categorical observation needs at least 2 outputs, the model gives {num_outputs}; "
                "use observation='bernoulli' for one yes/no output or 'gaussian' for regression"
            )
        rows = torch.eye(num_outputs, dtype=torch.float64)[self.kept(num_outputs)]
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

    def full_mean(self, outputs: Tensor) -> Tensor:
        """Probabilities of all classes, (B, C)."""
        return outputs.double().softmax(-1)

    def full_target(self, labels: Tensor, num_outputs: int) -> Tensor:
        """One-hot labels, (B, C)."""
        return torch.nn.functional.one_hot(labels.long(), num_outputs).double()

    def mean(self, outputs: Tensor) -> Tensor:
        return self.full_mean(outputs)[:, self.kept(outputs.shape[1])]

    def target(self, labels: Tensor, num_outputs: int) -> Tensor:
        return self.full_target(labels, num_outputs)[:, self.kept(num_outputs)]

    def times_link(self, point: Tensor, matrix: Tensor) -> Tensor:
        """``(diag(π) − π πᵀ) matrix`` on all classes, for π (B, C) and matrix (B, C, k)."""
        return point[..., None] * (matrix - point[:, None, :] @ matrix)

    @property
    def implied(self) -> int:
        """One: the rows of Λ J add up to zero, so that of the most probable class follows from the others."""
        return 1

    def importance(self, point: Tensor) -> Tensor:
        """Probabilities, (B, C)."""
        return point

    def seeds(self, point: Tensor, chosen: Tensor) -> Tensor:
        """``e_c − π`` for each chosen class, (B, C, k): row c of Λ J is π_c times this combination of the rows of J."""
        units = torch.nn.functional.one_hot(chosen, point.shape[1]).to(point.dtype)
        return (units - point[:, None, :]).mT

    def expect(self, outputs: Tensor, covariance: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor]:
        """Probabilities under uncertain outputs, and diag(π) − π πᵀ, which holds for whatever gave π."""
        mean = expected_softmax(outputs, covariance)
        return mean, self.link(mean)

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

    def kept(self, num_outputs: int) -> list[int]:
        """Every output is observed."""
        return list(range(num_outputs))

    def full_mean(self, outputs: Tensor) -> Tensor:
        """Probabilities, (B, C)."""
        return outputs.double().sigmoid()

    def full_target(self, labels: Tensor, num_outputs: int) -> Tensor:
        """The labels, (B, C)."""
        return labels.double()

    mean, target = full_mean, full_target

    def times_link(self, point: Tensor, matrix: Tensor) -> Tensor:
        """``diag(π (1 − π)) matrix`` for π (B, C) and matrix (B, C, k)."""
        return (point * (1 - point))[..., None] * matrix

    @property
    def implied(self) -> int:
        """None."""
        return 0

    def importance(self, point: Tensor) -> Tensor:
        """Variances π (1 − π), (B, C)."""
        return point * (1 - point)

    def seeds(self, point: Tensor, chosen: Tensor) -> Tensor:
        """Unit vectors of the chosen outputs, (B, C, k)."""
        return torch.nn.functional.one_hot(chosen, point.shape[1]).to(point.dtype).mT

    def expect(self, outputs: Tensor, covariance: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor]:
        """Probabilities under uncertain outputs, and the variance of each label; what labels share is left out."""
        mean = expected_sigmoid(outputs, covariance.diagonal(dim1=-2, dim2=-1))
        return mean, self.link(mean)

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

    def kept(self, num_outputs: int) -> list[int]:
        """Every output is observed."""
        return list(range(num_outputs))

    def full_mean(self, outputs: Tensor) -> Tensor:
        """The outputs, (B, C)."""
        return outputs.double()

    def full_target(self, labels: Tensor, num_outputs: int) -> Tensor:
        """The labels, (B, C)."""
        return labels.double()

    mean, target = full_mean, full_target

    def times_link(self, point: Tensor, matrix: Tensor) -> Tensor:
        """The link is the identity."""
        return matrix

    @property
    def implied(self) -> int:
        """None."""
        return 0

    def importance(self, point: Tensor) -> Tensor:
        """All outputs matter alike, (B, C)."""
        return torch.ones_like(point)

    def seeds(self, point: Tensor, chosen: Tensor) -> Tensor:
        """Unit vectors of the chosen outputs, (B, C, k)."""
        return torch.nn.functional.one_hot(chosen, point.shape[1]).to(point.dtype).mT

    def expect(self, outputs: Tensor, covariance: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor]:
        """The outputs, and their covariance with R on top; exact."""
        return outputs.double(), covariance if noise is None else covariance + noise

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
    """Residual and link of a batch (docs/filter.md §3, "where to linearise").

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


def narrow(
    model: ObservationModel,
    outputs: Tensor,
    labels: Tensor,
    weight: float,
    *,
    free: int,
    tolerance: float,
    limit: int | None,
    noise: Tensor | None,
) -> tuple[Linearization, Tensor, int]:
    """Linearise along few directions of the outputs instead of all, chosen for each sample (docs/filter.md §10).

    The first ``free`` directions are those of the outputs that the prediction alone calls important, so what K says
    along them can go into the prediction of the same batch. Behind them come outputs that matter for their labels: a
    class that had next to no probability, and proved right. Outputs are left out while the probability (Bernoulli: the
    variance) of all that are left out together, at ȳ, stays within ``tolerance``.

    With Q the orthonormal basis of the directions, ``Ĥ = Λ Q Qᵀ J``. Each row of H that is left out is off by at most
    its probability times a centred logit's Jacobian, that of the most probable class by as much as these together, and
    where that class is the label, the rows that are kept lean on it. So with τ' = τ (1 + ω (1 − π)/π), τ = tolerance, π
    the largest probability of ŷ, and v the largest prior variance of a centred logit of the sample,
    ``‖Ĥ P Ĥᵀ − H P Hᵀ‖ ≤ 4 τ' √v ‖H P Hᵀ‖^½ + 4 τ'² v`` (spectral norms; each sample's block).

    Where ``limit`` allows fewer directions than that, the last is the gradient of the whitened residual, so that the
    mean update sees all of it; the others are the most probable classes. That filter is less informed, not wrong.

    Args:
        model, outputs, labels, weight: as in :func:`linearize`.
        free: how many outputs of each sample the prediction calls important (:func:`outputs_needed`).
        tolerance: τ ≥ 0.
        limit: most directions, or None.
        noise: R (m, m) for noises that live on the outputs, None for those in logit space.

    Returns:
        The linearisation, the directions Qᵀ, (B, k, C): one backward pass for each of the k, and how many of them, from
        the first on, owe nothing to the labels.
    """
    mean = model.full_mean(outputs)
    target = model.full_target(labels, outputs.shape[1]).to(mean.device)
    residual, point = target - mean, torch.lerp(mean, target, weight)
    order = model.importance(mean).argsort(dim=1, descending=True)[:, model.implied :]
    mass, ranks = model.importance(point).gather(1, order[:, free:]).sort(dim=1, descending=True)
    order = torch.cat([order[:, :free], order[:, free:].gather(1, ranks)], dim=1)
    needed = free + _not_within(mass, tolerance)
    count = needed if limit is None else min(needed, limit)
    first = free if limit is None else min(free, limit - 1)  # whether there is a gradient depends on the labels
    columns = model.seeds(mean, order[:, :count])
    kept = model.kept(outputs.shape[1])
    if count < needed:
        gradient = residual[..., None]
        if noise is not None:
            factor, _ = cholesky(noise)
            gradient = torch.zeros_like(gradient)
            gradient[:, kept, 0] = torch.cholesky_solve(residual[:, kept].mT, factor).mT
            gradient = model.times_link(point, gradient)
        scale = torch.linalg.vector_norm(gradient, dim=1, keepdim=True).clamp_min(torch.finfo(mean.dtype).tiny)
        columns = torch.cat([columns[..., : count - 1], gradient / scale], dim=2)
    basis = torch.linalg.qr(columns).Q  # (B, C, k)
    link = model.times_link(point, basis)
    along = (basis.mT @ residual[..., None])[..., 0]
    if noise is None:
        return Linearization(along, basis.mT @ link), basis.mT, first
    return Linearization(residual[:, kept], link[:, kept], along), basis.mT, first


def outputs_needed(model: ObservationModel, outputs: Tensor, tolerance: float) -> int:
    """How many outputs a batch cannot leave out, as the predictions (B, C) have it whatever the labels; at least 1."""
    mass = model.importance(model.full_mean(outputs)).sort(dim=1, descending=True).values[:, model.implied :]
    return max(1, _not_within(mass, tolerance))


def _not_within(mass: Tensor, tolerance: float) -> int:
    """How many columns of ``mass`` (B, k), in falling order, have to stay so that no row lacks more than τ."""
    tail = mass.flip(1).cumsum(1).flip(1)  # of this output and all behind it
    return int((tail > tolerance).sum(1).max()) if mass.shape[1] else 0


def _check_shape(name: str, outputs: Tensor, labels: Tensor) -> None:
    if labels.shape != outputs.shape:
        raise ValueError(
            f"{name} labels must have the shape of the outputs, {tuple(outputs.shape)}; got {tuple(labels.shape)}"
        )
