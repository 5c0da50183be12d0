"""How much of P predictions allow for, learned from how well each share of it foretold the labels.

Where P is right, the probabilities to predict with are those expected under it, E[π(z)] for z ~ N(f(θ), J P Jᵀ): early
in a stream P is wide, and softmax at the mean claims more than is known. But P is a tool for learning first: ``ema``
noise and the scale (``loko.scale``) make it wider than that by factors from one to thousands. So the prediction is a
mixture over shares c of P,

    p(y) = Σ_c w_c E[π(z)],  z ~ N(f(θ), c J P Jᵀ),        w_c ∝ Π p_c(y of a batch) ^ (ρ ^ age of the batch)

which is Bayesian model averaging with forgetting (Raftery, Kárný and Ettler 2010, Technometrics 52). One row a batch,
and without forgetting, its log loss is within log 6 of that of the best share, over the whole stream; and c = 0, the
prediction at the mean, is one of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from loko.observation import Bernoulli, Categorical, ObservationModel
from loko.prediction import expected_sigmoid, expected_softmaxes

__all__ = ["SHARES", "Trust", "expected", "knows", "outputs_of"]

SHARES = (0.0, 1 / 256, 1 / 64, 1 / 16, 1 / 4, 1.0)
"""c: the shares of P that are mixed."""

_MEMORY = 0.95
"""ρ, a batch."""

_LEAST = 1e-12
"""Smallest probability: no share may be ruled out by one row."""


@dataclass(frozen=True)
class Trust:
    """A value: a step that is thrown away leaves nothing behind.

    Attributes:
        evidence: discounted log-likelihood of the labels so far under each share, (S,) float64.
    """

    evidence: Tensor

    @classmethod
    def start(cls, device: torch.device) -> Trust:
        """All shares alike."""
        return cls(torch.zeros(len(SHARES), dtype=torch.float64, device=device))

    @property
    def weights(self) -> Tensor:
        """w, (S,)."""
        return self.evidence.softmax(0)

    @property
    def share(self) -> float:
        """The mean share of P that is believed."""
        return float(self.weights @ self.weights.new_tensor(SHARES))

    def mix(self, each: Tensor) -> Tensor:
        """Expected label (B, C) from those under each share (S, B, C)."""
        return torch.tensordot(self.weights, each, 1)

    def learned(self, each: Tensor, model: ObservationModel, labels: Tensor) -> Trust:
        """After a batch whose labels were expected to be ``each`` (S, B, C)."""
        target = model.full_target(labels, each.shape[-1]).to(each)
        likely = target * each.clamp_min(_LEAST).log()
        if isinstance(model, Bernoulli):
            likely = likely + (1 - target) * (1 - each).clamp_min(_LEAST).log()
        return Trust(_MEMORY * self.evidence + likely.sum((1, 2)))


def knows(model: ObservationModel) -> bool:
    """Whether labels have probabilities that uncertain outputs change."""
    return isinstance(model, Categorical | Bernoulli)


def expected(model: ObservationModel, outputs: Tensor, lift: Tensor, covariance: Tensor) -> Tensor:
    """The label expected under each share, (S, B, C) float64.

    Args:
        model: categorical or bernoulli.
        outputs: (B, C).
        lift: what carries the observed directions to the outputs, (C, m) or (B, C, m). Other outputs count as certain.
        covariance: of the observed directions, K of each row, (B, m, m).
    """
    if isinstance(model, Categorical):
        return _expected_classes(outputs.double(), lift.expand(len(outputs), -1, -1), covariance)
    variance = ((lift @ covariance) * lift).sum(-1) * covariance.new_tensor(SHARES)[:, None, None]
    return expected_sigmoid(outputs.expand_as(variance), variance)


def _expected_classes(outputs: Tensor, lift: Tensor, covariance: Tensor) -> Tensor:
    """Of m directions only m + 1 classes, the most probable ones, are uncertain: the others go together as one."""
    count = lift.shape[-1] + 1
    if count >= outputs.shape[1]:
        return expected_softmaxes(outputs, lift @ covariance @ lift.mT, SHARES)
    chosen = outputs.topk(count, dim=1).indices
    others = outputs.scatter(1, chosen, -math.inf)
    share = others.softmax(1)  # of each in the probability of the others
    lumped = torch.cat([outputs.gather(1, chosen), others.logsumexp(1, keepdim=True)], 1)
    rows = chosen[..., None].expand(-1, -1, lift.shape[-1])
    lift = torch.cat([lift.gather(1, rows), share[:, None, :] @ lift], 1)
    each = expected_softmaxes(lumped, lift @ covariance @ lift.mT, SHARES)
    return (each[..., -1:] * share).scatter(2, chosen.expand(len(each), -1, -1), each[..., :-1])


def outputs_of(model: ObservationModel, mean: Tensor) -> Tensor:
    """Outputs (B, C) that say at their face value what ``mean`` says: log-probabilities, or their log-odds."""
    return mean.clamp_min(_LEAST).log() if isinstance(model, Categorical) else mean.logit(_LEAST)
