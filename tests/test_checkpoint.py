"""Checkpoints: whole or refused, and a model that was refused one is as it was."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from loko import checkpoint
from loko.checkpoint import CheckpointError

STATE = {"cursor": 12, "nested": {"x": torch.arange(3.0), "list": [1, "two", None]}}
BELONGS = {"stream": "abc", "configuration": "def"}
FILES = ["parameters.safetensors", "state.pt", "checkpoint.json"]


def model(width: int = 3, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(2, width), nn.Linear(width, 2))
    net[0].bias.requires_grad_(False)
    return net


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    checkpoint.save(tmp_path, model(), STATE, BELONGS)
    return tmp_path


def refused(folder: Path, net: nn.Module, match: str, belongs_to: dict[str, str] = BELONGS) -> None:
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(CheckpointError, match=match):
        checkpoint.load(folder, net, belongs_to)
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name])


def test_what_is_saved_comes_back(saved: Path) -> None:
    net = model(seed=1)
    bias = net[0].bias.clone()
    state = checkpoint.load(saved, net, BELONGS)
    assert state["cursor"] == 12
    assert torch.equal(state["nested"]["x"], STATE["nested"]["x"])  # type: ignore[index]
    assert torch.equal(net[0].weight, model()[0].weight)
    assert torch.equal(net[0].bias, bias)  # not trained, hence not in a checkpoint
    assert sorted(checkpoint.read_parameters(saved)) == ["0.weight", "1.bias", "1.weight"]


@pytest.mark.parametrize("name", FILES[:2])
def test_a_flipped_byte(saved: Path, name: str) -> None:
    data = bytearray((saved / name).read_bytes())
    data[len(data) // 2] ^= 1
    (saved / name).write_bytes(data)
    refused(saved, model(seed=1), f"damaged: {name} is not what was written")


@pytest.mark.parametrize("name", FILES[:2])
def test_a_truncated_file(saved: Path, name: str) -> None:
    (saved / name).write_bytes((saved / name).read_bytes()[:-7])
    refused(saved, model(seed=1), f"damaged: {name}")


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file(saved: Path, name: str) -> None:
    (saved / name).unlink()
    refused(saved, model(seed=1), name)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"sha256": 3, "format": 1}', '{"format": 1}'])
def test_a_manifest_that_is_none(saved: Path, text: str) -> None:
    (saved / "checkpoint.json").write_text(text)
    refused(saved, model(seed=1), "complete checkpoint")


def test_another_format(saved: Path) -> None:
    path = saved / "checkpoint.json"
    path.write_text(path.read_text().replace('"format": 1', '"format": 9'))
    refused(saved, model(seed=1), "format 9; this version reads 1")


@pytest.mark.parametrize("key", list(BELONGS))
def test_of_another_run(saved: Path, key: str) -> None:
    refused(saved, model(seed=1), f"belongs to another {key} .*here other", {**BELONGS, key: "other"})


def test_of_another_model(saved: Path) -> None:
    refused(saved, model(width=4), r"another model: 0.weight is \(3, 2\) in it and \(4, 2\) here")
    bigger = nn.Sequential(*model(), nn.Linear(2, 2))
    refused(saved, bigger, r"another model: 2 trainable parameters are not in it \(first: 2.bias\)")
    frozen = model()
    frozen[1].requires_grad_(False)
    refused(saved, frozen, "2 in it are not in the model")


def test_parameters_that_are_not_finite(saved: Path) -> None:
    net = model(seed=1)
    before = net[0].weight.clone()
    tensors = {**checkpoint.read_parameters(saved), "1.bias": torch.tensor([0.0, torch.nan])}
    with pytest.raises(CheckpointError, match=r"1.bias in the checkpoint has values that are not finite"):
        checkpoint.load_parameters(net, tensors)
    assert torch.equal(net[0].weight, before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.float8_e4m3fn])
def test_parameters_of_another_precision(saved: Path, dtype: torch.dtype) -> None:
    net = model(seed=1)
    before = net[0].weight.clone()
    tensors = {**checkpoint.read_parameters(saved), "1.bias": torch.zeros(2).to(dtype)}
    with pytest.raises(
        CheckpointError, match=rf"precision: 1.bias is {dtype} in it and float32 here".replace("torch.", "")
    ):
        checkpoint.load_parameters(net, tensors)
    assert torch.equal(net[0].weight, before)


def test_nothing_in_a_checkpoint_is_run(tmp_path: Path) -> None:
    """state.pt is read with weights_only: an object in it is refused, never made."""
    checkpoint.save(tmp_path, model(), {"path": tmp_path}, BELONGS)
    refused(tmp_path, model(seed=1), r"state.pt cannot be read")


def test_parameters_that_cannot_be_read(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"parameters.safetensors cannot be read"):
        checkpoint.read_parameters(tmp_path)
