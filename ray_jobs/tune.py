"""A search: Ray Tune and Optuna around the prequential loop, several candidates under the same budget.

python -m ray_jobs.tune search_spaces/mnist.yaml search.trials=4
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import typer
import yaml
from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import ASHAScheduler, TrialScheduler

from loko import online
from loko.config import ExperimentConfig, validate
from loko.tasks import save_adapter
from ray_jobs import cluster
from ray_jobs.cli import Overrides, fail, help_for, make_app
from ray_jobs.optuna_search import make_search
from ray_jobs.progress import Progress, ReportProgress
from ray_jobs.settings import Range, SearchConfig, read, with_values
from ray_jobs.storage import before, newest_whole
from ray_jobs.train import claim

app = make_app()

_DISTRIBUTIONS = {
    "log_uniform": tune.loguniform,
    "uniform": tune.uniform,
    "log_integer": lambda low, high: tune.lograndint(low, high + 1),
    "integer": lambda low, high: tune.randint(low, high + 1),
}


@app.command(help="Search the candidates of a YAML file.", epilog=help_for(SearchConfig))
def main(
    config: Annotated[Path, typer.Argument(help="YAML file of the search, such as search_spaces/mnist.yaml")],
    overrides: Overrides = None,
) -> None:
    """Run a search, or go on with it where it stopped."""
    with fail():
        run(read(SearchConfig, config, overrides or []))


def run(config: SearchConfig) -> Path:
    """Search every candidate and write the results; returns their folder. Run again, it goes on where it stopped.

    Raises:
        ConfigError: the folder holds the results of another search.
        StreamError, ValueError: rows or a model that cannot be used, before any trial.
    """
    folder = Path(config.folder).absolute()
    claim(folder / "search.yaml", config.model_dump(mode="json"))
    _check_once(folder, config)
    cluster.connect(dashboard=config.experiment.most_workers > 1)
    progress = Progress(config)
    with progress:
        grids = {}
        for name in config.candidates:
            progress.begin(name)
            grids[name] = _search(config, name, folder)
    _collect(config, folder, grids)
    from ray_jobs import report  # matplotlib is slow to load, and no trial needs it

    report.write(folder)
    return folder


def _check_once(folder: Path, config: SearchConfig) -> None:
    """Find bad rows and models before the first trial, and write down what the report needs to know of the stream."""
    first = validate(ExperimentConfig, config.experiment_of(next(iter(config.candidates)), {}))
    run = online.start(first)
    points = [{"row": p.row, "kind": p.kind, "description": p.description} for p in run.stream.change_points]
    about = {"rows": len(run.stream), "fingerprint": run.stream.fingerprint, "change_points": points}
    (folder / "stream.json").write_text(json.dumps(about, indent=1))


def _search(config: SearchConfig, candidate: str, folder: Path) -> tune.ResultGrid:
    """One candidate's trials."""
    experiment = validate(ExperimentConfig, config.experiment_of(candidate, {}))
    trainable = _trainable(config, candidate, experiment)
    storage = folder / "tune"
    if _can_go_on(storage / candidate):
        tuner = tune.Tuner.restore(
            str(storage / candidate),
            trainable,
            resume_unfinished=True,
            resume_errored=True,
            param_space=_space(config, candidate),
        )
    else:
        settings = config.search
        tuner = tune.Tuner(
            trainable,
            param_space=_space(config, candidate),
            tune_config=tune.TuneConfig(
                metric=settings.metric,
                mode="min",
                num_samples=settings.trials,
                search_alg=make_search(config, candidate, folder),
                scheduler=_scheduler(config, folder),
                max_concurrent_trials=settings.concurrent or _slots(experiment),
                reuse_actors=True,  # importing torch and transformers anew would cost a short trial more than its rows
                trial_dirname_creator=lambda trial: f"{trial.trial_id}",
            ),
            run_config=tune.RunConfig(
                name=candidate,
                storage_path=str(storage),
                failure_config=tune.FailureConfig(max_failures=settings.max_failures),
                checkpoint_config=tune.CheckpointConfig(num_to_keep=2),
                callbacks=[ReportProgress(candidate)],
                verbose=0,
            ),
        )
    return tuner.fit()


def _can_go_on(folder: Path) -> bool:
    """Whether Tune wrote down enough to go on from; killed before that, a search begins with the study's trials."""
    for state in folder.glob("experiment_state-*.json"):
        try:
            json.loads(state.read_text())
        except ValueError:
            state.unlink()  # cut off by a kill; an earlier one, or the study, knows what it held
    return tune.Tuner.can_restore(str(folder)) and any(folder.glob("experiment_state-*.json"))


def _trainable(config: SearchConfig, candidate: str, experiment: ExperimentConfig) -> Any:
    """The Tune function of a candidate: the loop itself, or for several workers the driver of a Train run."""
    plain = config.experiment_of(candidate, {})
    if experiment.most_workers == 1:
        wanted = cluster.resources(experiment)
        trials = str(Path(config.folder).absolute() / "tune" / candidate)
        return tune.with_resources(tune.with_parameters(_alone, plain=plain, storage=trials), wanted)
    storage = str(Path(config.folder).absolute() / "train")
    together = tune.with_parameters(_together, plain=plain, storage=storage, max_failures=config.search.max_failures)
    # Drivers take no CPU and stay on the head node, off the nodes that come and go.
    return tune.with_resources(together, {"node:__internal_head__": 0.001})


def _alone(values: dict[str, Any], plain: dict[str, Any], storage: str) -> None:
    """A trial of one worker."""

    def report(rung: online.Report, folder: Path | None) -> None:
        assert folder is not None
        tune.report(rung, checkpoint=tune.Checkpoint.from_directory(folder))

    experiment = validate(ExperimentConfig, with_values(plain, values))
    given = tune.get_checkpoint()
    restored = newest_whole(before(given)) if given is not None else None
    if restored is None:
        cluster.drive(experiment, None, report, storage)
    else:
        with restored.as_directory() as folder:
            cluster.drive(experiment, Path(folder), report, storage)


def _together(values: dict[str, Any], plain: dict[str, Any], storage: str, max_failures: int) -> None:
    """A trial of several workers: its Train run has the trial's name, so that a restarted driver goes on with it."""
    cluster.run_workers(
        with_values(plain, values),
        name=f"trial-{tune.get_context().get_trial_id()}",
        storage=storage,
        max_failures=max_failures,
        callbacks=[TuneReportCallback()],
    )


def _space(config: SearchConfig, candidate: str) -> dict[str, Any]:
    return {key: _domain(allowed) for key, allowed in config.candidates[candidate].space.items()}


def _domain(allowed: Range) -> Any:
    if allowed.choice is not None:
        return tune.choice(allowed.choice)
    kind, bounds = next((name, getattr(allowed, name)) for name in _DISTRIBUTIONS if getattr(allowed, name) is not None)
    return _DISTRIBUTIONS[kind](*bounds)


def _scheduler(config: SearchConfig, folder: Path) -> TrialScheduler | None:
    """ASHA on the row cursor: every trial sees the same rows, so a rung is a paired comparison."""
    asha = config.search.asha
    if asha is None:
        return None
    rows = json.loads((folder / "stream.json").read_text())["rows"]
    return ASHAScheduler(
        time_attr="rows",
        max_t=rows + 1,  # above the stream's length: the last row ends a trial, not the scheduler
        grace_period=asha.grace_rows,
        reduction_factor=asha.reduction_factor,
    )


def _slots(experiment: ExperimentConfig) -> int:
    """How many trials the cluster holds at a time."""
    has = ray.cluster_resources()
    wanted = cluster.resources(experiment)
    return max(1, min(int(has.get(name, 0) / (amount * experiment.least_workers)) for name, amount in wanted.items()))


def _collect(config: SearchConfig, folder: Path, grids: dict[str, tune.ResultGrid]) -> None:
    """results.parquet, best.yaml and adapter/ from what Tune kept."""
    frames = []
    best: tuple[float, str, tune.Result] | None = None
    for candidate, grid in grids.items():
        for result in sorted(grid, key=lambda one: one.path):  # Tune's own order changes when a search goes on
            frame = result.metrics_dataframe
            if frame is None or result.metrics is None:
                continue
            frame = frame.drop_duplicates("rows", keep="first")  # a resumed trial reports its last rung again
            finished = bool(result.metrics.get("finished"))
            status = "failed" if result.error else "complete" if finished else "stopped"
            frame = frame.assign(candidate=candidate, trial=result.metrics["trial_id"], status=status)
            frames.append(frame.assign(params=json.dumps(result.config)))
            score = float(result.metrics[config.search.metric])
            if finished and not result.error and (best is None or score < best[0]):
                best = (score, candidate, result)
    if best is None:
        raise RuntimeError(
            f"no trial of {config.name} reached the end of the stream; the errors are in {folder / 'tune'}"
        )
    table = pd.concat(frames, ignore_index=True)
    kept = [c for c in table.columns if not c.startswith("config/") and c not in _TUNE_COLUMNS]
    pq.write_table(pa.Table.from_pandas(table[kept], preserve_index=False), folder / "results.parquet")
    _write_best(config, folder, *best)


_TUNE_COLUMNS = {
    "timestamp",
    "checkpoint_dir_name",
    "should_checkpoint",
    "done",
    "training_iteration",
    "trial_id",
    "date",
    "time_this_iter_s",
    "time_total_s",
    "pid",
    "hostname",
    "node_ip",
    "time_since_restore",
    "iterations_since_restore",
}


def _write_best(config: SearchConfig, folder: Path, score: float, candidate: str, result: tune.Result) -> None:
    plain = config.experiment_of(candidate, result.config or {})
    head = (
        f"# The winner of the search {config.name}: {candidate}, {config.search.metric} {score!r}.\n"
        f"# Run it: python -m ray_jobs.train {_shown(folder / 'best.yaml')}\n"
    )
    (folder / "best.yaml").write_text(head + yaml.safe_dump(plain, sort_keys=False))
    assert result.checkpoint is not None
    with result.checkpoint.as_directory() as saved:
        model = online.trained_model(validate(ExperimentConfig, plain), Path(saved))
    save_adapter(model, folder / "adapter")


def _shown(path: Path) -> str:
    """A path as the user would type it here."""
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)


if __name__ == "__main__":
    app()
