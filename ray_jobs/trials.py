"""The Tune function of a trial: the loop itself, or for several workers the driver of a Train run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback

from loko import online
from loko.config import ExperimentConfig, validate
from ray_jobs import cluster, packed
from ray_jobs.places import Place
from ray_jobs.settings import SearchConfig, with_values
from ray_jobs.storage import before, newest_whole

__all__ = ["trainable"]


def trainable(config: SearchConfig, candidate: str, place: Place, hosts: Sequence[Any] = ()) -> Any:
    """What Tune runs for each trial of a candidate, with the resources that one trial takes.

    Args:
        config: the search.
        candidate: which of its candidates.
        place: where the results are; every node must reach it.
        hosts: of packed trials, see ``ray_jobs.packed``.
    """
    plain = config.experiment_of(candidate, {})
    if hosts:
        return packed.trainable(list(hosts), plain)
    experiment = validate(ExperimentConfig, plain)
    labels = {"run": config.name, "candidate": candidate}
    if experiment.most_workers == 1:
        alone = tune.with_parameters(_alone, plain=plain, labels=labels, storage=place.at("tune", candidate))
        return tune.with_resources(alone, cluster.resources(experiment))
    together = tune.with_parameters(
        _together,
        plain=plain,
        labels=labels,
        storage=place.at("train"),
        max_failures=config.search.max_failures,
    )
    # Drivers take no CPU and stay on the head node, off the nodes that come and go.
    return tune.with_resources(together, {"node:__internal_head__": 0.001})


def _alone(values: dict[str, Any], plain: dict[str, Any], labels: dict[str, str], storage: str) -> None:
    """A trial of one worker."""

    def report(rung: online.Report, folder: Path | None) -> None:
        assert folder is not None
        tune.report(rung, checkpoint=tune.Checkpoint.from_directory(folder))

    experiment = validate(ExperimentConfig, with_values(plain, values))
    labels = {**labels, "trial": tune.get_context().get_trial_id()}
    given = tune.get_checkpoint()
    restored = newest_whole(before(given)) if given is not None else None
    if restored is None:
        cluster.drive(experiment, None, report, storage, labels=labels)
    else:
        with restored.as_directory() as folder:
            cluster.drive(experiment, Path(folder), report, storage, labels=labels)


def _together(
    values: dict[str, Any], plain: dict[str, Any], labels: dict[str, str], storage: str, max_failures: int
) -> None:
    """A trial of several workers: its Train run has the trial's name, so that a restarted driver goes on with it."""
    trial = tune.get_context().get_trial_id()
    cluster.run_workers(
        with_values(plain, values),
        name=f"trial-{trial}",
        labels={**labels, "trial": trial},
        storage=storage,
        max_failures=max_failures,
        callbacks=[TuneReportCallback()],
    )
