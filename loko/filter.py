"""The Kalman filter on plain tensors: what one batch of observations says about the parameters.

Everything here lives in the small space of the observed outputs. With ``B`` samples of ``m`` outputs each, N = B·m,
the parameters (``n`` of them) enter through one matrix only, the *prior output covariance* ``K = J P Jᵀ`` (N × N),
where ``J = ∂logits/∂θ`` and ``P`` is the covariance of the parameters. What comes out are the two things that the
parameter space needs to know:

* ``weights`` w (N): the mean moves by ``P Jᵀ w``;
* ``root`` G (B × m × m): the precision grows by ``Jᵀ Gᵀ G J``.

Both are exact for any batch size: rows are stacked, the updates of single samples are never averaged.
All of it is computed in float64; N is small.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "Innovation",
    "Linearization",
    "cholesky",
    "diagonal_blocks",
    "innovate",
    "innovate_logits",
    "symmetric_root",
    "times_blocks",
    "whitened_innovation",
]

_FIRST_JITTER = 1e-12
_LAST_JITTER = 1e-2


@dataclass(frozen=True)
class Linearization:
    """An observation model linearised at the present parameters, float64.

    Attributes:
        residual: e = y − ŷ, shape (B, m).
        link: Λ(ȳ) = ∂ŷ/∂logits along the directions that J has rows for, taken at ŷ (tangent) or between ŷ and y
            (secant), shape (B, m, k); k = m unless the observation was narrowed.
        along: gradient of the log-likelihood along those directions, shape (B, k), where it is not the residual.
    """

    residual: Tensor
    link: Tensor
    along: Tensor | None = None

    @property
    def score(self) -> Tensor:
        """Gradient of the log-likelihood with respect to the outputs that J has rows for, (B, k)."""
        return self.residual if self.along is None else self.along


@dataclass(frozen=True)
class Innovation:
    """What a batch says, in output space, float64.

    Attributes:
        weights: w, shape (N,). The mean update is ``θ ← θ + P Jᵀ w``.
        root: G, shape (B, m, m). The covariance update is ``P⁻¹ ← P⁻¹ + Jᵀ blockdiag(GᵀG) J``.
        factor: lower Cholesky factor of ``I + G K Gᵀ``, the whitened innovation covariance, shape (N, N).
        consistency: the normalised innovation squared ``eᵀ S⁻¹ e`` (scalar); its mean is N for a consistent filter.
        jitters: how often a Cholesky factorisation needed a larger diagonal.
    """

    weights: Tensor
    root: Tensor
    factor: Tensor
    consistency: Tensor
    jitters: int

    def resolve(self, vector: Tensor) -> Tensor:
        """``Gᵀ (I + G K Gᵀ)⁻¹ G v``: what the update takes off an error v (N) of the outputs, in the units of w."""
        whitened = times_blocks(self.root, vector[:, None])
        return times_blocks(self.root.mT, torch.cholesky_solve(whitened, self.factor))[:, 0]

    @property
    def whitener(self) -> Tensor:
        """``L⁻¹ G``, (N, N), with ``L Lᵀ = I + G K Gᵀ``: the exact posterior is ``P − (L⁻¹ G J P)ᵀ (L⁻¹ G J P)``."""
        identity = torch.eye(len(self.factor), dtype=self.root.dtype, device=self.root.device)
        return torch.linalg.solve_triangular(self.factor, times_blocks(self.root, identity), upper=False)

    @property
    def gain(self) -> Tensor:
        """The mean gain in output space (scalar, 0 to 1): the share of its innovation that the filter believes.

        ``tr(H P Hᵀ S⁻¹) / N``, which is ``1 − tr((I + G K Gᵀ)⁻¹) / N`` once the noise is whitened away. Near zero P
        has settled beside R; near one every label is taken at its word.
        """
        return 1 - torch.cholesky_inverse(self.factor).diagonal().mean()


def diagonal_blocks(matrix: Tensor, size: int) -> Tensor:
    """The B diagonal blocks (B, m, m) of an (N, N) matrix with N = B·m, ``size`` = m."""
    count = matrix.shape[0] // size
    return matrix.view(count, size, count, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def times_blocks(blocks: Tensor, matrix: Tensor) -> Tensor:
    """``blockdiag(blocks) @ matrix`` for blocks (B, k, m) and matrix (B·m, ...); returns (B·k, ...)."""
    count, rows, columns = blocks.shape
    return (blocks @ matrix.reshape(count, columns, -1)).reshape(count * rows, *matrix.shape[1:])


def symmetric_root(matrix: Tensor) -> Tensor:
    """The symmetric square root of a positive semi-definite matrix (k, k)."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.mT


def cholesky(matrix: Tensor) -> tuple[Tensor, int]:
    """Lower Cholesky factor of symmetric positive matrices (..., k, k); jitter grows only where it fails.

    Returns the factor and how often the diagonal had to be raised (0 when the first try succeeded). A matrix with
    non-finite entries gives a factor full of NaN, which the caller sees as a non-finite innovation.
    """
    factor, info = torch.linalg.cholesky_ex(matrix)
    if not bool(info.any()):
        return factor, 0
    scale = matrix.diagonal(dim1=-2, dim2=-1).abs().mean(-1, keepdim=True).clamp_min(torch.finfo(matrix.dtype).tiny)
    jitter, tries = _FIRST_JITTER, 0
    while bool(info.any()) and jitter <= _LAST_JITTER and bool(torch.isfinite(matrix).all()):
        factor, info = torch.linalg.cholesky_ex(matrix + torch.diag_embed(jitter * scale.expand(matrix.shape[:-1])))
        jitter, tries = jitter * 10, tries + 1
    return (factor, tries) if not bool(info.any()) else (torch.full_like(matrix, torch.nan), tries)


def innovate(prior: Tensor, observed: Linearization, noise: Tensor) -> Innovation:
    """The innovation with H = Λ J and an observation noise R shared by the samples (arXiv 2410.11551).

    ``S = Λ K Λᵀ + I ⊗ R``, ``w = Λᵀ S⁻¹ e``, ``GᵀG = Λᵀ R⁻¹ Λ``. R is whitened away first, so that the system that is
    factorised, ``I + G K Gᵀ``, has no eigenvalue below one however small R has become.

    Args:
        prior: K = J P Jᵀ, shape (B·k, B·k).
        observed: residual (B, m) and link (B, m, k), k ≤ m.
        noise: R, shape (m, m), positive definite.
    """
    noise_factor, jitters = cholesky(noise)
    root = torch.linalg.solve_triangular(noise_factor, observed.link, upper=False)
    whitened = torch.linalg.solve_triangular(noise_factor, observed.residual.mT, upper=False).mT
    unseen = whitened.new_zeros(())
    if root.shape[1] > root.shape[2]:  # what lies outside the span of G meets the noise alone
        basis, root = torch.linalg.qr(root)
        inside = (basis.mT @ whitened[..., None])[..., 0]
        unseen = whitened.square().sum() - inside.square().sum()
        whitened = inside
    whitened = whitened.reshape(-1)
    factor, more = cholesky(whitened_innovation(prior, root))
    solved = torch.cholesky_solve(whitened[:, None], factor)[:, 0]
    return Innovation(times_blocks(root.mT, solved), root, factor, whitened @ solved + unseen, jitters + more)


def innovate_logits(prior: Tensor, observed: Linearization, excess: Tensor | None = None) -> Innovation:
    """The innovation with the noise the model itself implies, R = Λ, and an optional excess T in logit space.

    ``w = (I + Λ (K + I ⊗ T))⁻¹ e`` and ``GᵀG = (Λ⁻¹ + T)⁻¹`` (Ollivier 2018, arXiv 1703.00209, for T = 0). Needs no
    inverse of Λ, which is singular wherever the model is certain.

    Args:
        prior: K = J P Jᵀ, shape (N, N).
        observed: residual (B, m) and link (B, m, m), positive semi-definite.
        excess: T, shape (m, m), positive semi-definite, or None for T = 0.
    """
    link, size = observed.link, observed.link.shape[-1]
    identity = torch.eye(size, dtype=link.dtype, device=link.device)
    values, vectors = torch.linalg.eigh(link)
    half = vectors * values.clamp_min(0).sqrt()[:, None, :]  # Λ = half halfᵀ, where Cholesky fails on a certain model
    jitters = 0
    if excess is None:
        root = half.mT
        total = prior
    else:
        inner, jitters = cholesky(identity + half.mT @ excess @ half)
        root = torch.linalg.solve_triangular(inner, half.mT, upper=False)
        total = prior + torch.block_diag(*[excess] * link.shape[0])
    system = times_blocks(link, total)
    system.diagonal().add_(1.0)
    weights, _ = torch.linalg.solve_ex(system, observed.residual.reshape(-1, 1))
    # eᵀS⁻¹e = (Λ⁻¹e)ᵀ w. The floor keeps the statistic finite where the model was certain, and wrong.
    certain = torch.finfo(torch.float32).eps
    unscaled = vectors @ ((vectors.mT @ observed.residual[..., None]) / values.clamp_min(certain)[..., None])
    factor, more = cholesky(whitened_innovation(prior, root))
    return Innovation(weights[:, 0], root, factor, unscaled.reshape(-1) @ weights[:, 0], jitters + more)


def whitened_innovation(prior: Tensor, root: Tensor) -> Tensor:
    """``I + G K Gᵀ`` (N × N) for K (N, N) and block-diagonal G given as (B, m, m)."""
    system = times_blocks(root, times_blocks(root, prior).mT)
    system = (system + system.mT) / 2
    system.diagonal().add_(1.0)
    return system
