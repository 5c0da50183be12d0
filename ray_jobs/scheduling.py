"""What Ray Tune asks of a search: values for the next trial, and whether a trial goes on. The study has the answers.

Tune pickles searcher, scheduler and callbacks with an experiment and restores them in another process, so they hold the
candidate's name only; what they work on is entered here by the job that runs now.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from ray_jobs.halving import Rungs
from ray_jobs.places import Place
from ray_jobs.settings import SearchConfig
from ray_jobs.study import Study

__all__ = ["Halving", "OnlyFailuresInARow", "Search", "StudySearch", "enter", "tuner"]


@dataclass(frozen=True)
class Search:
    """What the search of one candidate works on."""

    study: Study
    rungs: Rungs | None
    slots: Callable[[], int]  # how many trials may run at a time, now


_entered: dict[str, Search] = {}


def enter(candidate: str, search: Search) -> None:
    """From here on, this is the search of the candidate in this process, and its time counts."""
    search.study.start_clock()
    if search.rungs is not None:
        search.rungs.remember(search.study.curves())
    _entered[candidate] = search
    # How many trials may wait for a node: the searcher limits them. Tune's own default asks a cluster that grows for
    # one node at a time.
    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = "1000"


def tuner(
    config: SearchConfig, candidate: str, trainable: Any, place: Place, callbacks: list[tune.Callback]
) -> tune.Tuner:
    """Tune, as every search of trials that :func:`enter` knows uses it."""
    settings = config.search
    return tune.Tuner(
        trainable,
        param_space={},
        tune_config=tune.TuneConfig(
            num_samples=settings.trials or -1,
            search_alg=StudySearch(candidate),
            scheduler=Halving(candidate),
            reuse_actors=True,  # importing torch and transformers anew would cost a short trial more than its rows
            trial_dirname_creator=lambda trial: f"{trial.trial_id}",
        ),
        run_config=tune.RunConfig(
            name=candidate,
            storage_path=place.at("tune"),
            failure_config=tune.FailureConfig(max_failures=settings.max_failures),
            checkpoint_config=tune.CheckpointConfig(num_to_keep=2),
            callbacks=callbacks,
            verbose=0,
        ),
    )


class StudySearch(Searcher):
    """Values of trials from the study, as many at a time as there is room for, until the budget is spent."""

    def __init__(self, candidate: str) -> None:
        super().__init__()
        self._candidate = candidate

    @property
    def _search(self) -> Search:
        return _entered[self._candidate]

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any) -> bool:
        """The study knows its metrics and its space."""
        return True

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """Values, None where there is no room, or the end of the search."""
        search = self._search
        if search.study.exhausted():
            return Searcher.FINISHED
        if search.study.running >= search.slots():
            return None
        return search.study.ask(trial_id)

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """The scheduler has written it down before it decided."""

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """A trial's end."""
        self._search.study.tell(trial_id, result, failed=error)

    def save(self, checkpoint_path: str) -> None:
        """Which trial of Tune is which of the study."""
        Path(checkpoint_path).write_text(json.dumps(self._search.study.keep()))

    def restore(self, checkpoint_path: str) -> None:
        """Take that up again."""
        self._search.study.restore(json.loads(Path(checkpoint_path).read_text()))


class Halving(FIFOScheduler):
    """Successive halving at the rungs, and the end of trials that run when the budget is spent."""

    def __init__(self, candidate: str) -> None:
        super().__init__()
        self._candidate = candidate

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Write the rung down, then decide."""
        search = _entered[self._candidate]
        study, rungs = search.study, search.rungs
        study.report(trial.trial_id, result)
        if result.get("finished"):
            return TrialScheduler.CONTINUE
        rows, number = int(result["rows"]), study.numbers[trial.trial_id]
        stop = (
            study.was_stopped(trial.trial_id, rows)
            or (rungs is not None and not rungs.goes_on(number, rows, study.values(result)))
            or (study.exhausted() and study.has_complete())
        )
        return TrialScheduler.STOP if stop else TrialScheduler.CONTINUE


class OnlyFailuresInARow(tune.Callback):
    """Sets the count of a trial's failures back at each further rung, so that ``max_failures`` is of those in a row.

    Tune does not count a preemption that Ray was told of. But a spot node may vanish without a word, and over days it
    does so more often than any limit that also ends a trial which always fails at the same row.
    """

    def __init__(self) -> None:
        self._reached: dict[str, int] = {}

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any) -> None:
        """A trial has reported a rung."""
        rows = int(result.get("rows", 0))
        if rows > self._reached.get(trial.trial_id, -1):
            self._reached[trial.trial_id] = rows
            trial.run_metadata.num_failures = 0
            trial.run_metadata.invalidate_cache()
