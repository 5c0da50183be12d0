"""What every job needs of Ray: a connection, resources of a trial, and the loop around its reports."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch.distributed as dist
from ray.exceptions import RayActorError

from loko import JacobianError, NonFiniteError, online
from loko.config import ExperimentConfig, validate
from loko.distributed import PeerError, Ranks
from ray_jobs.monitoring import Monitor
from ray_jobs.storage import StorageError, mend, newest_whole, of_run, wait_for_room

log = logging.getLogger(__name__)

__all__ = ["connect", "drive", "gpus_a_worker", "resources", "run_workers", "slots"]

_ENVIRONMENT = {
    # Paths in a config are relative to where the job was started, so no trial may change its folder.
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    # How often Train's controller looks after its workers, in seconds: it bounds what a report costs.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    # Ray's own summary boxes would stand between the lines of ours.
    "RAY_AIR_NEW_OUTPUT": "0",
}
_PASSED_ON = (*_ENVIRONMENT, "HF_HUB_OFFLINE", "LOKO_RESIZE_INTERVAL_S", "LOKO_STORAGE_PATIENCE_S", "PYTHONPATH")
# Worker processes keep freed memory. A step's buffers are of megabytes, and glibc would map and unmap them anew each
# time; on a virtual machine the page faults took half of every step, AdamW's as well as LoKO's.
_ALLOCATOR = {"MALLOC_TRIM_THRESHOLD_": str(1 << 30), "MALLOC_MMAP_THRESHOLD_": str(1 << 30)}


# How often a run with a range of workers looks whether there is room for more; it then goes on from its last rung.
_RESIZE_SECONDS = float(os.environ.get("LOKO_RESIZE_INTERVAL_S", "60"))


def connect(dashboard: bool = False, cpus: int | None = None) -> None:
    """Connect to the cluster of RAY_ADDRESS (as ``ray job submit`` sets it), or start one on this machine, on loopback.

    Args:
        dashboard: start the dashboard too; Ray Train frees what a stopped trial held through it.
        cpus: CPUs that a Ray started here counts with; None is those that there are.
    """
    if ray.is_initialized():
        return
    for key, value in _ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    settings: dict[str, Any] = {
        "logging_level": "ERROR",
        "log_to_driver": False,
        "runtime_env": {"env_vars": _ALLOCATOR | {key: os.environ[key] for key in _PASSED_ON if key in os.environ}},
    }
    if os.environ.get("RAY_ADDRESS"):
        ray.init(**settings)
    else:
        ray.init(address="local", num_cpus=cpus, include_dashboard=dashboard, dashboard_host="127.0.0.1", **settings)


def gpus_a_worker(config: ExperimentConfig) -> float:
    """GPUs of a worker: what the config says, or one where the cluster has any."""
    if config.gpus_per_worker is not None:
        return config.gpus_per_worker
    return 1.0 if ray.cluster_resources().get("GPU", 0) else 0.0


def resources(config: ExperimentConfig) -> dict[str, float]:
    """CPUs and GPUs that one worker takes."""
    wanted = {"CPU": config.cpus_per_worker, "GPU": gpus_a_worker(config)}
    return {name: amount for name, amount in wanted.items() if amount}


def slots(config: ExperimentConfig) -> int:
    """How many runs of a config the cluster holds at a time, as it is now; at least one, that waits for a node."""
    has = ray.cluster_resources()
    wanted = resources(config)
    return max(
        1, min(int(has.get(name, 0) / (amount * config.least_workers) + 1e-9) for name, amount in wanted.items())
    )


def drive(
    config: ExperimentConfig,
    restored: Path | None,
    report: Callable[[online.Report, Path | None], None],
    storage: str,
    group: dist.ProcessGroup | None = None,
    labels: dict[str, str] | None = None,
) -> None:
    """Run the loop from a checkpoint, if there is one, and hand each rung's report and checkpoint folder on.

    A rung that a run goes on from is reported again: whoever was to hear of it may have died before it did.

    Args:
        storage: folder or URL that the checkpoints go to, asked for room before each report.
        labels: run, candidate and trial, as Prometheus shall see them.
    """
    # The job has validated the rows once, before the first trial.
    with Ranks(group, online.default_device()).together():
        run = online.start(config, group=group, validate=False)
        if restored is not None:
            online.resume(run, restored)
    monitor = Monitor(labels or {}, run.cursor)
    again = [online.standing(run)] if 0 < run.cursor < len(run.stream) else []
    for rung in chain(again, online.advance(run)):
        if run.ranks.rank == 0:
            monitor(rung)
        with tempfile.TemporaryDirectory() as folder:
            online.save(run, Path(folder))
            with run.ranks.together():
                if run.ranks.rank == 0:
                    wait_for_room(storage, sum(file.stat().st_size for file in Path(folder).iterdir()))
            report(rung, Path(folder) if run.ranks.rank == 0 else None)


def run_workers(
    data: dict[str, Any],
    *,
    name: str,
    storage: str,
    max_failures: int,
    callbacks: list[Any] | None = None,
    labels: dict[str, str] | None = None,
) -> Any:
    """One run on Ray Train workers that share one filter; started again under the same name it goes on.

    Args:
        data: an experiment as plain data.
        name: name of the Train run, the same for a restarted job.
        storage: folder or URL that every node can write to.
        max_failures: times that workers, or Train's controller, may die; -1 is any number of times.
        callbacks: Ray Train callbacks, such as the one that passes reports on to Tune.
        labels: run, candidate and trial, as Prometheus shall see them.
    """
    config = validate(ExperimentConfig, data)
    gpu = gpus_a_worker(config) > 0
    scaling = ray.train.ScalingConfig(
        num_workers=config.workers,
        use_gpu=gpu,
        resources_per_worker=resources(config),
        elastic_resize_monitor_interval_s=_RESIZE_SECONDS,
    )
    deaths = 0
    while True:
        mend(f"{storage}/{name}")
        trainer = ray.train.torch.TorchTrainer(
            _worker,
            train_loop_config={"experiment": data, "folder": f"{storage}/{name}", "labels": labels or {"run": name}},
            torch_config=ray.train.torch.TorchConfig(backend="nccl" if gpu else "gloo"),
            scaling_config=scaling,
            run_config=ray.train.RunConfig(
                name=name,
                storage_path=storage,
                callbacks=callbacks or [],
                failure_config=ray.train.FailureConfig(max_failures=max_failures),
                checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
            ),
        )
        try:
            result = trainer.fit()
        except RayActorError as error:  # Train restarts its workers, nobody its controller
            deaths += 1
            if 0 <= max_failures < deaths:
                raise
            log.warning("the controller of %s died (%s); going on with a new one", name, error)
            continue
        if isinstance(result.return_value, Exception):
            raise result.return_value
        return result


_PERMANENT = (ValueError, JacobianError, NonFiniteError, StorageError, PeerError)
"""Errors that a restart meets again: bad rows, a model that does not fit, a filter that diverged, storage away."""


def _worker(given: dict[str, Any]) -> Exception | None:
    """The loop of one worker. What a restart cannot mend is returned, what it may mend (a lost peer) is raised."""
    try:
        _learn(**given)
    except _PERMANENT as error:
        return ValueError(str(error)) if isinstance(error, PeerError) else error
    return None


def _learn(experiment: dict[str, Any], folder: str, labels: dict[str, str]) -> None:
    config = validate(ExperimentConfig, experiment)

    def report(rung: online.Report, folder: Path | None) -> None:
        checkpoint = ray.train.Checkpoint.from_directory(folder) if folder is not None else None
        ray.train.report(rung, checkpoint=checkpoint)

    group = dist.group.WORLD if ray.train.get_context().get_world_size() > 1 else None
    # Rank 0 chooses: storage that one rank cannot read for a moment must not make it choose another.
    chosen: list[Any] = [None]
    if group is None or dist.get_rank() == 0:
        chosen = [newest_whole(of_run(folder))]
    if group is not None:
        dist.broadcast_object_list(chosen, src=0)
    if chosen[0] is None:
        drive(config, None, report, folder, group, labels)
    else:
        with chosen[0].as_directory() as restored:
            drive(config, Path(restored), report, folder, group, labels)
