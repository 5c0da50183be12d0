"""Checkpoints where a job keeps them: the newest whole one, and a disk that is full or away for a while."""

from __future__ import annotations

import functools
import importlib.util
import json
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pyarrow.fs
import ray.train
from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from sqlalchemy.exc import OperationalError

from loko import checkpoint
from loko.checkpoint import DamagedCheckpointError
from ray_jobs.places import file_system

__all__ = [
    "StorageError",
    "before",
    "mend",
    "newest_whole",
    "of_run",
    "patiently",
    "stand_in",
    "study_storage",
    "wait_for_room",
]

log = logging.getLogger(__name__)

PATIENCE = float(os.environ.get("LOKO_STORAGE_PATIENCE_S", "300"))
"""Seconds that a job waits for storage to come back before it fails."""

_FIRST_PAUSE, _LONGEST_PAUSE = 0.2, 5.0
_SNAPSHOT = "checkpoint_manager_snapshot.json"

Value = TypeVar("Value")


class StorageError(OSError):
    """Storage that stayed full, unwritable or away; nothing that was learned up to the last rung is lost."""


def patiently(
    action: Callable[[], Value], what: str, errors: tuple[type[BaseException], ...], seconds: float | None = None
) -> Value:
    """Do something to storage, again and again while it fails.

    Args:
        action: safe to do twice.
        what: for messages.
        errors: those that may pass; others are raised at once.
        seconds: how long to try; None is ``PATIENCE``.

    Raises:
        StorageError: it never passed; the message says what to do.
    """
    limit = PATIENCE if seconds is None else seconds
    deadline, pause = time.monotonic() + limit, _FIRST_PAUSE
    while True:
        try:
            return action()
        except errors as error:
            reason = str(error.__cause__ or error).splitlines()[0]
            if time.monotonic() + pause > deadline:
                raise StorageError(
                    f"{what} failed for {limit:.0f} s: {reason}. Everything up to the last rung is safe: mend the "
                    "storage (room, permissions, the database's server), then run the same command again"
                ) from error
            log.warning("%s: %s; trying again", what, reason)
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)


def wait_for_room(url: str, size: int) -> None:
    """Return once ``size`` bytes can be written into a local folder; remote stores retry by themselves.

    Ray uploads a checkpoint once, and a report that failed half way cannot be repeated: so the disk is asked before.

    Raises:
        StorageError: it cannot be written to.
    """
    filesystem, folder = file_system(url)
    if not isinstance(filesystem, pyarrow.fs.LocalFileSystem):
        return
    probe = Path(folder) / f".room-{os.getpid()}"

    def write() -> None:
        try:
            probe.parent.mkdir(parents=True, exist_ok=True)
            with probe.open("wb") as file:
                file.write(b"\0" * size)
                file.flush()
                os.fsync(file.fileno())
        finally:
            probe.unlink(missing_ok=True)

    patiently(write, f"writing {size} bytes to {folder}", (OSError,))


def newest_whole(candidates: list[ray.train.Checkpoint]) -> ray.train.Checkpoint | None:
    """The first checkpoint that is whole; None where there is none, and a run starts from its first row.

    The learner is deterministic, so a run that goes on from an earlier checkpoint comes to the same end.
    """
    for candidate in candidates:
        try:
            with candidate.as_directory() as folder:
                checkpoint.verify(Path(folder))
        except (DamagedCheckpointError, OSError) as error:
            log.warning("%s; going back to the checkpoint before it", error)
        else:
            return candidate
    if candidates:
        log.warning("none of %d checkpoints is whole: the run starts again from its first row", len(candidates))
    return None


def of_run(url: str) -> list[ray.train.Checkpoint]:
    """The checkpoints in the folder of a run, newest first, whether or not Ray's own list has them."""
    filesystem, folder = file_system(url)
    selector = pyarrow.fs.FileSelector(folder, allow_not_found=True)
    names = [
        info.path
        for info in filesystem.get_file_info(selector)
        if info.type == pyarrow.fs.FileType.Directory and info.base_name.startswith("checkpoint_")
    ]
    return [ray.train.Checkpoint(path, filesystem) for path in sorted(names, reverse=True)]


def before(given: ray.train.Checkpoint) -> list[ray.train.Checkpoint]:
    """A checkpoint that Tune hands to a trial, and those before it, newest first."""
    folder = given.path.rstrip("/").rpartition("/")[0]
    selector = pyarrow.fs.FileSelector(folder, allow_not_found=True)
    names = [info.path for info in given.filesystem.get_file_info(selector) if info.path < given.path.rstrip("/")]
    earlier = sorted((name for name in names if name.rpartition("/")[2].startswith("checkpoint_")), reverse=True)
    return [given, *(ray.train.Checkpoint(path, given.filesystem) for path in earlier)]


def stand_in(named: list[ray.train.Checkpoint]) -> None:
    """Put an empty folder in the place of each checkpoint that is gone, of those that Tune would go on from.

    Tune writes down which checkpoint is a trial's newest some time after it has removed the one before, so a kill
    between the two leaves it with a name of nothing, and it would fail the trial. An empty folder is a checkpoint
    that is not whole: the trial goes back to one before it, or to its first row, and comes to the same end.
    """
    for one in named:
        if one.filesystem.get_file_info(one.path).type == pyarrow.fs.FileType.NotFound:
            log.warning("%s is gone; its trial goes back to the checkpoint before it", one.path)
            one.filesystem.create_dir(one.path, recursive=True)


def mend(url: str) -> None:
    """Remove Ray Train's list of a run's checkpoints where it cannot be used: Train would refuse to start.

    It is written in place, so a kill or a full disk can leave half of it; and it can name a folder that is gone. The
    checkpoints themselves stay, and are found without it.
    """
    filesystem, folder = file_system(url)
    path = f"{folder}/{_SNAPSHOT}"
    if filesystem.get_file_info(path).type == pyarrow.fs.FileType.NotFound:
        return
    try:
        with filesystem.open_input_stream(path) as file:
            listed = [one["checkpoint_dir_name"] for one in json.loads(file.read())["checkpoint_results"]]
    except (ValueError, KeyError, TypeError) as error:
        log.warning("%s is cut off (%s); the checkpoints are found without it", path, error)
    else:
        here = {found.path.rpartition("/")[2] for found in of_run(url)}
        if here.issuperset(name.strip("/") for name in listed):
            return
        log.warning("%s names checkpoints that are gone; the others are found without it", path)
    filesystem.delete_file(path)


_METHODS = (
    "create_new_study", "get_study_id_from_name", "get_study_name_from_id", "get_study_directions", "get_all_studies",
    "set_study_user_attr", "set_study_system_attr", "get_study_user_attrs", "get_study_system_attrs",
    "create_new_trial", "set_trial_param", "set_trial_state_values", "set_trial_intermediate_value",
    "set_trial_user_attr", "set_trial_system_attr", "get_trial", "get_all_trials", "_get_trials",
)  # fmt: skip


class PatientStorage(RDBStorage):
    """Optuna's RDB storage that waits for a database that is locked or away, instead of ending the search.

    Each of its methods is one transaction, so doing it again after an error does it once.
    """


def _patient(name: str) -> Callable[..., Any]:
    method = getattr(RDBStorage, name)

    @functools.wraps(method)
    def call(self: PatientStorage, *args: Any, **kwargs: Any) -> Any:
        what = f"{name} on {self.url}"
        return patiently(lambda: method(self, *args, **kwargs), what, (StorageInternalError, OperationalError))

    return call


for _name in _METHODS:
    setattr(PatientStorage, _name, _patient(_name))


def study_storage(url: str) -> BaseStorage:
    """The Optuna storage at a URL; waits until its database can be reached.

    Args:
        url: journal:PATH, sqlite:///PATH, postgresql://USER@HOST/DB, or what else SQLAlchemy knows.

    Raises:
        StorageError: it cannot be reached, or its driver is not installed.
    """
    if url.startswith("journal:"):
        path = Path(url.removeprefix("journal:"))
        path.parent.mkdir(parents=True, exist_ok=True)
        return JournalStorage(JournalFileBackend(str(path)))
    if url.startswith("postgresql:"):
        if importlib.util.find_spec("psycopg") is None:
            raise StorageError(f'{url} needs the package psycopg: pip install "loko[postgresql]"')
        url = url.replace("postgresql:", "postgresql+psycopg:", 1)
    # A connection may have died while nobody used it.
    engine = {} if url.startswith("sqlite") else {"pool_pre_ping": True}
    return patiently(
        lambda: PatientStorage(url, engine_kwargs=engine, heartbeat_interval=None),
        f"opening the study's storage {url}",
        (StorageInternalError, OperationalError),
    )
