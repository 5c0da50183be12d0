"""Kinds of parameter covariance behind one interface: the paper's diagonal, low rank plus diagonal, blocks.

A covariance is an immutable value on the flat vector of trainable parameters (or on one rank's slice of it). A step is

    predicted = covariance.predict(forgetting, process_noise)
    prior     = predicted.project(J)             # K = J P Jᵀ, all that output space needs to know
    delta     = prior.mean_step(weights)         # P Jᵀ w
    posterior = prior.condition(innovation)      # P⁻¹ + Jᵀ blockdiag(GᵀG) J, restricted to the kind

and nothing is written in place, so a step that turns out not to be finite is dropped by not keeping its result.

``reduce`` makes every kind work on a slice: whatever is a sum over parameters passes through it, and a distributed
filter hands in an all-reduce. Whatever is a choice that rounding could make otherwise on another machine passes through
``same``, and a distributed filter hands in a broadcast.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from loko.filter import Innovation, cholesky, times_blocks
from loko.rows import Jacobian

__all__ = [
    "COVARIANCES",
    "FLOOR",
    "BlockDiagonal",
    "Covariance",
    "Diagonal",
    "LowRank",
    "Projection",
    "alone",
    "initial_variance",
    "outward",
]

FLOOR = 1e-20
"""Smallest variance kept, in float32's range with room for its square root; entries held there are counted."""

CEILING = 1e20
"""Largest variance kept. Forgetting inflates what no row excites (an embedding never looked up) without end."""

Reduce = Callable[[Tensor], Tensor]


_BLOCK_ELEMENTS = {"cpu": 2**18}
"""Elements of J worked on at once: on a CPU few enough to stay in its cache, elsewhere enough to fill the device."""

_WHOLE_ELEMENTS = 2**21
"""Up to here there is one block only: what is made of it is kept, which saves more time than the cache does."""


def _blocks(jacobian: Jacobian, more: int = 0) -> Iterator[slice]:
    """Slices of the columns of J, for work that also holds ``more`` rows of the same width."""
    count, size = jacobian.shape
    elements = (count + more) * size
    a_block = _BLOCK_ELEMENTS.get(jacobian.device.type, 2**24)
    blocks = 1 if elements <= max(_WHOLE_ELEMENTS, a_block) else -(-elements // a_block)
    width = max(1, -(-size // blocks))
    return (slice(first, min(first + width, size)) for first in range(0, size, width))


def outward(jacobian: Jacobian, vector: Tensor) -> Tensor:
    """J v, (N,), for v (n,)."""
    moved = jacobian.new_zeros(len(jacobian))
    for columns in _blocks(jacobian):
        moved += jacobian[:, columns] @ vector[columns]
    return moved


def alone(partial: Tensor) -> Tensor:
    """The sum over one rank."""
    return partial


class Projection(Protocol):
    """A covariance seen through one Jacobian. ``outputs`` is K = J P Jᵀ, (N, N) float64."""

    @property
    def outputs(self) -> Tensor: ...
    def mean_step(self, weights: Tensor) -> Tensor: ...
    def condition(self, innovation: Innovation, decay: float = 1.0) -> Covariance: ...


class Covariance(Protocol):
    """A covariance of n parameters. ``state()`` is a dict of tensors that ``from_state`` of the same class reads."""

    @classmethod
    def start(cls, variance: Tensor, rank: int, sizes: Sequence[int] = ()) -> Covariance: ...
    @classmethod
    def from_state(cls, state: dict[str, Tensor]) -> Covariance: ...
    def predict(
        self, forgetting: Tensor | float, process_noise: Tensor | float, reduce: Reduce = alone
    ) -> Covariance: ...
    def rescale(self, factors: Tensor) -> Covariance: ...
    def project(self, jacobian: Jacobian, reduce: Reduce = alone, same: Reduce = alone) -> Projection: ...
    def marginal(self, reduce: Reduce = alone) -> Tensor: ...
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
    def start(cls, variance: Tensor, rank: int, sizes: Sequence[int] = ()) -> Diagonal:
        """The diagonal has neither rank nor blocks; the arguments keep the constructors alike."""
        return cls(variance)

    def predict(self, forgetting: Tensor | float, process_noise: Tensor | float, reduce: Reduce = alone) -> Diagonal:
        """``p ← p / λ + q``; λ in (0, 1] and q ≥ 0 are scalars or (n,)."""
        return Diagonal((self.variance / forgetting + process_noise).clamp_max_(CEILING))

    def rescale(self, factors: Tensor) -> Diagonal:
        """``F^½ P F^½`` for F = diag(factors), (n,), positive: every variance times its factor."""
        return Diagonal((self.variance * factors).clamp_(FLOOR, CEILING))

    def project(self, jacobian: Jacobian, reduce: Reduce = alone, same: Reduce = alone) -> DiagonalProjection:
        """Look at this covariance through J, (N, n)."""
        outputs = jacobian.new_zeros(len(jacobian), len(jacobian), dtype=torch.float64)
        for columns in _blocks(jacobian):
            rows = jacobian[:, columns]
            outputs += (rows * self.variance[columns]) @ rows.mT
        return DiagonalProjection(self, jacobian, reduce(outputs))

    def marginal(self, reduce: Reduce = alone) -> Tensor:
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
    jacobian: Jacobian
    outputs: Tensor

    def mean_step(self, weights: Tensor) -> Tensor:
        """``p ∘ Jᵀ w`` for w (N,), or for several (k, N): (n,), or (k, n)."""
        variance = self.covariance.variance
        weights = weights.to(variance.dtype)
        moved = variance.new_empty(*weights.shape[:-1], len(variance))
        for columns in _blocks(self.jacobian):
            moved[..., columns] = weights @ self.jacobian[:, columns]
        return moved.mul_(variance)

    def condition(self, innovation: Innovation, decay: float = 1.0) -> Diagonal:
        """``p ← p ∘ (1 − p ∘ colsum((L⁻¹ G J)²))`` with ``L Lᵀ = I + G K Gᵀ``: the diagonal of the exact posterior.

        It has no directions, so there is none to decay.
        """
        rows = innovation.whitener.to(self.jacobian.dtype)
        variance = torch.empty_like(self.covariance.variance)
        for columns in _blocks(self.jacobian):
            before = self.covariance.variance[columns]
            shrink = (rows @ self.jacobian[:, columns]).square_().sum(0)
            # 1 − p·colsum is rounding noise below eps: no step may shrink a variance further than it can know.
            kept = shrink.mul_(before).neg_().add_(1.0).clamp_min_(torch.finfo(before.dtype).eps)
            torch.mul(before, kept, out=variance[columns])
        return Diagonal(variance.clamp_min_(FLOOR))


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
    def start(cls, variance: Tensor, rank: int, sizes: Sequence[int] = ()) -> LowRank:
        """A diagonal start from variances (n,), with room for ``rank`` directions."""
        return cls(1.0 / variance, variance.new_zeros(rank, len(variance)))

    def predict(self, forgetting: Tensor | float, process_noise: Tensor | float, reduce: Reduce = alone) -> LowRank:
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

    def rescale(self, factors: Tensor) -> LowRank:
        """``F^½ P F^½`` for F = diag(factors), (n,), positive: every variance times its factor."""
        return LowRank((self.precision / factors).clamp_(1.0 / CEILING, 1.0 / FLOOR), self.factor * factors.rsqrt())

    def project(self, jacobian: Jacobian, reduce: Reduce = alone, same: Reduce = alone) -> LowRankProjection:
        """Look at this covariance through J, (N, n), by a square root of it.

        With everything scaled by U^(-½), ``W̃ = W U^(-½)`` and ``J̃ = J U^(-½)``, the covariance is ``M²`` for
        ``M = I − W̃ᵀ T W̃``, where T has the eigenvectors of ``W̃ W̃ᵀ`` and the values (1 − (1 + g)^(-½)) / g. So K is the
        Gram matrix of the rows ``J̃ M``: never negative, and without Woodbury's difference of two large numbers, which
        float32 cannot hold once the data have made J's outputs certain.
        """
        rank, count = len(self.factor), len(jacobian)
        seen = LowRankView(self, jacobian)
        sums = jacobian.new_zeros(rank + count, rank, dtype=torch.float64)
        for _, stacked in seen.blocks():
            sums += stacked @ stacked[:rank].mT
        gram, cross = reduce(sums).split([rank, count])
        gram, shrink = _shrink(gram)
        mix = (cross @ shrink).to(jacobian.dtype)
        outputs = jacobian.new_zeros(count, count, dtype=torch.float64)
        for _, stacked in seen.blocks():
            rows = torch.addmm(stacked[rank:], mix, stacked[:rank], alpha=-1.0)
            outputs += rows @ rows.mT
        outputs = reduce(outputs)
        return LowRankProjection(seen, gram, cross, shrink, (outputs + outputs.mT) / 2, reduce, same)

    def marginal(self, reduce: Reduce = alone) -> Tensor:
        """Variance of every parameter, (n,): the squared rows of U^(-½) M."""
        scale = self.precision.rsqrt()
        factor = self.factor * scale
        gram, shrink = _shrink(reduce(factor @ factor.mT).double())
        explained = (factor.mT @ (2 * shrink - shrink @ gram @ shrink).to(factor.dtype)) * factor.mT
        return (scale.square() * (1.0 - explained.sum(1))).clamp_min(FLOOR)

    def state(self) -> dict[str, Tensor]:
        return {"precision": self.precision, "factor": self.factor}

    @classmethod
    def from_state(cls, state: dict[str, Tensor]) -> LowRank:
        return cls(**state)

    def at_floor(self) -> Tensor:
        """How many parameters have reached the largest precision kept."""
        return (self.precision >= 1.0 / FLOOR).sum()


def _shrink(gram: Tensor) -> tuple[Tensor, Tensor]:
    """W̃ W̃ᵀ made symmetric, and T of ``LowRank.project``."""
    gram = (gram + gram.mT) / 2
    values, vectors = torch.linalg.eigh(gram)
    root = (1.0 + values.clamp_min(0)).sqrt()
    return gram, (vectors / (root * (root + 1.0))) @ vectors.mT  # without dividing by a small g


@dataclass(frozen=True)
class LowRankView:
    """A low-rank covariance beside a Jacobian, a block of columns at a time: neither is ever copied whole."""

    covariance: LowRank
    jacobian: Jacobian
    made: list[Tensor] = field(default_factory=list, repr=False)

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Columns, and ``[W̃; J̃]`` of them, (L + N, width), good until the next block; made once where one holds all."""
        blocks = list(_blocks(self.jacobian, len(self.covariance.factor)))
        for columns in blocks:
            if len(blocks) > 1 or not self.made:
                self._make(columns)
            yield columns, self.made[0]

    def _make(self, columns: slice) -> None:
        factor = self.covariance.factor[:, columns]
        rank, width = factor.shape
        if not self.made or self.made[0].shape[1] != width:
            self.made[:] = [factor.new_empty(rank + len(self.jacobian), width)]
        scale = self.covariance.precision[columns].rsqrt()
        torch.mul(factor, scale, out=self.made[0][:rank])
        torch.mul(self.jacobian[:, columns], scale, out=self.made[0][rank:])


@dataclass(frozen=True)
class LowRankProjection:
    """A low-rank covariance seen through J; see ``LowRank.project``.

    Attributes:
        seen: the covariance and J.
        gram: W̃ W̃ᵀ, (L, L) float64.
        cross: J̃ W̃ᵀ, (N, L) float64.
        shrink: T, (L, L) float64.
        outputs: K, (N, N) float64.
    """

    seen: LowRankView
    gram: Tensor
    cross: Tensor
    shrink: Tensor
    outputs: Tensor
    reduce: Reduce = field(repr=False)
    same: Reduce = field(repr=False)

    def mean_step(self, weights: Tensor) -> Tensor:
        """``P Jᵀ w = U^(-½) M (J̃ M)ᵀ w`` for w (N,), or for several (k, N): (n,), or (k, n)."""
        rank = len(self.gram)
        own = torch.cat([-weights @ (self.cross @ self.shrink), weights], -1)  # (J̃ M)ᵀ w = own · [W̃; J̃]
        precision = self.seen.covariance.precision
        moved = precision.new_empty(*own.shape[:-1], len(precision))
        along = torch.zeros_like(own[..., :rank])
        for columns, stacked in self.seen.blocks():
            part = own.to(stacked.dtype) @ stacked
            along += part @ stacked[:rank].mT
            moved[..., columns] = part
        back = (self.reduce(along) @ self.shrink).to(moved.dtype)
        scale = precision.rsqrt()
        return moved.sub_((back @ self.seen.covariance.factor).mul_(scale)).mul_(scale)

    def condition(self, innovation: Innovation, decay: float = 1.0) -> LowRank:
        """Append the whitened rows ``G J`` to W, keep the L strongest directions, and move the rest into u.

        Strength is measured against what is known already: the directions are those of ``[W; G J] U^(-½)``, by the
        eigen-decomposition of its (L + N)² Gram matrix, so they do not depend on the units of the parameters. The
        diagonal of what is cut goes to u, which keeps the diagonal of the precision exact whatever the rank. No
        n-row matrix is decomposed, and that Gram matrix follows from those of ``project``.

        Args:
            innovation: of the batch.
            decay: φ in [0, 1]: ``W ← √φ W``, and the diagonal of the share 1 − φ goes to u as well. J turns as the
                parameters move, so what was certain along a direction of long ago is kept for each parameter alone.
        """
        rank, count, root = len(self.gram), len(self.outputs), innovation.root
        mix = self.cross @ self.shrink  # J̃ = rows + mix W̃
        outside = self.cross - mix @ self.gram  # rows W̃ᵀ
        unshrunk = self.outputs + outside @ mix.mT + mix @ outside.mT + mix @ self.gram @ mix.mT  # J̃ J̃ᵀ
        gram = self.gram.new_empty(rank + count, rank + count)
        gram[:rank, :rank] = self.gram
        gram[rank:, :rank] = times_blocks(root, self.cross)
        gram[:rank, rank:] = gram[rank:, :rank].mT
        gram[rank:, rank:] = times_blocks(root, times_blocks(root, unshrunk).mT)
        covariance = self.seen.covariance
        if not bool(torch.isfinite(gram).all()):
            return LowRank(torch.full_like(covariance.precision, torch.nan), covariance.factor)
        _, vectors = torch.linalg.eigh((gram + gram.mT) / 2)  # ascending
        vectors = self.same(vectors)  # each slice of a direction with the same sign
        dtype = covariance.factor.dtype
        few = count <= 2 * rank
        wanted = vectors if few else vectors[:, count:]
        mixing = torch.cat([wanted[:rank].mT, times_blocks(root.mT, wanted[rank:]).mT], 1).to(dtype)
        strong, root = vectors[:, count:].to(dtype), root.to(dtype)
        # Rows of W one after the other, as a checkpoint has them: other strides round otherwise after a resume.
        precision = torch.empty_like(covariance.precision)
        factor = torch.empty_like(covariance.factor, memory_format=torch.contiguous_format)
        for columns, stacked in self.seen.blocks():
            kept = mixing @ stacked
            # The squares of what is cut, not a difference of squares, which could not be told from zero.
            if few:
                cut, kept = kept[:count].square().sum(0), kept[count:]
            else:  # what the strong directions leave of each row, instead of as many weak directions
                cut = torch.addmm(stacked[:rank], strong[:rank], kept, alpha=-1.0).square_().sum(0)
                cut += times_blocks(root, stacked[rank:]).addmm_(strong[rank:], kept, alpha=-1.0).square_().sum(0)
            before = covariance.precision[columns]
            if decay < 1:
                cut += kept.square().sum(0).mul_(1.0 - decay)
                kept = kept.mul_(math.sqrt(decay))
            torch.addcmul(before, before, cut, out=precision[columns])
            torch.mul(kept, before.sqrt(), out=factor[:, columns])
        return LowRank(precision.clamp_max_(1.0 / FLOOR), factor)


@dataclass(frozen=True)
class BlockDiagonal:
    """P = blockdiag(P₁, P₂, …), a full block for each tensor of parameters: what low rank is measured against.

    Exact within a tensor, blind between tensors. A block has the square of its tensor's numbers: of a LoRA factor with
    3,072 of them 38 MB, so this is for small models, and for one rank, whose slice no block is cut by.

    Attributes:
        columns: (b, n), b the largest block: column j holds the covariances of parameter j with those of its tensor, in
            their order, and zeros below.
        place: where each parameter stands in its tensor, (n,), of the dtype of P.
    """

    columns: Tensor
    place: Tensor

    @classmethod
    def start(cls, variance: Tensor, rank: int, sizes: Sequence[int] = ()) -> BlockDiagonal:
        """A diagonal start from variances (n,), in blocks of ``sizes``; none: one block."""
        sizes = sizes or [len(variance)]
        place = torch.cat([torch.arange(size, device=variance.device) for size in sizes])
        columns = variance.new_zeros(max(sizes), len(variance))
        return cls(columns.scatter_(0, place[None], variance[None]), place.to(variance.dtype))

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Columns, and their block (b, b), a view."""
        firsts = (self.place == 0).nonzero().flatten().tolist()
        for first, stop in zip(firsts, [*firsts[1:], len(self.place)], strict=True):
            yield slice(first, stop), self.columns[: stop - first, first:stop]

    def predict(
        self, forgetting: Tensor | float, process_noise: Tensor | float, reduce: Reduce = alone
    ) -> BlockDiagonal:
        """``P ← P / λ + diag(q)``; λ and q are scalars, or (n,) and the same within a tensor."""
        columns = self.columns / forgetting
        index = self.place.long()[None]
        variance = (columns.gather(0, index)[0] + process_noise).clamp_max_(CEILING)
        return BlockDiagonal(columns.scatter_(0, index, variance[None]), self.place)

    def rescale(self, factors: Tensor) -> BlockDiagonal:
        """``F^½ P F^½`` for F = diag(factors), (n,), positive: every variance times its factor."""
        columns = torch.zeros_like(self.columns)
        for own, block in self.blocks():
            root = factors[own].sqrt()
            columns[: len(block), own] = root[:, None] * block * root
        return BlockDiagonal(columns, self.place)

    def project(self, jacobian: Jacobian, reduce: Reduce = alone, same: Reduce = alone) -> BlockProjection:
        """Look at this covariance through J, (N, n)."""
        seen = jacobian.new_empty(len(jacobian), len(self.place))
        outputs = jacobian.new_zeros(len(jacobian), len(jacobian), dtype=torch.float64)
        for own, block in self.blocks():
            rows = jacobian[:, own]
            seen[:, own] = rows @ block
            outputs += seen[:, own] @ rows.mT
        return BlockProjection(self, seen, (outputs + outputs.mT) / 2)

    def marginal(self, reduce: Reduce = alone) -> Tensor:
        """Variance of every parameter, (n,)."""
        return self.columns.gather(0, self.place.long()[None])[0]

    def state(self) -> dict[str, Tensor]:
        return {"columns": self.columns, "place": self.place}

    @classmethod
    def from_state(cls, state: dict[str, Tensor]) -> BlockDiagonal:
        return cls(**state)

    def at_floor(self) -> Tensor:
        """How many variances are held at the floor."""
        return (self.marginal() <= FLOOR).sum()


@dataclass(frozen=True)
class BlockProjection:
    """A covariance of blocks seen through J; ``seen`` is J P, (N, n)."""

    covariance: BlockDiagonal
    seen: Tensor
    outputs: Tensor

    def mean_step(self, weights: Tensor) -> Tensor:
        """``P Jᵀ w`` for w (N,), or for several (k, N): (n,), or (k, n)."""
        return weights.to(self.seen.dtype) @ self.seen

    def condition(self, innovation: Innovation, decay: float = 1.0) -> BlockDiagonal:
        """The blocks of the exact posterior ``P − (L⁻¹ G J P)ᵀ (L⁻¹ G J P)``, ``L Lᵀ = I + G K Gᵀ``.

        Args:
            innovation: of the batch.
            decay: φ in [0, 1]: the share of the covariances between parameters that is kept; variances stay.
        """
        shrink = innovation.whitener.to(self.seen.dtype) @ self.seen
        columns = torch.zeros_like(self.covariance.columns)
        before = self.covariance.marginal()
        eps = torch.finfo(before.dtype).eps  # as in the diagonal: no variance shrinks further than it can know
        variance = torch.maximum(before - shrink.square().sum(0), eps * before).clamp_min_(FLOOR)
        for own, block in self.covariance.blocks():
            less, kept = shrink[:, own], columns[: len(block), own]
            torch.addmm(block, less.mT, less, beta=decay, alpha=-decay, out=kept)
        place = self.covariance.place
        return BlockDiagonal(columns.scatter_(0, place.long()[None], variance[None]), place)


COVARIANCES: dict[str, type[Covariance]] = {
    "diagonal": Diagonal,
    "low_rank": LowRank,
    "block_diagonal": BlockDiagonal,
}


def initial_variance(count: int, scale: float, distribution: str, generator: torch.Generator) -> Tensor:
    """p₀ of one parameter group, (count,) float32: ``constant`` is the scale, ``uniform`` U(0, scale]."""
    if distribution == "constant":
        return torch.full((count,), float(scale))
    if distribution == "uniform":  # 1 − U[0, 1) is never zero, and a zero variance could never learn
        return scale * (1.0 - torch.rand(count, generator=generator))
    raise ValueError(f"initial_distribution = {distribution!r}; allowed: 'constant', 'uniform'")
