"""What Ray and Optuna cost a search, beside the loop that learns.

    python -m benchmarks.overhead --json benchmarks/results/overhead.json

Two measurements. *Trials*: a real search, one trial at a time, on a few rows of a tiny model; the time of each trial
from the end of the one before to its own end, less the time of the same loop without Ray, measured in this process.
*Plan*: a search of a thousand trials that sleep instead of learning, through the real searcher, scheduler, study and
callbacks; the driver's own CPU time a trial says how many trials it can start and end in a second, on any cluster.
"""

import argparse
import functools
import itertools
import math
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from ray import tune

from benchmarks.goals import Goal, print_goals, write
from loko import online
from loko.config import ExperimentConfig, validate
from loko.stream import write_shards
from ray_jobs import cluster, scheduling, trials
from ray_jobs.halving import Rungs
from ray_jobs.places import Place
from ray_jobs.progress import ReportProgress
from ray_jobs.settings import SearchConfig
from ray_jobs.storage import study_storage
from ray_jobs.study import Study

_MODEL_ROWS = 1000  # rows of a planned trial
_REPORTS = 5
_ROWS = 480


class Clock(tune.Callback):
    """When each trial was over, as the driver sees it."""

    ends: list[float] = []  # noqa: RUF012  Tune pickles the callback, not this

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        """A trial's end."""
        Clock.ends.append(time.perf_counter())


def search(folder: Path, rows: Path, count: int, **settings: Any) -> SearchConfig:
    """A search of one candidate over two keys."""
    plain = {
        "name": "overhead",
        "results": str(folder),
        "experiment": _experiment(rows),
        "candidates": {
            "loko": {
                "optimizer": {"name": "loko", "covariance": "diagonal"},
                "space": {
                    "optimizer.initial_covariance": {"log_uniform": [0.1, 3.0]},
                    "optimizer.noise_decay": {"uniform": [0.8, 0.99]},
                },
            }
        },
        "search": {"trials": count, "asha": None, **settings},
    }
    return validate(SearchConfig, plain)


def measure_trials(folder: Path, count: int) -> dict[str, float]:
    """Seconds that a one-worker trial takes beyond its loop: the first, which loads the libraries, and the others."""
    config = search(folder / "trials", _write_rows(folder / "rows"), count, concurrent=1)
    Clock.ends = []
    started = time.perf_counter()
    grid = _fit(config, folder / "trials", trials.trainable(config, "loko", Place(str(folder / "trials"))))
    ends = [started, *Clock.ends]
    walls = [after - before for before, after in itertools.pairwise(ends)]
    alone = []
    for result in grid:
        experiment = validate(ExperimentConfig, config.experiment_of("loko", result.config))
        begun = time.perf_counter()
        for _ in online.advance(online.start(experiment, validate=False)):
            pass
        alone.append(time.perf_counter() - begun)
    loop = statistics.median(alone)
    return {
        "trials": count,
        "loop_seconds": loop,
        "first_trial_seconds": walls[0] - alone[0],
        "overhead_seconds": statistics.median(walls[1:]) - loop,
        "overhead_seconds_mean_with_the_first": statistics.mean(walls) - loop,
    }


def plan(folder: Path, count: int, at_a_time: int, seconds: float) -> dict[str, float]:
    """A search of sleeping trials: what the driver does for them, and how much of its time that takes.

    Args:
        folder: where results, study and Tune's own files go.
        count: trials.
        at_a_time: trials that sleep at a time.
        seconds: how long each would sleep to its end; successive halving stops most of them before.
    """
    asha = {"grace_rows": _MODEL_ROWS // _REPORTS, "reduction_factor": 3}
    config = search(folder / "plan", folder, count, concurrent=at_a_time, asha=asha)
    sleeping = tune.with_resources(functools.partial(_sleep, seconds=seconds), {"CPU": 1})
    wall, cpu = time.perf_counter(), time.process_time()
    grid = _fit(config, folder / "plan", sleeping)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    reports = sum(result.metrics.get("training_iteration", 0) for result in grid)
    slept = seconds / _REPORTS * reports / at_a_time
    return {
        "trials": len(grid),
        "at_a_time": at_a_time,
        "reports": reports,
        "wall_seconds": wall,
        "slept_seconds": slept,
        "driver_cpu_seconds": cpu,
        "driver_cpu_seconds_a_trial": cpu / len(grid),
        "trials_a_second_the_driver_can_sustain": len(grid) / cpu,
        "trials_a_second_seen": len(grid) / wall,
    }


def _sleep(values: dict[str, Any], seconds: float) -> None:
    """A trial that reports as a real one does and learns nothing; better the nearer p₀ is to one."""
    for number in range(1, _REPORTS + 1):
        time.sleep(seconds / _REPORTS)
        nll = abs(math.log(values["optimizer.initial_covariance"])) + 1 / number
        tune.report({"rows": number * _MODEL_ROWS // _REPORTS, "nll": nll, "finished": number == _REPORTS})


def _fit(config: SearchConfig, folder: Path, trainable: Any) -> tune.ResultGrid:
    """The Tuner of ``ray_jobs.tune``, with a clock."""
    settings, place = config.search, Place(str(folder))
    folder.mkdir(exist_ok=True)
    study = Study(config, "loko", study_storage(f"sqlite:///{folder / 'study.db'}"))
    asha = settings.asha
    rungs = None if asha is None else Rungs(asha.grace_rows, asha.reduction_factor, _MODEL_ROWS)
    scheduling.enter("loko", scheduling.Search(study, rungs, lambda: settings.concurrent or 1))
    callbacks = [ReportProgress("loko"), scheduling.OnlyFailuresInARow(), Clock()]
    return scheduling.tuner(config, "loko", trainable, place, callbacks).fit()


_CLASSES, _FEATURES = 3, ["a", "b", "c", "d"]


def _write_rows(folder: Path) -> Path:
    """Rows of a small table: twelve rungs of a loop that takes a fraction of a second."""
    random = np.random.default_rng(0)
    labels = random.integers(_CLASSES, size=_ROWS)
    values = random.normal(size=(_ROWS, len(_FEATURES))).astype(np.float32) + labels[:, None]
    table = pa.table({**{name: values[:, i] for i, name in enumerate(_FEATURES)}, "label": labels})
    write_shards(table, folder, rows_per_shard=_ROWS)
    return folder


def _experiment(rows: Path) -> dict[str, Any]:
    """A small network with LoRA on those rows."""
    task = {
        "kind": "table",
        "model": "mlp",
        "num_labels": _CLASSES,
        "hidden_sizes": [8],
        "columns": {"features": _FEATURES, "label": "label"},
        "adapter": {"method": "lora", "rank": 2, "alpha": 4},
    }
    return {"stream": {"paths": str(rows)}, "task": task, "batch_size": 4, "report_every": 40, "near_future": 1}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="where the goals and all figures go")
    parser.add_argument("--trials", type=int, default=12, help="trials that learn")
    parser.add_argument("--planned", type=int, default=1000, help="trials that sleep")
    parser.add_argument("--at-a-time", type=int, default=16, help="trials that sleep at a time")
    parser.add_argument("--seconds", type=float, default=5.0, help="how long one sleeps to its end")
    options = parser.parse_args()
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15 would measure what else runs on the machine
    with tempfile.TemporaryDirectory(prefix="loko-overhead-") as name:
        cluster.connect()
        one = measure_trials(Path(name), options.trials)
        ray.shutdown()
        print("one-worker trials:", {key: round(value, 3) for key, value in one.items()}, flush=True)
        cluster.connect(cpus=options.at_a_time)
        many = plan(Path(name), options.planned, options.at_a_time, options.seconds)
        ray.shutdown()
        print("planned search:", {key: round(value, 4) for key, value in many.items()})
    goals = [
        Goal("Ray's part of a one-worker trial, s", "<= 2", one["overhead_seconds"], one["overhead_seconds"] <= 2),
        Goal(
            "trials a second that the driver sustains",
            f">= 1, and so a trial of 5 minutes on each of {60 * 5} workers",
            many["trials_a_second_the_driver_can_sustain"],
            many["trials_a_second_the_driver_can_sustain"] >= 1,
        ),
        Goal(
            "planned trials that ended",
            f"{options.planned}",
            many["trials"],
            many["trials"] == options.planned,
        ),
    ]
    print_goals(goals)
    if options.json is not None:
        write(options.json, goals, trials=one, plan=many)


if __name__ == "__main__":
    main()
