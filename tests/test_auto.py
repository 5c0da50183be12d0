"""``initial_covariance="auto"``: the prior variance of the logits is what it should be, whoever looks and however."""

from __future__ import annotations

import copy
import io
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from loko import LoKO
from loko.config import ConfigError, LokoConfig, validate
from loko.observation import Categorical
from loko.optimizer import AUTO_VARIANCE
from tests.oracle import jacobian
from tests.test_filter import OBSERVATIONS, Tiny, rows
from tests.test_optimizer import assert_same, snapshot

EXACT: dict[str, Any] = {"output_tolerance": 0.0, "initial_covariance": "auto", "scale_adaptation": 0.0}


def first_step(model: nn.Module, batch: int, observation: str, outputs: int, **settings: Any) -> LoKO:
    x, y = rows(observation, outputs, batch)
    optimizer = LoKO(model, observation=observation, **{**EXACT, **settings})
    optimizer.step(lambda: (model(x), y))
    return optimizer


def prior_variance(model: nn.Module, variance: Tensor, batch: int, observation: str, outputs: int) -> float:
    """Mean variance of a logit under diag(variance), dense; centred, and over C − 1 classes, for softmax."""
    names = [name for name, _ in model.named_parameters()]
    _, J = jacobian(model, names, rows(observation, outputs, batch)[0])
    if observation == "categorical":
        J = J - J.mean(1, keepdim=True)
    total = float((J.square() @ variance).sum())
    return total / batch / (outputs - 1 if observation == "categorical" else outputs)


def start_of(optimizer: LoKO, model: nn.Module) -> Tensor:
    """p₀ of every parameter, in the order of the model."""
    scales = {id(p): g["initial_covariance"] for g in optimizer.param_groups for p in g["params"]}
    return torch.cat([torch.full((p.numel(),), scales[id(p)], dtype=torch.float64) for p in model.parameters()])


@pytest.mark.parametrize(("observation", "outputs"), OBSERVATIONS)
@pytest.mark.parametrize("covariance", ["low_rank", "diagonal"])
@pytest.mark.parametrize("batch", [1, 4])
def test_the_first_rows_have_the_prior_variance_asked_for(
    observation: str, outputs: int, covariance: str, batch: int
) -> None:
    model = Tiny(outputs)
    start = copy.deepcopy(model)
    optimizer = first_step(model, batch, observation, outputs, covariance=covariance, scales={"head": 0.5})
    found = prior_variance(start, start_of(optimizer, model), batch, observation, outputs)
    assert found == pytest.approx(1.0 if observation == "gaussian" else AUTO_VARIANCE, rel=1e-9)
    groups = {g["name"]: g["initial_covariance"] for g in optimizer.param_groups}
    assert groups["head"] == pytest.approx(groups["other"] / 2)


def test_it_is_the_filter_with_that_number_given() -> None:
    """Up to float32, in which explicit variances start."""
    model = Tiny(3)
    twin = copy.deepcopy(model)
    optimizer = first_step(model, 4, "categorical", 3)
    found = optimizer.param_groups[0]["initial_covariance"]
    given = first_step(twin, 4, "categorical", 3, initial_covariance=found)
    x, y = rows("categorical", 3, 24)
    for i in range(4, 24, 4):
        for one, net in ((optimizer, model), (given, twin)):
            one.step(lambda i=i, net=net: (net(x[i : i + 4]), y[i : i + 4]))
    for name, value in snapshot(optimizer, model).items():
        torch.testing.assert_close(value, snapshot(given, twin)[name], rtol=1e-4, atol=1e-5)
    assert optimizer.diagnostics()["initial_covariance"] == found == given.diagnostics()["initial_covariance"]


@pytest.mark.parametrize("reference", [0, 1, 4])
def test_the_reference_class_does_not_matter(reference: int) -> None:
    model = Tiny(5)
    x, y = rows("categorical", 5, 4)
    optimizer = LoKO(model, observation=Categorical(reference), **EXACT)
    expected = first_step(Tiny(5), 4, "categorical", 5).param_groups[0]["initial_covariance"]
    optimizer.step(lambda: (model(x), y))
    assert optimizer.param_groups[0]["initial_covariance"] == pytest.approx(expected, rel=1e-9)


def test_units_of_the_start_do_not_matter() -> None:
    """Scales that are the same for every group cancel."""
    found = [
        first_step(Tiny(3), 4, "categorical", 3, scales=dict.fromkeys(("head", "other"), scale)).param_groups[0]
        for scale in (1.0, 100.0)
    ]
    assert found[0]["initial_covariance"] == pytest.approx(found[1]["initial_covariance"], rel=1e-9)


@pytest.mark.parametrize("at", [0, 2, 6])
@pytest.mark.parametrize("covariance", ["low_rank", "diagonal"])
def test_resume_before_and_after_the_first_step(covariance: str, at: int) -> None:
    x, y = rows("categorical", 3, 12)
    settings = {"covariance": covariance, "initial_covariance": "auto", "process_noise": 1e-4}

    def learn(optimizer: LoKO, model: nn.Module, first: int, last: int) -> None:
        for i in range(first, last, 2):
            optimizer.step(lambda i=i: (model(x[i : i + 2]), y[i : i + 2]))

    model = Tiny(3)
    optimizer = LoKO(model, **settings)
    learn(optimizer, model, 0, at)
    buffer = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, buffer)
    learn(optimizer, model, at, 12)

    other = Tiny(3, seed=4)
    resumed = LoKO(other, **settings)
    learn(resumed, other, 0, 4)  # a used optimizer can be loaded as well as a new one
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    other.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    learn(resumed, other, at, 12)
    assert_same(snapshot(resumed, other), snapshot(optimizer, model))
    assert resumed.diagnostics() == optimizer.diagnostics()


def test_a_first_batch_that_is_skipped_sets_nothing() -> None:
    model = Tiny(3)
    x, y = rows("categorical", 3, 4)
    optimizer = LoKO(model, **EXACT)
    optimizer.step(lambda: (model(x * math.nan), y))
    assert optimizer.diagnostics()["initial_covariance"] == 1.0
    optimizer.step(lambda: (model(x), y))
    expected = first_step(Tiny(3), 4, "categorical", 3)
    assert optimizer.diagnostics()["initial_covariance"] == expected.diagnostics()["initial_covariance"]


def test_repr_and_refusals() -> None:
    model = Tiny(3)
    assert "initial_covariance='auto'" in repr(LoKO(model))
    assert "initial_covariance='auto'" not in repr(LoKO(model, initial_covariance=0.3))
    first, *rest = model.parameters()
    own = {"params": [first], "initial_covariance": 1.0}
    with pytest.raises(ValueError, match="one scale for all"):
        LoKO(model, [own, {"params": rest}])
    assert "initial_covariance='auto'" not in repr(LoKO(model, [own]))  # nothing is left to it
    linear = nn.Linear(3, 3)
    silent = LoKO(linear, [linear.weight], initial_covariance="auto")
    with pytest.raises(ValueError, match="no parameter moves"):
        silent.step(lambda: (linear(torch.zeros(2, 3)), torch.tensor([0, 1])))


def test_the_config_takes_numbers_and_auto() -> None:
    for given, wanted in (("auto", "auto"), (0.5, 0.5), ("1e-3", 1e-3)):  # YAML reads 1e-3 as text
        assert validate(LokoConfig, {"name": "loko", "initial_covariance": given}).initial_covariance == wanted
    for wrong in ("automatic", 0, float("inf"), None):
        with pytest.raises(ConfigError, match="initial_covariance"):
            validate(LokoConfig, {"name": "loko", "initial_covariance": wrong})
