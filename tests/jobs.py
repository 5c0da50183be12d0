"""Jobs as their users start them: in processes of their own, with a Ray of their own."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import tiny
import yaml

ROOT = Path(__file__).parents[1]
LIMIT = 300


def search(folder: Path, rows: int = 96, **changes: Any) -> Path:
    """A search of two candidates with two trials each as a YAML file; its rows and its results are in the folder."""
    experiment = tiny.experiment(tiny.shards(folder / "rows", rows), report_every=24)
    del experiment["optimizer"]
    config: dict[str, Any] = {
        "name": "tiny",
        "results": str(folder / "results"),
        "experiment": experiment,
        "candidates": {
            "loko": {
                "optimizer": {"name": "loko", "covariance": "diagonal"},
                "space": {
                    "optimizer.initial_covariance": {"log_uniform": [0.1, 3.0]},
                    "optimizer.noise_decay": {"uniform": [0.8, 0.99]},
                },
                "points": [{"optimizer.initial_covariance": 0.3, "optimizer.noise_decay": 0.95}],
            },
            "adamw": {"optimizer": {"name": "adamw"}, "space": {"optimizer.lr": {"log_uniform": [1e-3, 1e-1]}}},
        },
        "search": {"trials": 2, "asha": {"grace_rows": 48, "reduction_factor": 2}},
        **changes,
    }
    path = folder / "search.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path


def environment(**more: str) -> dict[str, str]:
    """The environment of a job: this repository importable, one thread, no Ray that happens to run here."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    own = {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "COLUMNS": "160",
        "RAY_worker_niceness": "0",  # Ray's 15 would starve the trials where anything else runs beside the tests
    }
    return {**kept, **own, **more}


def run(*arguments: object, cwd: Path = ROOT, **more: str) -> subprocess.CompletedProcess[str]:
    """``python -m`` with these arguments, to its end."""
    return subprocess.run(
        [sys.executable, "-m", *map(str, arguments)],
        cwd=cwd,
        env=environment(**more),
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )


@contextmanager
def started(*arguments: object, when: Callable[[], bool], log: Path) -> Iterator[subprocess.Popen[Any]]:
    """``python -m``, running, as soon as the condition holds; killed with everything it started if the block fails."""
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", *map(str, arguments)],
            cwd=ROOT,
            env=environment(),
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        wait_until(when, process, log)
        yield process
    finally:
        if process.poll() is None:
            kill(process)


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[Any], log: Path) -> None:
    """Return when a condition holds; a process that ended before, or takes too long, is an error with its log."""
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert process.poll() is None, f"ended before it came that far:\n{log.read_text()}"
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.005)


def run_and_kill(*arguments: object, when: Callable[[], bool], log: Path) -> None:
    """Start ``python -m``, and as soon as the condition holds kill it with everything it started, at one stroke."""
    with started(*arguments, when=when, log=log) as process:
        kill(process)


def kill(process: subprocess.Popen[Any]) -> None:
    """SIGKILL a process that was started here and all its descendants; returns when they are gone."""
    parent = psutil.Process(process.pid)
    parent.suspend()  # it starts nothing more
    family = [*parent.children(recursive=True), parent]
    for one in family:
        try:
            one.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue
    process.wait()
    psutil.wait_procs(family, timeout=60)
