"""A candidate's Optuna study: where it is kept, what was tried, what that cost, what comes next. Knows nothing of Ray.

Everything that a search has to remember is in the study, at once: the process may be killed between any two lines.
"""

from __future__ import annotations

import logging
import math
import time
import warnings
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, Trial, TrialState

from loko.config import ConfigError
from ray_jobs.settings import Range, SearchConfig, SearchSettings

__all__ = ["Report", "Spent", "Study", "distribution", "study_name"]

log = logging.getLogger(__name__)

Report = dict[str, Any]

_STARTUP_TRIALS = 4
_CLOCK_SECONDS = 5.0  # how often the time spent is written down
# User attributes of a trial and of a study.
OWNER, ROWS, CURVE, WARM, ABOUT = "search", "rows", "curve", "warm_start", "about"


def study_name(config: SearchConfig, candidate: str) -> str:
    """Name of a candidate's study in the storage."""
    return f"{config.name}/{candidate}"


def distribution(allowed: Range) -> BaseDistribution:
    """A range as Optuna has it."""
    if allowed.choice is not None:
        return CategoricalDistribution(allowed.choice)
    if allowed.integer or allowed.log_integer:
        low, high = allowed.integer or allowed.log_integer or (0, 0)
        return IntDistribution(low, high, log=allowed.log_integer is not None)
    bounds = allowed.uniform or allowed.log_uniform or (0.0, 0.0)
    return FloatDistribution(*bounds, log=allowed.log_uniform is not None)


@dataclass(frozen=True)
class Spent:
    """What a candidate has cost so far: trials begun, rows learned in them, seconds of searching."""

    trials: int
    rows: int
    seconds: float


class Study:
    """A candidate's study, as seen by one search.

    Several searches may share a study through one storage: each runs its own trials and learns from all of them. A
    trial is known by a key that the caller chooses; ``keep`` gives what a caller has to keep of them. After a hard kill
    the study may hold trials whose keys were not kept; they are handed to the next keys, so that each is run once.

    Args:
        config: the search.
        candidate: which of its candidates.
        storage: where the study is kept.
        owner: names this search among those that share the study.
        about: what the figures are of (stream, experiment, metrics); kept with the study.

    Raises:
        ConfigError: the storage holds a study of this name about something else.
        StorageError: the storage does not answer.
    """

    def __init__(
        self,
        config: SearchConfig,
        candidate: str,
        storage: BaseStorage,
        owner: str = "",
        about: dict[str, Any] | None = None,
    ) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.name = study_name(config, candidate)
        self.objectives = tuple(config.search.objectives)
        self.space = {key: distribution(allowed) for key, allowed in config.candidates[candidate].space.items()}
        self.numbers: dict[str, int] = {}
        self._ended: set[str] = set()
        self._settings = config.search
        self._owner = owner
        self._trials: dict[str, Trial] = {}
        self._stops: dict[str, int] = {}
        self._reached: dict[str, int] = {}
        self._exclusive = config.search.storage is None
        self._open(storage, about or {}, config.candidates[candidate].points)
        self._seconds = float(self.study.user_attrs.get(self._clock_key, 0.0))
        self._since: float | None = None
        self._written = -math.inf

    def _open(self, storage: BaseStorage, about: dict[str, Any], points: Sequence[dict[str, Any]]) -> None:
        self.study = optuna.create_study(
            storage=storage,
            pruner=optuna.pruners.NopPruner(),  # the rungs decide
            study_name=self.name,
            load_if_exists=True,
            directions=["minimize"] * len(self.objectives),
        )
        there = self.study.user_attrs.get(ABOUT)
        if len(self.study.directions) != len(self.objectives) or (there is not None and there != about):
            differs = sorted(key for key in {*about, *(there or {})} if about.get(key) != (there or {}).get(key))
            raise ConfigError(
                f"the storage holds a study {self.name} about another search (differs: "
                f"{', '.join(differs) or 'metrics'}); its trials cannot be compared with these: choose another name or "
                "another search.storage"
            )
        self.study.set_user_attr(ABOUT, about)
        self.study.sampler = self._seeded()
        for point in points:
            self.study.enqueue_trial(point, skip_if_exists=True)

    def _seeded(self) -> optuna.samplers.BaseSampler:
        """The sampler; it does not draw again what this search, one beside it or the one it starts from drew before."""
        begun, earlier = len(self._own()), self._settings.warm_start
        parts = [begun] * (begun > 0) + [zlib.crc32(self._owner.encode())] * (not self._exclusive)
        parts += [] if earlier is None else [zlib.crc32(earlier.encode())]
        seed = self._settings.seed
        if parts:
            seed = int(np.random.SeedSequence([seed, *parts]).generate_state(1)[0])
        return _sampler(self._settings, seed)

    # What comes next

    def ask(self, key: str) -> dict[str, Any]:
        """Values of a trial: those that it had, of one that was lost, of a given point, or new ones of the sampler."""
        if key not in self.numbers:
            lost = self._lost()
            trial = self._again(key, lost[0]) if lost else self.study.ask()
            for name, allowed in self.space.items():
                trial._suggest(name, allowed)  # as Study.ask does; what has a value keeps it
            if not lost and not self._exclusive:
                trial.set_user_attr(OWNER, self._owner)
            self._trials[key], self.numbers[key] = trial, trial.number
        return dict(self._trial(key).params)

    def _lost(self) -> list[FrozenTrial]:
        """Trials of this search that no key stands for."""
        known = set(self.numbers.values())
        return [t for t in self._own() if t.number not in known and t.state != TrialState.FAIL]

    def _again(self, key: str, frozen: FrozenTrial) -> Trial:
        """A trial that runs again. One that failed gets a new number; one that was stopped will be, at the same row."""
        if frozen.state == TrialState.FAIL:
            fresh = optuna.create_trial(
                state=TrialState.RUNNING,
                params=frozen.params,
                distributions=frozen.distributions,
                user_attrs={OWNER: self._owner},
            )
            self.study.add_trial(fresh)
            frozen = self.study.get_trials(deepcopy=False)[-1]
            self.numbers[key] = frozen.number
        elif frozen.state == TrialState.PRUNED:
            self._stops[key] = _rows(frozen)
        self._reached[key] = _rows(frozen)
        return Trial(self.study, frozen._trial_id)

    def _own(self) -> list[FrozenTrial]:
        return [
            trial
            for trial in self.study.get_trials(deepcopy=False)
            if trial.state != TrialState.WAITING
            and WARM not in trial.user_attrs
            and trial.user_attrs.get(OWNER, self._owner if self._exclusive else None) == self._owner
        ]

    def _trial(self, key: str) -> Trial:
        """The trial of a key, also after a restart."""
        if key not in self._trials:
            number = self.numbers[key]
            frozen = next(t for t in self.study.get_trials(deepcopy=False) if t.number == number)
            self._trials[key] = self._again(key, frozen)
        return self._trials[key]

    @property
    def running(self) -> int:
        """Trials asked for whose end was not told."""
        return len(self.numbers.keys() - self._ended)

    def values(self, report: Report) -> tuple[float, ...]:
        """The metrics of a report, in the order of the search; NaN where one is missing."""
        return tuple(float(report.get(name, math.nan)) for name in self.objectives)

    def was_stopped(self, key: str, rows: int) -> bool:
        """Whether a trial that is run again was stopped here, or earlier, the first time."""
        self._trial(key)
        return rows >= self._stops.get(key, rows + 1)

    # What was tried

    def report(self, key: str, report: Report) -> None:
        """Write down where a trial is at a rung; told again, or after the trial's end, it changes nothing."""
        rows, values = int(report["rows"]), self.values(report)
        trial = self._trial(key)
        if rows <= self._reached.get(key, 0):
            return
        try:  # one write a rung: a commit waits for the disk
            if len(values) > 1:
                trial.set_user_attr(CURVE, {**trial.user_attrs.get(CURVE, {}), str(rows): list(values)})
            elif math.isfinite(values[0]):
                trial.report(values[0], rows)
            else:
                trial.set_user_attr(ROWS, rows)
        except optuna.exceptions.UpdateFinishedTrialError:
            log.info("the study already has the end of trial %s", key)
        self._reached[key] = rows
        self._tick()

    def tell(self, key: str, report: Report | None, failed: bool = False) -> None:
        """Write down a trial's end: complete at the stream's end, pruned before it, failed without finite metrics."""
        values = self.values(report or {})
        if failed or report is None or not all(math.isfinite(value) for value in values):
            state, told = TrialState.FAIL, None
        elif report.get("finished"):
            state, told = TrialState.COMPLETE, list(values)
        else:
            state, told = TrialState.PRUNED, None
        if report is not None and "rows" in report:
            self.report(key, report)
        self.study.tell(self.numbers[key], told, state=state, skip_if_finished=True)
        self._ended.add(key)
        self._trials.pop(key, None)
        self._tick()

    def keep(self) -> dict[str, Any]:
        """What the caller keeps to go on after a restart."""
        return {"numbers": dict(self.numbers), "ended": sorted(self._ended)}

    def restore(self, kept: dict[str, Any]) -> None:
        """Take up what :meth:`keep` gave."""
        self.numbers, self._ended, self._trials = dict(kept["numbers"]), set(kept["ended"]), {}

    def curves(self) -> dict[object, dict[int, tuple[float, ...]]]:
        """Number of a trial -> rows -> its metrics there; of all trials of this study, warm ones left out."""
        return {
            trial.number: {rows: (value,) for rows, value in trial.intermediate_values.items()}
            or {int(rows): tuple(values) for rows, values in trial.user_attrs.get(CURVE, {}).items()}
            for trial in self.study.get_trials(deepcopy=False)
            if _rows(trial) > 0 and WARM not in trial.user_attrs
        }

    # What it cost

    @property
    def _clock_key(self) -> str:
        return f"seconds:{self._owner}"

    def _tick(self) -> None:
        if time.monotonic() - self._written > _CLOCK_SECONDS:
            self._written = time.monotonic()
            self.study.set_user_attr(self._clock_key, self.seconds)

    def start_clock(self) -> None:
        """From here on, time counts."""
        self._since = time.monotonic()

    @property
    def seconds(self) -> float:
        """Time spent searching, over all starts."""
        return self._seconds + (0.0 if self._since is None else time.monotonic() - self._since)

    def spent(self) -> Spent:
        """What this search has cost so far, over all its starts."""
        own = self._own()
        return Spent(len(own), sum(map(_rows, own)), self.seconds)

    def exhausted(self) -> bool:
        """Whether the budget of rows or hours is spent; there is always enough of it for one trial to begin."""
        budget = self._settings.budget
        if budget is None:
            return False
        spent = self.spent()
        return spent.trials > 0 and (
            (budget.rows is not None and spent.rows >= budget.rows)
            or (budget.hours is not None and spent.seconds >= 3600 * budget.hours)
        )

    def has_complete(self) -> bool:
        """Whether a trial of this search came to the end of the stream."""
        return any(trial.state == TrialState.COMPLETE for trial in self._own())


def _rows(trial: FrozenTrial) -> int:
    """How many rows a trial has learned."""
    told = [int(rows) for rows in (*trial.intermediate_values, *trial.user_attrs.get(CURVE, {}))]
    return max([*told, int(trial.user_attrs.get(ROWS, 0))])


def _sampler(settings: SearchSettings, seed: int) -> optuna.samplers.BaseSampler:
    startup = min(_STARTUP_TRIALS, settings.trials or _STARTUP_TRIALS)
    samplers: dict[str, Callable[[], optuna.samplers.BaseSampler]] = {
        # The liar keeps trials that run at a time apart.
        "tpe": lambda: optuna.samplers.TPESampler(
            seed=seed, multivariate=True, constant_liar=True, n_startup_trials=startup
        ),
        "gp": lambda: optuna.samplers.GPSampler(seed=seed, n_startup_trials=_STARTUP_TRIALS),
        "nsga2": lambda: optuna.samplers.NSGAIISampler(
            seed=seed, population_size=max(4, min(50, (settings.trials or 200) // 4))
        ),
        "random": lambda: optuna.samplers.RandomSampler(seed=seed),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return samplers[settings.sampler]()
