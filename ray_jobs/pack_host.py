"""A process that holds one backbone, and the trials that learn over it together.

A trial that has reported a rung comes back for the next one, or does not: the scheduler may have stopped it. So before
each rung the host waits for the trials it knows, takes those that stand before the same row, the earliest first, and
lets them learn to their next rung as one pack. Trials that join late thus catch up with the others and run with them.
"""

from __future__ import annotations

import asyncio
import logging
import tempfile
import time
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray.train

from loko import online
from loko.config import ExperimentConfig, validate
from loko.packing import Pack, PackingError
from ray_jobs.settings import with_values
from ray_jobs.storage import before, newest_whole, wait_for_room

__all__ = ["Host"]

log = logging.getLogger(__name__)

PATIENCE = 5.0
"""Seconds that a rung waits for a trial that has reported and not come back; a first rung also for trials to come."""

Files = dict[str, bytes]
"""A checkpoint: the content of each of its files."""

Rung = tuple[online.Report, Files]
"""What a trial has to report."""


@dataclass
class _Trial:
    config: ExperimentConfig
    run: online.Run
    start: Files | None  # the checkpoint that it goes on from
    asked: asyncio.Future[Rung] | None = None
    seen: float = field(default_factory=time.monotonic)
    awaited: bool = True  # rungs wait for it


class Host:
    """Trials of one search over one backbone; an actor whose methods are called by the trials, each its own.

    Args:
        plain: an experiment, as plain data; trials differ from it in their optimizer.
        size: how many trials at a time.
        storage: folder or URL that checkpoints go to, asked for room before each report.
        patience: see ``PATIENCE``.
    """

    def __init__(self, plain: dict[str, Any], size: int, storage: str, patience: float = PATIENCE) -> None:
        self._size = size
        self._storage = storage
        self._patience = patience
        self._pack = Pack(validate(ExperimentConfig, plain), validate=False)
        self._trials: dict[str, _Trial] = {}
        self._arrived = asyncio.Event()
        self._working: asyncio.Task[None] | None = None
        self._lock = asyncio.Lock()  # one at a time builds a model or learns

    async def load(self) -> int:
        """How many trials it holds."""
        return len(self._trials)

    async def join(
        self, name: str, plain: dict[str, Any], values: dict[str, Any], given: ray.train.Checkpoint | None
    ) -> bool:
        """Take a trial in, at its checkpoint if it has one; False where there is no place for it.

        Args:
            name: the trial's.
            plain: the experiment of its candidate, as plain data.
            values: those of its searched keys.
            given: the checkpoint it goes on from.

        Raises:
            ConfigError, ValueError: it differs from the others in more than its optimizer.
        """
        self._make_room(name)
        if len(self._trials) >= self._size:
            return False
        config = validate(ExperimentConfig, with_values(plain, values))
        async with self._lock:
            self._trials[name] = await asyncio.to_thread(self._restored, config, given)
        self._arrived.set()
        return True

    async def rung(self, name: str, again: bool) -> Rung:
        """Learn to the next rung, together with whoever stands before the same row.

        Args:
            name: the trial's.
            again: the rung it stands at, once more: whoever was to hear of it may have died before it did.

        Raises:
            PackingError: the model cannot share its backbone.
            Exception: what went wrong with this trial; that of others is theirs.
        """
        trial = self._trials.get(name)
        if trial is None:
            raise RuntimeError(f"trial {name} is not known here; its host was restarted")
        if again and trial.start is not None and trial.run.cursor < len(trial.run.stream):
            return online.standing(trial.run), trial.start
        trial.asked = asyncio.get_running_loop().create_future()
        trial.seen, trial.awaited = time.monotonic(), True
        self._arrived.set()
        if self._working is None or self._working.done():
            self._working = asyncio.create_task(self._work())
        return await trial.asked

    async def leave(self, name: str) -> None:
        """Let a trial go that is at its end or was stopped."""
        self._trials.pop(name, None)
        self._arrived.set()

    def _make_room(self, name: str) -> None:
        self._trials.pop(name, None)
        gone = [other for other, trial in self._trials.items() if not trial.awaited]
        for other in gone if len(self._trials) >= self._size else ():
            del self._trials[other]

    def _restored(self, config: ExperimentConfig, given: ray.train.Checkpoint | None) -> _Trial:
        whole = newest_whole(before(given)) if given is not None else None
        if whole is None:
            return _Trial(config, self._pack.start(config), None)
        with whole.as_directory() as folder:
            files = {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}
        return _Trial(config, self._resumed(config, files), files)

    def _resumed(self, config: ExperimentConfig, files: Files | None) -> online.Run:
        run = self._pack.start(config)
        if files is not None:
            with tempfile.TemporaryDirectory() as folder:
                for name, content in files.items():
                    (Path(folder) / name).write_bytes(content)
                online.resume(run, Path(folder))
        return run

    async def _work(self) -> None:
        """Rung after rung, as long as a trial asks for one."""
        while True:
            await self._gather()
            waiting = {name: trial for name, trial in self._trials.items() if trial.asked is not None}
            if not waiting:
                return
            row = min(trial.run.cursor for trial in waiting.values())
            group = [trial for trial in waiting.values() if trial.run.cursor == row]
            async with self._lock:
                results = await asyncio.to_thread(self._learn, group)
            for trial, result in zip(group, results, strict=True):
                asked, trial.asked, trial.seen = trial.asked, None, time.monotonic()
                if asked is None or asked.done():
                    continue
                if not isinstance(result, Exception):
                    asked.set_result(result)
                else:
                    asked.set_exception(result)

    async def _gather(self) -> None:
        """Until every trial has asked for its rung; for those that are away, and for free places, not for long."""
        while True:
            self._arrived.clear()
            trials = list(self._trials.values())
            away = [trial for trial in trials if trial.asked is None and trial.awaited]
            starting = len(trials) < self._size and any(t.asked is not None and t.run.cursor == 0 for t in trials)
            if not away and not starting:
                return
            left = self._patience - (time.monotonic() - max(trial.seen for trial in trials))
            try:
                await asyncio.wait_for(self._arrived.wait(), max(left, 0.0))
            except TimeoutError:
                for trial in away:
                    trial.awaited = False
                return

    def _learn(self, group: list[_Trial]) -> list[Rung | Exception]:
        """To the next rung, all together; where that fails, from the last one on again, each alone."""
        try:
            return list(self._advance(group))
        except PackingError as error:
            return [error for _ in group]
        except Exception as error:
            if len(group) == 1:
                return [error]
            log.warning("%d trials together: %s; each goes on alone to the next rung", len(group), error)
        results: list[Rung | Exception] = []
        for trial in group:
            trial.run = self._resumed(trial.config, trial.start)
            results += self._learn([trial])
        return results

    def _advance(self, group: list[_Trial]) -> list[Rung]:
        with closing(self._pack.advance([trial.run for trial in group])) as rungs:  # type: ignore[type-var]
            reports = next(rungs)
        return [self._saved(trial, report) for trial, report in zip(group, reports, strict=True)]

    def _saved(self, trial: _Trial, report: online.Report) -> Rung:
        with tempfile.TemporaryDirectory() as folder:
            online.save(trial.run, Path(folder))
            files = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
        wait_for_room(self._storage, sum(map(len, files.values())))
        trial.start = files
        return report, files
