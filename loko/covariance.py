"""Kinds of parameter covariance behind one interface: the paper's diagonal, and low rank plus diagonal.

A covariance is an immutable value on the flat vector of trainable parameters (or on one rank's slice of it). A step is

    predicted = covariance.predict(forgetting, process_noise)
    prior     = predicted.project(J)             # K = J P Jᵀ, all that output space needs to know
    delta     = prior.mean_step(weights)         # P Jᵀ w
    posterior = prior.condition(root)            # P⁻¹ + Jᵀ blockdiag(GᵀG) J, restricted to the kind

and nothing is written in place, so a step that turns out not to be finite is dropped by not keeping its result.

``reduce`` makes every kind work on a slice: whatever is a sum over parameters passes through it, and a distributed
filter hands in an all-reduce.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from loko.filter import cholesky, times_blocks, whitened_innovation

__all__ = ["COVARIANCES", "FLOOR", "Covariance", "Diagonal", "LowRank", "Projection", "initial_variance"]

FLOOR = 1e-20
"""Smallest variance kept, in float32's range with room for its square root; entries held there are counted."""

CEILING = 1e20
"""Largest variance kept. Forgetting inflates what no row excites (an embedding never looked up) without end."""

_CHUNK = 1 << 14  # columns turned to float64 at a time: fits a cache

Reduce = Callable[[Tensor], Tensor]


def _alone(partial: Tensor) -> Tensor:
    return partial


class Projection(Protocol):
    """A covariance seen through one Jacobian. ``outputs`` is K = J P Jᵀ, (N, N) float64."""

    @property
    def outputs(self) -> Tensor: ...
    def mean_step(self, weights: Tensor) -> Tensor: ...
    def condition(self, root: Tensor) -> Covariance: ...


class Covariance(Protocol):
    """A covariance of n parameters. ``state()`` is a dict of tensors that ``from_state`` of the same class reads."""

    @classmethod
    def start(cls, variance: Tensor, rank: int) -> Covariance: ...
    @classmethod
    def from_state(cls, state: dict[str, Tensor]) -> Covariance: ...
    def predict(
        self, forgetting: Tensor | float, process_noise: Tensor | float, reduce: Reduce = _alone
    ) -> Covariance: ...
    def project(self, jacobian: Tensor, reduce: Reduce = _alone) -> Projection: ...
    def marginal(self, reduce: Reduce = _alone) -> Tensor: ...
    def state(self) -> dict[str, Tensor]: ...
    def at_floor(self) -> Tensor: ...


@dataclass(frozen=True)
class Diagonal:
    """P = diag(p), the paper's covariance (arXiv 2410.11551).

    Attributes:
        variance: p, shape (n,), positive.
    """

    variance: Tensor

    @classmethod
    def start(cls, variance: Tensor, rank: int) -> Diagonal:
        """The diagonal has no rank; the argument keeps the constructors alike."""
        return cls(variance)

    def predict(self, forgetting: Tensor | float, process_noise: Tensor | float, reduce: Reduce = _alone) -> Diagonal:
        """``p ← p / λ + q``; λ in (0, 1] and q ≥ 0 are scalars or (n,)."""
        return Diagonal((self.variance / forgetting + process_noise).clamp_max_(CEILING))

    def project(self, jacobian: Tensor, reduce: Reduce = _alone) -> DiagonalProjection:
        """Look at this covariance through J, (N, n)."""
        return DiagonalProjection(self, jacobian, reduce((jacobian * self.variance) @ jacobian.mT).double())

    def marginal(self, reduce: Reduce = _alone) -> Tensor:
        """Variance of every parameter, (n,)."""
        return self.variance

    def state(self) -> dict[str, Tensor]:
        return {"variance": self.variance}

    @classmethod
    def from_state(cls, state: dict[str, Tensor]) -> Diagonal:
        return cls(**state)

    def at_floor(self) -> Tensor:
        """How many variances are held at the floor."""
        return (self.variance <= FLOOR).sum()


@dataclass(frozen=True)
class DiagonalProjection:
    """A diagonal covariance seen through J."""

    covariance: Diagonal
    jacobian: Tensor
    outputs: Tensor

    def mean_step(self, weights: Tensor) -> Tensor:
        """``p ∘ Jᵀ w``, (n,)."""
        return self.covariance.variance * (self.jacobian.mT @ weights.to(self.jacobian.dtype))

    def condition(self, root: Tensor) -> Diagonal:
        """``p ← p ∘ (1 − p ∘ colsum((L⁻¹ G J)²))`` with ``L Lᵀ = I + G K Gᵀ``: the diagonal of the exact posterior."""
        innovation, _ = cholesky(whitened_innovation(self.outputs, root))
        identity = torch.eye(len(self.outputs), dtype=root.dtype, device=root.device)
        rows = torch.linalg.solve_triangular(innovation, times_blocks(root, identity), upper=False)
        shrink = (rows.to(self.jacobian.dtype) @ self.jacobian).square_().sum(0)
        variance = self.covariance.variance
        # 1 − p·colsum is rounding noise below eps: no step may shrink a variance further than it can know.
        kept = (1.0 - variance * shrink).clamp_min_(torch.finfo(variance.dtype).eps)
        return Diagonal((variance * kept).clamp_min_(FLOOR))


@dataclass(frozen=True)
class LowRank:
    """P⁻¹ = diag(u) + Wᵀ W with W (L × n): low rank plus diagonal, in precision form (LoFi, arXiv 2305.19535).

    ``rank = 0`` is the diagonal precision filter (the variational, or fully decoupled, diagonal): every update then
    goes into u. While L is at least the number of rows seen, nothing is cut and the filter is the full-covariance one.

    Attributes:
        precision: u, shape (n,), positive.
        factor: W, shape (L, n); the rows are directions that the data have made certain.
    """

    precision: Tensor
    factor: Tensor

    @classmethod
    def start(cls, variance: Tensor, rank: int) -> LowRank:
        """A diagonal start from variances (n,), with room for ``rank`` directions."""
        return cls(1.0 / variance, variance.new_zeros(rank, len(variance)))

    def predict(self, forgetting: Tensor | float, process_noise: Tensor | float, reduce: Reduce = _alone) -> LowRank:
        """``P ← P / λ + diag(q)``, exactly: the sum stays low rank plus diagonal.

        With ``s = 1 + q u``: ``u ← u / s``, ``W ← (I + W diag(q / s) Wᵀ)^(-½) W / s`` (after the scaling by λ).
        """
        precision = self.precision * forgetting
        factor = self.factor * torch.as_tensor(forgetting, dtype=precision.dtype, device=precision.device).sqrt()
        if isinstance(process_noise, Tensor) or process_noise > 0:
            scale = 1.0 + process_noise * precision
            inner = reduce((factor * (process_noise / scale)) @ factor.mT).double()
            inner.diagonal().add_(1.0)
            root, _ = cholesky(inner)
            factor = torch.linalg.solve_triangular(root.to(factor.dtype), factor, upper=False) / scale
            precision = precision / scale
        return LowRank(precision.clamp_min(1.0 / CEILING), factor)

    def project(self, jacobian: Tensor, reduce: Reduce = _alone) -> LowRankProjection:
        """Look at this covariance through J, (N, n), by Woodbury's identity in L + N dimensions.

        The Gram matrix is summed in float64: K is a difference of two of its blocks, as much smaller than they as the
        data have made J's outputs certain, and in float32 it would turn negative.
        """
        rank = len(self.factor)
        rows = torch.cat([self.factor, jacobian]) if rank else jacobian
        gram = reduce(_scaled_gram(rows, self.precision))
        inner = gram[:rank, :rank].clone()
        inner.diagonal().add_(1.0)
        root, _ = cholesky((inner + inner.mT) / 2)
        explained = torch.cholesky_solve(gram[:rank, rank:], root)  # (I + W U⁻¹ Wᵀ)⁻¹ W U⁻¹ Jᵀ
        outputs = gram[rank:, rank:] - gram[rank:, :rank] @ explained
        return LowRankProjection(self, rows, explained, (outputs + outputs.mT) / 2, reduce)

    def marginal(self, reduce: Reduce = _alone) -> Tensor:
        """Variance of every parameter, (n,), by Woodbury's identity."""
        inner = reduce(_scaled_gram(self.factor, self.precision))
        inner.diagonal().add_(1.0)
        root, _ = cholesky((inner + inner.mT) / 2)
        parts = []
        for part, scale in zip(self.factor.split(_CHUNK, 1), self.precision.split(_CHUNK), strict=True):
            scale = scale.double()
            explained = torch.linalg.solve_triangular(root, part / scale, upper=False).square().sum(0)
            parts.append((1.0 / scale - explained).clamp_min(FLOOR).to(self.precision.dtype))
        return torch.cat(parts)

    def state(self) -> dict[str, Tensor]:
        return {"precision": self.precision, "factor": self.factor}

    @classmethod
    def from_state(cls, state: dict[str, Tensor]) -> LowRank:
        return cls(**state)

    def at_floor(self) -> Tensor:
        """How many parameters have reached the largest precision kept."""
        return (self.precision >= 1.0 / FLOOR).sum()


@dataclass(frozen=True)
class LowRankProjection:
    """A low-rank covariance seen through J: ``rows`` are W above J, (L + N, n)."""

    covariance: LowRank
    rows: Tensor
    explained: Tensor
    outputs: Tensor
    reduce: Reduce = field(repr=False)

    def mean_step(self, weights: Tensor) -> Tensor:
        """``P Jᵀ w = U⁻¹ (Jᵀ − Wᵀ (I + W U⁻¹ Wᵀ)⁻¹ W U⁻¹ Jᵀ) w``, (n,)."""
        combined = torch.cat([-self.explained @ weights, weights])
        moved = [rows.mT.double() @ combined for rows in self.rows.split(_CHUNK, 1)]  # float64: see project
        return torch.cat(moved).to(self.rows.dtype) / self.covariance.precision

    def condition(self, root: Tensor) -> LowRank:
        """Append the whitened rows ``G J`` to W, keep the L strongest directions, and move the rest into u.

        The strongest are those of the eigen-decomposition of the (L + N)² Gram matrix; the diagonal of what is cut goes
        to u, so the diagonal of the precision is exact whatever the rank. No decomposition of an n-row matrix is made.
        """
        rank = len(self.covariance.factor)
        gram = self.reduce(self.rows @ self.rows.mT).double()
        total = len(gram)
        mixing = torch.eye(total, dtype=gram.dtype, device=gram.device)
        mixing[rank:, rank:] = times_blocks(root, mixing[rank:, rank:])
        whitened = mixing @ gram @ mixing.mT
        if not bool(torch.isfinite(whitened).all()):
            return LowRank(torch.full_like(self.covariance.precision, torch.nan), self.covariance.factor)
        _, vectors = torch.linalg.eigh((whitened + whitened.mT) / 2)  # ascending
        directions = (vectors.mT @ mixing).to(self.rows.dtype) @ self.rows
        cut = total - rank
        precision = self.covariance.precision + directions[:cut].square().sum(0)
        return LowRank(precision.clamp_max_(1.0 / FLOOR), directions[cut:])


def _scaled_gram(rows: Tensor, precision: Tensor) -> Tensor:
    """``rows diag(precision)⁻¹ rowsᵀ`` in float64, a chunk of columns at a time so that memory stays small."""
    gram = rows.new_zeros(len(rows), len(rows), dtype=torch.float64)
    for part, scale in zip(rows.split(_CHUNK, 1), precision.split(_CHUNK), strict=True):
        part = part.double()
        gram += (part / scale) @ part.mT
    return gram


COVARIANCES: dict[str, type[Covariance]] = {"diagonal": Diagonal, "low_rank": LowRank}


def initial_variance(count: int, scale: float, distribution: str, generator: torch.Generator) -> Tensor:
    """p₀ of one parameter group, (count,) float32: ``constant`` is the scale, ``uniform`` U(0, scale] (FILTER §4)."""
    if distribution == "constant":
        return torch.full((count,), float(scale))
    if distribution == "uniform":  # 1 − U[0, 1) is never zero, and a zero variance could never learn
        return scale * (1.0 - torch.rand(count, generator=generator))
    raise ValueError(f"initial_distribution = {distribution!r}; allowed: 'constant', 'uniform'")
