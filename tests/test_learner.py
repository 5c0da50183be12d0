"""One interface over the Kalman filter and gradient optimizers: a step, the head's own rate, a state that holds."""

import io
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from loko import online
from loko.config import ExperimentConfig, GradientConfig
from loko.learner import GradientLearner, KalmanLearner, build_learner, build_optimizer
from loko.optimizer import parameter_groups
from loko.tasks import Batch, Task, build

GRADIENT = [
    "adamw",
    "adagrad",
    "sgd",
    "muon",
    "lora_plus",
    "lora_fa",
    "riemannian",
    "schedule_free",
    "lora_rite",
    "soap",
]
GRADIENT += ["ivon"] if find_spec("ivon") else []
LEARNERS: list[dict[str, Any]] = [
    {"name": "loko", "covariance": "diagonal"},
    {"name": "loko", "covariance": "low_rank", "rank": 3},
    *({"name": name, "lr": 0.01} for name in GRADIENT),
]
NAMES = ["diagonal", "low_rank", *GRADIENT]


def setup(**changes: Any) -> tuple[ExperimentConfig, Task]:
    config = tiny.config(Path("rows"), **changes)
    return config, build(config.task)


def batch(seed: int = 0, rows: int = 6) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(rows, len(tiny.FEATURES), generator=generator)
    return Batch({"features": features}, torch.randint(tiny.CLASSES, (rows,), generator=generator))


def trained(task: Task) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in task.model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("optimizer", LEARNERS, ids=NAMES)
def test_a_step_returns_the_prediction_and_learns(optimizer: dict[str, Any]) -> None:
    plain = {"prediction": "plug_in"} if optimizer["name"] == "loko" else {}
    config, task = setup(optimizer={**optimizer, **plain})
    learner = build_learner(config, task)
    frozen = {name: p.detach().clone() for name, p in task.model.named_parameters() if not p.requires_grad}
    before, rows = trained(task), batch()
    with torch.no_grad():
        expected = task.logits(rows)
    outputs = learner.learn(rows)
    assert torch.equal(outputs, expected)
    assert not outputs.requires_grad
    learner.learn(rows)  # SOAP only looks at the first batch
    moved = [name for name, p in trained(task).items() if not torch.equal(p, before[name])]
    assert any("lora_B" in name for name in moved)
    assert any("classifier" in name and "weight" in name for name in moved)
    assert any("classifier" in name and "bias" in name for name in moved)
    for name, p in task.model.named_parameters():
        if name in frozen:
            assert torch.equal(p, frozen[name]), name
    assert learner.diagnostics()["skipped_rows"] == 0


@pytest.mark.parametrize("optimizer", LEARNERS, ids=NAMES)
def test_the_loss_falls(optimizer: dict[str, Any]) -> None:
    config, task = setup(optimizer=optimizer)
    learner, rows = build_learner(config, task), batch()
    losses = [float(torch.nn.functional.cross_entropy(learner.learn(rows), rows.labels)) for _ in range(20)]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("optimizer", LEARNERS, ids=NAMES)
def test_the_state_goes_on_bit_for_bit(optimizer: dict[str, Any]) -> None:
    config, task = setup(optimizer={**optimizer, **({} if optimizer["name"] == "loko" else {"head_lr_ratio": 3.0})})
    learner = build_learner(config, task)
    for seed in range(3):
        learner.learn(batch(seed))
    file = io.BytesIO()
    torch.save(learner.state_dict(), file)
    file.seek(0)
    _, other = setup()
    again = build_learner(config, other)
    again.load_state_dict(torch.load(file, weights_only=True))
    other.model.load_state_dict(task.model.state_dict())
    tiny.assert_same(again.state_dict(), learner.state_dict())
    for seed in range(3, 6):
        outputs = []
        for one in (again, learner):
            torch.manual_seed(seed)  # IVON samples; the loop's checkpoint holds the random state
            outputs.append(one.learn(batch(seed)))
        assert torch.equal(*outputs)
    tiny.assert_same(again.state_dict(), learner.state_dict())
    tiny.assert_same(trained(other), trained(task))


@pytest.mark.parametrize("name", GRADIENT)
def test_the_head_has_its_own_rate(name: str) -> None:
    def rates(ratio: float) -> dict[str, float]:
        _, task = setup()
        optimizer = build_optimizer(task.model, GradientConfig(name=name, lr=0.01, head_lr_ratio=ratio))  # type: ignore[arg-type]
        by_id = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
        return {key: by_id[id(p)] for key, p in task.model.named_parameters() if p.requires_grad}

    plain, own = rates(1.0), rates(5.0)
    assert plain["base_model.model.classifier.modules_to_save.default.weight"] == 0.01
    for key in plain:
        assert own[key] == pytest.approx(plain[key] * (5.0 if "classifier" in key else 1.0)), key


@pytest.mark.parametrize("name", [n for n in GRADIENT if n not in ("lora_plus", "muon")])
def test_the_head_moves_at_its_own_rate(name: str) -> None:
    """The rate that is written down is the one that acts: to first order the head's first step is as much larger."""

    def steps(ratio: float) -> dict[str, torch.Tensor]:
        config, task = setup(optimizer={"name": name, "lr": 1e-4, "head_lr_ratio": ratio})
        before = trained(task)
        learner = build_learner(config, task)
        torch.manual_seed(0)
        for _ in range(2 if name == "soap" else 1):  # SOAP only looks at the first batch
            learner.learn(batch())
        return {key: p - before[key] for key, p in trained(task).items()}

    plain, own = steps(1.0), steps(5.0)
    for key in plain:
        factor = 5.0 if "classifier" in key else 1.0
        torch.testing.assert_close(own[key], factor * plain[key], rtol=2e-2, atol=1e-7)


def test_muon_keeps_a_rate_for_each_parameter() -> None:
    moved = []
    for ratio in (1.0, 5.0):
        config, task = setup(
            optimizer={"name": "muon", "lr": 1e-3, "head_lr_ratio": ratio, "options": {"weight_decay": 0.0}}
        )
        before = trained(task)
        build_learner(config, task).learn(batch())
        moved.append({key: p - before[key] for key, p in trained(task).items()})
    for key in moved[0]:
        factor = 5.0 if "classifier" in key else 1.0
        torch.testing.assert_close(moved[1][key], factor * moved[0][key], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", GRADIENT)
def test_options_that_are_wrong(name: str) -> None:
    _, task = setup()
    with pytest.raises(ValueError, match=f"optimizer '{name}' with options .*warmth"):
        build_optimizer(task.model, GradientConfig(name=name, options={"warmth": 3}))  # type: ignore[arg-type]


def test_an_option_out_of_range() -> None:
    _, task = setup()
    with pytest.raises(ValueError, match=r"'sgd' with options .*[Ii]nvalid momentum"):
        build_optimizer(task.model, GradientConfig(name="sgd", options={"momentum": -1.0}))


@pytest.mark.parametrize("name", ["lora_plus", "lora_fa", "riemannian", "lora_rite"])
def test_optimizers_of_lora_need_lora(name: str) -> None:
    _, task = setup(task={**tiny.experiment(Path("rows"))["task"], "adapter": {"method": "ia3"}})
    with pytest.raises(ValueError, match=f"optimizer '{name}'.* LoRA"):
        build_optimizer(task.model, GradientConfig(name=name))  # type: ignore[arg-type]


@pytest.mark.parametrize("optimizer", LEARNERS, ids=NAMES)
def test_nothing_trainable(optimizer: dict[str, Any]) -> None:
    config, task = setup(optimizer=optimizer)
    task.model.requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameter"):
        build_learner(config, task)


@pytest.mark.parametrize("optimizer", LEARNERS, ids=NAMES)
def test_a_batch_that_is_not_finite_is_skipped_and_counted(optimizer: dict[str, Any]) -> None:
    config, task = setup(optimizer=optimizer)
    learner = build_learner(config, task)
    learner.learn(batch())
    before, rows = trained(task), batch(1)
    rows.inputs["features"][2, 1] = torch.nan
    learner.learn(rows)
    assert learner.diagnostics()["skipped_rows"] == len(rows)
    tiny.assert_same(trained(task), before)


@pytest.mark.parametrize(("observation", "width"), [("bernoulli", 3), ("gaussian", 3), ("gaussian", 1)])
@pytest.mark.parametrize("name", ["loko", "adamw"])
def test_other_observations(name: str, observation: str, width: int) -> None:
    names = [f"y{i}" for i in range(width)]
    task_config = {
        **tiny.experiment(Path("rows"))["task"],
        "observation": observation,
        "num_labels": width,
        "columns": {"features": tiny.FEATURES, "labels": names},
    }
    config, task = setup(task=task_config, optimizer={"name": name})
    learner, inputs = build_learner(config, task), batch().inputs
    labels = torch.rand(6, width, generator=torch.Generator().manual_seed(0))
    rows = Batch(inputs, labels.round() if observation == "bernoulli" else labels)

    def loss(outputs: torch.Tensor) -> float:
        if observation == "bernoulli":
            return float(torch.nn.functional.binary_cross_entropy_with_logits(outputs, rows.labels))
        return float((outputs - rows.labels).square().mean())

    losses = [loss(learner.learn(rows)) for _ in range(30)]
    assert losses[-1] < losses[0]


def test_the_learner_is_the_one_the_config_names() -> None:
    config, task = setup(optimizer={"name": "loko", "initial_covariance": 0.3, "scales": {"head": 2.0}})
    learner = build_learner(config, task)
    assert isinstance(learner, KalmanLearner)
    covariances = {g["name"]: g["initial_covariance"] for g in learner.optimizer.param_groups}
    assert covariances == {"A": 0.3, "B": 0.3, "head": 0.6}
    config, task = setup(optimizer={"name": "adagrad", "lr": 0.5})
    learner = build_learner(config, task)
    assert isinstance(learner, GradientLearner)
    assert isinstance(learner.optimizer, torch.optim.Adagrad)


def test_lora_fa_keeps_a(tmp_path: Path) -> None:
    """LoRA-FA freezes A; what is saved of such a run still loads into a fresh one."""
    config = tiny.config(tiny.shards(tmp_path / "rows", 16), optimizer={"name": "lora_fa"})
    run = online.start(config)
    groups = {g["name"] for g in parameter_groups(run.task.model)}
    assert groups == {"B", "head"}
    list(online.advance(run))
    (tmp_path / "saved").mkdir()
    online.save(run, tmp_path / "saved")
    model = online.trained_model(config, tmp_path / "saved")
    for (name, mine), (_, theirs) in zip(model.named_parameters(), run.task.model.named_parameters(), strict=True):
        assert torch.equal(mine, theirs), name
