"""``initial_covariance="auto"``: the prior variance of the logits is what it should be, whoever looks and however."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from loko import LoKO
from loko.config import ConfigError, LokoConfig, validate
from loko.covariance import LowRank, alone
from loko.observation import Categorical
from loko.start import COMMON, know_the_mean, spread
from tests.oracle import jacobian
from tests.test_filter import OBSERVATIONS, Tiny, rows
from tests.test_optimizer import assert_same, snapshot

EXACT: dict[str, Any] = {
    "output_tolerance": 0.0,
    "initial_covariance": "auto",
    "scale_adaptation": 0.0,
    "prior_variance": 5.0,
}


def first_step(model: nn.Module, batch: int, observation: str, outputs: int, **settings: Any) -> LoKO:
    x, y = rows(observation, outputs, batch)
    optimizer = LoKO(model, observation=observation, **{**EXACT, **settings})
    optimizer.step(lambda: (model(x), y))
    return optimizer


def logits_jacobian(
    model: nn.Module, batch: int, observation: str, outputs: int, names: Sequence[str] | None = None
) -> Tensor:
    """J of the outputs of every row, (B, C, n), dense; centred for softmax."""
    names = names or [name for name, _ in model.named_parameters()]
    _, J = jacobian(model, names, rows(observation, outputs, batch)[0])
    return J - J.mean(1, keepdim=True) if observation == "categorical" else J


def degrees(observation: str, outputs: int) -> int:
    return outputs - 1 if observation == "categorical" else outputs


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
    J = logits_jacobian(model, batch, observation, outputs)
    optimizer = first_step(model, batch, observation, outputs, covariance=covariance, scales={"head": 0.5})
    variance = start_of(optimizer, model) / degrees(observation, outputs)
    if observation == "gaussian":
        found, wanted = float((J.square() @ variance).sum()) / batch, 1.0
    elif batch == 1:
        found, wanted = float((J.square() @ variance).sum()), 5.0
    else:  # the unbiased sample variance over the rows
        found, wanted = float(((J - J.mean(0)).square() @ variance).sum()) / (batch - 1), 5.0
    assert found == pytest.approx(wanted, rel=1e-9)
    groups = {g["name"]: g["initial_covariance"] for g in optimizer.param_groups}
    assert groups["head"] == pytest.approx(groups["other"] / 2)


def directions_of(seed: int, rows: int, classes: int) -> Tensor:
    """For each row another basis of the centred outputs, (B, C − 1, C)."""
    mixing = torch.randn(rows, classes - 1, classes - 1, dtype=torch.float64, generator=torch.manual_seed(seed))
    return mixing @ Categorical().contrast(classes)


@pytest.mark.parametrize("own_basis", [False, True])
def test_the_mean_of_the_rows_is_observed_once(own_basis: bool) -> None:
    """P⁻¹ grows by J̄ᵀ J̄ / COMMON, J̄ that of the mean of the centred logits: dense, and in whatever basis."""
    J = logits_jacobian(Tiny(4), 3, "categorical", 4)
    D = directions_of(0, 3, 4) if own_basis else Categorical().contrast(4)
    seen = (D @ J).reshape(9, -1)
    start = LowRank.start(0.5 + torch.rand(J.shape[-1], dtype=torch.float64), 9)
    found = spread(start.project(seen).outputs, D)
    assert found.mean is not None
    after = know_the_mean(start, seen, found.mean, alone, alone)
    assert isinstance(after, LowRank)
    wanted = torch.diag(start.precision) + J.mean(0).mT @ J.mean(0) / COMMON
    torch.testing.assert_close(torch.diag(after.precision) + after.factor.mT @ after.factor, wanted)
    variance = (torch.diag_embed(1 / start.precision) @ J.mT).mT @ J.mT  # (B, C, C) of each row
    assert found.total == pytest.approx(float(variance.diagonal(dim1=1, dim2=2).sum(-1).mean()) / 3)


def test_rows_that_are_all_the_same_do_not_make_p_endless() -> None:
    model = Tiny(3)
    x, y = rows("categorical", 3, 4)
    J = logits_jacobian(model, 1, "categorical", 3)
    optimizer = LoKO(model, **EXACT)
    optimizer.step(lambda: (model(x[:1].expand(4, -1)), y))
    total = float((J.square() @ start_of(optimizer, model)).sum()) / 2
    assert total == pytest.approx(20 * 5.0)


def test_it_is_the_filter_with_that_start_given() -> None:
    """Up to float32, in which explicit variances start."""
    model = Tiny(3)
    twin = copy.deepcopy(model)
    optimizer = first_step(model, 4, "categorical", 3)
    p0 = optimizer.param_groups[0]["initial_covariance"]
    given = LoKO(twin, **{**EXACT, "initial_covariance": p0})
    first, (x, y) = rows("categorical", 3, 4), rows("categorical", 3, 24)
    directions = Categorical().contrast(3)
    J = (directions @ logits_jacobian(twin, 4, "categorical", 3, given.engine.names)).reshape(8, -1)
    found = spread(given.covariance.project(J).outputs, directions)
    assert found.mean is not None
    given.covariance = know_the_mean(given.covariance, J, found.mean, alone, alone)
    given.step(lambda: (twin(first[0]), first[1]))
    for i in range(4, 24, 4):
        for one, net in ((optimizer, model), (given, twin)):
            one.step(lambda i=i, net=net: (net(x[i : i + 4]), y[i : i + 4]))
    for name, value in snapshot(optimizer, model).items():
        torch.testing.assert_close(value, snapshot(given, twin)[name], rtol=1e-4, atol=1e-5)
    assert optimizer.diagnostics()["initial_covariance"] == p0 == given.diagnostics()["initial_covariance"]


@pytest.mark.parametrize("reference", [0, 1, 4])
def test_the_reference_class_does_not_matter(reference: int) -> None:
    model = Tiny(5)
    x, y = rows("categorical", 5, 4)
    optimizer = LoKO(model, observation=Categorical(reference), **EXACT)
    twin = Tiny(5)
    expected = first_step(twin, 4, "categorical", 5)
    optimizer.step(lambda: (model(x), y))
    assert start_of(optimizer, model).tolist() == pytest.approx(start_of(expected, twin).tolist(), rel=1e-9)
    torch.testing.assert_close(
        nn.utils.parameters_to_vector(model.parameters()), nn.utils.parameters_to_vector(twin.parameters())
    )


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
