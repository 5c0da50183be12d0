"""The audit of the chaos benchmark finds what it is there to find."""

from pathlib import Path

import pytest
import tiny
import torch

from benchmarks.chaos import Audit, damage, difference, newest
from benchmarks.workers import Shape, volume
from loko import online


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return tiny.shards(tmp_path / "rows", 24)


def final(rows: Path, folder: Path, **changes: object) -> Path:
    run = online.start(tiny.config(rows, **changes))
    for _ in online.advance(run):
        pass
    folder.mkdir(parents=True)
    online.save(run, folder)
    return folder


def test_equal_runs_differ_by_nothing_and_one_ulp_shows(rows: Path, tmp_path: Path) -> None:
    one, other = final(rows, tmp_path / "1"), final(rows, tmp_path / "2")
    assert difference(one, other) == 0.0
    state = torch.load(other / "state.pt", weights_only=True)
    state["learner"]["filter"]["covariance"]["precision"][3] *= 1 + 2e-7
    torch.save(state, other / "state.pt")
    assert 0 < difference(one, other) < 1e-4
    state["cursor"] -= 4
    torch.save(state, other / "state.pt")
    assert difference(one, other) == float("inf")


@pytest.mark.parametrize("optimizer", ["loko", "adamw"])
def test_rows_are_counted(rows: Path, tmp_path: Path, optimizer: str) -> None:
    plain = tiny.experiment(rows, optimizer={"name": optimizer})
    folder = final(rows, tmp_path / "run", optimizer={"name": optimizer})
    audit = Audit()
    audit.rows(plain, folder)
    assert (audit.lost, audit.twice) == (0, 0)
    state = torch.load(folder / "state.pt", weights_only=True)
    torch.save({**state, "digest": state["digest"] ^ 1}, folder / "state.pt")
    audit.rows(plain, folder)
    assert audit.lost == 24
    if optimizer == "loko":
        state["learner"]["filter"]["counters"]["rows"] += 4
        torch.save(state, folder / "state.pt")
        audit = Audit()
        audit.rows(plain, folder)
        assert (audit.lost, audit.twice) == (0, 4)


def test_the_newest_whole_checkpoint_is_taken(rows: Path, tmp_path: Path) -> None:
    first, second = final(rows, tmp_path / "run" / "checkpoint_1"), final(rows, tmp_path / "run" / "checkpoint_2")
    assert newest(tmp_path / "run") == second
    damage(second)
    assert newest(tmp_path / "run") == first


def test_one_worker_sends_nothing() -> None:
    assert sum(volume(Shape(1000, 4, 2, 10, 16), 1).values()) == 0
