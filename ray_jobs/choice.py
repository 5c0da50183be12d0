"""Which trial a candidate stands for: the lowest, unless it may owe that to chance. Knows nothing of Ray.

The lowest of many figures is lower than it deserves: on a few hundred rows, settings that differ little are told apart
mostly by chance. So the values that a search was told to try first stay until a trial is better by more than some
standard errors of the difference, which is small, as both learned the same rows. That is the one-standard-error rule of
Breiman, Friedman, Olshen and Stone (1984) with the first point as the simplest model, and with two of them by default:
of seven trials that are as good as the first, one is better by more than one standard error in 70 % of searches, by two
in 15 %.
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
        gain: by how much a row the trial that is taken, or where that is the first point the lowest, is better than the
            first point, and the standard error of that; None where there is nothing to compare.
        kept: whether the first point is taken, though another trial was lower.
    """

    run: pd.DataFrame
    lowest: pd.DataFrame
    gain: tuple[float, float] | None
    kept: bool = False

    @property
    def trial(self) -> str:
        """The trial that is taken."""
        return str(self.run.trial.iloc[0])

    @property
    def about(self) -> str:
        """What a person should know of it, or nothing."""
        if self.gain is None:
            return ""
        gain = f"{self.gain[0]:.4f} ± {self.gain[1]:.4f}"
        if self.kept:
            return f"the first point; the lowest trial is better by {gain} only"
        beside = "" if self.trial == self.lowest.trial.iloc[0] else "; a lower trial may owe that to chance"
        return f"better than the first point by {gain}{beside}"


def choose(rungs: pd.DataFrame, metric: str, points: list[dict[str, Any]], caution: float) -> Choice | None:
    """What to take of the trials of one candidate; None if none came to the end.

    Args:
        rungs: a row a rung a trial, as in results.parquet.
        metric: what is minimised.
        points: the values tried first.
        caution: standard errors by which a trial has to be better than the first of them; 0 takes the lowest.
    """
    complete = rungs[rungs.status == "complete"]
    if complete.empty:
        return None
    last = complete.sort_values("rows", kind="stable").groupby("trial", sort=False).tail(1)
    ranked = last.sort_values(metric, kind="stable")
    lowest = _run(rungs, ranked.trial.iloc[0])
    firsts = [t for t, params in zip(ranked.trial, ranked.params, strict=True) if [json.loads(params)] == points[:1]]
    if not firsts or firsts[0] == ranked.trial.iloc[0]:
        return Choice(lowest, lowest, None)
    first = _run(rungs, firsts[0])
    of_lowest = advantage(lowest, first, metric)
    if of_lowest is None:
        return Choice(lowest, lowest, None)
    for trial in ranked.trial:
        if trial == firsts[0]:  # those behind it are no better
            break
        run = _run(rungs, trial)
        gain = advantage(run, first, metric)
        if gain is not None and gain[0] > caution * gain[1]:
            return Choice(run, lowest, gain)
    return Choice(first, lowest, of_lowest, kept=True)


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
