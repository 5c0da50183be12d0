"""How sure predictions are, learned from how well each degree of it foretold the labels.

Where P is right, the probabilities to predict with are those expected under it, E[π(z)] for z ~ N(f(θ), J P Jᵀ): early
in a stream P is wide, and softmax at the mean claims more than is known. But P is a tool for learning first: ``ema``
noise and the scale (``loko.scale``) make it wider than that by factors from one to thousands. And after a drift the
model is wrong in a way that P has no room for: what it then is most certain of, it should say with less confidence. So
the prediction is a mixture of experts k, which allow for shares c of P or have another confidence a,

    p(y) = Σ_k w_k p_k(y),      p_k = E[π(z)], z ~ N(f(θ), c J P Jᵀ),   or   p_k = π(a f(θ) + (1 − a)⁺ b)

    w ∝ w^ρ p_k(y of the batch),   then   w ← (1 − α) w + α / number of experts

which is Bayesian model averaging with forgetting (Raftery, Kárný and Ettler 2010, Technometrics 52), and a share α for
all, as for experts that take turns (Herbster and Warmuth 1998, Machine Learning 32): an expert that was the worst for
long is back within a few rows. For ρ = 1, a row a batch, and experts that change k times in T batches, the log loss is
within (k + 1) log(12 / α) + T log(1 / (1 − α)) of theirs. The prediction at the mean, c = 0 and a = 1, is one of them.

Less confidence means to fall back on what is known without the inputs: b are the outputs that say no more than how
frequent each label has been, by Laplace's rule. Where labels are unbalanced, flat predictions would claim that they are
not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loko.observation import Bernoulli, Categorical, ObservationModel
from loko.prediction import expected_sigmoid, expected_softmaxes

__all__ = ["CONFIDENCES", "SHARES", "Trust", "expected", "knows", "log_likelihood", "outputs_of"]

SHARES = (0.0, 1 / 256, 1 / 64, 1 / 16, 1 / 4, 1.0)
"""c: the shares of P that are mixed."""

CONFIDENCES = (1 / 8, 1 / 4, 1 / 2, 3 / 4, 5 / 4, 3 / 2)
"""a: the factors on the outputs that are mixed."""

_MEMORY, _TURN = 0.95, 0.01
"""ρ and α, a batch."""

_LASTING = 0.995
"""Discount of the frequencies of the labels, a batch."""

_LEAST = 1e-12
"""Smallest probability: no expert may be ruled out by one row."""


@dataclass(frozen=True)
class Trust:
    """A value: a step that is thrown away leaves nothing behind.

    Attributes:
        weights: w, (K,) float64, first of ``SHARES``, then of ``CONFIDENCES``.
        labels: discounted sum of the labels so far, (C,) float64; empty before the first batch.
        rows: of how many rows, discounted alike.
    """

    weights: Tensor
    labels: Tensor
    rows: float = 0.0

    @classmethod
    def start(cls, device: torch.device) -> Trust:
        """All experts alike."""
        count = len(SHARES) + len(CONFIDENCES)
        weights = torch.full((count,), 1 / count, dtype=torch.float64, device=device)
        return cls(weights, weights.new_zeros(0))

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"weights": self.weights.clone(), "labels": self.labels.clone(), "rows": self.rows}

    @classmethod
    def from_state(cls, state: dict[str, Any], device: torch.device) -> Trust:
        """What ``state`` gave."""
        weights, labels = (state[key].to(device, copy=True) for key in ("weights", "labels"))
        return cls(weights, labels, float(state["rows"]))

    @property
    def share(self) -> float:
        """The mean share of P that is allowed for."""
        return float(self.weights[: len(SHARES)] @ self.weights.new_tensor(SHARES))

    @property
    def confidence(self) -> float:
        """The mean factor on the outputs: below one after a drift."""
        of_shares = float(self.weights[: len(SHARES)].sum())
        return of_shares + float(self.weights[len(SHARES) :] @ self.weights.new_tensor(CONFIDENCES))

    def usual(self, model: ObservationModel) -> Tensor:
        """b: outputs (C,) that say how frequent each label has been, and nothing else. Before the first batch: 0."""
        if not len(self.labels):
            return self.labels.new_zeros(1)
        if isinstance(model, Categorical):
            return (self.labels + 1).log() - math.log(self.rows + len(self.labels))
        return ((self.labels + 1) / (self.rows + 2)).logit()

    def mix(self, each: Tensor) -> Tensor:
        """Expected label (B, C) from those of each expert (K, B, C)."""
        return torch.tensordot(self.weights, each, 1)

    def learned(self, each: Tensor, model: ObservationModel, labels: Tensor) -> Trust:
        """After a batch whose labels were expected to be ``each`` (K, B, C)."""
        likely = log_likelihood(model, each, labels)
        weights = (_MEMORY * self.weights.log() + likely.sum((1, 2))).softmax(0)
        seen = model.full_target(labels, each.shape[-1]).to(each).sum(0)
        sums = _LASTING * self.labels + seen if len(self.labels) else seen
        return Trust((1 - _TURN) * weights + _TURN / len(weights), sums, _LASTING * self.rows + len(labels))


def log_likelihood(model: ObservationModel, mean: Tensor, labels: Tensor) -> Tensor:
    """Of the labels where ``mean`` was expected, (..., B, C), output by output: their sum is that of a row."""
    target = model.full_target(labels, mean.shape[-1]).to(mean)
    likely = target * mean.clamp_min(_LEAST).log()
    if isinstance(model, Bernoulli):
        likely = likely + (1 - target) * (1 - mean).clamp_min(_LEAST).log()
    return likely


def knows(model: ObservationModel) -> bool:
    """Whether labels have probabilities that uncertain outputs change."""
    return isinstance(model, Categorical | Bernoulli)


def expected(model: ObservationModel, outputs: Tensor, lift: Tensor, covariance: Tensor, usual: Tensor) -> Tensor:
    """The label that each expert expects, (K, B, C) float64.

    Args:
        model: categorical or bernoulli.
        outputs: (B, C).
        lift: what carries the observed directions to the outputs, (C, m) or (B, C, m). Other outputs count as certain.
        covariance: of the observed directions, K of each row, (B, m, m).
        usual: b of ``Trust.usual``, (C,).
    """
    if isinstance(model, Categorical):
        of_shares = _expected_classes(outputs.double(), lift.expand(len(outputs), -1, -1), covariance)
    else:
        variance = ((lift @ covariance) * lift).sum(-1) * covariance.new_tensor(SHARES)[:, None, None]
        uncertain = variance > 0  # of very many labels few are observed
        each = outputs.double().expand_as(variance)
        of_shares = each.sigmoid().masked_scatter(uncertain, expected_sigmoid(each[uncertain], variance[uncertain]))
    of_confidences = [model.full_mean(a * outputs.double() + max(0.0, 1 - a) * usual) for a in CONFIDENCES]
    return torch.cat([of_shares, torch.stack(of_confidences)])


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
