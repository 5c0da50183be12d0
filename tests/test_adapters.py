"""The units of LoRA's factors, by what the layer itself gives and what A starts with, and the start they lead to."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from torch import Tensor, nn

from loko import LoKO
from loko.adapters import Units
from loko.covariance import Diagonal, LowRank, alone

CPU = torch.device("cpu")


class Net(nn.Module):
    """A convolution and two maps, all with adapters, and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(2, 3, 3, padding=1)
        self.body = nn.Linear(12, 6)
        self.table = nn.Embedding(5, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.conv(x)).flatten(1)
        looked_up: Tensor = self.table((x[:, 0, 0, 0] > 0).long())
        out: Tensor = self.head(torch.tanh(self.body(hidden) + looked_up))
        return out


def net(**settings: Any) -> Any:
    config = LoraConfig(
        r=2,
        lora_alpha=6,
        target_modules=["conv", "body", "table"],
        modules_to_save=["head"],
        lora_dropout=0.0,
        **settings,
    )
    return get_peft_model(Net().double(), config).double().eval()


X = torch.randn(6, 2, 2, 2, dtype=torch.float64, generator=torch.manual_seed(1))
Y = torch.tensor([0, 1, 2, 0, 1, 2])


def measured(model: Any, rows: Tensor = X) -> dict[str, float]:
    units = Units(model)
    with units.measured():
        model(rows)
    found = units.found(alone, CPU)
    return {name: found[id(p)] for name, p in model.named_parameters() if id(p) in found}


def outputs_of(model: Any, name: str) -> Tensor:
    """What a layer gives for X."""
    kept: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_hook(
        lambda module, inputs, output: kept.append(output.detach())
    )
    model(X)
    handle.remove()
    return kept[0]


@pytest.mark.parametrize("layer", ["conv", "body"])
def test_in_its_unit_b_moves_a_layer_as_far_as_what_it_gives(layer: str) -> None:
    """The expectation over B is a sum over its numbers, each moved alone."""
    model = net()
    found = measured(model)
    path = f"base_model.model.{layer}"
    given = outputs_of(model, path)
    weight = model.get_parameter(f"{path}.lora_B.default.weight")
    moved = 0.0
    for index in range(weight.numel()):
        with torch.no_grad():
            weight.view(-1)[index] = 1.0
            moved += float((outputs_of(model, path) - given).square().sum())
            weight.view(-1)[index] = 0.0
    assert found[f"{path}.lora_B.default.weight"] * moved == pytest.approx(float(given.square().sum()), rel=1e-9)
    first = model.get_parameter(f"{path}.lora_A.default.weight").detach()
    assert found[f"{path}.lora_A.default.weight"] == pytest.approx(0.1 * float(first.square().mean()), rel=1e-12)


def test_what_is_not_measured_has_no_unit() -> None:
    """Embeddings, what is no adapter, a layer that no row reaches, a B behind an A of zeros."""
    model = net()
    assert not [name for name in measured(model) if "table" in name or "head" in name]
    assert not [name for name in measured(model, X[:0]) if "lora_B" in name]
    with torch.no_grad():
        model.get_parameter("base_model.model.body.lora_A.default.weight").zero_()
    assert not [name for name in measured(model) if "body" in name]
    assert len(Units(Net())) == 0
    ada = AdaLoraConfig(target_modules=["body"], init_r=2, target_r=2, total_step=10)
    assert len(Units(get_peft_model(Net(), ada))) == 0


@given(factor=st.floats(0.01, 100.0), scaling=st.floats(0.01, 100.0))
def test_how_a_is_scaled_does_not_matter(factor: float, scaling: float) -> None:
    """In units, s B A varies alike whether a number stands in A, in s or in neither."""
    model = net()
    plain = measured(model)
    body = model.get_submodule("base_model.model.body")
    with torch.no_grad():
        body.lora_A["default"].weight.mul_(factor)
    body.scaling["default"] *= scaling
    key = "base_model.model.body.lora_{}.default.weight"
    found = measured(model)
    assert found[key.format("A")] == pytest.approx(plain[key.format("A")] * factor**2, rel=1e-6)
    assert found[key.format("B")] == pytest.approx(plain[key.format("B")] / (factor * scaling) ** 2, rel=1e-6)


def first_step(model: Any, group: Any = None, rows: slice = slice(None), **settings: Any) -> LoKO:
    settings = {"output_tolerance": 0.0, "scale_adaptation": 0.0, "group": group, **settings}
    optimizer = LoKO(model, **settings)
    optimizer.step(lambda: (model(X[rows]), Y[rows]))
    return optimizer


def start_of(model: Any, **settings: Any) -> dict[str, float]:
    """The variance that the filter starts each tensor from, seen before the first row is learned."""
    optimizer = LoKO(model, covariance="diagonal", output_tolerance=0.0, **settings)
    start: list[Tensor] = []
    predicted = optimizer.predicted

    def spied(covariance: Any) -> Any:
        start.append(covariance.variance)
        return predicted(covariance)

    optimizer.predicted = spied  # type: ignore[method-assign]
    optimizer.step(lambda: (model(X[:1]), Y[:1]))  # one row: no mean to be observed before
    parts = start[0].split([p.numel() for p in optimizer.parameters])
    assert all(bool((part == part[0]).all()) for part in parts)
    return {name: float(part[0]) for name, part in zip(optimizer.engine.names, parts, strict=True)}


def test_a_factor_starts_half_way_between_p0_and_its_unit() -> None:
    found = measured(net(), X[:1])
    plain, met = start_of(net(), adapter_variance=0.0), start_of(net(), adapter_variance=7.0)
    scaled = start_of(net(), adapter_variance=7.0, scales={"B": 4.0, "A": 4.0, "head": 4.0})
    p0 = plain["base_model.model.head.modules_to_save.default.weight"]
    assert set(plain.values()) == {p0}
    for name, variance in met.items():
        wanted = math.sqrt(7.0 * found[name] * p0) if name in found else p0
        assert variance == pytest.approx(wanted, rel=1e-6), name
        assert not (name in found and variance == pytest.approx(p0, rel=1e-2))
        if "embedding" not in name:  # p₀ is set with the scales: a quarter of it gives the logits the same variance
            assert scaled[name] / scaled["base_model.model.head.modules_to_save.default.weight"] == pytest.approx(
                math.sqrt(4.0) * variance / p0 if name in found else 1.0, rel=1e-6
            )


def test_a_variance_given_by_hand_is_taken_as_it_is() -> None:
    optimizer = first_step(net(), initial_covariance=0.3)
    assert optimizer.diagnostics()["initial_covariance"] == 0.3
    assert "adapter_variance" not in optimizer.settings


def test_reports_and_drift_know_the_start(tmp_path: Any) -> None:
    """What diagnostics report is the mean of a group; a resumed filter still knows it."""
    model = net()
    optimizer = first_step(model, drift_adaptation=0.5)
    p0 = optimizer.param_groups[-1]["initial_covariance"]
    units = measured(net())
    of_a = {n: p.numel() for n, p in model.named_parameters() if "lora_A" in n or "lora_embedding_A" in n}
    wanted = sum(k * (math.sqrt(50 * units[n] * p0) if n in units else p0) for n, k in of_a.items()) / sum(
        of_a.values()
    )
    assert optimizer.diagnostics()["initial_covariance_A"] == pytest.approx(wanted, rel=1e-9)
    other = net()
    resumed = LoKO(other, output_tolerance=0.0, scale_adaptation=0.0, drift_adaptation=0.5)
    resumed.load_state_dict(optimizer.state_dict())
    other.load_state_dict(model.state_dict())
    assert resumed.diagnostics() == optimizer.diagnostics()
    for one, its in ((optimizer, model), (resumed, other)):
        for first in (0, 2, 4, 0, 2, 4) * 5:  # labels that turn, so that the filter goes back towards its start
            one.step(lambda its=its, first=first: (its(X[first : first + 2]), (Y[first : first + 2] + first) % 3))
    assert torch.equal(optimizer.covariance.marginal(), resumed.covariance.marginal())


def test_hooks_are_gone_and_the_jacobian_is_none_the_wiser() -> None:
    model, twin = net(), net()
    first_step(model)
    assert not any(module._forward_hooks for module in model.modules())
    given = first_step(twin, initial_covariance=0.3)
    other = net()
    plain = LoKO(other, output_tolerance=0.0, scale_adaptation=0.0, initial_covariance=0.3)
    with Units(other).measured():
        plain.step(lambda: (other(X), Y))
    assert torch.equal(given.covariance.marginal(), plain.covariance.marginal())


@pytest.mark.parametrize("kind", [Diagonal, LowRank])
def test_rescaling_is_that_of_the_covariance(kind: Any) -> None:
    variance, factors = (0.5 + torch.rand(2, 7, dtype=torch.float64)).unbind()
    covariance = kind.start(variance, 3)
    if kind is LowRank:
        covariance = LowRank(covariance.precision, torch.randn(3, 7, dtype=torch.float64))
        dense = torch.linalg.inv(torch.diag(covariance.precision) + covariance.factor.mT @ covariance.factor)
        after = covariance.rescale(factors)
        dense_after = torch.linalg.inv(torch.diag(after.precision) + after.factor.mT @ after.factor)
        torch.testing.assert_close(dense_after, factors.sqrt()[:, None] * dense * factors.sqrt())
    torch.testing.assert_close(covariance.rescale(factors).marginal(), factors * covariance.marginal())
