"""The start of P, read off the first rows (docs/initial_covariance.md).

Before anything is learned the logits of a batch have the prior covariance K = J P Jᵀ, and part of it they have in
common: the features of a pretrained model all point much the same way, so most of what P allows would move every row
at once. That part does not tell one row from another, and is soon known. So the two are set apart: the prior variance
of a logit from row to row sets p₀, and the mean of the logits over the rows counts as observed once before the first
row, with the noise variance ``COMMON``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from loko.covariance import Covariance, Reduce
from loko.filter import Innovation, cholesky, diagonal_blocks, symmetric_root, whitened_innovation
from loko.rows import Jacobian

__all__ = ["COMMON", "Spread", "know_the_mean", "spread"]

COMMON = 1.0
"""Noise variance with which the mean of the first rows' logits counts as known before they are learned."""

_LEAST = 0.05
"""Smallest share of the variance that counts as between rows: a first batch of equal rows must not make P endless."""


@dataclass(frozen=True)
class Spread:
    """How the prior variance of a logit divides over the rows of a batch, per orthonormal direction of the outputs.

    Attributes:
        total: the mean variance of a row's logit.
        between: the unbiased estimate of what differs from row to row; of one row, which cannot tell, all of it.
        mean: Q (N, N): the mean over the rows of the logits moves by δ with |δ|² = xᵀ Q x where the observed outputs of
            the rows, (N,), move by x. None for one row.
    """

    total: float
    between: float
    mean: Tensor | None


def spread(outputs: Tensor, directions: Tensor, free: int | None = None) -> Spread:
    """Divide K among rows and their mean.

    Args:
        outputs: K = J P Jᵀ, (N, N) float64, N = B·m.
        directions: D, (m, C), or (B, m, C) for each row its own: the combinations of the outputs that J has rows for.
            They are undone, so that neither the reference class nor the basis matters.
        free: how many of them to look at: those, from the first on, that owe nothing to the labels. None: all.
    """
    count = directions.shape[-2]
    free = count if free is None else free
    rows = len(outputs) // count
    each = directions[..., :free, :].to(outputs).expand(rows, -1, -1)
    lift = torch.zeros(rows, each.shape[-1], count, dtype=outputs.dtype, device=outputs.device)
    lift[..., :free] = torch.linalg.pinv(each)  # (B, C, m)
    lifted = lift @ diagonal_blocks(outputs, count) @ lift.mT
    total = float(lifted.diagonal(dim1=-2, dim2=-1).sum(-1).mean()) / free
    if rows == 1:
        return Spread(total, total, None)
    pooled = torch.cat(list(lift), 1) / rows  # (C, N): the mean of the rows' logits
    mean = pooled.mT @ pooled
    of_mean = float((mean * outputs).sum()) / free  # the mean varies by what is common and by a B-th of what is not
    return Spread(total, max(_LEAST * total, (total - of_mean) * rows / (rows - 1)), mean)


def know_the_mean(covariance: Covariance, jacobian: Jacobian, mean: Tensor, reduce: Reduce, same: Reduce) -> Covariance:
    """P after one observation of the mean of the rows' logits: that they are what the model says, give or take.

    Args:
        covariance: P.
        jacobian: J of the first batch, (N, n).
        mean: Q of ``Spread``, (N, N) float64.
        reduce, same: see ``loko.covariance``.
    """
    root = same(symmetric_root(mean / COMMON))
    prior = covariance.project(jacobian, reduce, same)
    factor, jitters = cholesky(whitened_innovation(prior.outputs, root[None]))
    nothing = root.new_zeros(len(root))
    return prior.condition(Innovation(nothing, root[None], factor, nothing.sum(), jitters))
