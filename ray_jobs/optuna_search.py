"""Optuna inside Tune: a durable study a candidate, and a searcher that survives what happens to long searches."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import RDBStorage
from ray.tune.search.optuna import OptunaSearch

from ray_jobs.settings import SearchConfig

__all__ = ["make_search", "storage_url", "study_name"]

log = logging.getLogger(__name__)

_STARTUP_TRIALS = 4


class DurableOptunaSearch(OptunaSearch):
    """OptunaSearch that keeps the study whole when a trial diverges or the driver is killed."""

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
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    samplers: dict[str, Any] = {
        "tpe": lambda: optuna.samplers.TPESampler(
            seed=settings.seed, multivariate=True, n_startup_trials=min(_STARTUP_TRIALS, settings.trials)
        ),
        "gp": lambda: optuna.samplers.GPSampler(seed=settings.seed, n_startup_trials=_STARTUP_TRIALS),
        "random": lambda: optuna.samplers.RandomSampler(seed=settings.seed),
    }
    return DurableOptunaSearch(
        study_name=study_name(config, candidate),
        storage=RDBStorage(storage_url(config, folder), heartbeat_interval=None),
        sampler=samplers[settings.sampler](),
        points_to_evaluate=points or None,
        metric=settings.metric,
        mode="min",
    )
