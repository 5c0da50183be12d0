"""What the online benchmark works out from its cells; nothing is measured here."""

from __future__ import annotations

import math
from pathlib import Path

import pandas as pd
import pytest

from benchmarks.online import CANDIDATES, Cells, Settings, collect
from benchmarks.online_report import (
    HEAD,
    goals,
    interval,
    markdown,
    overview,
    publish,
    rows_to,
    rows_to_recover,
    summary,
    to_target,
)
from benchmarks.online_streams import Stream, streams
from loko.config import ExperimentConfig, validate
from ray_jobs.settings import SearchConfig


def run_of(local: list[float], nll: list[float] | None = None, change: int | None = None) -> pd.DataFrame:
    """Rungs of 40 rows with these accuracies, and cumulative NLLs."""
    rows = [40 * (i + 1) for i in range(len(local))]
    total = pd.Series(local).expanding().mean()
    return pd.DataFrame({"rows": rows, "accuracy": total, "nll": nll or [1.0] * len(rows), "change": change})


def test_interval() -> None:
    mean, half = interval([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert half == pytest.approx(4.303 / 3**0.5)
    assert interval([5.0])[0] == 5.0
    assert math.isnan(interval([5.0])[1])


def test_rows_to_a_target_it_stays_below() -> None:
    run = run_of([0.5] * 5, nll=[2.0, 0.9, 1.1, 0.8, 0.7])
    assert rows_to(run, 1.0) == 160
    assert rows_to(run, 3.0) == 40
    assert rows_to(run, 0.5) == math.inf


def test_seconds_to_a_target() -> None:
    run = run_of([0.5] * 4, nll=[2.0, 1.5, 0.9, 0.8]).assign(learn_cpu_seconds=[1.0, 2.0, 3.0, 4.0])
    assert to_target(run, 1.0) == (120, 3.0)
    assert to_target(run, 0.1) == (math.inf, math.inf)


def test_a_passage_is_renewed_and_the_rest_stays(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- online -->\nold\n<!-- /online -->\nafter\n")
    publish(readme, "new\n")
    assert readme.read_text() == "before\n<!-- online -->\nnew\n<!-- /online -->\nafter\n"
    readme.write_text("nothing here")
    with pytest.raises(ValueError, match="no passage between"):
        publish(readme, "new\n")


def test_rows_to_recover() -> None:
    accuracies = [0.9] * 5 + [0.2, 0.9, 0.3, 0.85, 0.85, 0.85, 0.9]
    assert rows_to_recover(run_of(accuracies, change=200)) == pytest.approx(240)
    assert rows_to_recover(run_of([0.9] * 5 + [0.5] * 5, change=200)) == math.inf


def test_cells_are_found_again_and_make_the_table(tmp_path: Path) -> None:
    stream = next(s for s in streams(False) if s.name == "mnist")
    cells = Cells(Settings(trials=3, rows=200), tmp_path)
    names = ["loko-default", "loko-tuned", "adamw"]
    for name, level in zip(names, (0.5, 0.4, 1.0), strict=True):
        for order in (1, 2):
            reports = [
                {"rows": rows, "nll": level + 0.01 * order, "accuracy": 0.8, "window_nll": level,
                 "finished": rows == 200, "label_only_nll": 2.3, "learn_cpu_seconds": rows / 100,
                 "peak_megabytes": 500.0}
                for rows in range(40, 201, 40)
            ]  # fmt: skip
            cells.write(cells.path(stream, name, order), stream, name, order, {"optimizer.lr": 0.1}, reports)
    table = collect([stream], names, 2, cells)
    assert len(table) == 3 * 2 * 5
    assert len(collect([stream], names, 2, Cells(Settings(trials=4, rows=200), tmp_path))) == 0
    lines = summary(table)
    assert [line[1] for line in lines] == ["loko-tuned", "loko-default", "adamw", "labels only"]
    assert lines[0][3] == "-0.600 ± 0.000"
    assert [len(line) for line in lines] == [len(HEAD)] * 4
    assert lines[0][HEAD.index("rows to AdamW's NLL")] == "40"
    assert lines[0][HEAD.index("seconds to it")] == "0.4"
    assert markdown(HEAD, lines).count("\n") == 6
    assert overview(table).splitlines()[2:4] == ["| loko-default | 0.515 |", "| loko-tuned | **0.415** |"]
    reached = {goal.name: goal for goal in goals(table)}
    assert all(goal.met for name, goal in reached.items() if "NLL" in name or "streams" in name)
    assert reached["online NLL, loko-default / best tuned gradient, geometric mean"].measured == pytest.approx(
        0.515 / 1.015
    )


@pytest.mark.parametrize("full", [False, True])
def test_no_row_is_both_searched_and_reported(full: bool) -> None:
    for stream in streams(full):
        searched, reported = stream.part(True, None, 0), stream.part(False, None, 1)
        assert searched.first + searched.rows <= reported.first
        for part in (searched, reported):
            plain = stream.experiment(part)
            validate(ExperimentConfig, plain)
            for name, candidate in CANDIDATES.items():
                validate(SearchConfig, {"name": "x", "experiment": plain, "candidates": {name: candidate}})


def test_a_stream_without_its_data_is_named(tmp_path: Path) -> None:
    absent = Stream("none", (tmp_path / "rows.parquet",), {})
    assert absent.missing == "rows.parquet"
