"""Optuna inside Tune: a durable study a candidate, and a searcher that survives what happens to long searches."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState
from ray.tune.search.optuna import OptunaSearch

from ray_jobs.settings import SearchConfig
from ray_jobs.storage import study_storage

__all__ = ["make_search", "storage_url", "study_name"]

log = logging.getLogger(__name__)

_STARTUP_TRIALS = 4


class DurableOptunaSearch(OptunaSearch):
    """OptunaSearch that keeps the study whole when a trial diverges or the driver is killed.

    Tune writes its own state down every few seconds, the study at once. After a hard kill the study can therefore hold
    trials that Tune does not know of; they are given to the next trials that Tune starts, so that each is run once.
    """

    _points_to_evaluate: list[dict[str, Any]]

    def _setup_study(self, mode: str | list[str]) -> None:
        """Open the study; given points are enqueued once a study, not once a start."""
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        points, self._points_to_evaluate = self._points_to_evaluate, []
        super()._setup_study(mode)
        self._points_to_evaluate = points
        for point in points:
            self._ot_study.enqueue_trial(point, skip_if_exists=True)

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        """Values of a trial that Tune lost, if there is one, else new ones."""
        if trial_id not in self._ot_trials and (lost := self._lost()):
            self._adopt(trial_id, lost[0])
        return super().suggest(trial_id)

    def _lost(self) -> list[FrozenTrial]:
        """Trials that the study holds and Tune does not know of."""
        known = {trial.number for trial in self._ot_trials.values()}
        return [
            trial
            for trial in self._ot_study.get_trials(deepcopy=False)
            if trial.number not in known and trial.state != TrialState.WAITING
        ]

    def _adopt(self, trial_id: str, lost: FrozenTrial) -> None:
        trial = optuna.trial.Trial(self._ot_study, lost._trial_id)
        for name, distribution in self._space.items():
            trial._suggest(name, distribution)  # as Study.ask does; what has a value keeps it
        self._ot_trials[trial_id] = trial

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Pass an intermediate result on, unless the study already has the trial's end.

        After a hard kill the study can be ahead of Tune's own snapshot, and a finished trial cannot be told again.
        """
        try:
            super().on_trial_result(trial_id, result)
        except optuna.exceptions.UpdateFinishedTrialError:
            log.info("the study already has the end of trial %s", trial_id)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Tell the study; a metric that is not finite counts as a failed trial, not as one that runs for ever."""
        names = self.metric if isinstance(self.metric, list) else [self.metric]
        if result and any(not math.isfinite(float(result.get(name, math.nan))) for name in names):
            result, error = None, True
        super().on_trial_complete(trial_id, result, error)


def study_name(config: SearchConfig, candidate: str) -> str:
    """Name of a candidate's study in the storage."""
    return f"{config.name}/{candidate}"


def storage_url(config: SearchConfig, folder: Path) -> str:
    """URL of the Optuna storage: what the config says, or SQLite in the results folder."""
    return config.search.storage or f"sqlite:///{folder / 'study.db'}"


def make_search(config: SearchConfig, candidate: str, folder: Path) -> DurableOptunaSearch:
    """The searcher of one candidate; its given points are tried first."""
    settings = config.search
    points = config.candidates[candidate].points
    samplers: dict[str, Any] = {
        "tpe": lambda: optuna.samplers.TPESampler(
            seed=settings.seed, multivariate=True, n_startup_trials=min(_STARTUP_TRIALS, settings.trials)
        ),
        "gp": lambda: optuna.samplers.GPSampler(seed=settings.seed, n_startup_trials=_STARTUP_TRIALS),
        "random": lambda: optuna.samplers.RandomSampler(seed=settings.seed),
    }
    return DurableOptunaSearch(
        study_name=study_name(config, candidate),
        storage=study_storage(storage_url(config, folder)),
        sampler=samplers[settings.sampler](),
        points_to_evaluate=points or None,
        metric=settings.metric,
        mode="min",
    )
