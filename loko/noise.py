"""Estimators of the observation noise (docs/filter.md §3): each turns a batch into an innovation and a next estimate.

An estimator is stateless; its state, one (m, m) float64 matrix, goes in and comes out, so that a step that is thrown
away leaves nothing behind.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from loko.filter import Innovation, Linearization, diagonal_blocks, innovate, innovate_logits

__all__ = ["NOISES", "Categorical", "CategoricalEma", "Ema", "EmaResidual", "Fixed", "NoiseModel"]


class NoiseModel(Protocol):
    """What the optimizer asks of an estimator.

    ``on_outputs`` is true where the state is R, the noise of the observed outputs, and false where it lives in logits.
    """

    on_outputs: bool

    def initial(self, observation_noise: Tensor) -> Tensor: ...
    def innovate(self, state: Tensor, prior: Tensor, observed: Linearization) -> tuple[Innovation, Tensor]: ...


@dataclass(frozen=True)
class Fixed:
    """R = R₀ throughout."""

    on_outputs = True

    def initial(self, observation_noise: Tensor) -> Tensor:
        return observation_noise

    def innovate(self, state: Tensor, prior: Tensor, observed: Linearization) -> tuple[Innovation, Tensor]:
        return innovate(prior, observed, state), state


@dataclass(frozen=True)
class Ema(Fixed):
    """``R ← β R + (1 − β) mean_b(e_b e_bᵀ + H_b P H_bᵀ)``, before the update (arXiv 2410.11551).

    The term H P Hᵀ bounds the gain: S is at most about twice what R has learned, however large P started.
    """

    decay: float = 0.95

    def innovate(self, state: Tensor, prior: Tensor, observed: Linearization) -> tuple[Innovation, Tensor]:
        state = average(state, covariance_sample(prior, observed), self.decay)
        return innovate(prior, observed, state), state


@dataclass(frozen=True)
class EmaResidual(Fixed):
    """``R ← β R + (1 − β) mean_b(ε_b ε_bᵀ + H_b P⁺ H_bᵀ)`` with the residual ε and P⁺ of after the update.

    Textbook covariance matching; costs one more forward. The step itself uses the R of the steps before.
    """

    decay: float = 0.95

    def relearn(self, state: Tensor, posterior: Tensor, observed: Linearization) -> Tensor:
        """R after the update, from K⁺ = J P⁺ Jᵀ (N, N), the residual after and the link before the update."""
        return average(state, covariance_sample(posterior, observed), self.decay)


@dataclass(frozen=True)
class Categorical:
    """R = Λ(ȳ), the covariance the prediction itself implies; nothing is estimated (Ollivier 2018)."""

    on_outputs = False

    def initial(self, observation_noise: Tensor) -> Tensor:
        return torch.zeros_like(observation_noise)

    def innovate(self, state: Tensor, prior: Tensor, observed: Linearization) -> tuple[Innovation, Tensor]:
        return innovate_logits(prior, observed), state


@dataclass(frozen=True)
class CategoricalEma(Categorical):
    """R = Λ(ȳ) and an excess T in logit space, an average of the fraction κ of the blocks J P Jᵀ."""

    decay: float = 0.95
    excess: float = 0.3

    def innovate(self, state: Tensor, prior: Tensor, observed: Linearization) -> tuple[Innovation, Tensor]:
        size = observed.link.shape[-1]
        state = average(state, self.excess * diagonal_blocks(prior, size).mean(0), self.decay)
        return innovate_logits(prior, observed, state), state


NOISES: dict[str, type[Fixed] | type[Categorical]] = {
    "ema": Ema,
    "ema_residual": EmaResidual,
    "categorical": Categorical,
    "categorical_ema": CategoricalEma,
    "fixed": Fixed,
}


def covariance_sample(prior: Tensor, observed: Linearization) -> Tensor:
    """mean_b(e_b e_bᵀ + Λ_b K_bb Λ_bᵀ), (m, m): one batch's unbiased look at the noise."""
    blocks = diagonal_blocks(prior, observed.link.shape[-1])
    outer = observed.residual[:, :, None] * observed.residual[:, None, :]
    return (outer + observed.link @ blocks @ observed.link.mT).mean(0)


def average(state: Tensor, sample: Tensor, decay: float) -> Tensor:
    """β state + (1 − β) sample, kept symmetric."""
    mixed = decay * state + (1.0 - decay) * sample
    return (mixed + mixed.mT) / 2
