"""What ``step`` returns: labels as expected under shares of P, mixed by how well each foretold the labels before."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from loko import LoKO
from loko.observation import OBSERVATIONS
from loko.prediction import expected_sigmoid, expected_softmax
from loko.trust import CONFIDENCES, SHARES, Trust, expected
from tests.test_filter import Tiny, close, rows

EXPERTS = len(SHARES) + len(CONFIDENCES)

PLAIN: dict[str, Any] = {"initial_covariance": 2.0, "scale_adaptation": 0.0}
"""With these P is before a step what it was after the last."""


def expected_by_hand(outputs: Tensor, covariance: Tensor, observation: str, frequency: Tensor | None = None) -> Tensor:
    """(K, B, C), expert by expert; frequency: of each label so far, (C,), None: nothing was seen."""
    flat = 0.0 if frequency is None else frequency.log() if observation == "categorical" else frequency.logit()
    tempered = [a * outputs + max(0.0, 1 - a) * flat for a in CONFIDENCES]
    if observation == "categorical":
        shares = [expected_softmax(outputs, c * covariance) for c in SHARES]
        return torch.stack([*shares, *(each.softmax(-1) for each in tempered)])
    variance = covariance.diagonal(dim1=1, dim2=2)
    shares = [expected_sigmoid(outputs, c * variance) for c in SHARES]
    return torch.stack([*shares, *(each.sigmoid() for each in tempered)])


@pytest.mark.parametrize(("observation", "outputs"), [("categorical", 2), ("categorical", 4), ("bernoulli", 3)])
def test_a_step_returns_the_mixture_of_the_experts(observation: str, outputs: int) -> None:
    model = Tiny(outputs)
    optimizer = LoKO(model, observation=observation, output_tolerance=0.0, **PLAIN)
    weights = torch.full((EXPERTS,), 1 / EXPERTS, dtype=torch.float64)
    x, y = rows(observation, outputs, 20)
    frequency, seen, count = None, torch.zeros(outputs, dtype=torch.float64), 0.0
    for i in range(0, 20, 4):
        before = optimizer.predict(lambda i=i: model(x[i : i + 4]))
        each = expected_by_hand(before.outputs, before.covariance, observation, frequency)
        wanted = torch.tensordot(weights, each, 1)
        found = optimizer.step(lambda i=i: (model(x[i : i + 4]), y[i : i + 4]))
        close(found.softmax(-1) if observation == "categorical" else found.sigmoid(), wanted, 1e-9)
        labels = y[i : i + 4]
        one_hot = nn.functional.one_hot(labels, outputs) if observation == "categorical" else labels
        chance = torch.where(one_hot.bool(), each, 1 - each)
        if observation == "categorical":
            chance = chance[:, one_hot.bool()]
        weights = weights**0.95 * chance.flatten(1).prod(1)
        weights = 0.99 * weights / weights.sum() + 0.01 / EXPERTS
        seen, count = 0.995 * seen + one_hot.sum(0), 0.995 * count + 4
        frequency = (seen + 1) / (count + (outputs if observation == "categorical" else 2))
    found = optimizer.diagnostics()
    assert found["trust"] == pytest.approx(float(weights[: len(SHARES)] @ torch.tensor(SHARES).double()))
    factors = torch.tensor((1.0,) * len(SHARES) + CONFIDENCES).double()
    assert found["confidence"] == pytest.approx(float(weights @ factors))


def test_predict_mixes_with_the_same_weights() -> None:
    """What ``predict`` says of the next rows is what ``step`` then returns for them."""
    model = Tiny(4)
    optimizer = LoKO(model, output_tolerance=0.0, **PLAIN)
    x, y = rows("categorical", 4, 16)
    optimizer.step(lambda: (model(x[:4]), y[:4]))
    for i in range(4, 16, 4):
        before, consistency = optimizer.predict(lambda i=i: model(x[i : i + 4])), optimizer.diagnostics()["consistency"]
        found = optimizer.step(lambda i=i: (model(x[i : i + 4]), y[i : i + 4]))
        close(found.softmax(-1), before.mean, 1e-9)
        of_label = torch.diag_embed(before.mean) - before.mean[:, :, None] * before.mean[:, None]
        close(before.label_covariance, of_label, 1e-12)
        assert before.factor == consistency


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    observation=st.sampled_from(["categorical", "bernoulli"]),
    tolerance=st.sampled_from([0.0, 0.05, 0.2, 0.5]),
    limit=st.sampled_from([None, 1, 2]),
    sharp=st.floats(0.5, 6.0),
)
def test_a_prediction_knows_nothing_of_its_labels(
    seed: int, observation: str, tolerance: float, limit: int | None, sharp: float
) -> None:
    """Whatever the labels are, and so whichever outputs the update observes, the prediction is the same."""
    generator = torch.Generator().manual_seed(seed)
    model = nn.Linear(3, 5).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(sharp * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    x = torch.randn(8, 3, generator=generator, dtype=torch.float64)
    classes = torch.randint(5, (8,), generator=generator)
    given_settings: dict[str, Any] = {
        "observation": observation, "output_tolerance": tolerance, "max_outputs": limit
    }  # fmt: skip

    def labels_of(chosen: Tensor) -> Tensor:
        return chosen if observation == "categorical" else nn.functional.one_hot(chosen, 5).double()

    optimizer = LoKO(model, **given_settings)
    for seen in (x[:4], x[4:]):  # also of the first batch, which sets p₀
        found = []
        for chosen in (classes[4:], (classes[4:] + 1) % 5, torch.randint(5, (4,), generator=generator)):
            twin = copy.deepcopy(model)
            other = LoKO(twin, **given_settings)
            other.load_state_dict(optimizer.state_dict())
            predicted = other.step(lambda twin=twin, seen=seen, chosen=chosen: (twin(seen), labels_of(chosen)))
            found.append(predicted.softmax(-1) if observation == "categorical" else predicted.sigmoid())
        close(found[1], found[0], 1e-9)
        close(found[2], found[0], 1e-9)
        optimizer.step(lambda: (model(x[:4]), labels_of(classes[:4])))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), count=st.integers(1, 4))
def test_classes_that_are_left_out_go_together(seed: int, count: int) -> None:
    """Against all classes under the same covariance, for left-out classes with probabilities that do not matter."""
    generator = torch.Generator().manual_seed(seed)
    outputs = torch.randn(3, 6, generator=generator, dtype=torch.float64)
    order = outputs.argsort(1, descending=True)
    outputs = outputs.scatter_add(1, order[:, count + 1 :], torch.full((3, 6), -12.0).double())
    model = OBSERVATIONS["categorical"]()
    seeds = model.seeds(model.full_mean(outputs), order[:, 1 : count + 1])
    lift = torch.linalg.qr(seeds).Q
    half = torch.randn(3, count, count, generator=generator, dtype=torch.float64)
    covariance = half @ half.mT
    found = expected(model, outputs, lift, covariance, torch.zeros(6).double())
    close(found.sum(-1), torch.ones(EXPERTS, 3).double(), 1e-9)
    whole = expected_by_hand(outputs, lift @ covariance @ lift.mT, "categorical")
    assert float((found - whole).abs().max()) < 0.01  # other points of the same normal distribution
    left_out = found[: len(SHARES)].gather(2, order[:, count + 1 :].expand(len(SHARES), -1, -1))
    plain = outputs.gather(1, order[:, count + 1 :]).softmax(-1)
    close(left_out / left_out.sum(-1, keepdim=True), plain.expand(len(SHARES), -1, -1), 1e-9)


def test_the_mixture_is_never_far_behind_experts_that_take_turns() -> None:
    """Within log K of the best in the first batch, and within log(K / α) of it ever, also when the best has changed."""
    generator = torch.Generator().manual_seed(0)
    model, labels = OBSERVATIONS["categorical"](), torch.zeros(1, dtype=torch.long)
    trust = Trust.start(torch.device("cpu"))
    for step in range(200):
        each = torch.randn(EXPERTS, 1, 3, generator=generator, dtype=torch.float64).softmax(-1)
        each[3 if step < 150 else 7] = torch.tensor([0.999, 0.0005, 0.0005]).double()
        lost = float(each[:, 0, 0].max().log() - trust.mix(each)[0, 0].log())
        assert lost <= math.log(EXPERTS / (1.0 if step == 0 else 0.01))
        trust = trust.learned(each, model, labels)
        if step in (149, 199):
            assert int(trust.weights.argmax()) == (3 if step == 149 else 7)


def test_confidence_falls_where_the_model_is_certain_and_wrong_and_comes_back() -> None:
    model, outputs = OBSERVATIONS["categorical"](), torch.tensor([[9.0, 0.0, 0.0]] * 4).double()
    each = expected_by_hand(outputs, 1e-6 * torch.eye(3).double().expand(4, -1, -1), "categorical")
    trust, right, wrong = Trust.start(torch.device("cpu")), torch.tensor([0, 0, 0, 0]), torch.tensor([1, 2, 1, 2])
    found = []
    for labels in (right, wrong, right):
        for _ in range(3 if labels is wrong else 40):
            trust = trust.learned(each, model, labels)
        found.append(trust.confidence)
    assert found[0] > 0.9
    assert found[1] < 0.2
    assert found[2] > 0.9


@pytest.mark.parametrize("observation", ["categorical", "bernoulli"])
def test_a_model_that_knows_nothing_is_hardly_behind_the_frequencies_of_the_labels(observation: str) -> None:
    """Outputs at random, one label in twenty: falling back on even odds would cost 0.69 a row, the frequencies 0.2."""
    generator = torch.Generator().manual_seed(2)
    model, trust, lost, usual = OBSERVATIONS[observation](), Trust.start(torch.device("cpu")), [], []
    for _ in range(400):
        outputs = 3 * torch.randn(4, 2, generator=generator, dtype=torch.float64)
        rare = (torch.rand(4, generator=generator) < 0.05).long()
        labels = rare if observation == "categorical" else nn.functional.one_hot(rare, 2).double()
        flat = trust.usual(model)
        none = torch.zeros(4, 2, 1).double()
        each = expected(model, outputs, none, torch.zeros(4, 1, 1).double(), flat)
        for mean, total in ((trust.mix(each), lost), (model.full_mean(flat.expand(4, 2)), usual)):
            target = model.full_target(labels, 2)
            chance = mean if observation == "categorical" else torch.where(target > 0, mean, 1 - mean)
            total.append(float(-(chance.log() if observation == "bernoulli" else target * chance.log()).sum() / 4))
        trust = trust.learned(each, model, labels)
    outputs_a_row = 1 if observation == "categorical" else 2
    assert sum(usual[100:]) / 300 < 0.25 * outputs_a_row
    assert sum(lost[100:]) / 300 < 0.33 * outputs_a_row


def test_where_p_is_right_it_is_trusted_and_where_it_is_wrong_it_is_not() -> None:
    """Rows drawn from the prior the filter starts with, or from a model a hundredth as uncertain."""
    found = []
    for spread in (1.0, 0.01):
        generator = torch.Generator().manual_seed(1)
        trust, shares = Trust.start(torch.device("cpu")), []
        for _ in range(200):
            mean = torch.randn(4, 2, generator=generator, dtype=torch.float64)
            noise = 2.0 * math.sqrt(spread) * torch.randn(4, 2, generator=generator, dtype=torch.float64)
            labels = torch.distributions.Categorical(logits=mean + noise).probs.multinomial(1, generator=generator)
            covariance = 4.0 * torch.eye(2, dtype=torch.float64).expand(4, -1, -1)
            each = expected_by_hand(mean, covariance, "categorical")
            trust = trust.learned(each, OBSERVATIONS["categorical"](), labels[:, 0])
            shares.append(trust.share / float(trust.weights[: len(SHARES)].sum()))
        found.append(sum(shares[20:]) / 180)
    assert found[0] > 0.5
    assert found[1] < 0.2


def test_plug_in_and_gaussian_return_the_outputs_of_the_model() -> None:
    for observation, given_settings in (("categorical", {"prediction": "plug_in"}), ("gaussian", {})):
        model = Tiny(3)
        x, y = rows(observation, 3, 4)
        want = model(x).detach()
        optimizer = LoKO(model, observation=observation, **given_settings)
        assert torch.equal(optimizer.step(lambda model=model, x=x, y=y: (model(x), y)), want)
        assert "trust" not in optimizer.diagnostics()


def test_probabilities_of_a_model_in_bfloat16_keep_their_precision() -> None:
    model = Tiny(3).float()
    x, y = rows("categorical", 3, 4)
    found = LoKO(model).step(lambda: (model(x.float()).bfloat16(), y))
    assert found.dtype == torch.float32
    close(found.double().exp().sum(1), torch.ones(4).double(), 1e-6)


def test_a_batch_that_is_skipped_teaches_no_trust() -> None:
    model = Tiny(3)
    optimizer = LoKO(model)
    x, y = rows("categorical", 3, 4)
    optimizer.step(lambda: (model(x), y))
    before = optimizer.state_dict()["filter"]["trust"]
    assert bool(optimizer.step(lambda: (model(x * math.nan), y)).isnan().all())
    after = optimizer.state_dict()["filter"]["trust"]
    assert all(torch.equal(after[key], before[key]) for key in ("weights", "labels"))
    assert after["rows"] == before["rows"]


def test_a_state_of_the_other_kind_is_refused() -> None:
    optimizer = LoKO(Tiny(3))
    other = LoKO(Tiny(3), prediction="plug_in")
    state = optimizer.state_dict()
    state["filter"]["trust"]["weights"] = torch.ones(3, dtype=torch.float64)
    with pytest.raises(ValueError, match="mixed predictions in another way"):
        optimizer.load_state_dict(state)
    with pytest.raises(ValueError, match="saved with prediction = 'plug_in'"):
        optimizer.load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match="saved with prediction = 'expected'"):
        other.load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match="prediction = 'mean'; allowed: 'expected', 'plug_in'"):
        LoKO(Tiny(3), prediction="mean")  # type: ignore[arg-type]
