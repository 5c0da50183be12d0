"""The prequential loop: predict, score, learn, report, checkpoint. There is no second loop anywhere.

run = start(config)
for report in advance(run):        # one dictionary a rung
    save(run, folder)
"""

from __future__ import annotations

import hashlib
import time
import zlib
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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
from loko.tasks import Task, TaskConfig, build

__all__ = [
    "Report",
    "Run",
    "advance",
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
) -> Run:
    """Load everything a run needs and stand before its first row.

    Args:
        config: the run.
        group: ranks that share the run, each calling everything here together; None is one worker.
        device: where the model runs; None takes a GPU if there is one.
        validate: read the streams once whole (below 1 GiB), so that damaged rows are found before any training.

    Raises:
        StreamError, ConfigError, ValueError: bad input, before anything is learned.
    """
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    device = device or default_device()
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


def advance(run: Run) -> Iterator[Report]:
    """Learn the rest of the stream, row by row in order; yields a report at each rung and after the last row.

    A rung stands after every ``report_every`` rows. The run is in a state to be saved whenever a report is yielded.

    Raises:
        ValueError: the ranks stand before different rows: they were resumed from different checkpoints.
        PeerError: another rank failed, with that rank's error.
    """
    here = torch.tensor([[run.cursor, run.digest]], device=run.device)
    everywhere = run.ranks.gather_rows(here, [1] * run.ranks.world_size)
    if not bool((everywhere == here).all()):
        raise ValueError(f"the ranks were resumed from different checkpoints, of rows {everywhere[:, 0].tolist()}")
    total, every = len(run.stream), run.config.report_every
    if run.cursor == total:
        yield _report(run)
        return
    batches = run.stream.batches(
        run.config.batch_size, cursor=run.cursor, rank=run.ranks.rank, world_size=run.ranks.world_size
    )
    with closing(batches):  # type: ignore[type-var]
        while run.cursor < total:
            with run.ranks.together() as share:
                rows = next(batches)
                batch = run.task.collate(rows).to(run.device)
                share.rows = len(batch)
            before = time.perf_counter()
            outputs = run.learner.learn(batch)
            run.seconds += time.perf_counter() - before
            outputs, labels = (run.ranks.gather_rows(own, share.counts) for own in (outputs, batch.labels))
            run.metrics.update(outputs, labels)
            ids = run.ranks.gather_rows(torch.from_numpy(np.array(rows.row_ids)).to(run.device), share.counts)
            run.digest = zlib.crc32(ids.cpu().numpy().tobytes(), run.digest)
            run.cursor = rows.stop
            if run.cursor % every == 0 or run.cursor == total:
                yield _report(run)


def _report(run: Run) -> Report:
    if run.cursor < len(run.stream):
        _score_near_future(run)
    return standing(run)


def standing(run: Run) -> Report:
    """The report of where a run stands: right after ``resume``, once more that of the rung it goes on from."""
    finished = run.cursor == len(run.stream)
    report: Report = {
        **run.metrics.result(),
        **run.learner.diagnostics(),
        "rows": run.cursor,
        "rows_digest": f"{run.digest:08x}",
        "workers": run.ranks.world_size,
        "learn_seconds": run.seconds,
        "finished": finished,
    }
    if finished and run.heldout is not None:
        outputs, labels = _predict(run, run.heldout, 0, len(run.heldout))
        report |= {f"heldout_{key}": value for key, value in evaluate(outputs, labels, run.task.observation).items()}
    return report


def _score_near_future(run: Run) -> None:
    """Score rows 100 steps ahead with the present model: no correlation between neighbours flatters that figure."""
    if not run.config.near_future:
        return
    ahead = run.cursor + run.config.near_future * run.config.batch_size
    stop = min(ahead + _NEAR_FUTURE_ROWS, len(run.stream))
    if ahead < stop:
        run.metrics.update_near_future(*_predict(run, run.stream, ahead, stop))


@torch.no_grad()
def _predict(run: Run, stream: ArrowStream, first: int, stop: int) -> tuple[Tensor, Tensor]:
    """Outputs and labels of the positions [first, stop), every rank's; nothing is learned."""
    outputs, labels = [], []
    batches = stream.batches(_SCORING_BATCH, cursor=first, rank=run.ranks.rank, world_size=run.ranks.world_size)
    with closing(batches):  # type: ignore[type-var]
        reached = first
        while reached < stop:
            with run.ranks.together() as share:
                rows = next(batches)
                batch = run.task.collate(rows).to(run.device)
                predicted = run.task.logits(batch)
                share.rows = len(batch)
            keep = max(0, stop - rows.start)
            outputs.append(run.ranks.gather_rows(predicted, share.counts)[:keep])
            labels.append(run.ranks.gather_rows(batch.labels, share.counts)[:keep])
            reached = rows.stop
    return torch.cat(outputs), torch.cat(labels)


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
        checkpoint.save(folder, run.task.model, state, _identity(run))


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
