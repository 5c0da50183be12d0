"""The units of LoRA's factors, by what the layer itself gives and what A starts with, and the start they lead to."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from peft.tuners.lora.config import BdLoraConfig
from torch import Tensor, nn

from loko import LoKO
from loko.adapters import Units
from loko.covariance import BlockDiagonal, Diagonal, LowRank, alone

CPU = torch.device("cpu")


class Net(nn.Module):
    """Two convolutions, a map and a table, all with adapters, and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.grouped = nn.Conv2d(4, 4, 1, groups=2)
        self.body = nn.Linear(16, 6)
        self.table = nn.Embedding(5, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.grouped(torch.tanh(self.conv(x)))).flatten(1)
        looked_up: Tensor = self.table((x[:, 0, 0, 0] > 0).long())
        out: Tensor = self.head(torch.tanh(self.body(hidden) + looked_up))
        return out


def net() -> Any:
    config = LoraConfig(
        r=2,
        lora_alpha=6,
        target_modules=["conv", "grouped", "body", "table"],
        modules_to_save=["head"],
        lora_dropout=0.0,
    )
    return get_peft_model(Net().double(), config).double().eval()


X = torch.randn(6, 2, 2, 2, dtype=torch.float64, generator=torch.manual_seed(1))
Y = torch.tensor([0, 1, 2, 0, 1, 2])


def measured(model: Any, rows: Tensor = X) -> dict[str, float]:
    units = Units(model, {id(p) for p in model.parameters()})
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


@pytest.mark.parametrize("layer", ["conv", "grouped", "body"])
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
    assert not measured(model, X[:0])
    with torch.no_grad():
        model.get_parameter("base_model.model.body.lora_A.default.weight").zero_()
    assert not [name for name in measured(model) if "body" in name]


OTHERS: dict[str, Any] = {
    "AdaLoRA": AdaLoraConfig(target_modules=["body"], init_r=2, target_r=2, total_step=10),
    "bare parameters": LoraConfig(r=2, target_parameters=["body.weight"]),
    "blocks": LoraConfig(
        r=2, target_modules=["body"], use_bdlora=BdLoraConfig(target_modules_bd_b=["body"], nblocks=2)
    ),
    "another adapter": LoraConfig(r=2, target_modules=["body"]),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_variants_that_are_no_plain_map_start_from_p0(kind: str) -> None:
    """They learn as before; so does a head beside an adapter that is not filtered."""
    model = get_peft_model(Net().double(), OTHERS[kind]).double().eval()
    if kind == "another adapter":
        model.requires_grad_(False).get_submodule("base_model.model.head").requires_grad_(True)
    optimizer = first_step(model)
    assert optimizer.diagnostics()["initial_covariance"] == optimizer.param_groups[0]["initial_covariance"] != 1.0


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


def first_step(model: Any, **settings: Any) -> LoKO:
    optimizer = LoKO(model, output_tolerance=0.0, scale_adaptation=0.0, **settings)
    optimizer.step(lambda: (model(X), Y))
    return optimizer


def start_of(model: Any, rows: int = 1, **settings: Any) -> dict[str, float]:
    """The variance that the filter starts each tensor from, seen before the first row is learned.

    Of one row no mean is observed before, and the variance within a tensor is one number.
    """
    optimizer = LoKO(model, covariance="diagonal", output_tolerance=0.0, **settings)
    start: list[Tensor] = []
    predicted = optimizer.predicted

    def spied(covariance: Any) -> Any:
        start.append(covariance.variance)
        return predicted(covariance)

    optimizer.predicted = spied  # type: ignore[method-assign]
    gaussian = settings.get("observation") == "gaussian"
    optimizer.step(lambda: (model(X[:rows]), torch.zeros(rows, 3).double() if gaussian else Y[:rows]))
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
        # p₀ is set with the scales, all 4 here: a quarter of it gives the logits the same variance.
        of_head = scaled["base_model.model.head.modules_to_save.default.weight"]
        wanted = math.sqrt(4.0) * variance / p0 if name in found else 1.0
        assert scaled[name] / of_head == pytest.approx(wanted, rel=1e-6)


def test_numbers_to_predict_start_alike() -> None:
    found = measured(net(), X)
    start = start_of(net(), rows=6, observation="gaussian")
    p0 = start["base_model.model.head.modules_to_save.default.weight"]
    for name, variance in start.items():
        assert variance == pytest.approx(math.sqrt(50.0 * found[name] * p0) if name in found else p0, rel=1e-6)


def test_only_the_first_batch_that_is_learned_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    model, twin = net(), net()
    optimizer = LoKO(model, output_tolerance=0.0)
    optimizer.step(lambda: (model(X * torch.nan), Y))
    optimizer.step(lambda: (model(X), Y))
    other = LoKO(twin, output_tolerance=0.0)
    other.step(lambda: (twin(X), Y))
    assert torch.equal(optimizer.covariance.marginal(), other.covariance.marginal())
    monkeypatch.setattr(Units, "measured", None)  # what is called now fails
    optimizer.step(lambda: (model(X), Y))


def test_a_variance_given_by_hand_is_taken_as_it_is() -> None:
    optimizer = first_step(net(), initial_covariance=0.3)
    assert optimizer.diagnostics()["initial_covariance"] == 0.3
    assert "adapter_variance" not in optimizer.settings


def test_reports_and_a_resumed_filter_know_the_start() -> None:
    """What diagnostics report is the mean of a group."""
    model = net()
    optimizer = first_step(model)
    p0 = optimizer.param_groups[-1]["initial_covariance"]
    units = measured(net())
    of_a = {n: p.numel() for n, p in model.named_parameters() if "lora_A" in n or "lora_embedding_A" in n}
    total = sum(k * (math.sqrt(50 * units[n] * p0) if n in units else p0) for n, k in of_a.items())
    found = optimizer.diagnostics()
    assert found["initial_covariance_A"] == pytest.approx(total / sum(of_a.values()), rel=1e-9)
    assert f"initial_covariance={found['initial_covariance_A']:g}," in repr(optimizer)
    other = net()
    resumed = LoKO(other, output_tolerance=0.0, scale_adaptation=0.0)
    resumed.load_state_dict(optimizer.state_dict())
    assert resumed.diagnostics() == found


def test_after_a_drift_p_goes_back_towards_where_each_factor_started(monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    start = start_of(net(), rows=6, observation="gaussian")
    optimizer = LoKO(model, covariance="diagonal", observation="gaussian", scale_adaptation=0.0, drift_adaptation=0.5)
    optimizer.step(lambda: (model(X), torch.zeros(6, 3).double()))
    monkeypatch.setattr(optimizer, "_drift_share", lambda: 0.3)
    before = optimizer.covariance.marginal()
    sizes = torch.tensor([p.numel() for p in optimizer.parameters])
    of_start = before.new_tensor([start[name] for name in optimizer.engine.names]).repeat_interleave(sizes)
    torch.testing.assert_close(optimizer.predicted(optimizer.covariance).marginal(), 0.7 * before + 0.3 * of_start)


def test_hooks_are_gone_and_the_jacobian_is_none_the_wiser() -> None:
    model, twin = net(), net()
    first_step(model)
    assert not any(module._forward_hooks for module in model.modules())
    given = first_step(twin, initial_covariance=0.3)
    other = net()
    plain = LoKO(other, output_tolerance=0.0, scale_adaptation=0.0, initial_covariance=0.3)
    with Units(other, {id(p) for p in other.parameters()}).measured():
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


def test_rescaling_blocks_is_that_of_each_block() -> None:
    root = torch.randn(7, 7, dtype=torch.float64)
    dense = torch.block_diag((root @ root.mT)[:3, :3], (root @ root.mT)[3:, 3:])
    start = BlockDiagonal.start(dense.diagonal(), 0, [3, 4])
    columns = start.columns.clone()
    columns[:3, :3], columns[:4, 3:] = dense[:3, :3], dense[3:, 3:]
    factors = 0.5 + torch.rand(7, dtype=torch.float64)
    wanted = factors.sqrt()[:, None] * dense * factors.sqrt()
    for own, block in BlockDiagonal(columns, start.place).rescale(factors).blocks():
        torch.testing.assert_close(block, wanted[own, own])
