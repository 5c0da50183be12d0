"""The scale of P, learned on the way: a hypergradient of the online loss (docs/filter.md §11).

How large P should start depends on the model, the stream and the noise by factors of a hundred, and after a drift it
should be large again. Each step therefore begins with ``P ← s P``, and log s goes down the gradient of the negative
log-likelihood of the rows that come next: where the last updates moved the outputs the way the new labels want them,
they were too small, and s > 1; where the labels want them back, s < 1. This is IDBD's idea (Sutton 1992) carried over
from a gain per weight to the covariance of a Kalman filter.

With ``h = ∂θ/∂log s``, followed through the update by its own derivative,

    g   = ∂NLL/∂log s = −scoreᵀ J h                            score = ∂log p(y | outputs)/∂outputs
    h  ← γ h + P Jᵀ (w − Gᵀ (I + G K Gᵀ)⁻¹ G (K w + γ J h))

where w, G and K are the step's own (``loko.filter``): what the bracket takes off w are the saturation of ``P Jᵀ w`` in
P and the correction that the filter makes of its own mean. R and J count as constants. h also forgets, by γ a step:
once s is so small that nothing is learned, an h that remembers how it came about would go on shrinking s. One more
vector of n numbers, and one more mean update a step.

And because s was not known when θ went where it is, the mean is uncertain along h: with the standard deviation μ for
what log s may be off by, that adds μ² (J h)(J h)ᵀ to K, and takes the mean by μ² h (J h)ᵀ w as well. So steps that were
too large are taken back in part, and steps that were too small are made up for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from loko.filter import Innovation, Linearization

__all__ = ["LIMIT", "Scale"]

LIMIT = math.log(1e3)
"""Largest |log| of all factors together: a stream that has been noise for long must still be learned from later."""

_MEAN, _SQUARE, _TRACE = 0.5, 0.95, 0.95
"""Decays of the moving averages that g is smoothed and normalised with, and γ, a step."""


@dataclass(frozen=True)
class Scale:
    """State of the scale; a value, so a step that is thrown away leaves nothing behind.

    Attributes:
        trace: h, (n,), of this rank's slice of the parameters.
        mean, square: moving averages of g and of g².
        steps: hypergradients seen.
        log: log of all factors so far, the next one included.
        step: log s of the next step.
    """

    trace: Tensor
    mean: float = 0.0
    square: float = 0.0
    steps: int = 0
    log: float = 0.0
    step: float = 0.0

    @property
    def factor(self) -> float:
        """s of the next step."""
        return math.exp(self.step)

    @staticmethod
    def spread(rate: float, moved: Tensor) -> Tensor:
        """``μ² (J h)(J h)ᵀ``, (N, N): the prior covariance of the outputs that not knowing log s adds to K."""
        return rate**2 * torch.outer(moved, moved)

    @staticmethod
    def shift(rate: float, moved: Tensor, innovation: Innovation) -> float:
        """``μ² (J h)ᵀ w``: how far the mean moves along h."""
        return rate**2 * float(moved @ innovation.weights)

    def change(self, outputs: Tensor, innovation: Innovation, moved: Tensor) -> Tensor:
        """What J's rows add to h, in the units of w, (N,): the bracket of the module's docstring.

        Args:
            outputs: K, (N, N), of the scaled P.
            innovation: of the batch.
            moved: J h, (N,) float64.
        """
        return innovation.weights - innovation.resolve(outputs @ innovation.weights + _TRACE * moved)

    def update(self, rate: float, observed: Linearization, moved: Tensor, step: Tensor) -> Scale:
        """The scale after a batch.

        Args:
            rate: μ, about the largest change of log s in one step.
            observed: the batch.
            moved: J h, (N,) float64.
            step: ``P Jᵀ change``, (n,).
        """
        gradient = -float(observed.score.reshape(-1) @ moved) / len(observed.residual)
        trace = _TRACE * self.trace + step
        if gradient == 0.0:  # nothing was learned before, or nothing of what was bears on these rows
            return replace(self, trace=trace, step=0.0)
        steps = self.steps + 1
        mean = _MEAN * self.mean + (1 - _MEAN) * gradient
        square = _SQUARE * self.square + (1 - _SQUARE) * gradient**2
        normalised = (mean / (1 - _MEAN**steps)) / math.sqrt(square / (1 - _SQUARE**steps))
        log = min(LIMIT, max(-LIMIT, self.log - rate * normalised))
        return Scale(trace, mean, square, steps, log, log - self.log)
