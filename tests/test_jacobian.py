"""Every Jacobian route against torch.func.jacrev, or a loop of autograd where jacrev does not reach."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import BertConfig, BertForSequenceClassification, ConvNextConfig, ConvNextForImageClassification

from loko import JacobianError, LoKO
from loko.jacobian import JacobianEngine
from loko.rows import Rows
from tests.oracle import jacobian as jacrev

pytestmark = [
    pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning"),  # jacrev's, over attention
    pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
]


class Net(nn.Module):
    """A module from parts and a function of them and the input."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor], **parts: Any) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self._forward = forward

    def forward(self, x: Tensor) -> Tensor:
        return self._forward(self, x)


class Doubled(nn.Linear):
    """A Linear with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight**2, self.bias) * 2


def conv(**kwargs: Any) -> Callable[[], Net]:
    channels = kwargs.pop("channels", (4, 6))

    def make() -> Net:
        body = nn.Conv2d(*channels, **kwargs)
        return Net(lambda m, x: m.head(torch.tanh(m.body(x)).mean((2, 3))), body=body, head=nn.Linear(channels[1], 3))

    return make


def ids(*shape: int, rows: int = 7) -> Tensor:
    return torch.randint(rows, shape, generator=torch.Generator().manual_seed(0))


def real(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def lin(i: int, o: int, **kwargs: Any) -> nn.Linear:
    return nn.Linear(i, o, **kwargs)


def partly_frozen() -> Net:
    net = Net(lambda m, x: m.b(torch.tanh(m.a(x))), a=lin(4, 5), b=lin(5, 3))
    net.a.weight.requires_grad_(False)
    net.b.bias.requires_grad_(False)
    return net


def tied() -> Net:
    net = Net(lambda m, x: m.head(torch.tanh(m.body(m.emb(x))).mean(1)), emb=nn.Embedding(7, 4), body=lin(4, 4))
    net.head = lin(4, 7)
    net.head.weight = net.emb.weight
    return net


def functional_tie() -> Net:
    return Net(lambda m, x: F.linear(torch.tanh(m.a(x)), m.a.weight)[:, :3], a=lin(4, 4))


def transposed(batch_first: bool) -> Net:
    attention = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=batch_first)
    return Net(
        lambda m, x: m.head(m.attention(x) if batch_first else m.attention(x.transpose(0, 1)).transpose(0, 1)).mean(1),
        attention=attention,
        head=lin(4, 3),
    )


def weight_norm() -> Net:
    a = torch.nn.utils.parametrizations.weight_norm(lin(4, 5))
    return Net(lambda m, x: m.b(torch.tanh(m.a(x))), a=a, b=lin(5, 3))


def positions() -> Net:
    return Net(
        lambda m, x: m.b(torch.tanh(x + m.a(torch.arange(x.shape[1]))).mean(1)), a=nn.Embedding(9, 4), b=lin(4, 3)
    )


def two(forward: Callable[[Any, Tensor], Tensor]) -> Callable[[], Net]:
    return lambda: Net(forward, a=lin(4, 5), b=lin(5, 3))


# id: (model, input, how many parameters take the exact route)
CASES: dict[str, tuple[Callable[[], nn.Module], Tensor, int]] = {
    "linear-2d": (two(lambda m, x: m.b(torch.tanh(m.a(x)))), real(3, 4), 0),
    "linear-3d": (two(lambda m, x: m.b(torch.tanh(m.a(x))).mean(1)), real(3, 6, 4), 0),
    "linear-4d": (two(lambda m, x: m.b(torch.tanh(m.a(x))).mean((1, 2))), real(3, 2, 3, 4), 0),
    "linear-no-bias": (
        lambda: Net(lambda m, x: m.b(torch.tanh(m.a(x))).mean(1), a=lin(4, 5, bias=False), b=lin(5, 3, bias=False)),
        real(3, 6, 4),
        0,
    ),
    "linear-by-keyword": (two(lambda m, x: m.b(input=torch.tanh(m.a(input=x)))), real(3, 4), 0),
    "linear-one-row": (two(lambda m, x: m.b(torch.tanh(m.a(x)))), real(1, 4), 0),
    "linear-flattened-tokens": (
        two(lambda m, x: m.b(torch.tanh(m.a(x.flatten(0, 1)))).unflatten(0, x.shape[:2]).mean(1)),
        real(3, 6, 4),
        4,
    ),
    "called-twice": (
        lambda: Net(lambda m, x: m.b(m.a(torch.tanh(m.a(x)))), a=lin(4, 4), b=lin(4, 3)),
        real(3, 4),
        0,
    ),
    "called-aside": (two(lambda m, x: (m.a(x), m.b(torch.tanh(m.a(x))))[1]), real(3, 4), 0),
    "own-forward": (
        lambda: Net(lambda m, x: m.b(torch.tanh(m.a(x))), a=Doubled(4, 5), b=lin(5, 3)),
        real(3, 4),
        2,
    ),
    "partly-frozen": (partly_frozen, real(3, 4), 0),
    "in-place-after": (two(lambda m, x: m.b(m.a(x).relu_())), real(3, 4), 2),
    "layer-norm-and-raw": (
        lambda: Net(
            lambda m, x: m.b(m.norm(x) * m.gain), norm=nn.LayerNorm(4), gain=nn.Parameter(torch.ones(4)), b=lin(4, 3)
        ),
        real(3, 4),
        3,
    ),
    "weight-norm": (weight_norm, real(3, 4), 2),
    "batch-norm-eval": (
        lambda: Net(lambda m, x: m.b(m.norm(x)), norm=nn.BatchNorm1d(4).eval(), b=lin(4, 3)),
        real(3, 4),
        2,
    ),
    "conv": (conv(kernel_size=3), real(3, 4, 6, 6), 0),
    "conv-stride-padding": (conv(kernel_size=(3, 2), stride=(2, 3), padding=(1, 2)), real(3, 4, 7, 6), 0),
    "conv-same-even-kernel": (conv(kernel_size=4, padding="same", bias=False), real(3, 4, 6, 5), 0),
    "conv-valid": (conv(kernel_size=2, padding="valid"), real(3, 4, 5, 5), 0),
    "conv-dilation": (conv(kernel_size=2, dilation=(2, 3)), real(3, 4, 6, 6), 0),
    "conv-groups": (conv(kernel_size=3, groups=2, padding=1), real(3, 4, 5, 5), 0),
    "conv-depthwise": (conv(kernel_size=3, groups=4, channels=(4, 8), padding=1), real(3, 4, 5, 5), 0),
    "conv-reflect": (conv(kernel_size=3, padding=(2, 1), padding_mode="reflect"), real(3, 4, 6, 6), 0),
    "conv-circular-same": (conv(kernel_size=4, padding="same", padding_mode="circular"), real(3, 4, 6, 6), 0),
    "conv1d": (
        lambda: Net(lambda m, x: m.b(torch.tanh(m.a(x)).mean(2)), a=nn.Conv1d(4, 5, 2), b=lin(5, 3)),
        real(3, 4, 6),
        2,
    ),
    "embedding": (
        lambda: Net(lambda m, x: m.b(torch.tanh(m.a(x)).mean(1)), a=nn.Embedding(7, 4), b=lin(4, 3)),
        ids(3, 6),
        0,
    ),
    "embedding-one-id": (
        lambda: Net(lambda m, x: m.b(torch.tanh(m.a(x))), a=nn.Embedding(7, 4), b=lin(4, 3)),
        ids(3),
        0,
    ),
    "embedding-padding": (
        lambda: Net(lambda m, x: m.b(torch.tanh(m.a(x)).mean(1)), a=nn.Embedding(7, 4, padding_idx=-2), b=lin(4, 3)),
        ids(5, 9),
        0,
    ),
    "positions": (positions, real(3, 6, 4), 1),
    "positions-as-many-as-rows": (positions, real(3, 3, 4), 1),
    "positions-one-row": (positions, real(1, 6, 4), 1),
    "tied": (tied, ids(3, 6), 0),
    "functional-tie": (functional_tie, real(3, 4), 1),
    "attention": (lambda: transposed(True), real(3, 5, 4), 8),
    "sequence-first": (lambda: transposed(False), real(3, 5, 4), 12),
    "sequence-first-as-long-as-rows": (lambda: transposed(False), real(3, 3, 4), 12),
}


def trainable(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def engine_rows(engine: JacobianEngine, model: nn.Module, x: Any, contrast: Tensor | None = None) -> Tensor:
    with engine.record():
        outputs = model(x)
    with torch.no_grad():  # as in LoKO.step
        rows = engine.jacobian(outputs, torch.eye(outputs.shape[1]) if contrast is None else contrast)
    return rows[:, :].view(len(outputs), rows.shape[0] // max(len(outputs), 1), engine.size)


def assert_close(got: Tensor, want: Tensor, tolerance: float) -> None:
    assert got.shape == want.shape
    assert float((got - want).norm()) <= tolerance * float(want.norm())
    torch.testing.assert_close(got, want, rtol=100 * tolerance, atol=10 * tolerance * float(want.abs().max()))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=["f32", "f64"])
@pytest.mark.parametrize("case", CASES)
def test_route_is_jacrev(case: str, dtype: torch.dtype, tolerance: float) -> None:
    make, x, exact = CASES[case]
    torch.manual_seed(0)
    model = make().to(dtype)
    x = x.to(dtype) if x.is_floating_point() else x
    engine = JacobianEngine(model, trainable(model))
    _, want = jacrev(copy.deepcopy(model), engine.names, x)
    assert_close(engine_rows(engine, model, x), want, tolerance)
    contrast = real(2, want.shape[1]).to(dtype)
    again = engine_rows(engine, model, x, contrast)  # the routes chosen by the first batch serve the next
    assert_close(again, torch.einsum("kc,bcn->bkn", contrast, want), tolerance)
    assert len(engine.exact_names) == exact, engine.exact_names


@pytest.mark.parametrize("first", [1, 2, 5])
def test_routes_hold_when_the_batch_grows_or_shrinks(first: int) -> None:
    """Among them batches as large as the number of positions, after a batch of one, which proves little."""
    torch.manual_seed(0)
    model = positions().double()
    engine = JacobianEngine(model, trainable(model))
    for batch, length in [(first, 5), (1, 1), (5, 5), (3, 5), (1, 5), (1, 3), (3, 3)]:
        x = torch.randn(batch, length, 4, dtype=torch.float64)
        _, want = jacrev(copy.deepcopy(model), engine.names, x)
        assert_close(engine_rows(engine, model, x), want, 1e-10)
    assert engine_rows(engine, model, torch.zeros(0, 5, 4).double()).numel() == 0


def test_parameters_of_a_branch_not_taken_have_a_zero_jacobian() -> None:
    """An expert that this batch does not use; on the hook route and on the exact route."""
    model = Net(
        lambda m, x: m.b(m.a(x)) * m.gain if float(x.sum()) > 0 else m.b(x),
        a=lin(4, 4),
        b=lin(4, 3),
        gain=nn.Parameter(torch.ones(3)),
    ).double()
    engine = JacobianEngine(model, trainable(model))
    x = real(3, 4).double().abs()
    for sign in (1.0, -1.0, 1.0):
        _, want = jacrev(copy.deepcopy(model), engine.names, sign * x) if sign > 0 else (None, None)
        got = engine_rows(engine, model, sign * x)
        if want is not None:
            assert_close(got, want, 1e-10)
        else:
            used = model.b.weight.numel() + model.b.bias.numel()
            assert int((got.abs().sum((0, 1)) > 0).sum()) == used


def test_key_biases_whose_gradient_is_rounding_noise_stay_on_the_hook_route(caplog: pytest.LogCaptureFixture) -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.head = lin(8, 8), lin(8, 8), lin(8, 8), lin(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            weights = (self.q(x) @ self.k(x).mT).softmax(-1)
            return self.head((weights @ self.v(x)).mean(1))

    torch.manual_seed(0)
    model = Attention()
    engine = JacobianEngine(model, trainable(model))
    with caplog.at_level(logging.INFO, "loko.jacobian"):
        engine_rows(engine, model, real(4, 16, 8))
    assert engine.exact_names == []
    assert caplog.records == []


def test_a_parameter_moved_to_the_exact_route_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    model = functional_tie()
    engine = JacobianEngine(model, trainable(model))
    with caplog.at_level(logging.WARNING, "loko.jacobian"):
        engine_rows(engine, model, real(3, 4))
    assert "1 parameters are used in more ways" in caplog.text
    assert "a.weight" in caplog.text


@pytest.mark.parametrize(
    "batches",
    [[4], [1, 4]],
    ids=["at once", "after a batch of one"],
)
@pytest.mark.parametrize(
    "mix",
    [
        lambda h: h - h.mean(0),
        lambda h: (h @ h.mT / 9).softmax(-1) @ h,
        lambda h: h + torch.cat([torch.zeros_like(h[:1]), h[:-1]]),  # on the rows before
    ],
    ids=["statistics", "attention", "recurrence"],
)
def test_samples_that_depend_on_each_other_are_refused(mix: Callable[[Tensor], Tensor], batches: list[int]) -> None:
    torch.manual_seed(0)
    model = Net(lambda m, x: m.b(mix(torch.tanh(m.a(x)))), a=lin(4, 5), b=lin(5, 3))
    engine = JacobianEngine(model, trainable(model))
    for size in batches[:-1]:
        engine_rows(engine, model, real(size, 4))
    with pytest.raises(JacobianError, match="depends on another sample of the batch"):
        engine_rows(engine, model, real(batches[-1], 4))


def test_batch_norm_in_training_mode_is_refused_before_the_forward() -> None:
    model = Net(lambda m, x: m.b(m.norm(x)), norm=nn.BatchNorm1d(4), b=lin(4, 3))
    engine = JacobianEngine(model, trainable(model))
    with pytest.raises(JacobianError, match=r"BatchNorm1d is in training mode.*model\.eval\(\)"), engine.record():
        pytest.fail("the forward ran")
    assert torch.equal(model.norm.running_mean, torch.zeros(4))


def test_a_parameter_with_no_path_is_named() -> None:
    model = Net(lambda m, x: m.a(x), a=lin(4, 3), spare=lin(4, 3))
    engine = JacobianEngine(model, trainable(model))
    with pytest.raises(JacobianError, match=r"2 trainable parameters have no path.*first: spare\.weight"):
        engine_rows(engine, model, real(3, 4))


@pytest.mark.parametrize("how", ["no_grad", "inference_mode", "detach"])
def test_outputs_without_a_graph_are_refused(how: str) -> None:
    model = two(lambda m, x: m.b(torch.tanh(m.a(x))))()
    optimizer = LoKO(model)

    def closure() -> tuple[Tensor, Tensor]:
        if how == "detach":
            return model(real(3, 4)).detach(), torch.tensor([0, 1, 2])
        with getattr(torch, how)():
            return model(real(3, 4)), torch.tensor([0, 1, 2])

    with pytest.raises(JacobianError, match="do not depend on any trainable parameter"):
        optimizer.step(closure)


def test_a_first_batch_of_nan_does_not_count_as_proof() -> None:
    torch.manual_seed(0)
    model = Net(lambda m, x: F.linear(torch.tanh(m.a(x)), m.a.weight)[:, :3], a=lin(4, 4)).double()
    engine = JacobianEngine(model, trainable(model))
    engine_rows(engine, model, torch.full((3, 4), torch.nan).double())
    _, want = jacrev(copy.deepcopy(model), engine.names, real(3, 4).double())
    assert_close(engine_rows(engine, model, real(3, 4).double()), want, 1e-10)


def test_activation_checkpointing_keeps_the_hook_route() -> None:
    torch.manual_seed(0)
    model = two(lambda m, x: m.b(torch.tanh(m.a(x))))()
    kept = two(lambda m, x: m.b(checkpoint(lambda y: torch.tanh(m.a(y)), x, use_reentrant=False)))()
    kept.load_state_dict(model.state_dict())
    engine = JacobianEngine(kept, trainable(kept))
    want = engine_rows(JacobianEngine(model, trainable(model)), model, real(3, 4))
    assert_close(engine_rows(engine, kept, real(3, 4)), want, 1e-6)
    assert engine.exact_names == []


def test_half_precision_gives_float32_rows_close_to_the_float32_ones() -> None:
    torch.manual_seed(0)
    model = two(lambda m, x: m.b(torch.tanh(m.a(x))).mean(1))()
    _, want = jacrev(copy.deepcopy(model), [n for n, _ in trainable(model)], real(3, 6, 4))
    half = model.to(torch.bfloat16)
    engine = JacobianEngine(half, trainable(half))
    got = engine_rows(engine, half, real(3, 6, 4).bfloat16())
    assert got.dtype == torch.float32
    assert float((got - want).norm()) < 0.03 * float(want.norm())
    assert engine.exact_names == []


def bert() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    return BertForSequenceClassification(BertConfig(vocab_size=30, max_position_embeddings=12, num_labels=3, **sizes))


def test_a_compiled_model_is_refused_with_what_to_do() -> None:
    with pytest.raises(JacobianError, match=r"compiled by torch\.compile.*_orig_mod"):
        LoKO(torch.compile(lin(3, 2)))


def test_what_is_kept_in_factors_is_the_same_to_the_last_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    def learned(elements: int) -> tuple[nn.Module, LoKO]:
        monkeypatch.setattr("loko.jacobian._FACTORED_ELEMENTS", elements)
        torch.manual_seed(0)
        body = Net(lambda m, x: m.c(torch.tanh(m.b(torch.tanh(m.a(x)).mean(1)))), a=lin(4, 5), b=lin(5, 6), c=lin(6, 3))
        optimizer = LoKO(body)
        for seed in range(4):
            x = torch.randn(5, 7, 4, generator=torch.Generator().manual_seed(seed))
            optimizer.step(lambda x=x: (body(x), torch.tensor([0, 1, 2, 0, 1])))
        return body, optimizer

    (dense, first), (factored, second) = learned(10**9), learned(1)
    assert all(torch.equal(p, q) for p, q in zip(dense.parameters(), factored.parameters(), strict=True))
    assert torch.equal(first.covariance.state()["factor"], second.covariance.state()["factor"])


def test_columns_of_factored_rows_are_those_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = Net(lambda m, x: m.c(torch.tanh(m.b(torch.tanh(m.a(x))))), a=lin(4, 5), b=lin(5, 6), c=lin(6, 3))
    whole = engine_rows(JacobianEngine(model, trainable(model)), model, real(2, 4)).flatten(0, 1)
    monkeypatch.setattr("loko.jacobian._FACTORED_ELEMENTS", 1)
    engine = JacobianEngine(model, trainable(model))
    with engine.record():
        outputs = model(real(2, 4))
    with torch.no_grad():
        rows = engine.jacobian(outputs, torch.eye(3))
    assert isinstance(rows, Rows)
    assert len(rows.factors) == 3
    for start in range(engine.size):
        for stop in range(start + 1, engine.size + 1):
            assert torch.equal(rows[:, start:stop], whole[:, start:stop])


def test_backward_passes_in_bfloat16_are_close_to_the_exact_ones_and_the_same_on_the_first_batch() -> None:
    """The first batch also proves the routes, at full precision; a run that resumes there must not notice."""
    model = Net(lambda m, x: m.model(x).logits, model=bert().eval())
    names = [f"model.bert.encoder.layer.{i}.attention.self.{kind}" for i in (0, 1) for kind in ("query", "value")]
    some = [(n, p) for n, p in trainable(model) if n.rpartition(".")[0] in [*names, "model.classifier"]]
    assert len(some) == 10
    exact, fast = JacobianEngine(model, some), JacobianEngine(model, some, torch.bfloat16)
    first, second = (engine_rows(fast, model, ids(4, 6)).clone() for _ in range(2))
    want = engine_rows(exact, model, ids(4, 6))
    assert torch.equal(first, second)
    assert not torch.equal(first, want)
    for got, rows in zip(first.split(fast.sizes, -1), want.split(fast.sizes, -1), strict=True):
        assert float((got - rows).norm()) < 0.02 * float(rows.norm())


def convnext() -> nn.Module:
    torch.manual_seed(0)
    return ConvNextForImageClassification(
        ConvNextConfig(num_channels=1, patch_size=2, hidden_sizes=[8, 12], depths=[1, 1], num_stages=2, num_labels=3)
    )


TEXT = {"target_modules": ["query", "value"], "modules_to_save": ["classifier"]}
IMAGE = {"target_modules": ["pwconv1", "pwconv2"], "modules_to_save": ["classifier"]}
# id: (model, adapter, whether every parameter is on the hook route)
ADAPTERS: dict[str, tuple[Callable[[], nn.Module], peft.PeftConfig, bool]] = {
    "bert-lora": (bert, peft.LoraConfig(r=2, target_modules=["query", "value"]), True),
    "bert-lora-head": (bert, peft.LoraConfig(r=2, **TEXT), True),
    "bert-lora-bias-embedding": (
        bert,
        peft.LoraConfig(r=2, bias="all", target_modules=["query", "word_embeddings"], modules_to_save=["classifier"]),
        False,
    ),
    "bert-rslora": (bert, peft.LoraConfig(r=2, use_rslora=True, **TEXT), True),
    "bert-dora": (bert, peft.LoraConfig(r=2, use_dora=True, **TEXT), False),
    "bert-ia3": (
        bert,
        peft.IA3Config(
            target_modules=["key", "value", "intermediate.dense"],
            feedforward_modules=["intermediate.dense"],
            modules_to_save=["classifier"],
        ),
        False,
    ),
    "bert-vera": (bert, peft.VeraConfig(r=2, **TEXT), False),
    "convnext-lora-head": (convnext, peft.LoraConfig(r=2, **IMAGE), True),
    "convnext-lora-convolutions": (
        convnext,
        peft.LoraConfig(r=2, target_modules=r".*(pwconv1|downsampling_layer\.1|patch_embeddings)"),
        True,
    ),
    "convnext-dora": (convnext, peft.LoraConfig(r=2, use_dora=True, **IMAGE), False),
}


def adapted(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Tensor]:
    """A model with its adapter, every trainable parameter moved off its start (B = 0), and a batch."""
    make, config, _ = ADAPTERS[name]
    base = make()
    x = real(3, 1, 8, 8).to(dtype) if make is convnext else ids(3, 7, rows=30)
    model = peft.get_peft_model(base, copy.deepcopy(config)).to(dtype).eval()
    for _, parameter in trainable(model):
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    return model, x


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=["f32", "f64"])
@pytest.mark.parametrize("name", ADAPTERS)
def test_peft_adapters(name: str, dtype: torch.dtype, tolerance: float) -> None:
    model, x = adapted(name, dtype)
    wrapped = Net(lambda m, x: m.model(x).logits, model=model)
    engine = JacobianEngine(wrapped, trainable(wrapped))
    got = engine_rows(engine, wrapped, x)
    assert (engine.exact_names == []) == ADAPTERS[name][2], engine.exact_names
    for row in range(len(x)):  # alone in its forward: no other sample, no hook
        outputs = model(x[row : row + 1]).logits[0]
        for index, output in enumerate(outputs):
            grads = torch.autograd.grad(output, engine.parameters, retain_graph=True)
            assert_close(got[row, index], torch.cat([g.flatten() for g in grads]), tolerance)


@pytest.mark.parametrize("at_once", [1, 2, 5])
@pytest.mark.parametrize("name", ["bert-lora-head", "bert-dora", "convnext-lora-head", "convnext-lora-convolutions"])
def test_outputs_that_share_a_pass(name: str, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = adapted(name, torch.float64)
    wrapped = Net(lambda m, x: m.model(x).logits, model=model)
    engine = JacobianEngine(wrapped, trainable(wrapped))
    monkeypatch.setattr(engine, "_outputs_a_pass", lambda calls: at_once)
    passes: list[int] = []
    backward = engine._backward
    engine._backward = lambda t, o, seeds: passes.append(len(seeds)) or backward(t, o, seeds)  # type: ignore
    contrast = real(5, 3).double()
    got = engine_rows(engine, wrapped, x, contrast)
    assert passes == {1: [1, 1, 1, 1, 1], 2: [2, 2, 1], 5: [5]}[at_once]
    outputs = model(x).logits
    for row in range(len(x)):
        for index, direction in enumerate(contrast):
            grads = torch.autograd.grad(outputs[row] @ direction, engine.parameters, retain_graph=True)
            assert_close(got[row, index], torch.cat([g.flatten() for g in grads]), 1e-10)


class Stubborn(torch.autograd.Function):
    """The identity, with a backward that looks at numbers, which no vmap can."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad * (2.0 if float(grad.sum()) > 1e30 else 1.0)


def test_a_backward_that_cannot_be_vmapped_runs_once_an_output(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model = two(lambda m, x: m.b(Stubborn.apply(torch.tanh(m.a(x)))))().double()
    plain = two(lambda m, x: m.b(torch.tanh(m.a(x))))().double()
    plain.load_state_dict(model.state_dict())
    engine = JacobianEngine(model, trainable(model))
    with caplog.at_level(logging.INFO, "loko.jacobian"):
        for seed in range(2):
            x = torch.randn(4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            _, want = jacrev(copy.deepcopy(plain), engine.names, x)
            assert_close(engine_rows(engine, model, x), want, 1e-10)
    assert engine.exact_names == []
    assert sum("cannot be vmapped" in message for message in caplog.messages) == 1


def test_several_outputs_in_a_pass_are_proven_when_they_first_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """A large batch, whose outputs take a pass each, proves nothing of a small one's."""
    torch.manual_seed(0)
    model = two(lambda m, x: m.b(torch.tanh(m.a(x))))().double()
    engine = JacobianEngine(model, trainable(model))
    monkeypatch.setattr("loko.jacobian._PASS_ELEMENTS", 100)
    proofs: list[int] = []
    prove = engine._prove
    monkeypatch.setattr(engine, "_prove", lambda *args: proofs.append(len(args[1])) or prove(*args))
    for rows in (30, 30, 4, 4, 30, 2):
        engine_rows(engine, model, real(rows, 4).double())
    assert proofs == [30, 4]


def test_all_of_bert() -> None:
    """Full fine-tuning: embeddings, positions, norms and attention, on both routes together."""
    model = Net(lambda m, x: m.model(x).logits, model=bert().double().eval())
    engine = JacobianEngine(model, trainable(model))
    x = ids(3, 7, rows=30)
    got = engine_rows(engine, model, x)
    _, want = jacrev(copy.deepcopy(model), engine.names, x)
    assert_close(got, want, 1e-10)
    assert all("LayerNorm" in n or "position" in n or "token_type" in n for n in engine.exact_names)
