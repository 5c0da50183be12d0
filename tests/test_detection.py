"""The change detector: what it hears, what it says nothing of, what follows, and that a checkpoint holds all of it."""

from __future__ import annotations

import logging
import math
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from loko import LoKO, detection
from loko.config import ConfigError, LokoConfig, validate
from loko.detection import Detector, loss
from loko.observation import OBSERVATIONS
from tests.oracle import covariance_of
from tests.test_drift_adaptation import CHANGE, END, X, Y, build, linear
from tests.test_filter import close
from tests.test_optimizer import assert_same, snapshot, through_disk


def noisy(level: float, steps: int, seed: int, deviation: float = 0.2) -> list[float]:
    generator = torch.Generator().manual_seed(seed)
    return (level + deviation * torch.randn(steps, generator=generator, dtype=torch.float64)).tolist()


def heard(losses: list[float]) -> list[int]:
    detector = Detector()
    return [step for step, one in enumerate(losses) if detector.update(one)]


@pytest.mark.parametrize("seed", range(5))
def test_a_rise_is_heard_once_and_soon_a_fall_and_noise_never(seed: int) -> None:
    low, high = noisy(0.5, 300, seed), noisy(2.0, 300, seed + 100)
    assert heard(low) == []
    assert heard(high + low) == []
    found = heard(low + high)
    assert len(found) == 1
    assert 300 <= found[0] < 320


@pytest.mark.parametrize("deviation", [0.3, 0.5])
def test_a_fall_among_noise_is_not_heard(deviation: float) -> None:
    """ADWIN cuts where it may, and keeps much from before the fall: means of the two parts do not say which way."""
    for seed in range(40):
        assert heard(noisy(2.0, 200, seed, deviation) + noisy(1.0, 60, seed + 1000, deviation)) == []


def test_a_loss_that_has_fallen_may_rise_again() -> None:
    """What was cut off with the fall is not what the next rise is held against."""
    losses = noisy(2.0, 100, 0) + noisy(0.5, 100, 1) + noisy(1.25, 100, 2)
    found = heard(losses)
    assert len(found) == 1
    assert found[0] >= 200


@settings(max_examples=30, deadline=None)
@given(
    levels=st.lists(st.floats(0, 4), min_size=1, max_size=4),
    split=st.integers(0, 400),
    longest=st.sampled_from([64, 999]),
)
def test_from_its_state_it_hears_what_it_would_have_heard(levels: list[float], split: int, longest: int) -> None:
    losses = [one for seed, level in enumerate(levels) for one in noisy(level, 100, seed)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(detection, "_LONGEST", longest)
        whole = Detector()
        told = [whole.update(one) for one in losses]
        first = Detector()
        for one in losses[:split]:
            first.update(one)
        second = Detector(first.state().tolist())
        assert [second.update(one) for one in losses[split:]] == told[split:]
        assert torch.equal(second.state(), whole.state())
        assert len(whole.state()) <= longest


def test_the_loss_is_that_of_the_labels_at_the_outputs() -> None:
    g = torch.Generator().manual_seed(0)
    outputs = torch.randn(5, 3, generator=g, dtype=torch.float64)
    classes = torch.tensor([0, 2, 1, 1, 0])
    several = torch.tensor([[0, 1, 1], [1, 0, 0], [0, 0, 0], [1, 1, 1], [0, 1, 0]])
    cases = {
        "categorical": (classes, float(F.cross_entropy(outputs, classes))),
        "bernoulli": (several, float(F.binary_cross_entropy_with_logits(outputs, several.double()))),
        "gaussian": (outputs + 1, math.log(8.5)),
    }
    for name, (labels, want) in cases.items():
        assert loss(OBSERVATIONS[name](), outputs, labels, 7.5) == pytest.approx(want, rel=1e-12)


def learn(optimizer: LoKO, model: nn.Module, first: int, last: int) -> None:
    for i in range(first, last):
        optimizer.step(lambda i=i: (model(X[i]), Y[i]))


def alarmed(**given: Any) -> tuple[LoKO, nn.Linear, int]:
    """A filter right after its first alarm, and the step that comes next."""
    model = linear()
    optimizer = build(model, drift_detector="adwin", **given)
    for step in range(END):
        learn(optimizer, model, step, step + 1)
        if optimizer.diagnostics()["drifts"]:
            return optimizer, model, step + 1
    raise AssertionError("no alarm")


def test_a_new_rule_is_heard_and_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="loko"):
        optimizer, _, step = alarmed()
    assert CHANGE < step <= CHANGE + 12
    found = optimizer.diagnostics()
    assert (found["drifts"], found["drift_row"]) == (1.0, 2.0 * step)
    assert f"at row {2 * step}" in caplog.text


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_the_step_after_an_alarm_starts_from_the_formula_and_no_other_does(share: float) -> None:
    optimizer, model, step = alarmed(drift_adaptation=share)
    want = (1 - share) * covariance_of(optimizer) + share * 4.0 * torch.eye(3, dtype=torch.float64)
    prior = optimizer.predicted(optimizer.covariance)
    other = build(linear())
    other.covariance = prior
    close(covariance_of(other), want, 2e-6)
    learn(optimizer, model, step, step + 1)
    assert optimizer.predicted(optimizer.covariance) is optimizer.covariance


def test_without_adaptation_it_only_listens() -> None:
    quiet, model, step = alarmed()
    twin = linear()
    other = build(twin)
    learn(other, twin, 0, step)
    for one, net in ((quiet, model), (other, twin)):
        learn(one, net, step, END)
    assert_same(snapshot(quiet, model), snapshot(other, twin))


@pytest.mark.parametrize("before", [-20, 0, 1])
def test_resume_is_the_uninterrupted_run(before: int) -> None:
    """Also right at the alarm, which the next step has yet to answer."""
    _, _, alarm = alarmed(drift_adaptation=1.0)
    at = alarm + before
    model = linear()
    optimizer = build(model, drift_detector="adwin", drift_adaptation=1.0)
    learn(optimizer, model, 0, at)
    saved = through_disk({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    learn(optimizer, model, at, END)
    other = linear()
    resumed = build(other, drift_detector="adwin", drift_adaptation=1.0)
    other.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    learn(resumed, other, at, END)
    assert_same(snapshot(resumed, other), snapshot(optimizer, model))
    assert resumed.diagnostics() == optimizer.diagnostics()
    assert torch.equal(*(one.state_dict()["filter"]["detector"] for one in (resumed, optimizer)))


def test_a_batch_that_is_skipped_is_not_listened_to() -> None:
    model = linear()
    optimizer = build(model, drift_detector="adwin")
    learn(optimizer, model, 0, 5)
    optimizer.step(lambda: (model(X[5] * torch.nan), Y[5]))
    assert len(optimizer.state_dict()["filter"]["detector"]) == 5


def test_the_row_of_an_alarm_is_that_of_the_stream() -> None:
    """Also behind rows that were skipped."""
    model = linear()
    optimizer = build(model, drift_detector="adwin")
    for _ in range(3):
        optimizer.step(lambda: (model(X[0] * torch.nan), Y[0]))
    for step in range(END):
        learn(optimizer, model, step, step + 1)
        if optimizer.diagnostics()["drifts"]:
            assert optimizer.diagnostics()["drift_row"] == 2.0 * (step + 1) + 6
            return
    raise AssertionError("no alarm")


@pytest.mark.parametrize("observation", ["categorical", "bernoulli"])
def test_an_output_that_is_masked_leaves_a_loss_that_can_be_kept(observation: str) -> None:
    outputs = torch.tensor([[0.3, -0.2, -torch.inf]]).double()
    target = torch.tensor([[1, 0, 0]])
    model = OBSERVATIONS[observation]()
    want = loss(model, outputs[:, :2], target[:, 0] * 0 if observation == "categorical" else target[:, :2], 0.0)
    found = loss(model, outputs, target[:, 1] if observation == "categorical" else target, 0.0)
    assert found == pytest.approx(want if observation == "categorical" else want * 2 / 3, abs=1e-9)
    impossible = torch.tensor([2]) if observation == "categorical" else torch.tensor([[0, 0, 1]])
    assert 5 < loss(model, outputs, impossible, 0.0) < 30


def test_what_cannot_be_used_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with_it, without = (build(linear(), drift_detector=kind) for kind in ("adwin", None))
    with pytest.raises(ValueError, match="saved without a drift_detector and LoKO was built with"):
        with_it.load_state_dict(without.state_dict())
    with pytest.raises(ValueError, match="saved with a drift_detector and LoKO was built without"):
        without.load_state_dict(with_it.state_dict())
    with pytest.raises(ValueError, match="drift_detector = 'kswin'; allowed: 'adwin'"):
        build(linear(), drift_detector="kswin")
    with pytest.raises(ConfigError, match="drift_detector"):
        validate(LokoConfig, {"name": "loko", "drift_detector": "kswin"})
    monkeypatch.setitem(sys.modules, "river.drift", None)
    with pytest.raises(ValueError, match=r"needs the library river: pip install 'loko\[drift\]'"):
        build(linear(), drift_detector="adwin")
