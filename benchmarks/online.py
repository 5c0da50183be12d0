"""Online learning, one row once: LoKO against tuned gradient optimizers, on streams neither was tuned on.

    python -m benchmarks.online                    # everything there is data for; goes on where it stopped
    python -m benchmarks.online --streams mnist --optimizers loko-default,adamw --trials 3 --rows 600
    python -m benchmarks.online --full             # whole streams and models from the hub, for a GPU

Every optimizer gets the same number of Optuna trials, the same pruner, rows and seeds, and searches its own space on
the first rows of a stream through ``ray_jobs.tune``; ``loko-default``, ``loko-plug-in`` (which learns the same, and is
scored at the model's own outputs), ``loko-diagonal`` and ``loko-variational`` (the precision-matching diagonal) are not
searched. The winner then learns the rows behind those, in several orders. What is compared is paired by order: means
and 95 % intervals (Student's t). A stream whose data is not at hand is skipped by name. Each finished cell (stream,
optimizer, order) is one Parquet file with machine, versions, date and commit in it; the table, the plot and the goal
lines are made from those files alone.
"""

from __future__ import annotations

import hashlib
import json
import resource
import subprocess
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

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
from benchmarks.online_report import HEAD, goals, markdown, overview, plot, publish, summary
from benchmarks.online_streams import EVERY, ROOT, SHARED, Plain, Stream, make_data, streams
from loko import PAPER, online
from loko.config import ExperimentConfig, validate
from loko.learner import Learner
from loko.tasks import Batch
from ray_jobs import cluster, tune
from ray_jobs.results import chosen
from ray_jobs.settings import SearchConfig, with_values

RESULTS = ROOT / "benchmarks" / "results" / "online"


def _gradient(name: str, low: float, high: float, first: float, options: Plain | None = None) -> Plain:
    return {
        "optimizer": {"name": name, "options": options or {}},
        "space": {
            "optimizer.lr": {"log_uniform": [low, high]},
            "optimizer.head_lr_ratio": {"log_uniform": [0.1, 10.0]},
        },
        "points": [{"optimizer.lr": first, "optimizer.head_lr_ratio": 1.0}],
    }


_P0, _V, _ADAPTER, _BETA = (
    f"optimizer.{key}" for key in ("initial_covariance", "prior_variance", "adapter_variance", "noise_decay")
)
CANDIDATES: dict[str, Plain] = {
    "loko-default": {"optimizer": {"name": "loko"}},
    "loko-tuned": {
        "optimizer": {"name": "loko"},
        "space": {_V: {"log_uniform": [1.5, 48.0]}, _ADAPTER: {"log_uniform": [0.5, 5000.0]}},
        "points": [{_V: 6.0, _ADAPTER: 50.0}],
    },
    "loko-plug-in": {"optimizer": {"name": "loko", "prediction": "plug_in"}},
    "loko-paper": {
        "optimizer": {"name": "loko", **PAPER},
        "space": {_P0: {"log_uniform": [1e-3, 30.0]}, _BETA: {"uniform": [0.8, 0.999]}},
        "points": [{_P0: 1.0, _BETA: 0.95}],
    },
    "loko-diagonal": {"optimizer": {"name": "loko", "covariance": "diagonal"}},
    "loko-variational": {"optimizer": {"name": "loko", "rank": 0}},
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
            "caution": 0.0,  # of every optimizer the lowest: the first points of most are no more than customary
            "asha": {"grace_rows": max(1, part.rows // 3 // EVERY) * EVERY, "reduction_factor": 3},
        },
    }
    folder = ROOT / "results" / "online" / f"{stream.name}-{name}-{_digest(plain)}"
    config = validate(SearchConfig, {**plain, "results": str(folder)})
    found = chosen(config, pd.read_parquet(Path(tune.run(config)) / "results.parquet"), name)
    assert found is not None
    best: Plain = json.loads(found.run.params.iloc[0])
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

    def params(self, stream: Stream, name: str, orders: int) -> Plain:
        """What the search found: as an order that is finished has it, or searched now."""
        for order in range(1, orders + 1):
            path = self.path(stream, name, order)
            if path.exists():
                found: Plain = json.loads(pd.read_parquet(path, columns=["params"]).params.iloc[0])
                return found
        return searched(stream, name, self.settings)

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
            params = cells.params(stream, name, orders)
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


def names_of(given: str, known: Sequence[str], what: str) -> list[str]:
    """The names given, comma-separated, or all; one that is not known is an error."""
    names = [name.strip() for name in given.split(",") if name.strip()] or list(known)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise typer.BadParameter(f"{what} {unknown[0]!r}; there are: {', '.join(known)}")
    return names


def _spoken(reached: Sequence[Goal]) -> str:
    lines = [[goal.name, goal.goal, f"{goal.measured:.3g}", "yes" if goal.met else "**no**"] for goal in reached]
    return markdown(["goal", "wanted", "measured", "met"], lines)


def main(
    json_: Annotated[Path | None, typer.Option("--json", help="write goals and table here")] = None,
    full: Annotated[bool, typer.Option(help="the paper's scale: hub models, more rows; for a GPU")] = False,
    trials: Annotated[int | None, typer.Option(help="Optuna trials an optimizer; 8, full: 30")] = None,
    orders: Annotated[int, typer.Option(help="orders of the rows")] = 6,
    rows: Annotated[int | None, typer.Option(help="most rows of a search and of a comparison")] = None,
    streams_: Annotated[str, typer.Option("--streams", help="comma-separated; default: all")] = "",
    optimizers: Annotated[str, typer.Option(help="comma-separated; default: all")] = "",
    readme: Annotated[bool, typer.Option(help="renew table and plot in README.md and docs/online.md")] = False,
    measure_: Annotated[
        bool, typer.Option("--measure/--no-measure", help="no-measure: only show what there is")
    ] = True,
) -> None:
    """Finish what is missing, then print the table and the goals from the files."""
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    known = {stream.name: stream for stream in streams(full)}
    names = names_of(optimizers, list(CANDIDATES), "optimizer")
    asked = names_of(streams_, list(known), "stream")
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
    if readme:
        plot(table, ROOT / "docs" / "online.png")
        publish(ROOT / "README.md", overview(table))
        publish(ROOT / "docs" / "online.md", markdown(HEAD, lines) + "\n" + _spoken(reached))
    if json_ is not None:
        write(
            json_,
            reached,
            table=[dict(zip(HEAD, line, strict=True)) for line in lines],
            settings=asdict(cells.settings),
        )


if __name__ == "__main__":
    typer.run(main)
