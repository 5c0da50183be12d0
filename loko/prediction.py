"""Predictions with what the filter does not know yet: P is carried to the outputs, and through the link to the labels."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Prediction", "mean_field_softmax", "probit_sigmoid"]


@dataclass(frozen=True)
class Prediction:
    """What a model says about rows, and how sure the filter is of it.

    Attributes:
        outputs: the model's own, (B, C).
        covariance: of the outputs, J P Jᵀ of each row, (B, C, C) float64. ``categorical`` outputs count as centred
            (their mean over the classes taken off), because softmax sees no more of them.
        mean: expected label, (B, C) float64: probabilities that allow for ``covariance``, or the outputs
            (``gaussian``). Never more certain than the plug-in prediction.
        label_covariance: of the label around ``mean``, (B, C, C) float64: what ``covariance`` and the noise of the
            observation add up to.
    """

    outputs: Tensor
    covariance: Tensor
    mean: Tensor
    label_covariance: Tensor


def mean_field_softmax(outputs: Tensor, covariance: Tensor) -> Tensor:
    """Approximately E[softmax(z)] for ``z ~ N(outputs, covariance)``, (B, C) (Lu, Ie and Sha 2020, arXiv 2006.07584).

    ``p_k ∝ 1 / Σ_i exp(−u_ki)``, ``u_ki = (μ_k − μ_i) / √(1 + π/8 · Var(z_k − z_i))``: every pair of classes meets in
    MacKay's (1992) probit approximation of the expected sigmoid. Exact for no covariance; for two classes it is
    :func:`probit_sigmoid` of their difference.

    Args:
        outputs: μ, (B, C).
        covariance: (B, C, C), of the outputs or of the centred outputs: only variances of differences are read.
    """
    variance = covariance.diagonal(dim1=-2, dim2=-1)
    pairs = variance[:, :, None] + variance[:, None, :] - 2 * covariance
    gaps = (outputs[:, :, None] - outputs[:, None, :]) / (1 + math.pi / 8 * pairs.clamp_min(0)).sqrt()
    return (-torch.logsumexp(-gaps, dim=2)).softmax(1)


def probit_sigmoid(outputs: Tensor, variance: Tensor) -> Tensor:
    """Approximately E[sigmoid(z)] for ``z ~ N(outputs, variance)``: ``σ(μ / √(1 + π s / 8))`` (MacKay 1992)."""
    return (outputs / (1 + math.pi / 8 * variance.clamp_min(0)).sqrt()).sigmoid()
