"""The prequential loop: predict, score, learn, report, checkpoint. There is no second loop anywhere.

run = start(config)
for report in advance(run):        # one dictionary a rung
    save(run, folder)
"""

from __future__ import annotations

import hashlib
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from loko import checkpoint
from loko.config import ExperimentConfig, StreamConfig
from loko.distributed import Ranks
from loko.learner import Learner, build_learner
from loko.metrics import OnlineMetrics, evaluate
from loko.stream import ArrowStream, concatenate
from loko.stream.columns import ColumnKind
from loko.tasks import Batch, Task, TaskConfig, build

__all__ = [
    "OneByOne",
    "Report",
    "Run",
    "Together",
    "advance",
    "advance_together",
    "column_kinds",
    "default_device",
    "open_stream",
    "resume",
    "save",
    "standing",
    "start",
    "trained_model",
]

Report = dict[str, Any]

_NEAR_FUTURE_ROWS = 64
_SCORING_BATCH = 64
_VALIDATED_BYTES = 1 << 30


@dataclass
class Run:
    """A run between two batches. ``cursor`` is the next row of the stream; ``digest`` the order of those learned."""

    config: ExperimentConfig
    task: Task
    stream: ArrowStream
    heldout: ArrowStream | None
    learner: Learner
    metrics: OnlineMetrics
    ranks: Ranks
    device: torch.device
    cursor: int = 0
    digest: int = 0
    seconds: float = 0.0
    resumed_from: int | None = field(default=None, compare=False)


def open_stream(config: StreamConfig, task: TaskConfig) -> ArrowStream:
    """The stream of a config, with the columns that a task reads, their types checked.

    Raises:
        StreamError: see ``loko.stream``.
    """
    own = ArrowStream(
        config.paths,
        columns=column_kinds(task),
        shuffle_seed=config.shuffle_seed,
        start=config.start,
        stop=config.stop,
        drift=config.drift,
    )
    return concatenate([own, *(open_stream(more, task) for more in config.then)]) if config.then else own


def column_kinds(task: TaskConfig) -> dict[str, ColumnKind]:
    """What each column that a task reads has to hold."""
    columns = task.columns
    kinds: dict[str, ColumnKind] = {}
    kinds |= {name: "text" for name in (columns.text, columns.text_b) if name is not None}
    kinds |= {columns.image: "image"} if columns.image is not None else {}
    kinds |= dict.fromkeys(columns.features or [], "number")
    kinds |= dict.fromkeys(columns.label_names, "label" if task.observation == "categorical" else "number")
    return kinds


def start(
    config: ExperimentConfig,
    *,
    group: dist.ProcessGroup | None = None,
    device: torch.device | None = None,
    validate: bool = True,
    beside: Run | None = None,
) -> Run:
    """Load everything a run needs and stand before its first row.

    Args:
        config: the run.
        group: ranks that share the run, each calling everything here together; None is one worker.
        device: where the model runs; None takes a GPU if there is one.
        validate: read the streams once whole (below 1 GiB), so that damaged rows are found before any training.
        beside: a run of the same configuration, but for the optimizer, that has learned nothing: the new one takes its
            streams and its frozen parameters, and an adapter of its own.

    Raises:
        StreamError, ConfigError, ValueError: bad input, before anything is learned.
    """
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    device = device or default_device()
    if beside is not None:
        return _beside(beside, config)
    stream = open_stream(config.stream, config.task)
    heldout = open_stream(config.heldout, config.task) if config.heldout is not None else None
    for rows in (stream, heldout):
        if validate and rows is not None and rows.nbytes <= _VALIDATED_BYTES:
            rows.validate()
    task = build(config.task)
    task.model.to(device)
    return Run(
        config=config,
        task=task,
        stream=stream,
        heldout=heldout,
        learner=build_learner(config, task, group),
        metrics=OnlineMetrics(
            config.task.num_labels,
            config.task.observation,
            window=config.window,
            near_future=max(1, config.near_future * config.batch_size),
        ),
        ranks=Ranks(group, device),
        device=device,
    )


def default_device() -> torch.device:
    """This process's GPU, or the CPU where there is none."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _beside(other: Run, config: ExperimentConfig) -> Run:
    differing = [
        key
        for key in type(config).model_fields
        if key != "optimizer" and getattr(config, key) != getattr(other.config, key)
    ]
    if differing or other.cursor:
        raise ValueError(
            f"runs that share a backbone differ in their optimizer only, and start from one that has learned nothing: "
            f"{', '.join(differing) or 'rows learned'} differs"
        )
    task = other.task.twin()
    return replace(
        other,
        config=config,
        task=task,
        learner=build_learner(config, task, other.ranks.group),
        metrics=OnlineMetrics(
            config.task.num_labels,
            config.task.observation,
            window=config.window,
            near_future=max(1, config.near_future * config.batch_size),
        ),
    )


class Together(Protocol):
    """How runs learn and predict the same batch: each its outputs (B, C). ``loko.packing`` has a faster one."""

    def learn(self, runs: Sequence[Run], batch: Batch) -> list[Tensor]: ...
    def predict(self, runs: Sequence[Run], batch: Batch) -> list[Tensor]: ...


class OneByOne:
    """Each run by itself."""

    def learn(self, runs: Sequence[Run], batch: Batch) -> list[Tensor]:
        """The outputs before the update."""
        return [run.learner.learn(batch) for run in runs]

    def predict(self, runs: Sequence[Run], batch: Batch) -> list[Tensor]:
        """The outputs; nothing is learned."""
        return [run.task.logits(batch) for run in runs]


def advance(run: Run) -> Iterator[Report]:
    """Learn the rest of the stream, row by row in order; yields a report at each rung and after the last row.

    A rung stands after every ``report_every`` rows. The run is in a state to be saved whenever a report is yielded.

    Raises:
        ValueError: the ranks stand before different rows: they were resumed from different checkpoints.
        PeerError: another rank failed, with that rank's error.
    """
    for (report,) in advance_together([run], OneByOne()):
        yield report


def advance_together(runs: Sequence[Run], how: Together) -> Iterator[list[Report]]:
    """``advance`` for runs that stand before the same row of one stream; yields their reports, in their order."""
    first = runs[0]
    here = torch.tensor([[first.cursor, first.digest]], device=first.device)
    everywhere = first.ranks.gather_rows(here, [1] * first.ranks.world_size)
    if not bool((everywhere == here).all()):
        raise ValueError(f"the ranks were resumed from different checkpoints, of rows {everywhere[:, 0].tolist()}")
    total, every = len(first.stream), first.config.report_every
    if first.cursor == total:
        yield _reports(runs, how)
        return
    batches = first.stream.batches(
        first.config.batch_size, cursor=first.cursor, rank=first.ranks.rank, world_size=first.ranks.world_size
    )
    with closing(batches):  # type: ignore[type-var]
        while first.cursor < total:
            with first.ranks.together() as share:
                rows = next(batches)
                batch = first.task.collate(rows).to(first.device)
                share.rows = len(batch)
            before = time.perf_counter()
            predicted = how.learn(runs, batch)
            seconds = (time.perf_counter() - before) / len(runs)
            labels = first.ranks.gather_rows(batch.labels, share.counts)
            ids = first.ranks.gather_rows(torch.from_numpy(np.array(rows.row_ids)).to(first.device), share.counts)
            for run, outputs in zip(runs, predicted, strict=True):
                run.seconds += seconds
                run.metrics.update(run.ranks.gather_rows(outputs, share.counts), labels)
                run.digest = zlib.crc32(ids.cpu().numpy().tobytes(), run.digest)
                run.cursor = rows.stop
            if first.cursor % every == 0 or first.cursor == total:
                yield _reports(runs, how)


def _reports(runs: Sequence[Run], how: Together) -> list[Report]:
    if runs[0].cursor < len(runs[0].stream):
        _score_near_future(runs, how)
    return _standing(runs, how)


def standing(run: Run) -> Report:
    """The report of where a run stands: right after ``resume``, once more that of the rung it goes on from."""
    (report,) = _standing([run], OneByOne())
    return report


def _standing(runs: Sequence[Run], how: Together) -> list[Report]:
    finished = runs[0].cursor == len(runs[0].stream)
    reports: list[Report] = [
        {
            **run.metrics.result(),
            **run.learner.diagnostics(),
            "rows": run.cursor,
            "rows_digest": f"{run.digest:08x}",
            "workers": run.ranks.world_size,
            "learn_seconds": run.seconds,
            "seconds_per_row": run.seconds / run.cursor if run.cursor else 0.0,
            "finished": finished,
        }
        for run in runs
    ]
    heldout = runs[0].heldout
    if finished and heldout is not None:
        predicted, labels = _predict(runs, how, heldout, 0, len(heldout))
        for run, report, outputs in zip(runs, reports, predicted, strict=True):
            scores = evaluate(outputs, labels, run.task.observation)
            report |= {f"heldout_{key}": value for key, value in scores.items()}
    return reports


def _score_near_future(runs: Sequence[Run], how: Together) -> None:
    """Score rows 100 steps ahead with the present models: no correlation between neighbours flatters that figure."""
    first = runs[0]
    if not first.config.near_future:
        return
    ahead = first.cursor + first.config.near_future * first.config.batch_size
    stop = min(ahead + _NEAR_FUTURE_ROWS, len(first.stream))
    if ahead < stop:
        predicted, labels = _predict(runs, how, first.stream, ahead, stop)
        for run, outputs in zip(runs, predicted, strict=True):
            run.metrics.update_near_future(outputs, labels)


@torch.no_grad()
def _predict(
    runs: Sequence[Run], how: Together, stream: ArrowStream, first: int, stop: int
) -> tuple[list[Tensor], Tensor]:
    """Each run's outputs, and the labels, of the positions [first, stop), every rank's; nothing is learned."""
    one = runs[0]
    outputs: list[list[Tensor]] = [[] for _ in runs]
    labels = []
    batches = stream.batches(_SCORING_BATCH, cursor=first, rank=one.ranks.rank, world_size=one.ranks.world_size)
    with closing(batches):  # type: ignore[type-var]
        reached = first
        while reached < stop:
            with one.ranks.together() as share:
                rows = next(batches)
                batch = one.task.collate(rows).to(one.device)
                predicted = how.predict(runs, batch)
                share.rows = len(batch)
            keep = max(0, stop - rows.start)
            for run, kept, own in zip(runs, outputs, predicted, strict=True):
                kept.append(run.ranks.gather_rows(own, share.counts)[:keep])
            labels.append(one.ranks.gather_rows(batch.labels, share.counts)[:keep])
            reached = rows.stop
    return [torch.cat(kept) for kept in outputs], torch.cat(labels)


def save(run: Run, folder: Path) -> None:
    """Write a checkpoint of the run into an existing folder; with several workers, call on all, rank 0 writes."""
    state = {
        "learner": run.learner.state_dict(),
        "metrics": run.metrics.state_dict(),
        "cursor": run.cursor,
        "digest": run.digest,
        "seconds": run.seconds,
        "random": torch.get_rng_state(),
    }
    if run.ranks.rank == 0:
        about = {"rows": run.cursor, "workers": run.ranks.world_size}
        checkpoint.save(folder, run.task.model, state, _identity(run), about)


def resume(run: Run, folder: Path) -> None:
    """Go on from a checkpoint of the same run, with any number of workers; bit for bit with the same number.

    Raises:
        DamagedCheckpointError: a damaged checkpoint.
        CheckpointError: one of another model, stream or configuration.
    """
    state = checkpoint.load(folder, run.task.model, _identity(run))
    run.learner.load_state_dict(state["learner"])
    run.metrics.load_state_dict(state["metrics"])
    run.cursor, run.digest, run.seconds = state["cursor"], state["digest"], state["seconds"]
    run.resumed_from = run.cursor
    torch.set_rng_state(state["random"])


def trained_model(config: ExperimentConfig, folder: Path) -> nn.Module:
    """The model of a run with the parameters of its checkpoint.

    Raises:
        CheckpointError: it cannot be read, or is of another model.
    """
    task = build(config.task)
    build_learner(config, task)  # some optimizers freeze what they do not train, LoRA-FA every A
    checkpoint.load_parameters(task.model, checkpoint.read_parameters(folder))
    return task.model


def _identity(run: Run) -> dict[str, str]:
    """What has to be the same for a cursor and a filter to mean the same."""
    settings = run.config.model_dump_json(include={"task", "optimizer", "batch_size", "window", "near_future"})
    return {
        "stream": run.stream.fingerprint,
        "configuration": hashlib.sha256(settings.encode()).hexdigest()[:16],
    }
