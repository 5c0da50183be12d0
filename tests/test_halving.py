"""Successive halving: Ray's own scheduler is the oracle for one metric, the definition of dominance for several."""

import itertools
import math
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.tune.schedulers import ASHAScheduler

from ray_jobs.halving import Rungs, dominates, fronts, standing

finite = st.floats(-1e3, 1e3)


@given(
    curves=st.lists(st.lists(finite, min_size=9, max_size=9), min_size=1, max_size=8),
    order=st.randoms(use_true_random=False),
    grace=st.sampled_from([100, 200, 300]),
    eta=st.sampled_from([2, 3, 1.5]),
)
def test_one_metric_is_stopped_as_by_rays_scheduler(
    curves: list[list[float]], order: Any, grace: int, eta: float
) -> None:
    rows = 1000
    mine = Rungs(grace, eta, rows)
    theirs = ASHAScheduler(
        time_attr="rows", metric="nll", mode="min", max_t=rows + 1, grace_period=grace, reduction_factor=eta
    )
    trials: dict[int, Any] = {i: SimpleNamespace(trial_id=str(i)) for i in range(len(curves))}
    for trial in trials.values():
        theirs.on_trial_add(None, trial)
    at = dict.fromkeys(trials, 0)
    while at:
        number = order.choice(sorted(at))
        at[number] += 1
        cursor, value = 100 * at[number], curves[number][at[number] - 1]
        expected = theirs.on_trial_result(None, trials[number], {"rows": cursor, "nll": value})
        assert mine.goes_on(number, cursor, (value,)) == (expected == "CONTINUE")
        if expected == "STOP" or at[number] == len(curves[number]):
            del at[number]


points = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=10)


@given(points)
def test_a_front_is_what_nothing_left_dominates(points: list[tuple[float, ...]]) -> None:
    levels = fronts(points)
    for (i, a), (j, b) in itertools.permutations(enumerate(points), 2):
        if dominates(a, b):
            assert levels[i] < levels[j]
    for level in range(1, max(levels) + 1):
        for i, point in enumerate(points):
            if levels[i] == level:
                assert any(dominates(points[j], point) for j in range(len(points)) if levels[j] == level - 1)


@given(points)
def test_who_dominates_stands_before(points: list[tuple[float, ...]]) -> None:
    places = standing(points)
    assert sorted(places) == list(range(len(points)))
    for (i, a), (j, b) in itertools.permutations(enumerate(points), 2):
        if dominates(a, b):
            assert places[i] < places[j]


def test_a_cheap_trial_is_not_stopped_for_its_loss() -> None:
    """Of two metrics, the trial that is best in the second goes on although it is the worst in the first."""
    rungs = Rungs(100, 2, 1000)
    for trial, values in enumerate([(0.5, 4.0), (0.6, 5.0), (0.55, 4.5)]):
        rungs.goes_on(trial, 100, values)
    assert rungs.goes_on("cheap", 100, (0.9, 1.0))
    assert not rungs.goes_on("worse in both", 100, (0.95, 6.0))


@pytest.mark.parametrize("values", [(math.nan,), (math.inf,), (0.1, math.nan)])
def test_what_is_not_finite_is_stopped_and_measures_nobody(values: tuple[float, ...]) -> None:
    rungs = Rungs(100, 3, 1000)
    assert not rungs.goes_on("diverged", 40, values)
    assert not rungs.goes_on("diverged", 100, values)
    assert rungs.goes_on("first", 100, tuple(0.0 for _ in values))


def test_the_last_rung_is_before_the_end() -> None:
    assert Rungs(100, 2, 400).levels == [100, 200]
    assert Rungs(500, 2, 400).levels == []
    assert Rungs(500, 2, 400).goes_on(1, 400, (9.0,))


def test_rungs_outlive_a_restart() -> None:
    before = Rungs(100, 2, 1000)
    curves: dict[object, dict[int, tuple[float, ...]]] = {1: {100: (0.1,), 200: (0.1,)}, 2: {100: (0.2,)}}
    for trial, curve in curves.items():
        for rows, values in curve.items():
            before.goes_on(trial, rows, values)
    after = Rungs(100, 2, 1000)
    after.remember(curves)
    for value in (0.05, 0.14, 0.16, 0.3):
        assert after.goes_on(value, 100, (value,)) == before.goes_on(value, 100, (value,))
    assert not Rungs(100, 2, 1000).goes_on(3, 100, (math.nan,))
