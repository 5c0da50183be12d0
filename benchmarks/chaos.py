"""Kill everything that can be killed, at random, and compare what was learned with an undisturbed run.

    python -m benchmarks.chaos --kills 30 --seed 0 --json benchmarks/results/chaos.json

On a local cluster of three nodes, runs of two workers and searches take turns, as their users start them
(``python -m ray_jobs.train``, ``python -m ray_jobs.tune``). At seeded random moments one of these gets a SIGKILL: a
*worker* (the process that learns), a *driver* (Ray Train's controller; of a search, the process that runs Tune), a
whole *node* (which comes back empty), or the *submitter* (``python -m``, which is started again with the same command,
as it is whenever it ends with an error). Then the disk is full, the folder cannot be written to, the study's database
is locked or gone for a while, and the newest checkpoint is damaged.

What is audited: the digest of the learned row ids, the filter's own count of rows, the parameters and the filter bit
for bit against a run without Ray and without kills, and the study.
"""

from __future__ import annotations

import json as jsonlib
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import optuna
import psutil
import torch
import typer
import yaml
from optuna.trial import TrialState
from ray.cluster_utils import Cluster
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks import worlds
from benchmarks.goals import Goal, print_goals, write
from loko import checkpoint, online
from loko.config import ExperimentConfig, validate
from loko.covariance import LowRank
from ray_jobs import embedded
from ray_jobs.settings import SearchConfig

TITLES = {"worker": ("ray::RayTrainWorker", "ray::ImplicitFunc"), "controller": ("ray::TrainController",)}
PATIENCE = 30.0
"""Seconds that storage is away."""
LIMIT = 300.0
"""Seconds after which a run that storage failed under is given up."""


# ---- what runs


def search(folder: Path, plain: dict[str, Any]) -> dict[str, Any]:
    """Two candidates with two trials each, all of them to the end."""
    del plain["optimizer"]
    return {
        "name": "chaos",
        "results": str(folder / "results"),
        "experiment": plain,
        "candidates": {
            "loko": {
                "optimizer": {"name": "loko"},
                "space": {"optimizer.initial_covariance": {"log_uniform": [0.03, 1.0]}},
                "points": [{"optimizer.initial_covariance": 0.3}],
            },
            "adamw": {"optimizer": {"name": "adamw"}, "space": {"optimizer.lr": {"log_uniform": [1e-3, 1e-2]}}},
        },
        "search": {"trials": 2, "asha": None, "concurrent": 2, "max_failures": 100},
    }


@dataclass
class Job:
    """``python -m`` with arguments, started again until it ends well, as whoever needs its result would do."""

    arguments: list[str]
    log: Path
    address: str | None = None
    starts: int = 0
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)
    all: ClassVar[list[Job]] = []

    def __post_init__(self) -> None:
        self.all.append(self)

    def start(self) -> None:
        kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        kept |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "160", "RAY_DEDUP_LOGS": "0"}
        kept |= {"RAY_ADDRESS": self.address} if self.address else {}
        self.starts += 1
        with self.log.open("ab") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *self.arguments], env=kept, stdout=file, stderr=file, start_new_session=True
            )

    def done(self) -> bool:
        """Whether it has ended well; starts it again where it has ended otherwise."""
        assert self.process is not None
        status = self.process.poll()
        if status is None:
            return False
        if status == 0:
            return True
        if self.starts > 60:
            raise RuntimeError(f"it has been started {self.starts} times; see {self.log}")
        self.start()
        return False

    def kill(self) -> None:
        if self.process is not None and self.process.poll() is None:
            kill_all([psutil.Process(self.process.pid)])
            self.process.wait()


def kill_all(processes: list[psutil.Process]) -> None:
    """SIGKILL processes and their descendants at one stroke."""
    family = []
    for process in processes:
        try:
            process.suspend()  # it starts nothing more
            family += [*process.children(recursive=True), process]
        except psutil.NoSuchProcess:
            continue
    for one in family:
        try:
            one.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue


# ---- where it runs


class Nodes:
    """A head node without CPUs and two that have two each, all on this machine."""

    def __init__(self) -> None:
        self.cluster = Cluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": 0,
                "include_dashboard": True,
                "dashboard_host": "127.0.0.1",
                "dashboard_port": 0,
            },
        )
        self.workers = [self._add(), self._add()]

    def _add(self) -> Any:
        return self.cluster.add_node(num_cpus=2)

    @property
    def address(self) -> str:
        return str(self.cluster.address)

    def raylet(self, node: Any) -> psutil.Process:
        return psutil.Process(node.all_processes["raylet"][0].process.pid)

    def find(self, titles: tuple[str, ...]) -> list[psutil.Process]:
        """The processes of this cluster whose title begins so."""
        found = []
        for node in [self.cluster.head_node, *self.workers]:
            for process in self.raylet(node).children(recursive=True):
                try:
                    if process.cmdline() and process.cmdline()[0].startswith(titles):
                        found.append(process)
                except (psutil.NoSuchProcess, psutil.ZombieProcess):
                    continue
        return found

    def lose(self, rng: random.Random) -> None:
        """Kill a node with all that runs on it, one that learns if there is any; another takes its place."""
        busy = [node for node in self.workers if any(p in self._below(node) for p in self.find(TITLES["worker"]))]
        node = rng.choice(busy or self.workers)
        family = self._below(node)
        self.cluster.remove_node(node, allow_graceful=False)
        kill_all(family)
        self.workers.remove(node)

    def gain(self) -> None:
        self.workers.append(self._add())

    def _below(self, node: Any) -> list[psutil.Process]:
        try:
            return self.raylet(node).children(recursive=True)
        except psutil.NoSuchProcess:
            return []


@dataclass
class Chaos:
    """Kills until a number is reached, at moments and of kinds that the seed decides."""

    nodes: Nodes
    rng: random.Random
    left: int
    seconds: float
    killed: Counter[str] = field(default_factory=Counter)
    bag: list[str] = field(default_factory=list)

    def disturb(self, job: Job, kinds: tuple[str, ...], rungs: Callable[[], int], most: int) -> None:
        """Run a job to its end under at most so many kills."""
        job.start()
        waiting, ready = 0, self._moment()
        seen = rungs()
        while not job.done():
            time.sleep(0.05)
            if self.left == 0 or waiting >= most:
                continue
            if ready[0] and rungs() <= seen:
                continue  # this one comes in the middle of learning: after the next rung
            if ready[0]:
                ready = (False, time.monotonic() + self.rng.uniform(0, 3))
            if time.monotonic() < ready[1]:
                continue
            kind = self._kind(kinds)
            if not self._kill(kind, job):
                continue
            self.left, waiting = self.left - 1, waiting + 1
            print(f"    {self.killed.total():3} killed: {kind}", flush=True)
            ready, seen = self._moment(), rungs()

    def _moment(self) -> tuple[bool, float]:
        """Half of the kills wait for a rung, the others for nothing: start-up is a moment like any other."""
        return self.rng.random() < 0.5, time.monotonic() + self.rng.uniform(0, self.seconds)

    def _kind(self, kinds: tuple[str, ...]) -> str:
        if not any(kind in self.bag for kind in kinds):
            self.bag += self.rng.sample(kinds, len(kinds))
        return next(kind for kind in self.bag if kind in kinds)

    def _kill(self, kind: str, job: Job) -> bool:
        if kind == "node":
            self.nodes.lose(self.rng)
            time.sleep(self.rng.uniform(0, 3))
            self.nodes.gain()
        elif kind == "submitter":
            job.kill()
        else:
            title = TITLES["worker" if kind == "worker" else "controller"]
            found = self.nodes.find(title)
            if not found and kind == "driver" and not self._trains(job):
                job.kill()  # of a search, the process that was started is the driver
            elif not found:
                return False
            else:
                kill_all([self.rng.choice(sorted(found, key=lambda process: process.pid))])
        self.bag.remove(kind)
        self.killed[kind] += 1
        return True

    @staticmethod
    def _trains(job: Job) -> bool:
        return job.arguments[0].endswith("train")


# ---- audit


def difference(one: Path, other: Path) -> float:
    """The largest difference between two checkpoints: parameters, filter, metrics, cursor; inf for another shape."""
    read = [
        {**checkpoint.read_parameters(folder), "state": torch.load(folder / "state.pt", weights_only=True)}
        for folder in (one, other)
    ]
    for state in read:
        del state["state"]["seconds"]
    return _difference(*read)


def moved(one: Path, other: Path) -> float:
    """The largest difference of a parameter or of a parameter's variance: of the filter, not of how it is written down.

    The rows of a low-rank factor may be rotated without changing the covariance.
    """
    variances = []
    for folder in (one, other):
        state = torch.load(folder / "state.pt", weights_only=True)["learner"]["filter"]["covariance"]
        variances.append(LowRank.from_state(state).marginal())
    parameters = [checkpoint.read_parameters(folder) for folder in (one, other)]
    return max(_difference(*parameters), _difference(*variances))


def _difference(one: Any, other: Any) -> float:
    if isinstance(one, dict) and isinstance(other, dict) and set(one) == set(other):
        return max((_difference(one[key], other[key]) for key in one), default=0.0)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
        return max((_difference(a, b) for a, b in zip(one, other, strict=True)), default=0.0)
    if isinstance(one, Tensor) and isinstance(other, Tensor) and one.shape == other.shape:
        return 0.0 if torch.equal(one, other) else float((one.double() - other.double()).abs().max())
    if one == other or (one != one and other != other):
        return 0.0
    return abs(one - other) if isinstance(one, float) and isinstance(other, float) else float("inf")


@dataclass
class Audit:
    """What may have gone wrong, over everything that was run."""

    lost: int = 0
    twice: int = 0
    same_world: float = 0.0
    other_world: float = 0.0
    not_once: int = 0
    running: int = 0

    def rows(self, config: dict[str, Any], folder: Path) -> None:
        """Whether the history of a final state is every row id of the stream, once and in order."""
        parsed = validate(ExperimentConfig, config)
        stream = online.open_stream(parsed.stream, parsed.task)
        ids = np.concatenate([batch.row_ids for batch in stream.batches(64)])
        state = torch.load(folder / "state.pt", weights_only=True)
        counted = _learned_rows(state["learner"])
        learned = len(ids) if counted is None else counted
        self.lost += max(0, len(ids) - min(learned, state["cursor"]))
        self.twice += max(0, learned - len(ids))
        if state["digest"] != zlib.crc32(ids.tobytes()):  # other rows, or in another order: none is vouched for
            self.lost += len(ids)


def _learned_rows(learner: dict[str, Any]) -> int | None:
    """How many rows the filter itself has counted; gradient optimizers count steps."""
    if "filter" in learner:
        return int(learner["filter"]["counters"]["rows"])
    steps = {int(state["step"]) for state in learner["optimizer"]["state"].values() if "step" in state}
    return 4 * steps.pop() if len(steps) == 1 else None


def newest(folder: Path) -> Path:
    """The last whole checkpoint below a run's or a trial's folder."""
    for found in sorted(folder.glob("checkpoint_*"), reverse=True):
        try:
            checkpoint.verify(found)
        except checkpoint.DamagedCheckpointError:
            continue
        return found
    raise RuntimeError(f"no whole checkpoint in {folder}")


def audit_train(audit: Audit, config: dict[str, Any], run: Path, reference: Path, single: Path) -> None:
    final = newest(run / "train")
    audit.rows(config, final)
    audit.same_world = max(audit.same_world, difference(final, reference))
    audit.other_world = max(audit.other_world, moved(final, single))


def audit_search(audit: Audit, data: dict[str, Any], results: Path, references: dict[str, Path], work: Path) -> None:
    config = validate(SearchConfig, data)
    for name in config.candidates:
        study = optuna.load_study(study_name=f"{config.name}/{name}", storage=f"sqlite:///{results / 'study.db'}")
        audit.running += sum(trial.state == TrialState.RUNNING for trial in study.trials)
        audit.not_once += abs(len(study.trials) - (config.search.trials or 0))
        audit.not_once += sum(trial.state != TrialState.COMPLETE for trial in study.trials)
        trials = [path for path in (results / "tune" / name).iterdir() if (path / "params.json").exists()]
        told = sorted(jsonlib.dumps(trial.params, sort_keys=True) for trial in study.trials)
        kept = []
        for trial in trials:
            values = jsonlib.loads((trial / "params.json").read_text())
            kept.append(jsonlib.dumps(values, sort_keys=True))
            plain = config.experiment_of(name, values)
            final = newest(trial)
            audit.rows(plain, final)
            if kept[-1] not in references:
                references[kept[-1]] = work / f"search-{len(references)}"
                worlds.run(plain, references[kept[-1]])
            audit.same_world = max(audit.same_world, difference(final, references[kept[-1]]))
        audit.not_once += sorted(kept) != told


# ---- storage that fails


@contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """A disk of 64 MB at a folder."""
    folder.mkdir(parents=True)
    _mount("-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder))
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=False)


@contextmanager
def full(folder: Path) -> Iterator[None]:
    """Not a byte left on the disk of a folder."""
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        while file.write(b"\0" * 4096):
            pass
    try:
        yield
    finally:
        filler.unlink()


@contextmanager
def unwritable(folder: Path) -> Iterator[None]:
    """Nothing can be created or opened for writing in a folder."""
    _mount("--bind", str(folder), str(folder))
    _mount("-o", "remount,bind,ro", str(folder))
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def _mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True, capture_output=True)


@contextmanager
def locked(database: Path) -> Iterator[None]:
    """Another process holds the database for itself."""
    connection = sqlite3.connect(database, isolation_level=None, timeout=60)
    connection.execute("BEGIN EXCLUSIVE")
    try:
        yield
    finally:
        connection.execute("ROLLBACK")
        connection.close()


@contextmanager
def gone(database: Path) -> Iterator[None]:
    """The database is not where it was."""
    away = database.with_suffix(".away")
    database.rename(away)
    try:
        yield
    finally:
        away.replace(database)


def damage(checkpoint_folder: Path) -> None:
    """One byte of the filter's state, as a bad sector leaves it."""
    path = checkpoint_folder / "state.pt"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def until(job: Job, condition: Callable[[], bool]) -> None:
    """Wait for a condition while a job runs."""
    end = time.monotonic() + LIMIT
    while not condition():
        if job.done():
            raise RuntimeError(f"{job.log}: it ended before anything could be done to it")
        if time.monotonic() > end:
            raise RuntimeError(f"{job.log}: nothing happened for {LIMIT:.0f} s")
        time.sleep(0.05)


def finish(job: Job) -> None:
    """Wait for the end of a job."""
    end = time.monotonic() + LIMIT
    while not job.done():
        if time.monotonic() > end:
            job.kill()
            raise RuntimeError(f"{job.log}: it did not end within {LIMIT:.0f} s")
        time.sleep(0.1)


@dataclass
class Faults:
    """Each fault on a run or a search of its own, audited like any other."""

    address: str
    work: Path
    plain: dict[str, Any]
    searched: Callable[[Path], dict[str, Any]]
    references: dict[str, Path]
    found: list[dict[str, Any]] = field(default_factory=list)

    def run(self, chosen: str) -> None:
        """Every fault whose name contains this."""
        mounts = os.geteuid() == 0 and shutil.which("mount") is not None
        train: dict[str, tuple[Callable[[Path], Any] | None, bool]] = {
            "newest checkpoint damaged": (None, False),
            "disk full": (full, True),
            "folder unwritable": (lambda runs: unwritable(runs / "one"), False),
        }
        search: dict[str, tuple[Callable[[Path], Any] | None, bool]] = {
            "newest checkpoint damaged, search": (None, False),
            "database locked": (lambda results: locked(results / "study.db"), False),
            "database gone": (lambda results: gone(results / "study.db"), False),
            "disk full, search": (lambda results: full(results.parent), True),
        }
        for faults, do in ((train, self._train), (search, self._search)):
            for name, (fault, disk) in faults.items():
                if chosen not in name:
                    continue
                if not mounts and (disk or "unwritable" in name):
                    print(f"  {name}: left out, there is no right to mount")
                    continue
                try:
                    do(name, fault, disk)
                except Exception as error:  # one fault that is not survived must not hide the others
                    print(f"  {name}: {type(error).__name__}: {error}", flush=True)
                    self.found.append({"fault": name, "starts": 0, **asdict(Audit(lost=-1)), "error": str(error)})

    def _train(self, name: str, fault: Callable[[Path], Any] | None, disk: bool) -> None:
        folder = self.work / name.replace(" ", "-").replace(",", "")
        folder.mkdir()
        with small_disk(folder / "runs") if disk else nullcontext():
            job = train_job(self.plain, folder, self.address)
            job.start()
            kept = folder / "runs" / "one" / "train"
            until(job, lambda: len(list(kept.glob("checkpoint_*/checkpoint.json"))) >= 2)
            if fault is None:
                job.kill()
                damage(newest(kept))
            else:
                self._hold(fault(folder / "runs"), job)
            finish(job)
            audit = Audit()
            audit_train(audit, self.plain, folder / "runs" / "one", self.work / "two", self.work / "one")
            self._note(name, audit, job)

    def _search(self, name: str, fault: Callable[[Path], Any] | None, disk: bool) -> None:
        folder = self.work / name.replace(" ", "-").replace(",", "")
        folder.mkdir()
        with small_disk(folder / "disk") if disk else nullcontext():
            results = folder / "disk" / "results" if disk else folder / "results"
            data = {**self.searched(folder), "results": str(results)}
            job = search_job(data, folder, self.address)
            job.start()
            until(job, lambda: len(list(results.glob("tune/loko/*/checkpoint_*/checkpoint.json"))) >= 3)
            if fault is None:
                job.kill()
                for trial in (results / "tune" / "loko").iterdir():
                    if list(trial.glob("checkpoint_*/checkpoint.json")):
                        damage(newest(trial))
            else:
                self._hold(fault(results), job)
            finish(job)
            audit = Audit()
            audit_search(audit, data, results, self.references, self.work)
            self._note(name, audit, job)

    def _hold(self, fault: Any, job: Job) -> None:
        with fault:
            end = time.monotonic() + PATIENCE
            while time.monotonic() < end:
                assert job.process is not None
                if job.process.poll() is not None:  # failed; it is started again once the fault is over
                    break
                time.sleep(0.1)
            time.sleep(max(0.0, end - time.monotonic()))

    def _note(self, name: str, audit: Audit, job: Job) -> None:
        print(f"  {name}: {audit}, started {job.starts} times", flush=True)
        self.found.append({"fault": name, "starts": job.starts, **asdict(audit)})

    def goals(self) -> list[Goal]:
        keys = ("lost", "twice", "not_once", "running", "same_world")
        return [
            Goal(
                f"{one['fault']}: rows lost or twice, trials not once or running, difference",
                "0",
                sum(one[key] for key in keys),
                all(one[key] == 0 for key in keys),
            )
            for one in self.found
        ]


# ---- the benchmark


def main(
    json: Annotated[Path | None, typer.Option(help="write the figures here")] = None,
    kills: Annotated[int, typer.Option(help="how many")] = 30,
    seed: Annotated[int, typer.Option(help="of kinds and moments")] = 0,
    rows: Annotated[int, typer.Option(help="of the stream that a run of two workers learns")] = 1200,
    search_rows: Annotated[int, typer.Option(help="of the stream that a trial learns")] = 600,
    each: Annotated[int, typer.Option(help="most kills in one run or search")] = 6,
    kinds: Annotated[str, typer.Option(help="what is killed")] = "worker,driver,node,submitter",
    faults: Annotated[str, typer.Option(help="storage faults whose name contains this; 'none' leaves them out")] = "",
    keep: Annotated[Path | None, typer.Option(help="work here, take what is here, leave everything")] = None,
) -> None:
    """Kill, audit, and print the table."""
    begun = time.monotonic()
    work = (keep or Path(tempfile.mkdtemp(prefix="chaos-"))).absolute()
    work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    embedded.embed(work / "mnist", embedded.EmbeddedConfig(epochs=2))
    plain = worlds.experiment(work / "mnist", rows, workers=2)
    for name, workers in (("two", 2), ("one", 1)):
        if not (work / name / "report.json").exists():
            worlds.run(plain, work / name, workers)
    audit = Audit()
    references: dict[str, Path] = {}

    def searched(folder: Path) -> dict[str, Any]:
        return search(folder, worlds.experiment(work / "mnist", search_rows))

    rng = random.Random(seed)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the nodes end with it
    nodes = Nodes()
    try:
        chaos = Chaos(nodes, rng, kills, 8.0)
        chosen = tuple(kinds.split(","))
        number = 0
        while chaos.left:
            number += 1
            folder = work / f"run-{number}"
            folder.mkdir()
            if number % 2:
                kept = folder / "runs" / "one" / "train"
                chaos.disturb(train_job(plain, folder, nodes.address), chosen, partial(_rungs, kept), each)
                audit_train(audit, plain, folder / "runs" / "one", work / "two", work / "one")
            else:
                data = searched(folder)
                # Of a search the submitter is the driver.
                possible = tuple(kind for kind in chosen if kind != "submitter" or "driver" not in chosen)
                kept = folder / "results" / "tune"
                chaos.disturb(search_job(data, folder, nodes.address), possible, partial(_rungs, kept), each)
                audit_search(audit, data, folder / "results", references, work)
            print(f"  run {number}: {audit}", flush=True)
        disks = Faults(nodes.address, work, plain, searched, references)
        disks.run(faults)
    finally:
        for job in Job.all:
            job.kill()
        nodes.cluster.shutdown()
    about = {"seed": seed, "rows": rows, "search_rows": search_rows, "runs": number, "faults": disks.found}
    report(audit, chaos, disks.goals(), time.monotonic() - begun, json, about)
    if keep is None:
        shutil.rmtree(work, ignore_errors=True)


def train_job(plain: dict[str, Any], folder: Path, address: str) -> Job:
    (folder / "experiment.yaml").write_text(yaml.safe_dump(plain))
    arguments = [
        "ray_jobs.train", str(folder / "experiment.yaml"), "--name", "one", "--results", str(folder / "runs"),
        "--max-failures", "-1",
    ]  # fmt: skip
    return Job(arguments, folder / "log", address)


def search_job(data: dict[str, Any], folder: Path, address: str) -> Job:
    (folder / "search.yaml").write_text(yaml.safe_dump(data))
    return Job(["ray_jobs.tune", str(folder / "search.yaml")], folder / "log", address)


def _rungs(folder: Path) -> int:
    """When the last checkpoint below a folder was written, in nanoseconds."""
    found = list(folder.glob("**/checkpoint.json"))
    times = []
    for path in found:
        try:
            times.append(path.stat().st_mtime_ns)
        except FileNotFoundError:
            continue
    return max(times, default=0)


def report(
    audit: Audit, chaos: Chaos, more: list[Goal], seconds: float, json: Path | None, about: dict[str, Any]
) -> None:
    goals = [
        Goal("kills", "30", chaos.killed.total(), chaos.killed.total() >= 30),
        Goal("rows lost", "0", audit.lost, audit.lost == 0),
        Goal("rows learned twice", "0", audit.twice, audit.twice == 0),
        Goal("adapter and filter off an undisturbed run of as many workers", "0, bit for bit", audit.same_world,
             audit.same_world == 0),
        Goal("parameters and their variances off a run of one worker", "<= 1e-5", audit.other_world,
             audit.other_world <= 1e-5),
        Goal("trials not in the study exactly once", "0", audit.not_once, audit.not_once == 0),
        Goal("trials left RUNNING", "0", audit.running, audit.running == 0),
        *more,
        Goal("minutes", "<= 20", seconds / 60, seconds <= 1200),
    ]  # fmt: skip
    table = Table("killed", "times", title="Chaos", title_justify="left")
    for kind, count in sorted(chaos.killed.items()):
        table.add_row(kind, str(count))
    Console().print(table)
    print_goals(goals)
    if json is not None:
        write(json, goals, killed=dict(chaos.killed), seconds=seconds, **about)


if __name__ == "__main__":
    typer.run(main)
