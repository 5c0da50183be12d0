"""Trials of a search that share one process and one backbone (``search.pack``).

Each stays a trial of Tune and of the study: its rungs, its checkpoints, its end are its own, and the scheduler stops
any of them. But its Tune function only passes on what a host learns (``pack_host``), and imports neither torch nor a
model. A trial takes no CPU, a host takes what an unpacked trial would.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.exceptions import RayActorError

__all__ = ["hosts", "trainable"]

_PAUSE = 0.2
_RESTART_SECONDS = 120.0


@contextmanager
def hosts(
    plain: dict[str, Any], size: int, count: int, resources: dict[str, float], storage: str
) -> Iterator[list[Any]]:
    """Processes that each hold one backbone and so many trials; they end with the block.

    Args:
        plain: the experiment, as plain data; the optimizer in it is replaced by each trial's.
        size: trials in each.
        count: how many.
        resources: CPUs and GPUs of each.
        storage: folder or URL that checkpoints go to.
    """
    from ray_jobs.pack_host import Host

    actor = ray.remote(Host).options(
        num_cpus=resources.get("CPU", 0),
        num_gpus=resources.get("GPU", 0),
        max_restarts=-1,  # a new process on whatever node is left; its trials come back with their checkpoints
        max_concurrency=4 * size + 8,
    )
    started = [actor.remote(plain, size, storage) for _ in range(count)]
    try:
        yield started
    finally:
        for one in started:
            ray.kill(one)


def trainable(given: list[Any], plain: dict[str, Any]) -> Any:
    """What Tune runs for each trial.

    Args:
        given: the hosts.
        plain: the experiment of the candidate, as plain data.
    """
    wrapped = tune.with_parameters(_member, hosts=given, plain=plain)
    return tune.with_resources(wrapped, {"node:__internal_head__": 0.001})


def _member(values: dict[str, Any], hosts: list[Any], plain: dict[str, Any]) -> None:
    """A trial: each rung is learned by a host, and reported here."""
    name = tune.get_context().get_trial_id()
    host = _place(hosts, name, plain, values)
    there = True
    try:
        again = True
        while True:
            report, files = ray.get(host.rung.remote(name, again))
            again = False
            with tempfile.TemporaryDirectory() as folder:
                for path, content in files.items():
                    (Path(folder) / path).write_bytes(content)
                tune.report(report, checkpoint=tune.Checkpoint.from_directory(folder))
            if report["finished"]:
                return
    except RayActorError:  # Tune starts the trial again, and a late leave would take that one out of the new host
        there = False
        raise
    finally:  # also when the scheduler has stopped the trial: report raises SystemExit then
        if there:
            host.leave.remote(name)


def _place(hosts: list[Any], name: str, plain: dict[str, Any], values: dict[str, Any]) -> Any:
    """Join the host with the fewest trials that takes this one; waits while all are full or restarted."""
    deadline = time.monotonic() + _RESTART_SECONDS
    checkpoint = tune.get_checkpoint()
    while True:
        try:
            loads = ray.get([host.load.remote() for host in hosts])
            for _, host in sorted(zip(loads, hosts, strict=True), key=lambda pair: pair[0]):
                if ray.get(host.join.remote(name, plain, values, checkpoint)):
                    return host
        except RayActorError:  # Ray is starting it again
            if time.monotonic() > deadline:
                raise
        time.sleep(_PAUSE)
