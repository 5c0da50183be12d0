"""Trials of an earlier search as a start for a new one."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
import yaml
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial, TrialState

from loko.config import ConfigError, validate
from ray_jobs.places import Place, is_url
from ray_jobs.settings import SearchConfig, is_storage
from ray_jobs.storage import study_storage
from ray_jobs.study import ABOUT, CURVE, WARM, Study

__all__ = ["Added", "warm_start"]

_MANY = 5
_TRIED_FIRST = 3


@dataclass
class Added:
    """What became of the earlier trials of one candidate."""

    source: str
    added: int = 0
    enqueued: int = 0
    left_out: dict[str, int] = field(default_factory=dict)  # why -> trials

    def __str__(self) -> str:
        parts = [f"{self.added} earlier trials of {self.source} added"] if self.added else []
        if self.enqueued:
            parts.append(
                f"the {self.enqueued} best settings of {self.source} are tried first (its figures are of other rows)"
            )
        parts += [f"{count} left out: {why}" for why, count in list(self.left_out.items())[:_MANY]]
        if len(self.left_out) > _MANY:
            parts.append(f"{sum(list(self.left_out.values())[_MANY:])} left out for like reasons")
        return "; ".join(parts) or f"nothing in {self.source} to start from"


def warm_start(study: Study, config: SearchConfig, candidate: str) -> Added | None:
    """Add the earlier search's trials of the same candidate to its study, each once however often this is called.

    A trial counts where it searched the same keys and its values lie in the present ranges, whatever those were. Where
    the earlier figures are of other rows or of another model they cannot stand beside new ones: then the best settings
    are tried first instead.

    Returns:
        What was added and what was left out; None if the search names no earlier one.

    Raises:
        ConfigError: there is no such search, or it has no such candidate.
        StorageError: its storage does not answer.
    """
    source = config.search.warm_start
    if source is None:
        return None
    earlier = _earlier(source, config, candidate)
    found = Added(source)
    fitting = []
    for trial in earlier.get_trials(deepcopy=False):
        if trial.state not in (TrialState.COMPLETE, TrialState.PRUNED):
            continue
        why = _misfit(trial.params, study.space)
        if why is None:
            fitting.append(trial)
        else:
            found.left_out[why] = found.left_out.get(why, 0) + 1
    if earlier.user_attrs.get(ABOUT) == study.study.user_attrs.get(ABOUT):
        found.added = _add(study, fitting, source)
    else:
        found.enqueued = _enqueue(study, fitting)
    return found


def _earlier(source: str, config: SearchConfig, candidate: str) -> optuna.Study:
    """The earlier study of the same candidate."""
    if is_storage(source):
        url, _, name = source.partition("#")
    else:
        url, name = _of_folder(source)
    storage = study_storage(url)
    names = [summary.study_name for summary in optuna.get_all_study_summaries(storage, include_best_trial=False)]
    wanted = [f"{name}/{candidate}"] if name else [n for n in names if n.endswith(f"/{candidate}")]
    there = [n for n in wanted if n in names]
    if len(there) != 1:
        what = "several studies" if there else "no study"
        raise ConfigError(
            f"search.warm_start = {source!r}: {what} of candidate {candidate!r} there; it holds "
            f"{', '.join(sorted(names)) or 'none'}. Name the search: {url}#NAME"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.load_study(study_name=there[0], storage=storage)


def _of_folder(source: str) -> tuple[str, str]:
    """Storage and name of the search in a results folder."""
    place = Place(source)
    text = place.read("search.yaml")
    if text is None:
        raise ConfigError(f"search.warm_start = {source!r} holds no search (search.yaml is missing)")
    earlier = validate(SearchConfig, yaml.safe_load(text), f"{source}/search.yaml")
    if earlier.search.storage is not None:
        return earlier.search.storage, earlier.name
    if is_url(source):
        raise ConfigError(f"search.warm_start = {source!r} is no folder on this machine; name its storage instead")
    study = Path(source).absolute() / "study.db"
    if not study.is_file():
        raise ConfigError(f"search.warm_start = {source!r} holds no study (study.db is missing)")
    return f"sqlite:///{study}", earlier.name


def _misfit(params: dict[str, Any], space: dict[str, BaseDistribution]) -> str | None:
    """Why values of an earlier trial are none of this space, or None."""
    if set(params) != set(space):
        return f"other keys were searched ({', '.join(sorted(set(params) ^ set(space)))})"
    for key, allowed in space.items():
        try:
            inside = allowed._contains(allowed.to_internal_repr(params[key]))
        except ValueError:
            inside = False
        if not inside:
            return f"{key} is outside its present range"
    return None


def _add(study: Study, trials: list[FrozenTrial], source: str) -> int:
    """Copies of earlier trials, with today's ranges; those that are there are not added again."""
    there = {trial.user_attrs.get(WARM) for trial in study.study.get_trials(deepcopy=False)}
    added = 0
    for trial in trials:
        origin = trial.user_attrs.get(WARM) or f"{source}:{trial.number}"
        if origin not in there:
            attributes = {WARM: origin} | {key: v for key, v in trial.user_attrs.items() if key == CURVE}
            study.study.add_trial(
                optuna.create_trial(
                    state=trial.state,
                    values=trial.values,
                    params=trial.params,
                    distributions=study.space,
                    user_attrs=attributes,
                    intermediate_values=trial.intermediate_values,
                )
            )
        added += 1
    return added


def _enqueue(study: Study, trials: list[FrozenTrial]) -> int:
    """The best settings of an earlier search, as points to try first."""
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    best = sorted(complete, key=lambda trial: trial.values[0])[:_TRIED_FIRST]
    for trial in best:
        study.study.enqueue_trial(trial.params, skip_if_exists=True)
    return len(best)
