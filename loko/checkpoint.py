"""Checkpoints: everything a run needs to go on, and nothing else, in one folder.

``parameters.safetensors`` holds the trained parameters by name, ``state.pt`` the learner, the metrics, the cursor and
the random state (read with ``weights_only=True``), ``checkpoint.json`` the hashes of both and what the checkpoint
belongs to. The JSON file is written last: a folder without it is not a checkpoint, and a byte changed anywhere is
noticed.
"""

from __future__ import annotations

import hashlib
import json
import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

__all__ = ["CheckpointError", "DamagedCheckpointError", "load", "load_parameters", "read_parameters", "save", "verify"]

_FORMAT = 1
_PARAMETERS, _STATE, _MANIFEST = "parameters.safetensors", "state.pt", "checkpoint.json"


class CheckpointError(ValueError):
    """A checkpoint that is damaged, or belongs to another run; the message says which and what to do."""


class DamagedCheckpointError(CheckpointError):
    """A checkpoint that is not what was written: cut off, changed, or parts of it gone. An earlier one may be whole."""


def save(
    folder: Path,
    model: nn.Module,
    state: dict[str, Any],
    belongs_to: dict[str, str],
    about: dict[str, int] | None = None,
) -> None:
    """Write a checkpoint into an existing folder.

    Args:
        folder: where to.
        model: its trainable parameters are saved.
        state: tensors, numbers, strings, and lists and dicts of them.
        belongs_to: what must be the same when it is loaded, such as the stream's fingerprint.
        about: what people may want to see of it without loading it.
    """
    tensors = {name: p.detach().cpu().contiguous() for name, p in model.named_parameters() if p.requires_grad}
    try:
        save_file(tensors, folder / _PARAMETERS)
        torch.save(state, folder / _STATE)
    except (SafetensorError, RuntimeError) as error:  # how the two report a full disk
        raise OSError(f"the checkpoint cannot be written to {folder}: {error}") from error
    manifest = {
        "format": _FORMAT,
        "belongs_to": belongs_to,
        "about": about or {},
        "sha256": {name: _sha256(folder / name) for name in (_PARAMETERS, _STATE)},
    }
    (folder / _MANIFEST).write_text(json.dumps(manifest, indent=1))


def load(folder: Path, model: nn.Module, belongs_to: dict[str, str]) -> dict[str, Any]:
    """Read a checkpoint: the parameters go into the model, the state is returned.

    Raises:
        DamagedCheckpointError: not a checkpoint, or a damaged one.
        CheckpointError: one of another model, stream or configuration. The model is as it was in either case.
    """
    manifest = verify(folder)
    for key, value in belongs_to.items():
        saved = manifest["belongs_to"].get(key)
        if saved != value:
            raise CheckpointError(
                f"{folder} belongs to another {key} ({saved}, here {value}); start under another name, or go back to "
                f"the {key} it was made with"
            )
    try:
        state: dict[str, Any] = torch.load(folder / _STATE, weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        # torch's own message advises to run what is in the file; it is left out.
        raise CheckpointError(
            f"{folder / _STATE} cannot be read: it holds more than tensors, numbers and text"
        ) from error
    load_parameters(model, read_parameters(folder))
    return state


def read_parameters(folder: Path) -> dict[str, Tensor]:
    """The trained parameters in a checkpoint, by name."""
    try:
        return load_file(folder / _PARAMETERS)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder / _PARAMETERS} cannot be read: {error}") from error


def load_parameters(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Copy parameters into a model, all of its trainable ones and no other, of the same shape and type and finite.

    Raises:
        CheckpointError: a checkpoint of another model or precision, or values that are not finite. The model is as it
            was.
    """
    own = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if set(own) != set(tensors):
        missing, extra = sorted(set(own) - set(tensors)), sorted(set(tensors) - set(own))
        raise CheckpointError(
            f"a checkpoint of another model: {len(missing)} trainable parameters are not in it"
            f"{f' (first: {missing[0]})' if missing else ''}, {len(extra)} in it are not in the model"
            f"{f' (first: {extra[0]})' if extra else ''}"
        )
    for name, p in own.items():
        if tensors[name].shape != p.shape:
            raise CheckpointError(
                f"a checkpoint of another model: {name} is {tuple(tensors[name].shape)} in it and {tuple(p.shape)} here"
            )
        if tensors[name].dtype != p.dtype:
            raise CheckpointError(
                f"a checkpoint of another precision: {name} is {_word(tensors[name].dtype)} in it and {_word(p.dtype)} "
                "here; rounded, a run would not go on as it was. Load the model as it was trained"
            )
        if not bool(torch.isfinite(tensors[name]).all()):
            raise CheckpointError(f"{name} in the checkpoint has values that are not finite; take an earlier one")
    with torch.no_grad():
        for name, p in own.items():
            p.copy_(tensors[name])


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def verify(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint of which every byte is as it was written.

    Raises:
        DamagedCheckpointError: some are not.
    """
    try:
        manifest: dict[str, Any] = json.loads((folder / _MANIFEST).read_text())
        hashes = dict(manifest["sha256"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedCheckpointError(
            f"{folder} is not a complete checkpoint: no readable {_MANIFEST} ({error})"
        ) from error
    if manifest.get("format") != _FORMAT:
        raise CheckpointError(f"{folder} has checkpoint format {manifest.get('format')}; this version reads {_FORMAT}")
    for name in (_PARAMETERS, _STATE):
        try:
            actual = _sha256(folder / name)
        except OSError as error:
            raise DamagedCheckpointError(f"{folder} is damaged: {name} cannot be read ({error})") from error
        if actual != hashes.get(name):
            raise DamagedCheckpointError(
                f"{folder} is damaged: {name} is not what was written; take an earlier checkpoint"
            )
    return manifest


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
