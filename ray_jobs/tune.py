"""A search: Ray Tune and Optuna around the prequential loop, several candidates under the same budget.

python -m ray_jobs.tune search_spaces/mnist.yaml search.trials=4
"""

from __future__ import annotations

import hashlib
import json
import math
import time
import uuid
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Annotated, Any

import typer
from ray import tune
from rich.console import Console

from loko import online
from loko.config import ExperimentConfig, validate
from ray_jobs import cluster, packed, scheduling, trials
from ray_jobs.cli import Overrides, fail, help_for, make_app
from ray_jobs.halving import Rungs
from ray_jobs.places import Place
from ray_jobs.progress import Progress, ReportProgress
from ray_jobs.results import collect
from ray_jobs.settings import SearchConfig, read
from ray_jobs.storage import stand_in, study_storage
from ray_jobs.study import Study
from ray_jobs.train import claim
from ray_jobs.warm_start import warm_start

app = make_app()

_RECOUNT_SECONDS = 2.0


@app.command(help="Search the candidates of a YAML file.", epilog=help_for(SearchConfig))
def main(
    config: Annotated[Path, typer.Argument(help="YAML file of the search, such as search_spaces/mnist.yaml")],
    overrides: Overrides = None,
) -> None:
    """Run a search, or go on with it where it stopped."""
    with fail():
        run(read(SearchConfig, config, overrides or []))


def run(config: SearchConfig) -> str:
    """Search every candidate and write the results; returns where they are. Run again, it goes on where it stopped.

    Raises:
        ConfigError: the folder holds the results of another search, or the storage a study of another one.
        StreamError, ValueError: rows or a model that cannot be used, before any trial.
        StorageError: the study's storage does not answer.
    """
    place = Place(config.folder)
    with place.working_folder() as folder:
        claim(folder / "search.yaml", config)
        about = _check_once(folder, config)
        place.upload(folder)
        storage = study_storage(config.search.storage or f"sqlite:///{folder / 'study.db'}")
        studies = {name: Study(config, name, storage, _owner(folder), about) for name in config.candidates}
        place.upload(folder)
        for name, study in studies.items():
            if (added := warm_start(study, config, name)) is not None:
                Console().print(f"{name}: {added}", highlight=False, markup=False, soft_wrap=True)
        cluster.connect(dashboard=config.experiment.most_workers > 1)
        progress = Progress(config)
        with progress, _hosts(config, place) as hosts:
            grids = {}
            for name, study in studies.items():
                progress.begin(name)
                grids[name] = _search(config, name, study, place, _rows(folder), hosts)
                if study.exhausted():
                    progress.spent(name, study.spent())
        collect(config, folder, place.location, grids)
        from ray_jobs import report  # matplotlib is slow to load, and no trial needs it

        report.write(folder, location=place.location)
    return place.location


def _check_once(folder: Path, config: SearchConfig) -> dict[str, Any]:
    """Find bad rows and models before the first trial, and write down what the report needs to know of the stream.

    Returns:
        What the figures of this search are of: two studies may be put together where it is the same.
    """
    first = validate(ExperimentConfig, config.experiment_of(next(iter(config.candidates)), {}))
    run = online.start(first)
    points = [{"row": p.row, "kind": p.kind, "description": p.description} for p in run.stream.change_points]
    stream = {"rows": len(run.stream), "fingerprint": run.stream.fingerprint, "change_points": points}
    (folder / "stream.json").write_text(json.dumps(stream, indent=1))
    same = config.experiment.model_dump_json(include={"task", "batch_size", "window", "near_future", "seed"})
    return {
        "stream": run.stream.fingerprint,
        "experiment": hashlib.sha256(same.encode()).hexdigest()[:16],
        "metrics": config.search.objectives,
    }


def _rows(folder: Path) -> int:
    return int(json.loads((folder / "stream.json").read_text())["rows"])


def _owner(folder: Path) -> str:
    """A name for this search that no other has which shares its studies."""
    path = folder / "search_id"
    if not path.exists():
        fresh = path.with_suffix(".new")
        fresh.write_text(uuid.uuid4().hex)
        fresh.replace(path)
    return path.read_text()


def _hosts(config: SearchConfig, place: Place) -> AbstractContextManager[list[Any]]:
    """The processes of packed trials, as many as the cluster holds; none where trials are not packed."""
    settings = config.search
    if settings.pack == 1:
        return nullcontext([])
    plain = config.experiment_of(next(iter(config.candidates)), {})
    experiment = validate(ExperimentConfig, plain)
    count = cluster.slots(experiment)
    if settings.concurrent is not None:
        count = min(count, math.ceil(settings.concurrent / settings.pack))
    return packed.hosts(plain, settings.pack, count, cluster.resources(experiment), place.at("tune"))


def _search(
    config: SearchConfig, candidate: str, study: Study, place: Place, rows: int, hosts: list[Any]
) -> tune.ResultGrid:
    """One candidate's trials."""
    settings = config.search
    experiment = validate(ExperimentConfig, config.experiment_of(candidate, {}))
    asha = settings.asha
    rungs = Rungs(asha.grace_rows, asha.reduction_factor, rows) if asha is not None else None
    slots = _room(settings.concurrent or len(hosts) * settings.pack or None, experiment)
    scheduling.enter(candidate, scheduling.Search(study, rungs, slots))
    trainable = trials.trainable(config, candidate, place, hosts)
    if _can_go_on(place, candidate):
        tuner = tune.Tuner.restore(
            place.at("tune", candidate), trainable, resume_unfinished=True, resume_errored=True, param_space={}
        )
        with suppress(RuntimeError):  # Tune has written down no trial yet
            stand_in([result.checkpoint for result in tuner.get_results() if result.checkpoint is not None])
        return tuner.fit()
    callbacks = [ReportProgress(candidate), scheduling.OnlyFailuresInARow()]
    return scheduling.tuner(config, candidate, trainable, place, callbacks).fit()


def _room(concurrent: int | None, experiment: ExperimentConfig) -> Callable[[], int]:
    """How many trials may run at a time: as given, or what the cluster holds, asked again every few seconds."""
    if concurrent is not None:
        return lambda: concurrent
    known: list[float] = [-math.inf, 0]

    def slots() -> int:
        if time.monotonic() - known[0] > _RECOUNT_SECONDS:
            known[:] = time.monotonic(), cluster.slots(experiment)
        return int(known[1])

    return slots


def _can_go_on(place: Place, candidate: str) -> bool:
    """Whether Tune wrote down enough to go on from; killed before that, a search begins with the study's trials."""
    states = [n for n in place.names("tune", candidate) if n.startswith("experiment_state-") and n.endswith(".json")]
    whole = []
    for name in states:
        try:
            json.loads(place.read("tune", candidate, name) or b"")
            whole.append(name)
        except ValueError:
            # Cut off by a kill; an earlier one, or the study, knows what it held.
            place.remove("tune", candidate, name)
    return bool(whole) and tune.Tuner.can_restore(place.at("tune", candidate))


if __name__ == "__main__":
    app()
