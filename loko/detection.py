"""A change detector beside the innovation test: ADWIN, as the library river has it, on the loss of each step.

The innovation test (``diagnostics()["surprise"]``) compares the last few steps with the last hundred. ADWIN (Bifet and
Gavaldà 2007, doi 10.1137/1.9781611972771.42) keeps a window of all losses since the last change, and drops its older
part as soon as any two parts of it differ by more than chance allows. A loss that falls is learning, and shortens the
window without a word; one that rises is a drift, and the window begins anew.

The bound holds for losses in [0, 1]. Others it takes by their variance, and the wider they scatter the more often it
sounds for nothing: of 60 times 1,000 steps of normal noise none with standard deviation 0.2, 3 with 0.5, 7 with 2.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from statistics import fmean
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from loko.observation import Categorical, ObservationModel
from loko.trust import knows, log_likelihood

if TYPE_CHECKING:
    from river.drift import ADWIN

__all__ = ["DETECTORS", "Detector", "loss"]

DETECTORS = ("adwin",)

_DELTA = 0.05
"""δ. The bound is wide: on the streams of docs/drift.md nothing was heard without a change, at 0.2 neither."""

_LATELY = 10
"""Steps whose mean loss says whether the losses have risen or fallen."""

_LONGEST = 10_000
"""Losses kept at most; half of them go when there are more."""


class Detector:
    """ADWIN with a state that fits into a checkpoint: the losses since it began, from which it is made again.

    Args:
        losses: those of the steps so far.

    Raises:
        ValueError: river is not installed.
    """

    def __init__(self, losses: Iterable[float] = ()) -> None:
        self._begin(list(losses))

    def _begin(self, losses: list[float]) -> None:
        """Nothing but these losses decides what comes: what goes on from a checkpoint is what went on without one."""
        self._losses = losses
        self._adwin = _adwin()
        for one in losses:
            self._adwin.update(one)

    def update(self, value: float) -> bool:
        """Take the loss of a step; whether the losses have risen, beyond chance, somewhere in the window."""
        self._losses.append(value)
        self._adwin.update(value)
        if not self._adwin.drift_detected:
            if len(self._losses) > _LONGEST:
                self._begin(self._losses[-_LONGEST // 2 :])
            return False
        width = int(self._adwin.width)
        before, after = self._losses[:-width], self._losses[-width:]
        risen = fmean(after[-_LATELY:]) > fmean(before)  # ADWIN may keep much from before a fall
        self._begin([] if risen else after)  # what is left of the time before a rise would be heard as one again
        return risen

    def state(self) -> Tensor:
        """The losses, (steps in the window,) float64."""
        return torch.tensor(self._losses, dtype=torch.float64)


def _adwin() -> ADWIN:
    try:
        from river.drift import ADWIN
    except ImportError:
        raise ValueError("drift_detector = 'adwin' needs the library river: pip install 'loko[drift]'") from None
    return ADWIN(delta=_DELTA, clock=1)  # looked at every step: there are few


def loss(model: ObservationModel, outputs: Tensor, labels: Tensor, consistency: float) -> float:
    """What the detector sees of a batch.

    Args:
        model: how labels come from outputs.
        outputs, labels: of the batch, before it was learned.
        consistency: its eᵀS⁻¹e / N.

    Returns:
        The mean negative log-likelihood of the labels at the outputs; where labels have no probability (``gaussian``),
        log(1 + eᵀS⁻¹e / N), as the squares are so heavy-tailed that a few of them hide a change. For classes the latter
        says little: the innovation covariance that the filter learns with is wider than the innovations by factors
        that drift by themselves.
    """
    if not knows(model):
        return math.log1p(max(0.0, consistency))
    likely = log_likelihood(model, model.full_mean(outputs.double()), labels)
    return -float(likely.sum(1).mean() if isinstance(model, Categorical) else likely.mean())
