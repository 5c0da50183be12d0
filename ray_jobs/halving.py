"""Asynchronous successive halving on the row cursor, on plain numbers.

Li et al., "A System for Massively Parallel Hyperparameter Tuning", arXiv 1810.05934. Every trial sees the same rows, so
a comparison at a rung is paired. Several metrics are compared by non-dominated sorting (Deb et al., NSGA-II, 2002).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

__all__ = ["Rungs", "dominates", "fronts", "standing"]

Values = tuple[float, ...]


def dominates(one: Values, other: Values) -> bool:
    """Whether one is nowhere worse (larger) than the other, and somewhere better."""
    return all(a <= b for a, b in zip(one, other, strict=True)) and one != other


def fronts(points: Sequence[Values]) -> list[int]:
    """Number of the front of each point: 0 is dominated by none, 1 only by points of front 0, and so on."""
    found = [-1] * len(points)
    level, left = 0, list(range(len(points)))
    while left:
        front = [i for i in left if not any(dominates(points[j], points[i]) for j in left)]
        for i in front:
            found[i] = level
        left = [i for i in left if found[i] < 0]
        level += 1
    return found


def standing(points: Sequence[Values]) -> list[float]:
    """One number a point, smaller is better: the metric, or with several the place by front, then by the first."""
    if all(len(point) == 1 for point in points):
        return [point[0] for point in points]
    level = fronts(points)
    order = sorted(range(len(points)), key=lambda i: (level[i], points[i]))
    places = {i: float(place) for place, i in enumerate(order)}
    return [places[i] for i in range(len(points))]


class Rungs:
    """What each trial had reached at each rung, and whether it may go on.

    Args:
        grace_rows: first rung; no trial is stopped before it.
        reduction_factor: η > 1. The next rung stands at η times the rows; about one of η trials goes on.
        rows: length of the stream; at its end a trial is complete, not stopped.
    """

    def __init__(self, grace_rows: int, reduction_factor: float, rows: int) -> None:
        self._keep = 1 / reduction_factor
        count = int(math.log(rows / grace_rows, reduction_factor)) + 1 if rows >= grace_rows else 0
        self._levels = [grace_rows * reduction_factor**k for k in range(count)]
        self._levels = [level for level in self._levels if level < rows]
        self._recorded: dict[float, dict[object, Values]] = {level: {} for level in self._levels}

    @property
    def levels(self) -> list[float]:
        """Rows at which trials are compared."""
        return list(self._levels)

    def goes_on(self, trial: object, rows: int, values: Values) -> bool:
        """Record where a trial is after so many rows, and say whether it goes on.

        Args:
            trial: anything hashable that names it.
            rows: rows learned so far.
            values: metrics to be minimised. One that is not finite stops the trial, as no later row mends a mean.
        """
        if not all(math.isfinite(value) for value in values):
            return False
        level = max((level for level in self._levels if level <= rows), default=None)
        if level is None or trial in self._recorded[level]:
            return True  # decided there before
        others = list(self._recorded[level].values())
        self._recorded[level][trial] = values
        if not others:
            return True
        *theirs, mine = standing([*others, values])
        # As in Ray's own scheduler, to the last bit: at a tie the direction of rounding would decide.
        return -mine >= float(np.percentile([-value for value in theirs], (1 - self._keep) * 100))

    def remember(self, curves: Mapping[object, Mapping[int, Values]]) -> None:
        """Take up what was reported before a restart: trial -> rows -> values."""
        for trial, curve in curves.items():
            for rows, values in sorted(curve.items()):
                self.goes_on(trial, rows, values)
