"""Online learning, one row once: LoKO against tuned gradient optimizers, on streams neither was tuned on.

    python -m benchmarks.online                    # everything there is data for; goes on where it stopped
    python -m benchmarks.online --streams mnist --optimizers loko-default,adamw --trials 3 --rows 600
    python -m benchmarks.online --full             # whole streams and models from the hub, for a GPU

Every optimizer gets the same number of Optuna trials, the same pruner, rows and seeds, and searches its own space on
the first rows of a stream through ``ray_jobs.tune``; ``loko-default`` is not searched. The winner then learns the rows
behind those, in several orders. What is compared is paired by order: means and 95 % intervals (Student's t). A stream
whose data is not at hand is skipped by name. Each finished cell (stream, optimizer, order) is one Parquet file with
machine, versions, date and commit in it; the table, the plot and the goal lines are made from those files alone.
"""

from __future__ import annotations

import hashlib
import json
import math
import resource
import statistics
import subprocess
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers.utils import logging

from benchmarks.goals import Goal, machine, print_goals, write
from benchmarks.online_streams import BATCH, EVERY, ROOT, SHARED, Plain, Stream, make_data, streams
from loko import PAPER, online
from loko.config import ExperimentConfig, validate
from loko.learner import Learner
from loko.tasks import Batch
from ray_jobs import cluster, tune
from ray_jobs.settings import SearchConfig, with_values

RESULTS = ROOT / "benchmarks" / "results" / "online"

_STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}


def _gradient(name: str, low: float, high: float, first: float, options: Plain | None = None) -> Plain:
    return {
        "optimizer": {"name": name, "options": options or {}},
        "space": {
            "optimizer.lr": {"log_uniform": [low, high]},
            "optimizer.head_lr_ratio": {"log_uniform": [0.1, 10.0]},
        },
        "points": [{"optimizer.lr": first, "optimizer.head_lr_ratio": 1.0}],
    }


_P0, _BETA, _OMEGA, _MU = (
    f"optimizer.{key}" for key in ("initial_covariance", "noise_decay", "linearization", "scale_adaptation")
)
CANDIDATES: dict[str, Plain] = {
    "loko-default": {"optimizer": {"name": "loko"}},
    "loko-tuned": {
        "optimizer": {"name": "loko"},
        "space": {_BETA: {"uniform": [0.9, 0.99]}, _OMEGA: {"uniform": [0.1, 0.5]}, _MU: {"log_uniform": [0.05, 0.5]}},
        "points": [{_BETA: 0.95, _OMEGA: 0.25, _MU: 0.2}],
    },
    "loko-paper": {
        "optimizer": {"name": "loko", **PAPER},
        "space": {_P0: {"log_uniform": [1e-3, 30.0]}, _BETA: {"uniform": [0.8, 0.999]}},
        "points": [{_P0: 1.0, _BETA: 0.95}],
    },
    "adamw": _gradient("adamw", 1e-5, 1e-1, 1e-3),
    "adagrad": _gradient("adagrad", 1e-4, 1.0, 1e-2),
    "sgd": _gradient("sgd", 1e-5, 1.0, 1e-2),
    "muon": _gradient("muon", 1e-5, 1e-1, 1e-3),
    "lora-plus": _gradient("lora_plus", 1e-5, 1e-1, 3e-4),
    "riemannian": _gradient("riemannian", 1e-5, 1e-1, 1e-3),
    "schedule-free": _gradient("schedule_free", 1e-5, 1e-1, 3e-3),
    "lora-rite": _gradient("lora_rite", 1e-5, 1e-1, 1e-3),
    "soap": _gradient("soap", 1e-5, 1e-1, 1e-3),
    "ivon": _gradient("ivon", 1e-3, 10.0, 0.1, {"hess_init": 0.1}),
}
FILTERS = ("loko-default", "loko-tuned", "loko-paper")


@dataclass(frozen=True)
class Settings:
    """What a cell depends on beside its names; another setting is another cell."""

    trials: int = 8
    rows: int | None = None
    full: bool = False


def searched(stream: Stream, name: str, settings: Settings) -> Plain:
    """The values the search prefers for one optimizer, by dotted key."""
    candidate = CANDIDATES[name]
    if "space" not in candidate:
        return {}
    part = stream.part(True, settings.rows, 0)
    plain = {
        "name": f"{stream.name}-{name}",
        "experiment": {**stream.experiment(part), "heldout": None, "near_future": 0, "report_every": EVERY},
        "candidates": {name: candidate},
        "search": {
            "trials": settings.trials,
            "concurrent": 1,
            "asha": {"grace_rows": max(1, part.rows // 3 // EVERY) * EVERY, "reduction_factor": 3},
        },
    }
    folder = ROOT / "results" / "online" / f"{stream.name}-{name}-{_digest(plain)}"
    config = validate(SearchConfig, {**plain, "results": str(folder)})
    table = pd.read_parquet(Path(tune.run(config)) / "results.parquet")
    last = table[table.status == "complete"].sort_values("rows").groupby("trial").tail(1)
    best: Plain = json.loads(last.sort_values(config.search.metric).iloc[0].params)
    return best


def _digest(plain: Any) -> str:
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:8]


@ray.remote(num_cpus=1, max_calls=1)  # a process each, so that its peak memory is its own
def learn(plains: list[Plain]) -> list[list[Plain]]:
    """Runs one after the other: of each a report a rung, with the peak memory of the process so far on the last.

    In one process, because a new one takes longer to import what it needs than a short run takes to learn.
    """
    warnings.simplefilter("ignore")
    logging.disable_progress_bar()
    return [_learn(plain) for plain in plains]


def _learn(plain: Plain) -> list[Plain]:
    run = online.start(validate(ExperimentConfig, plain), validate=False)
    run.learner = timed = _Timed(run.learner)
    reports = [{**report, "learn_cpu_seconds": timed.seconds} for report in online.advance(run)]
    reports[-1]["peak_megabytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return reports


class _Timed:
    """A learner whose steps are timed by the processor: cells run side by side, and would count each other's time."""

    def __init__(self, learner: Learner) -> None:
        self._learner = learner
        self.seconds = 0.0

    def learn(self, batch: Batch) -> Tensor:
        before = time.process_time()
        outputs = self._learner.learn(batch)
        self.seconds += time.process_time() - before
        return outputs

    def diagnostics(self) -> dict[str, float]:
        return self._learner.diagnostics()

    def state_dict(self) -> Plain:
        return self._learner.state_dict()

    def load_state_dict(self, state: Plain) -> None:
        self._learner.load_state_dict(state)


@dataclass
class Cells:
    """Finished cells, a Parquet file each."""

    settings: Settings
    folder: Path = RESULTS
    commit: str = field(default_factory=lambda: _commit())

    def path(self, stream: Stream, name: str, order: int) -> Path:
        """Where a cell is; the name tells its settings apart."""
        part = stream.part(False, self.settings.rows, order)
        asked = {"stream": stream.experiment(part), "candidate": CANDIDATES[name], **asdict(self.settings)}
        anywhere = json.loads(json.dumps(asked).replace(str(ROOT), "").replace(str(SHARED), ""))
        return self.folder / stream.name / f"{name}-{order}-{_digest(anywhere)}.parquet"

    def write(self, path: Path, stream: Stream, name: str, order: int, params: Plain, reports: list[Plain]) -> None:
        """One row a rung; machine, versions, date and commit as metadata of the file and the commit as a column."""
        table = pd.DataFrame(reports).assign(
            stream=stream.name, optimizer=name, order=order, params=json.dumps(params), commit=self.commit,
            trials=self.settings.trials, change=stream.change(stream.part(False, self.settings.rows, order)),
        )  # fmt: skip
        arrow = pa.Table.from_pandas(table, preserve_index=False)
        arrow = arrow.replace_schema_metadata(
            {**(arrow.schema.metadata or {}), b"machine": json.dumps(machine()).encode()}
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".unfinished")
        pq.write_table(arrow, unfinished)
        unfinished.rename(path)


def _commit() -> str:
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return found.stdout.strip() or "unknown"


def measure(chosen: Sequence[Stream], names: Sequence[str], orders: int, cells: Cells) -> Iterator[str]:
    """Finish every cell that is not there yet; yields what was done."""
    for stream in chosen:
        for name in names:
            todo = [o for o in range(1, orders + 1) if not cells.path(stream, name, o).exists()]
            if not todo:
                continue
            cluster.connect()
            params = searched(stream, name, cells.settings)
            plains = [
                {
                    **stream.experiment(stream.part(False, cells.settings.rows, order)),
                    "optimizer": CANDIDATES[name]["optimizer"],
                }
                for order in todo
            ]
            learned = learn.remote([with_values(plain, params) for plain in plains])
            for order, reports in zip(todo, ray.get(learned), strict=True):
                cells.write(cells.path(stream, name, order), stream, name, order, params, reports)
                yield f"{stream.name}, {name}, order {order}: NLL {reports[-1]['nll']:.4f} {params}"


def collect(chosen: Sequence[Stream], names: Sequence[str], orders: int, cells: Cells) -> pd.DataFrame:
    """All rungs of the cells there are."""
    paths = [cells.path(s, n, o) for s in chosen for n in names for o in range(1, orders + 1)]
    frames = [pd.read_parquet(path) for path in paths if path.exists()]
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % interval by Student's t (NaN for one value)."""
    count = len(values)
    if count < 2:
        return (values[0] if count else math.nan), math.nan
    return statistics.fmean(values), _STUDENT.get(count, 2.0) * statistics.stdev(values) / math.sqrt(count)


def rows_to(run: pd.DataFrame, target: float) -> float:
    """The first rung from which on the cumulative NLL stays at or below a target; infinite if it never does."""
    above = run[run.nll > target].rows.max()
    later = run.rows if math.isnan(above) else run[run.rows > above].rows
    return float(later.min()) if len(later) else math.inf


def rows_to_recover(run: pd.DataFrame, share: float = 0.9) -> float:
    """Rows after the change until three rungs in a row reach ``share`` of the accuracy of the five before it."""
    change = run.change.iloc[0]
    correct = run.accuracy * run.rows
    rungs = pd.DataFrame(
        {"rows": run.rows, "accuracy": correct.diff().fillna(correct) / run.rows.diff().fillna(run.rows)}
    )
    before = rungs[rungs.rows <= change].accuracy.tail(5).mean()
    after = rungs[rungs.rows > change]
    good = (after.accuracy >= share * before).rolling(3).sum() == 3
    return float(after.rows[good].min() - change) if good.any() else math.inf


def last(table: pd.DataFrame, stream: str, name: str, key: str) -> dict[int, float]:
    """A figure at the end of the stream, by order."""
    chosen = table[(table.stream == stream) & (table.optimizer == name) & table.finished]
    return dict(zip(chosen.order, chosen[key], strict=True)) if key in chosen else {}


def paired(table: pd.DataFrame, stream: str, name: str, other: str) -> tuple[float, float]:
    """Mean and half interval of the difference of online NLL between two optimizers, by order."""
    ours, theirs = last(table, stream, name, "nll"), last(table, stream, other, "nll")
    return interval([ours[order] - theirs[order] for order in ours if order in theirs])


def best_gradient(table: pd.DataFrame, stream: str) -> str | None:
    """The tuned gradient optimizer with the lowest mean online NLL."""
    means = {
        name: statistics.fmean(values.values())
        for name in CANDIDATES
        if name not in FILTERS and (values := last(table, stream, name, "nll"))
    }
    return min(means, key=lambda name: means[name]) if means else None


def goals(table: pd.DataFrame) -> list[Goal]:
    """The figures that the filter was meant to reach, over the streams measured."""
    names = list(dict.fromkeys(table.stream)) if len(table) else []
    rivals = {name: rival for name in names if (rival := best_gradient(table, name)) is not None}
    lines: list[Goal] = []
    for filtered, allowed in (("loko-default", 1), ("loko-tuned", 0)):
        ours = {n: r for n, r in rivals.items() if last(table, n, filtered, "nll")}
        if not ours:
            continue
        differences = {n: paired(table, n, filtered, r) for n, r in ours.items()}
        if filtered == "loko-default":
            won = sum(mean <= 0 for mean, _ in differences.values())
            title = f"streams of {len(ours)} on which {filtered} is at or below every tuned gradient optimizer"
        else:
            won = sum(mean + half < 0 for mean, half in differences.values())
            title = f"streams of {len(ours)} on which {filtered} is below the best by more than the 95 % interval"
        needed = max(1, len(ours) - allowed)
        lines.append(Goal(title, f">= {needed}", won, won >= needed))
        ratios = [
            statistics.fmean(last(table, n, filtered, "nll").values())
            / statistics.fmean(last(table, n, r, "nll").values())
            for n, r in ours.items()
        ]
        mean = statistics.geometric_mean(ratios)
        lines.append(
            Goal(f"online NLL, {filtered} / best tuned gradient, geometric mean", "<= 0.85", mean, mean <= 0.85)
        )
    shares, recovered = [], []
    for name in names:
        for order, target in last(table, name, "adamw", "nll").items():
            run = table[(table.stream == name) & (table.optimizer == "loko-default") & (table.order == order)]
            adamw = table[(table.stream == name) & (table.optimizer == "adamw") & (table.order == order)]
            if not len(run):
                continue
            shares.append(rows_to(run, target) / float(adamw.rows.max()))
            if run.change.notna().all():
                ours_back, theirs_back = rows_to_recover(run), rows_to_recover(adamw)
                if math.isfinite(min(ours_back, theirs_back)):
                    recovered.append(ours_back / theirs_back)  # zero where AdamW never does
    if shares:
        value = statistics.median(shares)
        lines.append(Goal("rows to AdamW's final NLL, loko-default / AdamW, median", "<= 0.5", value, value <= 0.5))
    if recovered:
        value = statistics.median(recovered)
        title = "rows to 90 % of the accuracy before a drift, loko-default / AdamW, median"
        lines.append(Goal(title, "<= 0.5", value, value <= 0.5))
    return lines


_COLUMNS = {
    "window_nll": "last 500",
    "accuracy": "accuracy",
    "near_future_accuracy": "near future",
    "heldout_accuracy": "held-out",
    "heldout_ece": "ECE",
}


def summary(table: pd.DataFrame) -> list[list[str]]:
    """Rows of the table: a stream's optimizers, the best online NLL first, behind them who sees labels only."""
    lines: list[list[str]] = []
    for stream in dict.fromkeys(table.stream):
        rival = best_gradient(table, stream)
        present = [n for n in CANDIDATES if last(table, stream, n, "nll")]
        for name in sorted(present, key=lambda n: statistics.fmean(last(table, stream, n, "nll").values())):
            mean, half = interval(list(last(table, stream, name, "nll").values()))
            against = (
                "" if rival in (None, name) else "{:+.3f} ± {:.3f}".format(*paired(table, stream, name, str(rival)))
            )
            others = [interval(list(last(table, stream, name, key).values()))[0] for key in _COLUMNS]
            seconds, rows = (
                interval(list(last(table, stream, name, k).values()))[0] for k in ("learn_cpu_seconds", "rows")
            )
            memory = interval(list(last(table, stream, name, "peak_megabytes").values()))[0]
            runs = table[(table.stream == stream) & (table.optimizer == name)].groupby("order")
            back = [rows_to_recover(run) for _, run in runs if run.change.notna().all()]
            shown = [f"{value:.3f}" for value in others]
            recovered = f"{statistics.median(back):.0f}" if back else ""
            costs = [f"{1e3 * seconds / rows * BATCH:.0f}", f"{memory:.0f}"]
            lines.append([stream, name, f"{mean:.3f} ± {half:.3f}", against, *shown, recovered, *costs])
        labels = last(table, stream, present[0], "label_only_nll").values()
        lines.append([stream, "labels only", f"{statistics.fmean(labels):.3f}", *[""] * (len(_COLUMNS) + 4)])
    return lines


HEAD = [
    "stream",
    "optimizer",
    "online NLL",
    "− best gradient",
    *_COLUMNS.values(),
    "rows to recover",
    "ms a step",
    "MiB",
]


def plot(table: pd.DataFrame, path: Path) -> None:
    """Mean NLL of each stretch of rows over the orders, a panel a stream."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(table.stream))
    figure, axes = plt.subplots(1, len(names), figsize=(4.2 * len(names), 3.6), squeeze=False, layout="constrained")
    for axis, stream in zip(axes[0], names, strict=True):
        for name in [n for n in CANDIDATES if n in set(table[table.stream == stream].optimizer)]:
            runs = table[(table.stream == stream) & (table.optimizer == name)]
            curves = runs.pivot_table(index="rows", columns="order", values="nll").mul(runs.rows.unique(), axis=0)
            steps = np.diff(curves.index.to_numpy(), prepend=0)[:, None]
            local = (curves.diff().fillna(curves) / steps).mean(axis=1).rolling(5, min_periods=1).mean()
            style = {"lw": 2.0} if name in FILTERS else {"lw": 1.1, "ls": "--"}
            axis.plot(local.index, local, label=name, **style)
        change = table[table.stream == stream].change.dropna()
        if len(change):
            axis.axvline(change.iloc[0], color="#868e96", lw=0.8)
        axis.set(title=stream, xlabel="rows", ylabel="NLL of the last 200 rows")
        axis.set_ylim(0, float(np.nanpercentile(table[table.stream == stream].nll, 98)) * 1.3)
    axes[0][-1].legend(fontsize=7)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def markdown(lines: list[list[str]]) -> str:
    """The table for a README."""
    return "\n".join("| " + " | ".join(line) + " |" for line in [HEAD, ["---"] * len(HEAD), *lines]) + "\n"


def _names(given: str, known: Sequence[str], what: str) -> list[str]:
    names = [name.strip() for name in given.split(",") if name.strip()] or list(known)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise typer.BadParameter(f"{what} {unknown[0]!r}; there are: {', '.join(known)}")
    return names


def main(
    json_: Annotated[Path | None, typer.Option("--json", help="write goals and table here")] = None,
    full: Annotated[bool, typer.Option(help="the paper's scale: hub models, more rows; for a GPU")] = False,
    trials: Annotated[int | None, typer.Option(help="Optuna trials an optimizer; 8, full: 30")] = None,
    orders: Annotated[int | None, typer.Option(help="orders of the rows; 3, full: 5")] = None,
    rows: Annotated[int | None, typer.Option(help="most rows of a search and of a comparison")] = None,
    streams_: Annotated[str, typer.Option("--streams", help="comma-separated; default: all")] = "",
    optimizers: Annotated[str, typer.Option(help="comma-separated; default: all")] = "",
    measure_: Annotated[
        bool, typer.Option("--measure/--no-measure", help="no-measure: only show what there is")
    ] = True,
) -> None:
    """Finish what is missing, then print the table and the goals from the files."""
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    known = {stream.name: stream for stream in streams(full)}
    names = _names(optimizers, list(CANDIDATES), "optimizer")
    asked = _names(streams_, list(known), "stream")
    orders = orders or (5 if full else 3)
    cells = Cells(Settings(trials or (30 if full else 8), rows, full))
    if measure_:
        make_data(asked)
    chosen = []
    for name in asked:
        missing = known[name].missing
        if missing is None:
            chosen.append(known[name])
        else:
            print(f"skipped {name}: no {missing}")
    for done in measure(chosen, names, orders, cells) if measure_ else ():
        print(done, flush=True)
    table = collect(chosen, names, orders, cells)
    if not len(table):
        raise SystemExit("nothing measured")
    lines = summary(table)
    shown = Table(*HEAD, title=f"{orders} orders, {cells.settings.trials} trials an optimizer", title_justify="left")
    for number, line in enumerate(lines):
        shown.add_row(*line, end_section=number + 1 == len(lines) or lines[number + 1][0] != line[0])
    Console(width=170).print(shown)
    reached = goals(table)
    print_goals(reached)
    (RESULTS / "table.md").write_text(markdown(lines))
    plot(table, RESULTS / "online.png")
    if json_ is not None:
        write(
            json_,
            reached,
            table=[dict(zip(HEAD, line, strict=True)) for line in lines],
            settings=asdict(cells.settings),
        )


if __name__ == "__main__":
    typer.run(main)
