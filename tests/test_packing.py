"""Runs packed over one backbone against the same runs alone."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from transformers import BertConfig, BertForSequenceClassification, ConvNextConfig, ConvNextForImageClassification

from loko import online
from loko.config import ExperimentConfig
from loko.jacobian import JacobianEngine
from loko.packing import Pack, PackedModel, PackingError, _jacobians
from loko.tasks import Batch, Task, TaskConfig
from loko.tasks.models import TableOutput

LOKO: list[dict[str, Any]] = [
    {"name": "loko", "covariance": "low_rank", "rank": 3, "initial_covariance": 0.3},
    {"name": "loko", "covariance": "low_rank", "rank": 2, "initial_covariance": 1.0, "noise_decay": 0.9},
    {"name": "loko", "covariance": "diagonal", "initial_covariance": 0.1, "linearization": 0.0},
    {"name": "loko", "covariance": "diagonal", "noise": "ema_residual", "output_tolerance": 0.0},
]
GRADIENT: list[dict[str, Any]] = [
    {"name": "adamw", "lr": 1e-3},
    {"name": "adamw", "lr": 1e-2, "head_lr_ratio": 0.3},
    {"name": "sgd", "lr": 1e-2},
    {"name": "lora_fa", "lr": 1e-3},
]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return tiny.shards(tmp_path / "rows", 42)


def configs(rows: Path, optimizers: list[dict[str, Any]], **changes: Any) -> list[ExperimentConfig]:
    heldout = {"paths": str(tiny.shards(rows.parent / "heldout", 20, seed=1))}
    return [tiny.config(rows, optimizer=one, heldout=heldout, **changes) for one in optimizers]


def close(actual: online.Report, expected: online.Report) -> None:
    assert list(actual) == list(expected)
    for key, value in expected.items():
        if key == "rows_digest":
            assert actual[key] == value
        elif "seconds" not in key:
            assert actual[key] == pytest.approx(value, rel=1e-5, abs=1e-5, nan_ok=True), key


@pytest.mark.parametrize("optimizers", [LOKO, GRADIENT, [GRADIENT[1], LOKO[0], LOKO[2]]], ids=["loko", "sgd", "mixed"])
def test_packed_runs_report_what_each_reports_alone(rows: Path, optimizers: list[dict[str, Any]]) -> None:
    given = configs(rows, optimizers)
    pack = Pack(given[0])
    rungs = list(pack.advance([pack.start(config) for config in given]))
    for place, config in enumerate(given):
        alone = list(online.advance(online.start(config)))
        assert len(rungs) == len(alone) == 6
        for rung, report in zip(rungs, alone, strict=True):
            close(rung[place], report)


def test_a_run_that_leaves_does_not_disturb_the_others(rows: Path) -> None:
    given = configs(rows, LOKO[:3])
    pack = Pack(given[0])
    runs = [pack.start(config) for config in given]
    first = next(pack.advance(runs))
    rest = list(pack.advance([runs[0], runs[2]]))
    assert runs[1].cursor == first[1]["rows"] == 8
    for place, config in ((0, given[0]), (1, given[2])):
        alone = list(online.advance(online.start(config)))
        close(first[2 * place], alone[0])
        for rung, report in zip(rest, alone[1:], strict=True):
            close(rung[place], report)


def test_a_checkpoint_of_a_packed_run_is_that_of_any_run(rows: Path, tmp_path: Path) -> None:
    given = configs(rows, LOKO[:2])
    pack = Pack(given[0])
    runs = [pack.start(config) for config in given]
    next(pack.advance(runs))
    folders = [tmp_path / "0", tmp_path / "1"]
    for run, folder in zip(runs, folders, strict=True):
        folder.mkdir()
        online.save(run, folder)
    # One goes on alone, and both go on in another pack.
    again = online.start(given[1])
    online.resume(again, folders[1])
    alone = list(online.advance(again))
    other = Pack(given[0])
    resumed = [other.start(config) for config in given]
    for run, folder in zip(resumed, folders, strict=True):
        online.resume(run, folder)
    packed = list(other.advance(resumed))
    undisturbed = list(online.advance(online.start(given[1])))[1:]
    for mine, together, expected in zip(alone, packed, undisturbed, strict=True):
        close(mine, expected)
        close(together[1], expected)


def test_one_backbone_is_in_memory_once(rows: Path) -> None:
    given = configs(rows, LOKO)
    pack = Pack(given[0])
    models = [pack.start(config).task.model for config in given]
    frozen = [{p.data_ptr() for p in model.parameters() if not p.requires_grad} for model in models]
    trained = [{p.data_ptr() for p in model.parameters() if p.requires_grad} for model in models]
    assert frozen[0] == frozen[1] == frozen[2] == frozen[3]
    assert not trained[0] & trained[1]
    assert not trained[0] & frozen[0]


def test_a_run_of_another_experiment_is_refused(rows: Path) -> None:
    given = configs(rows, LOKO[:1])
    pack = Pack(given[0])
    with pytest.raises(ValueError, match=r"differ in their optimizer only.*batch_size differs"):
        pack.start(given[0].model_copy(update={"batch_size": 8}))


def test_runs_at_different_rows_are_refused(rows: Path) -> None:
    given = configs(rows, LOKO[:2])
    pack = Pack(given[0])
    ahead, behind = (pack.start(config) for config in given)
    next(pack.advance([ahead]))
    with pytest.raises(PackingError, match=r"from one row of the stream; these stand at \[0, 8\]"):
        pack.advance([ahead, behind])


def test_adapters_that_cannot_be_packed_are_refused_by_name(rows: Path) -> None:
    def plain(method: str) -> ExperimentConfig:
        experiment = tiny.experiment(rows)
        experiment["task"]["adapter"] = {"method": method}
        return tiny.config(rows, **{key: value for key, value in experiment.items() if key == "task"})

    with pytest.raises(PackingError, match=r"ia3_l is a ParameterDict .*unpacked \(search.pack: 1\)"):
        Pack(plain("ia3"))
    config = plain("dora")
    with pytest.raises(PackingError, match=r"lora_magnitude_vector.* is a .*unpacked"):
        Pack(config)


def test_an_optimizer_with_a_pass_of_its_own_is_refused(rows: Path) -> None:
    given = configs(rows, [{"name": "schedule_free"}, GRADIENT[0]])
    pack = Pack(given[0])
    with pytest.raises(PackingError, match=r"ScheduleFreeAdamW learns at other parameters .*unpacked"):
        list(pack.advance([pack.start(config) for config in given]))


def table_task(model: nn.Module, dtype: torch.dtype = torch.float64) -> Task:
    """A task around any model that takes ``features``; float64 where the model is."""
    config = TaskConfig.model_validate(tiny.experiment(Path("unused"))["task"])

    class Plain(Task):
        def logits(self, batch: Batch) -> Tensor:
            return self.model(**batch.inputs).logits

    return Plain(config, model.to(dtype).eval(), lambda rows: None)  # type: ignore[arg-type, return-value]


def bert(layers: list[int] | None = None) -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    base = BertForSequenceClassification(
        BertConfig(
            vocab_size=50, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32,
            max_position_embeddings=16, num_labels=3,
        )
    )  # fmt: skip
    lora = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"], layers_to_transform=layers)
    ids = torch.randint(0, 50, (3, 7))
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    return get_peft_model(base, lora), {"input_ids": ids, "attention_mask": mask}


def convnext() -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    base = ConvNextForImageClassification(
        ConvNextConfig(
            num_channels=1, image_size=16, patch_size=4, num_stages=2, hidden_sizes=[8, 12], depths=[1, 1],
            num_labels=3, layer_scale_init_value=1.0,
        )
    )  # fmt: skip
    lora = LoraConfig(r=2, target_modules=["pwconv1", "pwconv2", "patch_embeddings"], modules_to_save=["classifier"])
    return get_peft_model(base, lora), {"pixel_values": torch.randn(3, 1, 16, 16, dtype=torch.float64)}


MODELS: dict[str, Callable[[], tuple[nn.Module, dict[str, Tensor]]]] = {
    "bert": bert,
    "bert, last layer": lambda: bert([2]),
    "convnext": convnext,
}


@pytest.mark.parametrize("name", MODELS)
def test_jacobians_through_a_pack_are_those_of_each_model(name: str) -> None:
    model, inputs = MODELS[name]()
    task = table_task(model)
    packed = PackedModel(task)
    models = [task.twin().model for _ in range(3)]
    for one in models:
        for p in one.parameters():
            if p.requires_grad:
                p.data += 0.3 * torch.randn_like(p)
    batch = Batch(inputs, torch.zeros(3, dtype=torch.int64))
    packed.prove(batch)
    outputs = packed(models, batch)
    # Two runs observe all outputs, the third only one combination of them, each row another.
    narrow = torch.randn(3, 1, 3, dtype=torch.float64)
    seeds = {0: torch.eye(3, dtype=torch.float64), 1: torch.eye(3, dtype=torch.float64), 2: narrow}
    first = JacobianEngine(models[0], [(n, p) for n, p in models[0].named_parameters() if p.requires_grad])
    jacobians = _jacobians(first, outputs, packed.take_calls(), packed.layers, seeds)
    for k, one in enumerate(models):
        trained = {n: p for n, p in one.named_parameters() if p.requires_grad}
        fixed = {n: p for n, p in one.named_parameters() if not p.requires_grad}
        fixed |= dict(one.named_buffers())

        def alone(values: dict[str, Tensor], one: nn.Module = one, fixed: dict[str, Tensor] = fixed) -> Tensor:
            return functional_call(one, {**fixed, **values}, (), inputs).logits

        torch.testing.assert_close(outputs[k], alone(trained), rtol=1e-12, atol=1e-12)
        truth = jacrev(alone)({n: p.detach() for n, p in trained.items()})
        dense = torch.cat([truth[n].flatten(2) for n in trained], dim=2)
        expected = seeds[k] @ dense if k < 2 else torch.einsum("bmc,bcn->bmn", narrow, dense)
        torch.testing.assert_close(jacobians[k], expected.flatten(0, 1), rtol=1e-10, atol=1e-10)


def test_what_lies_before_the_first_adapter_is_computed_once() -> None:
    model, inputs = bert([2])
    task = table_task(model)
    packed = PackedModel(task)
    batch = Batch(inputs, torch.zeros(3, dtype=torch.int64))
    seen: dict[str, int] = {}
    for name, module in packed._task.model.named_modules():
        if name.endswith("attention.output.dense"):
            module.register_forward_hook(lambda m, args, out, name=name: seen.update({name: len(out)}))
    packed([task.twin().model for _ in range(4)], batch)
    assert sorted(seen.values()) == [3, 3, 12]


def test_a_parameter_read_past_its_layer_is_found() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(4, 4)
            self.classifier = nn.Linear(4, 3)
            self.body.requires_grad_(False)

        def forward(self, features: Tensor) -> Any:
            hidden = self.classifier(self.body(features).tanh())
            return TableOutput(hidden + features @ self.classifier.weight.mT)

    batch = Batch({"features": torch.randn(3, 4, dtype=torch.float64)}, torch.zeros(3, dtype=torch.int64))
    with pytest.raises(PackingError, match="read past its layer"):
        PackedModel(table_task(Tied())).prove(batch)


def test_rows_that_mix_are_found() -> None:
    class Mixing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(4, 4)
            self.classifier = nn.Linear(4, 3)

        def forward(self, features: Tensor) -> Any:
            hidden = self.body(features)
            return TableOutput(self.classifier(hidden - hidden.mean(0)))

    batch = Batch({"features": torch.randn(3, 4, dtype=torch.float64)}, torch.zeros(3, dtype=torch.int64))
    with pytest.raises(PackingError, match="rows of a batch depend on each other"):
        PackedModel(table_task(Mixing())).prove(batch)
