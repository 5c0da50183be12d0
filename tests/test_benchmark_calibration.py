"""The ways to predict that the calibration benchmark compares: each is what it says, and leaves the model as it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch

from benchmarks.calibration import Predict, goals, of_ivon, of_loko, scores
from loko import online
from tests import tiny

ROWS = 32
Ways = Callable[[online.Run], dict[str, Predict]]


def learned(tmp_path: Path, optimizer: dict[str, object]) -> online.Run:
    paths = tiny.shards(tmp_path / "stream", ROWS)
    heldout = {"paths": str(tiny.shards(tmp_path / "heldout", 20, seed=1))}
    run = online.start(tiny.config(paths, heldout=heldout, optimizer=optimizer))
    for _ in online.advance(run):
        pass
    return run


def test_scores_of_a_predictor_that_knows_nothing(tmp_path: Path) -> None:
    run = learned(tmp_path, {"name": "loko"})
    uniform = torch.full((ROWS, tiny.CLASSES), 1 / tiny.CLASSES, dtype=torch.float64)
    found = scores(run, lambda batch: uniform[: len(batch.labels)])
    assert found["nll"] == pytest.approx(torch.tensor(3.0).log().item())
    assert found["ece"] == pytest.approx(abs(found["accuracy"] - 1 / 3))


@pytest.mark.parametrize(("name", "ways"), [("loko", of_loko), ("ivon", of_ivon)])
def test_predictions_are_probabilities_and_change_nothing(tmp_path: Path, name: str, ways: Ways) -> None:
    if name == "ivon":
        pytest.importorskip("ivon")
    run = learned(tmp_path, {"name": name, **({"options": {"hess_init": 0.1}} if name == "ivon" else {})})
    assert run.heldout is not None
    batch = run.task.collate(next(iter(run.heldout.batches(20, cursor=0, rank=0, world_size=1))))
    before = [p.detach().clone() for p in run.task.model.parameters()]
    with torch.no_grad():
        found = {way: predict(batch) for way, predict in ways(run).items()}
    for predicted in found.values():
        assert predicted.shape == (20, tiny.CLASSES)
        torch.testing.assert_close(predicted.sum(1), torch.ones(20, dtype=torch.float64))
    for parameter, was in zip(run.task.model.parameters(), before, strict=True):
        assert torch.equal(parameter, was)
    first = next(iter(found.values()))
    assert torch.equal(first, run.task.logits(batch).detach().double().softmax(-1))


def test_a_goal_is_met_where_the_expectation_is_no_worse() -> None:
    ways = {"plug-in": (0.5, 0.1), "predict": (0.4, 0.2), "IVON, posterior": (0.6, 0.2)}
    lines = [{"stream": "a", "way": way, "nll": nll, "ece": ece} for way, (nll, ece) in ways.items()]
    assert [goal.met for goal in goals(pd.DataFrame(lines))] == [True, True, False, True]
