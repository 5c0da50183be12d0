"""LoKO as its user meets it: settings, resume, bad batches, hooks, groups, adapters."""

from __future__ import annotations

import copy
import io
from collections import OrderedDict
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from loko import PAPER, LoKO, NonFiniteError, parameter_groups
from loko.noise import NOISES
from loko.observation import Categorical
from tests.test_filter import Tiny, groups_of, rows
from tests.test_jacobian import ADAPTERS, adapted, bert, ids

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

COVARIANCES: list[dict[str, Any]] = [
    {"covariance": "diagonal"},
    {"rank": 0},
    {"rank": 4},
    {"covariance": "block_diagonal"},
]
X, Y = rows("categorical", 3, 24)


def learn(optimizer: LoKO, model: nn.Module, first: int, last: int, dtype: torch.dtype = torch.float32) -> None:
    for i in range(first, last, 2):
        optimizer.step(lambda i=i: (model(X[i : i + 2].to(dtype)), Y[i : i + 2]))


def snapshot(optimizer: LoKO, model: nn.Module) -> dict[str, Tensor]:
    """θ, P and R."""
    state = optimizer.state_dict()["filter"]
    result = {name: p.detach().clone() for name, p in model.named_parameters()} | state["covariance"]
    return result | ({} if state["noise"] is None else {"noise": state["noise"]})


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


def through_disk(value: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("at", [0, 2, 10])
@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("covariance", COVARIANCES, ids=str)
def test_resume_goes_on_bit_for_bit(covariance: dict[str, Any], noise: str, at: int) -> None:
    settings = {**covariance, "noise": noise, "forgetting": 0.99, "process_noise": 1e-4}
    model = Tiny(3).float()
    optimizer = LoKO(model, **settings, initial_distribution="uniform", seed=1)
    learn(optimizer, model, 0, at)
    saved = through_disk({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    learn(optimizer, model, at, 20)

    other = Tiny(3, seed=5).float()
    resumed = LoKO(other, **settings, initial_distribution="uniform", seed=2)
    learn(resumed, other, 0, 6)  # a used optimizer can be loaded as well as a new one
    other.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    learn(resumed, other, at, 20)
    assert_same(snapshot(resumed, other), snapshot(optimizer, model))
    assert resumed.diagnostics() == optimizer.diagnostics()
    assert resumed.state_dict()["filter"]["counters"] == optimizer.state_dict()["filter"]["counters"]


def test_a_state_is_a_copy() -> None:
    model = Tiny(3).float()
    optimizer = LoKO(model)
    learn(optimizer, model, 0, 4)
    state = optimizer.state_dict()
    kept = copy.deepcopy(state)
    resumed = LoKO(model)
    resumed.load_state_dict(state)
    learn(resumed, model, 4, 8)
    learn(optimizer, model, 8, 12)
    for key, value in kept["filter"]["covariance"].items():
        assert torch.equal(state["filter"]["covariance"][key], value)
    assert torch.equal(state["filter"]["noise"], kept["filter"]["noise"])


def _poison(state: dict[str, Any], where: str) -> None:
    target = state["filter"]
    if where == "noise":
        target["noise"][0, 0] = torch.nan
    else:
        target["covariance"][where].view(-1)[0] = torch.inf


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("filter"), "not a state of LoKO"),
        (lambda s: s["filter"].pop("noise"), "not a state of LoKO"),
        (lambda s: s["filter"]["counters"].pop("rows"), "not a state of LoKO"),
        (lambda s: s["filter"]["counters"].update(more=1), "not a state of LoKO"),
        (lambda s: s["filter"]["parameters"].pop(), "another model: 5 trainable parameters there, 6 here"),
        (
            lambda s: s["filter"]["parameters"].__setitem__(0, "conv.weight[3, 1]"),
            r"another model.*first that differs: head\.weight\[3, 3\] here, conv\.weight\[3, 1\] there",
        ),
        (lambda s: s["filter"].update(covariance={"variance": torch.ones(30)}), r"another covariance: .*variance"),
        (
            lambda s: s["filter"]["covariance"].update(factor=torch.zeros(4, 30, dtype=torch.float16)),
            r"in torch\.float.*torch\.float.* and here in torch\.float",
        ),
        (
            lambda s: s["filter"]["covariance"].update(factor=torch.zeros(5, 30)),
            r"another covariance: .*\(5, 30\).*there.*\(4, 30\).*here",
        ),
        (lambda s: _poison(s, "precision"), "not finite"),
        (lambda s: _poison(s, "factor"), "not finite"),
        (lambda s: _poison(s, "noise"), "not finite"),
        (lambda s: s["param_groups"].pop(), "different number of parameter groups"),
    ],
)
def test_states_that_are_refused_leave_the_optimizer_as_it_was(change: Any, message: str) -> None:
    model = Tiny(3).float()
    optimizer = LoKO(model, rank=4)
    learn(optimizer, model, 0, 4)
    before = snapshot(optimizer, model)
    state = copy.deepcopy(optimizer.state_dict())
    change(state)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state)
    assert_same(snapshot(optimizer, model), before)
    learn(optimizer, model, 4, 8)


def test_noise_of_other_outputs_is_refused_at_the_next_step() -> None:
    model = nn.Linear(3, 3)
    optimizer = LoKO(model)
    learn(optimizer, model, 0, 2)
    state = copy.deepcopy(optimizer.state_dict())
    state["filter"]["noise"] = torch.ones(1, 1, dtype=torch.float64)
    fresh = LoKO(model)
    fresh.load_state_dict(state)
    with pytest.raises(ValueError, match="noise loaded is of 1 observed outputs, the model gives 2"):
        learn(fresh, model, 2, 4)


BAD_BATCHES = {
    "nan-input": lambda model: (model(torch.tensor([[0.0, torch.nan, 1.0], [1.0, 1.0, 1.0]])), Y[:2]),
    "inf-input": lambda model: (model(torch.full((2, 3), torch.inf)), Y[:2]),
    "nan-output": lambda model: (model(X[:2].float()) * torch.tensor([1.0, torch.nan, 1.0]), Y[:2]),
    "inf-output": lambda model: (model(X[:2].float()) / torch.zeros(1), Y[:2]),
    # sqrt has an infinite slope at zero: finite outputs, a Jacobian that is not
    "inf-jacobian": lambda model: ((z := model(X[:2].float())) + (z - z.detach()).sqrt(), Y[:2]),
}


@pytest.mark.parametrize("bad", BAD_BATCHES)
@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("covariance", COVARIANCES, ids=str)
def test_a_batch_that_is_not_finite_is_skipped_and_counted(covariance: dict[str, Any], noise: str, bad: str) -> None:
    model = Tiny(3).float()
    optimizer = LoKO(model, **covariance, noise=noise, max_skipped=1, forgetting=0.9)
    learn(optimizer, model, 0, 4)
    before = snapshot(optimizer, model)
    for count in (2, 4):
        if count == 4:
            with pytest.raises(NonFiniteError, match=r"2 batches in a row .*\(max_skipped = 1\)"):
                optimizer.step(lambda: BAD_BATCHES[bad](model))
        else:
            optimizer.step(lambda: BAD_BATCHES[bad](model))
        assert_same(snapshot(optimizer, model), before)
        assert optimizer.diagnostics()["skipped_rows"] == count
    learn(optimizer, model, 4, 6)  # the count in a row starts again
    optimizer.step(lambda: BAD_BATCHES[bad](model))
    counters = optimizer.state_dict()["filter"]["counters"]
    assert (counters["rows"], counters["steps"], counters["skipped_in_a_row"]) == (6, 3, 1)


def test_a_first_batch_that_is_not_finite() -> None:
    model = Tiny(3).float()
    optimizer = LoKO(model)
    before = snapshot(optimizer, model)
    optimizer.step(lambda: BAD_BATCHES["nan-input"](model))
    after = snapshot(optimizer, model)
    after.pop("noise")  # R₀, laid out once the number of outputs is known
    assert_same(after, before)
    learn(optimizer, model, 0, 4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"covariance": "full"}, r"covariance = 'full'; allowed: 'diagonal', 'low_rank'"),
        ({"noise": "adam"}, r"noise = 'adam'; allowed: 'ema'"),
        ({"observation": "poisson"}, r"observation = 'poisson'; allowed: 'categorical', 'bernoulli', 'gaussian'$"),
        ({"observation": ""}, "observation = ''"),
        ({"initial_distribution": "normal"}, "initial_distribution = 'normal'"),
        ({"rank": -1}, "rank = -1; allowed: an integer >= 0"),
        ({"rank": 2.5}, "rank = 2.5"),
        ({"initial_covariance": 0.0}, "initial_covariance = 0.0"),
        ({"initial_covariance": -1.0}, "initial_covariance = -1.0"),
        ({"initial_covariance": float("nan")}, "initial_covariance = nan"),
        ({"initial_covariance": 1e-30}, r"initial_covariance = 1e-30; allowed: in \[1e-20, 1e\+20\]"),
        ({"initial_covariance": 1e39}, "initial_covariance = 1e\\+39"),
        ({"scales": {"head": 0.0}}, r"scales\['head'\] = 0.0"),
        ({"scales": {"head": float("inf")}}, r"scales\['head'\] = inf"),
        ({"scales": {"head": 1e25}}, "initial_covariance = "),
        ({"scales": {"A": 2.0}}, "scales = 'A'; allowed: 'head', 'other'"),
        ({"noise_decay": 1.0}, r"noise_decay = 1.0; allowed: in \[0, 1\)"),
        ({"noise_decay": -0.1}, "noise_decay"),
        ({"noise_decay": float("nan")}, "noise_decay"),
        ({"initial_noise": 0.0}, "initial_noise = 0.0; allowed: > 0, or None"),
        ({"initial_noise": float("inf")}, "initial_noise"),
        ({"noise_excess": -1.0}, "noise_excess = -1.0"),
        ({"noise_excess": float("inf")}, "noise_excess"),
        ({"linearization": 1.5}, r"linearization = 1.5; allowed: in \[0, 1\]"),
        ({"linearization": -0.1}, "linearization"),
        ({"forgetting": 0.0}, r"forgetting = 0.0; allowed: in \(0, 1\]"),
        ({"forgetting": 1.1}, "forgetting"),
        ({"process_noise": -1e-3}, "process_noise = -0.001"),
        ({"process_noise": float("inf")}, "process_noise"),
        ({"max_skipped": -1}, "max_skipped = -1"),
    ],
    ids=str,
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoKO(Tiny(3), **settings)


def test_parameters_out_of_place() -> None:
    model = Tiny(3)
    with pytest.raises(ValueError, match="not parameters of the model"):
        LoKO(model, [nn.Parameter(torch.zeros(3))])
    with pytest.raises(ValueError, match="more than one parameter group"):
        LoKO(model, [{"params": [model.gain]}, {"params": [model.gain]}])
    with pytest.raises(ValueError, match=r"forgetting = 2\.0"):
        LoKO(model, [{"params": [model.gain], "forgetting": 2.0}])
    model.gain.requires_grad_(False)
    with pytest.raises(ValueError, match=r"1 of the parameters given are frozen \(first: gain\)"):
        LoKO(model, list(model.parameters()))
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameter: wrap it with peft"):
        LoKO(model)
    optimizer = LoKO(Tiny(3))
    with pytest.raises(RuntimeError, match="laid out once"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))]})


@pytest.mark.parametrize(
    ("closure", "message"),
    [
        (lambda model: (model(X[:2]), torch.tensor([0, 3])), r"label 3 in row 1 .* outside \[0, 3\)"),
        (lambda model: (model(X[:2]), torch.tensor([-100, 0])), "label -100 in row 0"),
        (lambda model: (model(X[:2])[0], Y[:1]), r"shape \(rows, outputs\), got \(3,\)"),
        (lambda model: (model(X[:2])[:, :2], Y[:2] * 0), "the model gave 2 outputs, and 3 before"),
        (lambda model: model(X[:2, :2]), "cannot be multiplied"),
    ],
)
def test_a_step_that_raises_has_learned_nothing_and_leaves_no_hook(closure: Any, message: str) -> None:
    model = Tiny(3)
    optimizer = LoKO(model)
    learn(optimizer, model, 0, 2, torch.float64)
    before = snapshot(optimizer, model)
    with pytest.raises((ValueError, RuntimeError), match=message):
        optimizer.step(lambda: closure(model))
    assert_same(snapshot(optimizer, model), before)
    assert all(module._forward_hooks == OrderedDict() for module in model.modules())
    learn(optimizer, model, 2, 4, torch.float64)


def test_hooks_are_there_only_during_the_closure() -> None:
    model = Tiny(3).float()
    optimizer = LoKO(model)
    inside = []

    def closure() -> tuple[Tensor, Tensor]:
        inside.append(sum(len(module._forward_hooks) for module in model.modules()))
        return model(X[:2].float()), Y[:2]

    outputs = optimizer.step(closure)
    assert inside == [2]
    assert not outputs.requires_grad
    assert sum(len(module._forward_hooks) for module in model.modules()) == 0
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_the_prediction_returned_is_the_one_before_the_update() -> None:
    model = Tiny(3).float()
    before = model(X[:4].float()).detach()
    optimizer = LoKO(model, prediction="plug_in")
    assert torch.equal(optimizer.step(lambda: (model(X[:4].float()), Y[:4])), before)
    after = model(X[:4].float()).detach()
    loss = nn.functional.cross_entropy
    assert loss(after, Y[:4]) < loss(before, Y[:4])


def test_it_is_a_torch_optimizer_with_settings_of_its_own_for_each_group() -> None:
    model = Tiny(3)
    groups = groups_of(model, True)
    optimizer = LoKO(model, groups, scales={"body": 0.5}, initial_covariance=0.25, covariance="diagonal")
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert [g["initial_covariance"] for g in optimizer.param_groups] == [2.0, 0.125]
    assert [g["forgetting"] for g in optimizer.param_groups] == [0.9, 1.0]
    variance = optimizer.state_dict()["filter"]["covariance"]["variance"]
    assert variance.dtype == torch.float64
    assert torch.equal(variance, torch.cat([torch.full((12,), 2.0), torch.full((18,), 0.125)]).double())
    optimizer.zero_grad()
    text = repr(optimizer)
    for part in ("LoKO(30 parameters", "covariance='diagonal'", "noise='ema'", "linearization=0.25", "rank=16"):
        assert part in text
    assert "head: 12 parameters, initial_covariance=2, forgetting=0.9, process_noise=0" in text
    assert "body: 18 parameters, initial_covariance=0.125, forgetting=1, process_noise=0.01" in text
    assert "Categorical(reference=1)" in repr(LoKO(model, observation=Categorical(1)))


def test_groups_by_role_and_the_paper() -> None:
    model, x = adapted("bert-lora-head")
    assert [g["name"] for g in parameter_groups(model)] == ["A", "B", "head"]
    optimizer = LoKO(model, scales={"A": 2.0}, **PAPER)
    assert [g["initial_covariance"] for g in optimizer.param_groups] == [2.0, 1.0, 1.0]
    optimizer.step(lambda: (model(x).logits, torch.tensor([0, 1, 2])))
    variance = optimizer.state_dict()["filter"]["covariance"]["variance"]
    assert float(variance.min()) > 0
    assert 1.5 < float(variance.max()) <= 2.0


def test_uniform_start_follows_the_seed() -> None:
    starts = [LoKO(Tiny(3), seed=seed, **PAPER).state_dict()["filter"]["covariance"]["variance"] for seed in (0, 0, 1)]
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])


def test_outputs_of_another_precision_do_not_change_the_state_s() -> None:
    for covariance in COVARIANCES:
        model = Tiny(3).float()
        optimizer = LoKO(model, **covariance)
        optimizer.step(lambda m=model: (m(X[:2].float()).double(), Y[:2]))
        assert {v.dtype for v in optimizer.state_dict()["filter"]["covariance"].values()} == {torch.float32}
        assert model.head.weight.dtype == torch.float32


def test_bfloat16_parameters_keep_a_float32_state() -> None:
    model = Tiny(3).bfloat16()
    optimizer = LoKO(model)
    learn(optimizer, model, 0, 8, torch.bfloat16)
    state = optimizer.state_dict()["filter"]
    assert {v.dtype for v in state["covariance"].values()} == {torch.float32}
    assert state["counters"]["rows"] == 8


@pytest.mark.parametrize("name", ["bert-lora-head", "bert-rslora", "bert-dora", "bert-ia3", "bert-vera"])
def test_adapters_load_back_in_plain_peft(name: str, tmp_path: Path) -> None:
    model, x = adapted(name)
    optimizer = LoKO(model)
    labels = torch.tensor([0, 1, 2])
    before = optimizer.step(lambda: (model(x).logits, labels))
    for _ in range(2):
        optimizer.step(lambda: (model(x).logits, labels))
    after = model(x).logits.detach()
    assert not torch.allclose(after, before, atol=1e-3)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(ADAPTERS[name][0](), tmp_path).eval()
    assert torch.equal(again(x).logits.detach(), after)


def test_frozen_weights_stay() -> None:
    model = peft.get_peft_model(bert(), peft.LoraConfig(r=2, target_modules=["query"])).eval()
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    optimizer = LoKO(model)
    for _ in range(2):
        optimizer.step(lambda: (model(ids(2, 5, rows=30)).logits, torch.tensor([0, 1])))
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)
