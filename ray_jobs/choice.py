"""Which trial a candidate stands for: the lowest, unless it may owe that to chance. Knows nothing of Ray.

The lowest of many figures is lower than it deserves: on a few hundred rows, settings that differ little are told apart
mostly by chance. So the values that a search was told to try first stay until a trial is better by more than the
standard error of the difference, which is small, as both learned the same rows (the one-standard-error rule of
Breiman, Friedman, Olshen and Stone 1984, with the first point as the simplest model).
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

__all__ = ["Choice", "advantage", "choose"]

_CUMULATIVE = ("nll", "mse")
"""Metrics that are means over all rows so far, and so can be taken apart into the rows between two rungs."""


@dataclass(frozen=True)
class Choice:
    """What is taken of a candidate.

    Attributes:
        run: rungs of the trial that is taken.
        lowest: rungs of the complete trial with the lowest metric; mostly the same.
        gain: by how much the lowest is better than the first point, a row, and the standard error of that; None where
            it is the first point, or the two cannot be compared.
    """

    run: pd.DataFrame
    lowest: pd.DataFrame
    gain: tuple[float, float] | None

    @property
    def trial(self) -> str:
        """The trial that is taken."""
        return str(self.run.trial.iloc[0])

    @property
    def kept(self) -> bool:
        """Whether the first point is taken, though another trial was lower."""
        return self.trial != str(self.lowest.trial.iloc[0])

    @property
    def about(self) -> str:
        """What a person should know of it, or nothing."""
        if self.gain is None:
            return ""
        gain = f"{self.gain[0]:.4f} ± {self.gain[1]:.4f}"
        if self.kept:
            return f"the first point; the lowest trial is better by {gain} only"
        return f"better than the first point by {gain}"


def choose(rungs: pd.DataFrame, metric: str, points: list[dict[str, Any]], caution: float) -> Choice | None:
    """What to take of the trials of one candidate; None if none came to the end.

    Args:
        rungs: a row a rung a trial, as in results.parquet.
        metric: what is minimised.
        points: the values tried first.
        caution: standard errors by which the lowest has to be better than the first of them; 0 takes the lowest.
    """
    complete = rungs[rungs.status == "complete"]
    if complete.empty:
        return None
    last = complete.sort_values("rows", kind="stable").groupby("trial", sort=False).tail(1)
    lowest = _run(rungs, last.sort_values(metric, kind="stable").trial.iloc[0])
    for trial, params in zip(last.trial, last.params, strict=True):
        if not points or json.loads(params) != points[0] or trial == lowest.trial.iloc[0]:
            continue
        first = _run(rungs, trial)
        gain = advantage(lowest, first, metric)
        if gain is None:
            break
        return Choice(first if gain[0] < caution * gain[1] else lowest, lowest, gain)
    return Choice(lowest, lowest, None)


def advantage(run: pd.DataFrame, other: pd.DataFrame, metric: str) -> tuple[float, float] | None:
    """By how much a run is better than another on the same rows, a row, and the standard error of that.

    The differences between two rungs count as independent. None for fewer than two of them, figures that are not
    finite, and metrics that are no mean over all rows.
    """
    if metric not in _CUMULATIVE:
        return None
    both = run.merge(other, on="rows", suffixes=("", "_other")).sort_values("rows")
    rows = both.rows.to_numpy(float)
    total = (both[f"{metric}_other"] - both[metric]).to_numpy(float) * rows
    if len(rows) < 2 or not np.isfinite(total).all():
        return None
    weights = np.diff(rows, prepend=0.0) / rows[-1]
    mean = total[-1] / rows[-1]
    away = np.diff(total, prepend=0.0) / rows[-1] - weights * mean
    return mean, math.sqrt(float(away @ away) * len(rows) / (len(rows) - 1))


def _run(rungs: pd.DataFrame, trial: str) -> pd.DataFrame:
    return rungs[rungs.trial == trial].sort_values("rows")
