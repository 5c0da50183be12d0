"""Which trial a candidate stands for: closed forms of the paired difference, and when the first point stays."""

from __future__ import annotations

import json
import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_jobs.choice import advantage, choose

FIRST = {"optimizer.lr": 1.0}


def trial(name: str, blocks: list[float], lr: float = 2.0, status: str = "complete", every: int = 40) -> pd.DataFrame:
    """A trial whose rows between two rungs had these mean losses."""
    rows = every * np.arange(1, len(blocks) + 1)
    return pd.DataFrame(
        {"trial": name, "rows": rows, "nll": np.cumsum(blocks) / np.arange(1, len(blocks) + 1), "status": status,
         "params": json.dumps({"optimizer.lr": lr})}
    )  # fmt: skip


BASE = [2.0, 1.6, 1.2, 1.3, 1.0]


def shifted(by: list[float]) -> list[float]:
    return [one - other for one, other in zip(BASE, by, strict=True)]


@settings(deadline=None)
@given(st.lists(st.floats(-1, 1), min_size=2, max_size=12), st.integers(1, 50))
def test_the_difference_is_that_of_means_of_blocks(gains: list[float], every: int) -> None:
    base = trial("a", [2.0] * len(gains), every=every)
    mean, error = advantage(trial("b", [2.0 - gain for gain in gains], every=every), base, "nll") or (math.nan,) * 2
    assert mean == pytest.approx(np.mean(gains), abs=1e-9)
    assert error == pytest.approx(np.std(gains, ddof=1) / math.sqrt(len(gains)), abs=1e-9)


def test_rows_that_only_one_of_them_learned_do_not_count() -> None:
    mean, _ = advantage(trial("b", [1.0, 1.0, 9.0]), trial("a", [1.5, 1.5]), "nll") or (math.nan,) * 2
    assert mean == pytest.approx(0.5)


def test_a_last_rung_of_fewer_rows_has_less_weight() -> None:
    ours, theirs = (pd.DataFrame({"rows": [40, 80, 90], "nll": nll}) for nll in ([1.0, 1.0, 1.0], [2.0, 1.5, 1.5]))
    mean, error = advantage(ours, theirs, "nll") or (math.nan,) * 2
    gained = [40.0, 0.0, 5.0]  # cumulative losses differ by 40, 40 and 45
    away = [(one - rows * 0.5) / 90 for one, rows in zip(gained, [40, 40, 10], strict=True)]
    assert mean == pytest.approx(0.5)
    assert error == pytest.approx(math.sqrt(sum(one**2 for one in away) * 3 / 2))


@pytest.mark.parametrize(
    ("gains", "caution", "taken"),
    [
        ([0.3, -0.3, 0.3, -0.2, 0.0], 1.0, "first"),  # better by chance
        ([0.3, -0.3, 0.3, -0.2, 0.0], 0.0, "low"),
        ([0.3, 0.2, 0.3, 0.2, 0.25], 1.0, "low"),  # better on every block
        ([0.3, 0.2, 0.3, 0.2, 0.25], 50.0, "first"),
    ],
)
def test_the_first_point_stays_until_it_is_beaten_beyond_chance(gains: list[float], caution: float, taken: str) -> None:
    worse = trial("worse", [5.0] * 5, lr=3.0)
    rungs = pd.concat([trial("first", BASE, lr=1.0), trial("low", shifted(gains)), worse])
    found = choose(rungs, "nll", [FIRST], caution)
    assert found is not None
    assert found.trial == taken
    assert found.lowest.trial.iloc[0] == "low"
    assert found.gain is not None
    assert found.gain[0] == pytest.approx(np.mean(gains))
    assert ("only" in found.about) == found.kept == (taken == "first")


def test_a_lucky_trial_does_not_hide_a_solid_one() -> None:
    lucky, solid = shifted([0.9, -0.7, 0.9, -0.7, 0.2]), shifted([0.1, 0.1, 0.1, 0.09, 0.11])
    rungs = pd.concat([trial("first", BASE, lr=1.0), trial("lucky", lucky), trial("solid", solid, lr=3.0)])
    found = choose(rungs, "nll", [FIRST], 1.0)
    assert found is not None
    assert (found.trial, found.lowest.trial.iloc[0], found.kept) == ("solid", "lucky", False)
    assert found.about.startswith("better than the first point by 0.1000 ± ")
    assert found.about.endswith("a lower trial may owe that to chance")


def test_a_tie_and_a_repeated_first_point_change_nothing() -> None:
    """A key without effect gives the same figures; of several trials of the first point the lowest is taken."""
    same = pd.concat([trial("same", BASE), trial("first", BASE, lr=1.0)])
    found = choose(same, "nll", [FIRST], 1.0)
    assert found is not None
    assert found.trial == "first"
    again = pd.concat([trial("first", BASE, lr=1.0), trial("again", shifted([0.1, -0.05, 0.0, 0.1, 0.0]), lr=1.0)])
    found = choose(again, "nll", [FIRST], 1.0)
    assert found is not None
    assert (found.trial, found.about) == ("again", "")


@pytest.mark.parametrize("reason", ["no points", "stopped", "is lowest", "another metric", "one rung", "not finite"])
def test_without_a_first_point_to_compare_with_the_lowest_is_taken(reason: str) -> None:
    noisy = [0.3, -0.3, 0.3, -0.2, 0.0] if reason != "is lowest" else [-0.1] * 5
    first = trial("first", BASE, lr=1.0, status="stopped" if reason == "stopped" else "complete")
    low = trial("low", shifted(noisy))
    if reason == "one rung":
        first, low = (frame.tail(1) for frame in (first, low))
    if reason == "not finite":
        first.loc[1, "nll"] = math.nan
    rungs = pd.concat([first, low]).assign(window_nll=lambda frame: frame.nll)
    metric = "window_nll" if reason == "another metric" else "nll"
    found = choose(rungs, metric, [] if reason == "no points" else [FIRST], 1.0)
    assert found is not None
    assert found.trial == ("first" if reason == "is lowest" else "low")
    assert not found.kept
    assert found.about == ""


def test_no_trial_came_to_the_end() -> None:
    assert choose(trial("a", BASE, status="stopped"), "nll", [FIRST], 1.0) is None
