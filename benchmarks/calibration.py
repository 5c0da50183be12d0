"""How well a model knows what it does not know: LoKO's predictive probabilities beside the plug-in ones and IVON's.

    python -m benchmarks.calibration --json benchmarks/results/calibration.json

A stream is learned online, row by row, as in ``benchmarks.online``; then held-out rows are predicted in four ways:

* ``plug-in``: the softmax of the model's outputs;
* ``predict``: ``LoKO.predict``, P carried to the outputs and scaled by the innovations seen; ``predict, raw``: P as
  it is;
* ``IVON, plug-in`` and ``IVON, posterior``: a model that IVON learned (arXiv 2402.17641), its softmax at the mean, and
  averaged over samples of its posterior.

IVON's settings are those that the search of ``benchmarks.online`` found on the first rows of the stream; LoKO has none.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers.utils import logging

from benchmarks.goals import Goal, print_goals, write
from benchmarks.online import CANDIDATES, Cells, Settings, names_of
from benchmarks.online_streams import Plain, Stream, make_data, streams
from loko import LoKO, online
from loko.config import ExperimentConfig, validate
from loko.learner import GradientLearner, KalmanLearner
from loko.metrics import evaluate
from loko.tasks import Batch
from ray_jobs.settings import with_values

STREAMS = ("mnist", "cifar10", "sst2")
SAMPLES = 16
"""Draws from IVON's posterior for each prediction."""

_BATCH = 16

Predict = Callable[[Batch], Tensor]
"""From a batch to probabilities (B, C), float64."""


def learned(stream: Stream, optimizer: Plain, values: Plain, order: int) -> online.Run:
    """A run at the end of its stream."""
    plain = {**stream.experiment(stream.part(False, None, order)), "optimizer": optimizer, "near_future": 0}
    run = online.start(validate(ExperimentConfig, with_values(plain, values)), validate=False)
    for _ in online.advance(run):
        pass
    return run


def of_loko(run: online.Run) -> dict[str, Predict]:
    """The ways to predict with what LoKO learned."""
    assert isinstance(run.learner, KalmanLearner)
    optimizer, task = run.learner.optimizer, run.task
    assert isinstance(optimizer, LoKO)
    return {
        "plug-in": lambda batch: task.logits(batch).double().softmax(-1),
        "predict": lambda batch: optimizer.predict(lambda: task.logits(batch)).mean,
        "predict, raw": lambda batch: optimizer.predict(lambda: task.logits(batch), calibrated=False).mean,
    }


def of_ivon(run: online.Run) -> dict[str, Predict]:
    """The ways to predict with what IVON learned."""
    assert isinstance(run.learner, GradientLearner)
    optimizer: Any = run.learner.optimizer
    task = run.task

    def posterior(batch: Batch) -> Tensor:
        total: Tensor | None = None
        for _ in range(SAMPLES):
            with optimizer.sampled_params():
                probabilities = task.logits(batch).double().softmax(-1)
            total = probabilities if total is None else total + probabilities
        assert total is not None
        return total / SAMPLES

    return {
        "IVON, plug-in": lambda batch: task.logits(batch).double().softmax(-1),
        "IVON, posterior": posterior,
    }


@torch.no_grad()
def scores(run: online.Run, predict: Predict) -> dict[str, float]:
    """NLL, calibration error and accuracy on the held-out rows."""
    assert run.heldout is not None
    torch.manual_seed(0)
    predicted, labels = [], []
    for batch in _batches(run, run.heldout):
        predicted.append(predict(batch))
        labels.append(batch.labels)
    logarithms = torch.cat(predicted).clamp_min(1e-300).log()  # logits of these very probabilities
    found = evaluate(logarithms, torch.cat(labels))
    return {key: found[key] for key in ("nll", "ece", "accuracy")}


def _batches(run: online.Run, rows: Any) -> Iterator[Batch]:
    reached = 0
    for some in rows.batches(_BATCH, cursor=0, rank=0, world_size=1):
        yield run.task.collate(some).to(run.device)
        reached = some.stop
        if reached >= len(rows):
            return


def measure(stream: Stream, orders: int) -> list[Plain]:
    """One line for each way to predict and order."""
    lines = []
    values = Cells(Settings()).params(stream, "ivon", orders)  # as the online benchmark's search found them
    for order in range(1, orders + 1):
        for ways, name, tuned in ((of_loko, "loko-default", {}), (of_ivon, "ivon", values)):
            run = learned(stream, CANDIDATES[name]["optimizer"], tuned, order)
            for way, predict in ways(run).items():
                found = scores(run, predict)
                lines.append({"stream": stream.name, "order": order, "way": way, **found})
                print(
                    f"{stream.name}, order {order}, {way}: NLL {found['nll']:.4f}, ECE {found['ece']:.4f}", flush=True
                )
    return lines


def goals(table: pd.DataFrame) -> list[Goal]:
    """Expectations over P should not be worse than the plug-in, nor than IVON's posterior."""
    found = []
    mean = table.groupby(["stream", "way"])[["nll", "ece"]].mean().to_dict()
    for name in table.stream.unique():
        for key in ("nll", "ece"):
            for rival in ("plug-in", "IVON, posterior"):
                ours, theirs = mean[key][name, "predict"], mean[key][name, rival]
                title = f"{name}: held-out {key.upper()} of predict less that of {rival}"
                found.append(Goal(title, "<= 0", ours - theirs, ours <= theirs))
    return found


def main(
    json_: Annotated[Path | None, typer.Option("--json", help="write goals and table here")] = None,
    orders: Annotated[int, typer.Option(help="orders of the rows")] = 3,
    streams_: Annotated[str, typer.Option("--streams", help="comma-separated")] = ",".join(STREAMS),
) -> None:
    """Learn, predict, score."""
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    known = {stream.name: stream for stream in streams(False)}
    names = names_of(streams_, list(known), "stream")
    make_data(names)
    lines: list[Plain] = []
    for name in names:
        if known[name].missing is not None:
            print(f"skipped {name}: no {known[name].missing}")
            continue
        lines += measure(known[name], orders)
    if not lines:
        raise SystemExit("nothing measured")
    table = pd.DataFrame(lines)
    shown = Table("stream", "way", "NLL", "ECE", "accuracy", title=f"held-out rows, {orders} orders")
    for (stream, way), rows in table.groupby(["stream", "way"], sort=False):
        shown.add_row(str(stream), str(way), *(f"{rows[key].mean():.3f}" for key in ("nll", "ece", "accuracy")))
    Console(width=100).print(shown)
    reached = goals(table)
    print_goals(reached)
    if json_ is not None:
        write(json_, reached, table=lines, samples=SAMPLES, orders=orders)


if __name__ == "__main__":
    typer.run(main)
