"""Every variant of the filter against the oracle, the closed form of the linear case, and the invariances."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from loko import LoKO
from loko.filter import Linearization, cholesky, diagonal_blocks, innovate, innovate_logits, times_blocks
from loko.observation import Categorical
from tests.oracle import Oracle, covariance_of, reduced_noise

P0 = 0.5  # exact in float32 as well

KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # loko's settings, the oracle's restriction
    "diagonal": ({"covariance": "diagonal"}, {"restriction": "diagonal"}),
    "full": ({"covariance": "low_rank", "rank": 100, "direction_decay": 1.0}, {"restriction": "full"}),
    "rank0": ({"covariance": "low_rank", "rank": 0}, {"restriction": "precision"}),
    "blocks": (
        {"covariance": "block_diagonal", "direction_decay": 0.9},
        {"restriction": "blocks", "direction_decay": 0.9},
    ),
    "rank3": (
        {"covariance": "low_rank", "rank": 3, "direction_decay": 0.8},
        {"restriction": "truncated", "rank": 3, "direction_decay": 0.8},
    ),
}
NOISES = ["ema", "ema_residual", "categorical", "categorical_ema", "fixed"]
OBSERVATIONS = [("categorical", 2), ("categorical", 5), ("bernoulli", 3), ("gaussian", 2)]
REGIMES: dict[str, dict[str, Any]] = {
    "tangent": {"linearization": 0.0},
    "secant-moving": {"linearization": 0.25, "forgetting": 0.97, "process_noise": 1e-3},
    "grouped": {"linearization": 0.5, "noise_decay": 0.8, "noise_excess": 1.0, "initial_noise": 0.3, "groups": True},
}


class Tiny(nn.Module):
    """A body and a head; 18 + 4C parameters."""

    def __init__(self, outputs: int, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Linear(3, 3, dtype=torch.float64)
        self.gain = nn.Parameter(torch.rand(3, dtype=torch.float64) + 0.5)
        self.shift = nn.Parameter(torch.zeros(3, dtype=torch.float64))
        self.head = nn.Linear(3, outputs, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x)) * self.gain + self.shift)


def groups_of(model: nn.Module, grouped: bool) -> list[dict[str, Any]]:
    head = {"name": "head", "params": [model.head.bias, model.head.weight]}
    body = {"name": "body", "params": [model.body.weight, model.gain, model.shift, model.body.bias]}
    if grouped:
        head |= {"initial_covariance": 2.0, "forgetting": 0.9}
        body |= {"process_noise": 0.01}
    return [head, body]


def rows(observation: str, outputs: int, count: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 3, generator=g, dtype=torch.float64)
    if observation == "categorical":
        return x, torch.randint(outputs, (count,), generator=g)
    if observation == "bernoulli":
        return x, torch.randint(2, (count, outputs), generator=g).double()
    return x, torch.randn(count, outputs, generator=g, dtype=torch.float64)


def build(model: nn.Module, grouped: bool = False, **settings: Any) -> LoKO:
    settings = {"initial_covariance": P0, "linearization": 0.0, "scale_adaptation": 0.0, **settings}
    settings = {"prediction": "plug_in", **settings}
    return LoKO(model, groups_of(model, grouped), **settings)


def oracle_of(model: nn.Module, optimizer: LoKO, noise: str, regime: dict[str, Any], **restriction: Any) -> Oracle:
    twin = copy.deepcopy(model)
    names = {id(p): name for name, p in model.named_parameters()}
    members = [(p, g) for g in optimizer.param_groups for p in g["params"]]

    def spread(key: str) -> Tensor:
        return torch.cat([torch.full((p.numel(),), g[key], dtype=torch.float64) for p, g in members])

    return Oracle(
        twin,
        [names[id(p)] for p, _ in members],
        spread("initial_covariance"),
        noise=noise,
        decay=regime.get("noise_decay", 0.98),
        initial_noise=regime.get("initial_noise"),
        excess=regime.get("noise_excess", 0.3),
        omega=regime["linearization"],
        forgetting=spread("forgetting"),
        process_noise=spread("process_noise"),
        **restriction,
    )


def close(got: Tensor, want: Tensor, tolerance: float = 1e-8) -> None:
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance * float(want.norm()))


# Every triple of kind, noise and observation; the regimes take turns, so that each pair with a regime occurs.
VARIANTS = [
    (*triple, list(REGIMES)[i % len(REGIMES)])
    for i, triple in enumerate(itertools.product(KINDS, NOISES, OBSERVATIONS))
]


@pytest.mark.parametrize(
    ("kind", "noise", "observed", "regime"),
    VARIANTS,
    ids=["-".join([k, n, *map(str, o), r]) for k, n, o, r in VARIANTS],
)
def test_every_variant_is_the_restricted_oracle(kind: str, noise: str, observed: tuple[str, int], regime: str) -> None:
    observation, outputs = observed
    settings, restriction = KINDS[kind]
    moving = dict(REGIMES[regime])
    model = Tiny(outputs)
    optimizer = build(model, moving.pop("groups", False), noise=noise, observation=observation, **settings, **moving)
    oracle = oracle_of(model, optimizer, noise, moving, observation=observation, **restriction)
    x, y = rows(observation, outputs, 9)
    innovations: list[float] = []
    gained = 0.0
    for part in torch.arange(9).split([1, 4, 1, 3]):
        got = optimizer.step(lambda part=part: (model(x[part]), y[part]))
        close(got, oracle.step(x[part], y[part]))
        for ours, theirs in zip(model.parameters(), oracle.model.parameters(), strict=True):
            close(ours.detach(), theirs.detach())
        close(covariance_of(optimizer), oracle.P, 1e-7)
        state = optimizer.state_dict()["filter"]["noise"]
        close(state, reduced_noise(oracle.R, noise) if observation == "categorical" else oracle.R)
        if noise in ("ema", "ema_residual", "fixed"):
            count = len(part) * (outputs - 1 if observation == "categorical" else outputs)
            innovations.append(oracle.consistency / count)
            weights = 0.99 ** torch.arange(len(innovations) - 1, -1, -1.0, dtype=torch.float64)
            mean = float(weights @ torch.tensor(innovations, dtype=torch.float64) / weights.sum())
            assert optimizer.diagnostics()["consistency"] == pytest.approx(mean, rel=1e-7)
            gained = 0.7 * gained + 0.3 * oracle.gain
            assert optimizer.diagnostics()["gain"] == pytest.approx(gained / (1 - 0.7 ** len(innovations)), rel=1e-7)
        assert optimizer.diagnostics()["trace_p"] == pytest.approx(float(oracle.P.trace()), rel=1e-7)
        assert optimizer.diagnostics()["jitters"] == 0


class Regression(nn.Module):
    def __init__(self, features: int, outputs: int) -> None:
        super().__init__()
        self.map = nn.Linear(features, outputs, bias=False, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.map(x)


@given(cuts=st.sets(st.integers(1, 11)), seed=st.integers(0, 5))
def test_the_linear_gaussian_case_is_bayesian_regression_however_rows_are_batched(cuts: set[int], seed: int) -> None:
    torch.manual_seed(seed)
    model, noise, p0 = Regression(4, 2), 0.25, 2.0
    start = model.map.weight.detach().clone()
    x, y = torch.randn(12, 4, dtype=torch.float64), torch.randn(12, 2, dtype=torch.float64)
    settings = {"initial_noise": noise, "initial_covariance": p0, "scale_adaptation": 0.0}
    optimizer = LoKO(model, rank=24, direction_decay=1.0, noise="fixed", observation="gaussian", **settings)
    for first, last in itertools.pairwise([0, *sorted(cuts), 12]):
        optimizer.step(lambda a=first, b=last: (model(x[a:b]), y[a:b]))
    precision = torch.eye(4, dtype=torch.float64) / p0 + x.T @ x / noise  # of each output's row of weights
    mean = torch.linalg.solve(precision, start.T / p0 + x.T @ y / noise).T
    close(model.map.weight.detach(), mean)
    close(covariance_of(optimizer), torch.block_diag(*[torch.linalg.inv(precision)] * 2))


def run(model: nn.Module, batches: list[tuple[Tensor, Tensor]], **settings: Any) -> tuple[Tensor, Tensor, Tensor, LoKO]:
    optimizer = build(model, **settings)
    for x, y in batches:
        optimizer.step(lambda x=x, y=y: (model(x), y))
    theta = torch.cat([p.detach().flatten() for p in model.parameters()])
    return theta, covariance_of(optimizer), optimizer.state_dict()["filter"]["noise"], optimizer


@settings(max_examples=12)
@given(
    kind=st.sampled_from(sorted(KINDS)),
    noise=st.sampled_from(NOISES),
    reference=st.integers(0, 3),
    omega=st.sampled_from([0.0, 0.25, 1.0]),
)
def test_which_class_is_dropped_changes_nothing(kind: str, noise: str, reference: int, omega: float) -> None:
    x, y = rows("categorical", 4, 8)
    given = {**KINDS[kind][0], "noise": noise, "linearization": omega}
    batches = list(zip(x.split(3), y.split(3), strict=True))
    want = run(Tiny(4), batches, **given)
    got = run(Tiny(4), batches, **given, observation=Categorical(reference))
    close(got[0], want[0])
    close(got[1], want[1])
    lift = torch.eye(4, dtype=torch.float64)[:, :3]  # from the block without the last class to all of R
    lift[3] = -1.0
    whole = lift @ want[2] @ lift.T
    if noise.startswith("categorical"):  # T of differences to the last class: that class itself is the zero
        whole = nn.functional.pad(want[2], (0, 1, 0, 1))
    close(got[2], reduced_noise(whole, noise, reference))


@settings(max_examples=12)
@given(kind=st.sampled_from(sorted(KINDS)), noise=st.sampled_from(NOISES), order=st.permutations(range(5)))
def test_the_order_inside_a_batch_changes_nothing(kind: str, noise: str, order: list[int]) -> None:
    x, y = rows("categorical", 3, 10)
    given = {**KINDS[kind][0], "noise": noise, "linearization": 0.25}
    want = run(Tiny(3), [(x[:5], y[:5]), (x[5:], y[5:])], **given)
    got = run(Tiny(3), [(x[:5][order], y[:5][order]), (x[5:], y[5:])], **given)
    for ours, theirs in zip(got[:3], want[:3], strict=True):
        close(ours, theirs)


def test_rows_are_stacked_and_never_averaged() -> None:
    """The same row k times with noise R says what the row once with noise R / k says."""
    x, y = rows("gaussian", 2, 1)
    given = {"covariance": "low_rank", "rank": 20, "noise": "fixed", "observation": "gaussian"}
    four = run(Tiny(2), [(x.repeat(4, 1), y.repeat(4, 1))], **given, initial_noise=1.0)
    once = run(Tiny(2), [(x, y)], **given, initial_noise=0.25)
    close(four[0], once[0])
    close(four[1], once[1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("noise", ["ema", "categorical"])
def test_float32_follows_float64(kind: str, noise: str) -> None:
    x, y = rows("categorical", 3, 160)
    results = []
    for dtype in (torch.float64, torch.float32):
        batches = list(zip(x.to(dtype).split(4), y.split(4), strict=True))
        results.append(run(Tiny(3).to(dtype), batches, **KINDS[kind][0], noise=noise, linearization=0.25))
    (theta, P, R, _), (single, P32, R32, optimizer) = results
    state = optimizer.state_dict()["filter"]["covariance"]
    assert all(value.dtype == torch.float32 for value in state.values())
    assert (single.double() - theta).norm() < 1e-3 * theta.norm()
    assert (P32 - P).norm() < 2e-3 * P.norm()
    assert (R32 - R).norm() <= 2e-3 * R.norm()


def test_blocks() -> None:
    torch.manual_seed(0)
    matrix = torch.randn(6, 6, dtype=torch.float64)
    blocks = diagonal_blocks(matrix, 2)
    assert torch.equal(blocks[1], matrix[2:4, 2:4])
    left = torch.randn(3, 2, 2, dtype=torch.float64)
    close(times_blocks(left, matrix), torch.block_diag(*left) @ matrix)
    close(times_blocks(left, matrix[:, 0]), torch.block_diag(*left) @ matrix[:, 0])


def test_jitter_is_added_only_where_cholesky_fails_and_is_counted() -> None:
    sound = torch.tensor([[2.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
    assert cholesky(sound)[1] == 0
    factor, tries = cholesky(torch.ones(2, 2, dtype=torch.float64) - 1e-13 * torch.eye(2, dtype=torch.float64))
    assert tries > 0
    close(factor @ factor.T, torch.ones(2, 2, dtype=torch.float64), 1e-6)
    for broken in (-sound, torch.full((2, 2), torch.nan), torch.full((2, 2), torch.inf)):
        assert cholesky(broken)[0].isnan().all()


def test_a_certain_model_that_is_wrong_still_moves_by_finite_steps() -> None:
    """Λ = 0: the tangent sees no Jacobian, the logit form falls back to the plain gradient step w = e."""
    certain = Linearization(torch.tensor([[-1.0, 1.0]], dtype=torch.float64), torch.zeros(1, 2, 2).double())
    prior = torch.eye(2, dtype=torch.float64)
    close(innovate_logits(prior, certain).weights, certain.residual[0])
    assert float(innovate(prior, certain, prior).weights.abs().max()) == 0.0
    for excess in (None, prior):
        result = innovate_logits(prior, certain, excess)
        assert all(bool(value.isfinite().all()) for value in (result.weights, result.root, result.consistency))
