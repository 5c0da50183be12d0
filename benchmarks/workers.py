"""One filter over several workers: how equal, how much is sent, what a merge now and then costs, and how it scales.

    python -m benchmarks.workers --json benchmarks/results/workers.json

Everything runs in gloo processes on this machine, without Ray, on the real digits of ``ray_jobs.embedded``. The last
table predicts what cannot be measured here: a step on 8 to 64 GPUs, from the volumes measured here and the assumptions
written in docs/distributed.md.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from rich.console import Console
from rich.table import Table

from benchmarks import worlds
from benchmarks.goals import Goal, print_goals, write
from loko import checkpoint, online
from loko.config import ExperimentConfig, LokoConfig, validate
from loko.learner import build_learner
from loko.tasks import build
from ray_jobs import embedded

STEPS = 200
WORLDS = (1, 2, 4)
SYNC = (1, 8, 64)
ROUND = 5


def config(data: Path, rows: int, batch: int, optimizer: dict[str, Any], seed: int | None = None) -> dict[str, Any]:
    plain = worlds.experiment(data, rows, batch_size=batch, report_every=rows, near_future=0)
    plain["optimizer"] = {"name": "loko", **optimizer}
    plain["stream"]["shuffle_seed"] = seed
    return plain


# ---- exact: one worker's filter, whatever the number


def exact(data: Path, work: Path, batch: int) -> list[dict[str, Any]]:
    """The same 200 steps with 1, 2 and 4 workers."""
    found = []
    for covariance in ("low_rank", "diagonal"):
        plain = config(data, STEPS * batch, batch, {"covariance": covariance})
        alone = work / f"exact-{covariance}-1"
        for workers in WORLDS:
            folder = work / f"exact-{covariance}-{workers}"
            report = worlds.run(plain, folder, workers)
            found.append(
                {
                    "covariance": covariance,
                    "workers": workers,
                    "nll": report["nll"],
                    "off": _furthest(folder, alone),
                    "bytes_a_step": report["bytes_a_step"],
                    "collectives_a_step": report["collectives_a_step"],
                }
            )
    return found


def _furthest(one: Path, other: Path) -> float:
    """The largest difference of a parameter."""
    first, second = checkpoint.read_parameters(one), checkpoint.read_parameters(other)
    return max(float((first[name].double() - second[name].double()).abs().max()) for name in first)


# ---- consensus: what it loses


def consensus(data: Path, work: Path, rows: int, batch: int, orders: int) -> list[dict[str, Any]]:
    """Two and four workers that merge every 1, 8, 64 steps, beside the exact update of the same covariance."""
    found = []
    for seed in range(orders):
        plain = config(data, rows, batch, {"covariance": "diagonal"}, seed)
        base = worlds.run(plain, work / f"order-{seed}")["nll"]
        low_rank = worlds.run(config(data, rows, batch, {}, seed), work / f"order-{seed}-low-rank")["nll"]
        for workers in (2, 4):
            for every in SYNC:
                merged = config(data, rows, batch, {"covariance": "diagonal", "sync_every": every}, seed)
                report = worlds.run(merged, work / f"order-{seed}-{workers}-{every}", workers)
                found.append(
                    {
                        "order": seed,
                        "workers": workers,
                        "sync_every": every,
                        "nll": report["nll"],
                        "exact": base,
                        "exact_low_rank": low_rank,
                        "loss": report["nll"] - base,
                        "bytes_a_step": report["bytes_a_step"],
                    }
                )
    return found


# ---- weak scaling: the same rows a worker


def weak_scaling(data: Path, work: Path, batch: int, rounds: int) -> dict[str, float]:
    """Seconds of a step on one worker and, with twice the rows, on two; rounds of either in turn."""
    folder = work / "weak"
    folder.mkdir()
    torch.multiprocessing.start_processes(
        _weak, (str(data), str(folder), batch, rounds), nprocs=2, start_method="spawn"
    )
    pairs = torch.load(folder / "times.pt", weights_only=True)
    return {
        "alone_ms": 1000 * statistics.median(one for one, _ in pairs),
        "together_ms": 1000 * statistics.median(two for _, two in pairs),
        "efficiency": statistics.median(one / two for one, two in pairs),
    }


def _weak(rank: int, data: str, folder: str, batch: int, rounds: int) -> None:
    worlds.join(rank, folder, 2)
    parsed = validate(ExperimentConfig, config(Path(data), 2000, batch, {}))
    task = build(parsed.task)
    both = build(parsed.task)
    alone, together = build_learner(parsed, task), build_learner(parsed, both, dist.group.WORLD)
    stream = online.open_stream(parsed.stream, parsed.task)
    own = stream.batches(batch)
    shared = stream.batches(2 * batch, rank=rank, world_size=2)
    pairs = []
    for _ in range(rounds + 1):
        dist.barrier()
        start = time.perf_counter()
        if rank == 0:
            for _ in range(ROUND):
                alone.learn(task.collate(next(own)))
        middle = time.perf_counter()
        dist.barrier()
        begun = time.perf_counter()
        for _ in range(ROUND):
            together.learn(both.collate(next(shared)))
        pairs.append(((middle - start) / ROUND, (time.perf_counter() - begun) / ROUND))
    if rank == 0:
        torch.save(pairs[1:], f"{folder}/times.pt")  # the first round allocates
    dist.destroy_process_group()


# ---- a model of the communication


@dataclass(frozen=True)
class Shape:
    """A step: n parameters, b rows a worker, k observed outputs a row of C classes, rank L of the covariance."""

    parameters: int
    rows: int
    outputs: int
    classes: int
    rank: int


def volume(shape: Shape, workers: int) -> dict[str, float]:
    """Bytes that one rank sends in one step of the exact update, by what they are (docs/distributed.md)."""
    share, others = (workers - 1) / workers, workers - 1
    n, b, k, c, rank = shape.parameters, shape.rows, shape.outputs, shape.classes, shape.rank
    rows, count = workers * b, workers * b * k
    narrowed = rows * ((c - 1) * (1 + k) + k * c) if k < c - 1 else 0
    return {
        "Jacobian": share * 4 * b * k * n,
        "parameters": share * 4 * n,
        "sums": 2 * share * 8 * (count**2 + count * rank + rank**2 + rank + 3),
        "choices": share * 8 * ((rank + count) ** 2 + count + rows * k**2 + (c - 1) ** 2 + 2 + narrowed),
        "rows": others * (b * (4 * c + 8) + 16),
    }


def measured_volume(data: Path, work: Path, batch: int) -> list[dict[str, float]]:
    """What is sent against what the formula says, every output observed so that the number is fixed."""
    found = []
    for workers in (2, 4):
        plain = config(data, 20 * batch, batch, {"output_tolerance": 0.0})
        report = worlds.run(plain, work / f"volume-{workers}", workers)
        size = sum(p.numel() for p in checkpoint.read_parameters(work / f"volume-{workers}").values())
        expected = sum(volume(Shape(size, batch // workers, 9, 10, LokoConfig().rank), workers).values())
        found.append(
            {
                "workers": workers,
                "parameters": size,
                "bytes_a_step": report["bytes_a_step"],
                "formula": expected,
                "collectives_a_step": report["collectives_a_step"],
            }
        )
    return found


@dataclass(frozen=True)
class Machine:
    """What is assumed of nodes of eight GPUs: bytes a second that a rank sends, and seconds that a collective takes."""

    inside: float = 300e9
    between: float = 40e9
    latency_inside: float = 15e-6
    latency_between: float = 40e-6


def predict(shape: Shape, workers: int, collectives: float, machine: Machine) -> dict[str, Any]:
    """A step's communication on so many GPUs, and the eigen-decomposition that every rank repeats, as long as here."""
    inside = workers <= 8
    sent = volume(shape, workers)
    size = workers * shape.rows * shape.outputs + shape.rank
    matrix = torch.randn(size, size, dtype=torch.float64)
    matrix = matrix @ matrix.mT
    begun = time.perf_counter()
    torch.linalg.eigh(matrix)
    repeated = time.perf_counter() - begun
    return {
        "workers": workers,
        "parameters": shape.parameters,
        "bytes": sent,
        "megabytes": sum(sent.values()) / 1e6,
        "bandwidth_ms": 1e3 * sum(sent.values()) / (machine.inside if inside else machine.between),
        "latency_ms": 1e3 * collectives * (machine.latency_inside if inside else machine.latency_between),
        "joined": size,
        "eigh_here_ms": 1e3 * repeated,
    }


# ---- the benchmark


def main(
    json: Annotated[Path | None, typer.Option(help="write the figures here")] = None,
    batch: Annotated[int, typer.Option(help="rows of a global batch")] = 8,
    rows: Annotated[int, typer.Option(help="of the stream that consensus learns")] = 1600,
    orders: Annotated[int, typer.Option(help="stream orders for consensus")] = 2,
    rounds: Annotated[int, typer.Option(help="of weak scaling")] = 20,
) -> None:
    """Measure, predict, and print the tables."""
    torch.set_num_threads(1)
    work = Path(tempfile.mkdtemp(prefix="workers-"))
    try:
        data = work / "mnist"
        embedded.embed(data, embedded.EmbeddedConfig())
        equal = exact(data, work, batch)
        volumes = measured_volume(data, work, batch)
        scaling = weak_scaling(data, work, 4, rounds)
        lost = consensus(data, work, rows, batch, orders)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    console = Console()
    console.print(_equal_table(equal))
    console.print(_consensus_table(lost))
    print(
        f"weak scaling, batch 4 a worker: {scaling['alone_ms']:.1f} ms on one, {scaling['together_ms']:.1f} ms on two, "
        f"efficiency {scaling['efficiency']:.2f}"
    )
    collectives = max(row["collectives_a_step"] for row in equal)
    predicted = _predictions(collectives)
    console.print(_predicted_table(predicted))
    off = max(abs(row["bytes_a_step"] / row["formula"] - 1) for row in volumes)
    furthest = max(row["off"] for row in equal)
    goals = [
        Goal("parameters of 1, 2 and 4 workers apart after 200 steps", "<= 1e-5", furthest, furthest <= 1e-5),
        *(
            Goal(
                f"NLL lost by merging every {every} steps, 2 workers (a figure, no limit)",
                "measured",
                statistics.mean(row["loss"] for row in lost if row["sync_every"] == every and row["workers"] == 2),
                True,
            )
            for every in SYNC
        ),
        Goal("bytes a step off the formula of the model", "<= 0.02", off, off <= 0.02),
        Goal("weak scaling efficiency 1 -> 2 (a figure, no limit)", "measured", scaling["efficiency"], True),
    ]
    print_goals(goals)
    if json is not None:
        write(
            json, goals, exact=equal, volumes=volumes, consensus=lost, weak_scaling=scaling, predicted=predicted,
            assumptions=asdict(Machine()),
        )  # fmt: skip


def _predictions(collectives: float) -> list[dict[str, Any]]:
    """Adapters of a small and a large model, weak scaling: 4 rows a GPU, 2 outputs of a row observed."""
    rank = LokoConfig().rank
    return [
        predict(Shape(size, 4, 2, 10, rank), workers, collectives, Machine())
        for size in (1_000_000, 10_000_000)
        for workers in (8, 16, 32, 64)
    ]


def _equal_table(found: list[dict[str, Any]]) -> Table:
    table = Table("covariance", "workers", "NLL", "furthest parameter", "kB a step", "collectives a step")
    for row in found:
        table.add_row(
            row["covariance"], str(row["workers"]), f"{row['nll']:.6f}", f"{row['off']:.1e}",
            f"{row['bytes_a_step'] / 1e3:.1f}", f"{row['collectives_a_step']:.1f}",
        )  # fmt: skip
    return table


def _consensus_table(found: list[dict[str, Any]]) -> Table:
    table = Table("workers", "merged every", "NLL", "exact", "exact, low rank", "loss", "kB a step")
    for workers in (2, 4):
        for every in SYNC:
            rows = [row for row in found if (row["workers"], row["sync_every"]) == (workers, every)]
            mean = {key: statistics.mean(row[key] for row in rows) for key in rows[0]}
            table.add_row(
                str(workers), str(every), f"{mean['nll']:.3f}", f"{mean['exact']:.3f}", f"{mean['exact_low_rank']:.3f}",
                f"{mean['loss']:+.3f}", f"{mean['bytes_a_step'] / 1e3:.1f}",
            )  # fmt: skip
    return table


def _predicted_table(found: list[dict[str, Any]]) -> Table:
    table = Table("parameters", "GPUs", "MB a step", "bandwidth ms", "latency ms", "eigh here, ms")
    for row in found:
        table.add_row(
            f"{row['parameters']:,}", str(row["workers"]), f"{row['megabytes']:.1f}", f"{row['bandwidth_ms']:.2f}",
            f"{row['latency_ms']:.2f}", f"{row['eigh_here_ms']:.0f} (of {row['joined']})",
        )  # fmt: skip
    return table


if __name__ == "__main__":
    typer.run(main)
