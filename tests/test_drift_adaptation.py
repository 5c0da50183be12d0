"""The innovation test, and the covariance that goes back towards its start when the test says so."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from loko import LoKO
from loko.config import ConfigError, LokoConfig, validate
from tests.oracle import covariance_of
from tests.test_filter import Tiny, close
from tests.test_optimizer import COVARIANCES, assert_same, snapshot, through_disk

CHANGE, END = 60, 80


def stream(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Rows of a linear rule with noise; at ``CHANGE`` the rule is another."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(END, 2, 3, generator=g, dtype=torch.float64)
    before, after = torch.randn(2, 3, 1, generator=g, dtype=torch.float64)
    rule = torch.where(torch.arange(END)[:, None, None] < CHANGE, before, after + 3)
    return x, x @ rule + 0.1 * torch.randn(END, 2, 1, generator=g, dtype=torch.float64)


X, Y = stream()


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(3, 1, bias=False).double()


def learn(optimizer: LoKO, model: nn.Module, first: int, last: int) -> list[float]:
    """Steps [first, last); the surprise after each."""
    surprises = []
    for i in range(first, last):
        optimizer.step(lambda i=i: (model(X[i]), Y[i]))
        surprises.append(optimizer.diagnostics()["surprise"])
    return surprises


def build(model: nn.Module, **settings: Any) -> LoKO:
    given = {"observation": "gaussian", "noise": "fixed", "initial_noise": 0.01, "initial_covariance": 4.0}
    return LoKO(model, **{**given, **settings})


def test_a_consistent_filter_has_innovations_of_one_and_a_change_surprises() -> None:
    """With the true noise and a linear model the test statistic is χ²; a new rule is seen in the very next steps."""
    model = linear()
    optimizer = build(model)
    learn(optimizer, model, 0, 20)
    quiet = learn(optimizer, model, 20, CHANGE)
    assert optimizer.diagnostics()["consistency"] == pytest.approx(1.0, abs=0.35)
    assert max(quiet) < 3
    assert learn(optimizer, model, CHANGE, CHANGE + 1)[0] > 10


@pytest.mark.parametrize("covariance", COVARIANCES, ids=str)
def test_no_adaptation_is_the_filter_without_it(covariance: dict[str, Any]) -> None:
    model = linear()
    optimizer = build(model, **covariance)
    before = optimizer.state_dict()["filter"]["covariance"]
    learn(optimizer, model, 0, END)
    twin = linear()
    calm = build(twin, **covariance, drift_adaptation=0.0)
    learn(calm, twin, 0, END)
    assert_same(snapshot(optimizer, model), snapshot(calm, twin))
    assert float(covariance_of(optimizer).trace()) < float(covariance_of(build(linear(), **covariance)).trace())
    assert before is not None


@pytest.mark.parametrize("covariance", COVARIANCES, ids=str)
def test_the_share_of_the_start_is_the_formula(covariance: dict[str, Any]) -> None:
    """(1 − a) P + a P₀, dense, on the prior of the step after the change; groups keep their own start."""
    model = Tiny(1)
    settings = {"observation": "gaussian", "noise": "ema", "scales": {"head": 2.0}, "initial_covariance": 0.5}
    optimizer = LoKO(model, **settings, **covariance, drift_adaptation=0.6)
    learn(optimizer, model, 0, CHANGE + 2)
    surprise = optimizer.diagnostics()["surprise"]
    assert surprise > 1
    share = 0.6 * min(1.0, surprise - 1.0)
    start = torch.cat(
        [
            torch.full((p.numel(),), g["initial_covariance"], dtype=torch.float64)
            for g in optimizer.param_groups
            for p in g["params"]
        ]
    )
    want = (1 - share) * covariance_of(optimizer) + share * torch.diag(start)
    moved = optimizer.predicted(optimizer.covariance).state()
    state = copy.deepcopy(optimizer.state_dict())
    state["filter"]["covariance"] = moved
    twin = Tiny(1)
    other = LoKO(twin, **settings, **covariance)
    other.load_state_dict(state)
    close(covariance_of(other), want, 1e-7)


def test_it_never_goes_beyond_the_start() -> None:
    model = linear()
    optimizer = build(model, drift_adaptation=1.0)
    for i in range(END):
        optimizer.step(lambda i=i: (model(X[i]), Y[i] * (1 + i)))  # one surprise after another
        assert float(torch.linalg.eigvalsh(covariance_of(optimizer)).max()) <= 4.0 * (1 + 1e-5)


def test_after_a_change_it_is_closer_sooner() -> None:
    """A filter that was certain of the old rule against one that was reminded of its start."""
    errors = []
    for share in (0.0, 1.0):
        model = linear()
        optimizer = build(model, drift_adaptation=share)
        learn(optimizer, model, 0, CHANGE + 6)
        rows = slice(CHANGE + 6, END)
        errors.append(float((model(X[rows]).detach() - Y[rows]).square().mean()))
    assert errors[1] < 0.5 * errors[0]


@pytest.mark.parametrize("at", [0, 10, CHANGE + 2])
def test_resume_keeps_both_means(at: int) -> None:
    model = linear()
    optimizer = build(model, drift_adaptation=0.5, initial_covariance="auto")
    learn(optimizer, model, 0, at)
    saved = through_disk({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    learn(optimizer, model, at, END)
    other = linear()
    resumed = build(other, drift_adaptation=0.5, initial_covariance="auto")
    other.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    learn(resumed, other, at, END)
    assert_same(snapshot(resumed, other), snapshot(optimizer, model))
    assert resumed.diagnostics() == optimizer.diagnostics()


@pytest.mark.parametrize("wrong", [-0.1, 1.1, float("nan")])
def test_settings_out_of_range(wrong: float) -> None:
    with pytest.raises(ValueError, match=r"drift_adaptation = .*; allowed: in \[0, 1\]"):
        LoKO(linear(), drift_adaptation=wrong)
    with pytest.raises(ConfigError, match="drift_adaptation"):
        validate(LokoConfig, {"name": "loko", "drift_adaptation": wrong})
