"""What helps when a stream drifts: the adapted scale, forgetting, the innovation test, a change detector.

    python -m benchmarks.drift --json benchmarks/results/drift.json

Rotated digits, abruptly, gradually and on and off; labels turned round; and two streams without any drift, where an
answer to one only costs. Each is learned with every answer, on rows and orders that ``benchmarks.online`` does not
report. Of the detector it is also counted how often it sounds where nothing has changed, and how many rows after a
change it does.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pandas as pd
import typer
from rich.console import Console
from rich.table import Table
from transformers.utils import logging

from benchmarks.goals import write
from benchmarks.online import names_of
from benchmarks.online_streams import BATCH, Part, Plain, make_data, streams
from loko import online
from loko.config import ExperimentConfig, validate

_TURNED: Plain = {"kind": "rotation", "degrees": 90}


@dataclass(frozen=True)
class Case:
    """A stream of ``benchmarks.online``, on other rows, with a drift of its own.

    Attributes:
        stream: its name there.
        first, rows: which rows.
        drift: or None.
        changes: rows at which something changes, where it does so at once.
    """

    stream: str
    first: int
    rows: int
    drift: Plain | None = None
    changes: tuple[int, ...] = ()


CASES = {
    "digits, abrupt": Case("mnist", 600, 1200, {**_TURNED, "at": 400}, (400,)),
    "digits, gradual": Case("mnist", 600, 1200, {**_TURNED, "at": 300, "until": 900}),
    "digits, on and off": Case("mnist", 600, 1200, {**_TURNED, "at": 300, "every": 300}, (300, 600, 900)),
    "text, labels flipped": Case("sst2", 2000, 1000, {"kind": "relabel", "mapping": "flip", "at": 500}, (500,)),
    "clothes, no drift": Case("fashion", 600, 1000),
    "CIFAR-10, no drift": Case("cifar10", 600, 1000),
}

ANSWERS: dict[str, Plain] = {
    "default": {},
    "forgetting .999": {"forgetting": 0.999},
    "innovation test .1": {"drift_adaptation": 0.1},
    "innovation test 1": {"drift_adaptation": 1.0},
    "detector .1": {"drift_detector": "adwin", "drift_adaptation": 0.1},
    "detector 1": {"drift_detector": "adwin", "drift_adaptation": 1.0},
    "fixed scale": {"scale_adaptation": 0.0},
    "fixed scale, innovation test .1": {"scale_adaptation": 0.0, "drift_adaptation": 0.1},
    "fixed scale, detector 1": {"scale_adaptation": 0.0, "drift_detector": "adwin", "drift_adaptation": 1.0},
}


def measure(case: Case, answer: Plain, order: int) -> Plain:
    """One run: online NLL, and where the detector sounded (rows)."""
    stream = next(one for one in streams(False) if one.name == case.stream)
    plain = stream.experiment(Part(case.first, case.rows, order))
    plain["stream"].pop("drift", None)
    if case.drift is not None:
        plain["stream"]["drift"] = [case.drift]
    plain |= {"optimizer": {"name": "loko", **answer}, "heldout": None, "near_future": 0, "report_every": BATCH}
    reports = list(online.advance(online.start(validate(ExperimentConfig, plain), validate=False)))
    alarms = sorted({int(report["drift_row"]) for report in reports if report.get("drift_row")})
    return {"nll": reports[-1]["nll"], "window_nll": reports[-1]["window_nll"], "alarms": alarms}


def delays(alarms: Sequence[int], changes: Sequence[int]) -> tuple[list[int], int]:
    """Rows from each change to the first alarm before the next one, and how many alarms no change explains.

    A change explains the first alarm after it, and no other.
    """
    found = []
    for change, following in zip(changes, [*changes[1:], math.inf], strict=True) if changes else ():
        after = [alarm for alarm in alarms if change < alarm <= following]
        found += [after[0] - change] if after else []
    return found, len(alarms) - len(found)


def _heard(runs: pd.DataFrame, case: Case) -> str:
    if case.drift is not None and not case.changes:
        return ", ".join(" ".join(map(str, alarms)) or "none" for alarms in runs.alarms)
    each = [delays(alarms, case.changes) for alarms in runs.alarms]
    late = [delay for found, _ in each for delay in found]
    due = len(case.changes) * len(runs)
    between = " to ".join(map(str, sorted({min(late), max(late)}))) if late else ""
    after = f"; {between} rows after" if late else ""
    return f"{len(late)} of {due}{after}; {sum(false for _, false in each)} false"


def main(
    json_: Annotated[Path | None, typer.Option("--json", help="write what was measured here")] = None,
    orders: Annotated[int, typer.Option(help="orders of the rows")] = 3,
    only: Annotated[str, typer.Option("--streams", help="comma-separated; default: all")] = "",
) -> None:
    """Learn every case with every answer."""
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    lines: list[Plain] = []
    chosen = names_of(only, list(dict.fromkeys(case.stream for case in CASES.values())), "stream")
    for name, case in CASES.items():
        if case.stream not in chosen:
            continue
        make_data([case.stream])
        missing = next(one for one in streams(False) if one.name == case.stream).missing
        if missing is not None:
            print(f"skipped {name}: no {missing}")
            continue
        for answer, settings in ANSWERS.items():
            for order in range(11, 11 + orders):
                lines.append({"case": name, "answer": answer, "order": order, **measure(case, settings, order)})
                print(*list(lines[-1].values())[:4], lines[-1]["alarms"], flush=True)
    if not lines:
        raise SystemExit("nothing measured")
    table = pd.DataFrame(lines)
    shown = Table("answer", *table.case.unique(), title=f"online NLL, {orders} orders")
    means = table.groupby(["answer", "case"]).nll.mean()
    for answer in ANSWERS:
        shown.add_row(answer, *(f"{means[answer, name]:.3f}" for name in table.case.unique()))
    Console(width=150).print(shown)
    for pair, runs in table[table.answer.str.contains("detector")].groupby(["case", "answer"], sort=False):
        print(f"{pair[0]}, {pair[1]}: alarms {_heard(runs, CASES[str(pair[0])])}")
    if json_ is not None:
        write(json_, [], table=lines, orders=orders)


if __name__ == "__main__":
    typer.run(main)
