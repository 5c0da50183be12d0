"""From rows to tensors: inputs as the model wants them, labels checked one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from loko.tasks.config import TaskConfig

__all__ = ["Batch", "Rows", "image_inputs", "labels_to_tensor", "table_inputs", "text_inputs"]


class Rows(Protocol):
    """What a task asks of a batch of rows; loko.stream's batches have it."""

    def texts(self, column: str) -> list[str]: ...
    def images(self, column: str) -> list[npt.NDArray[np.uint8]]: ...
    def labels(self, column: str) -> npt.NDArray[Any]: ...
    def table(self, columns: list[str]) -> npt.NDArray[np.float32]: ...


Inputs = Callable[[Rows], dict[str, Tensor]]


@dataclass(frozen=True)
class Batch:
    """Inputs of the model by name, and the labels, one row each."""

    inputs: dict[str, Tensor]
    labels: Tensor

    def __len__(self) -> int:
        return int(self.labels.shape[0])

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        inputs = {name: value.to(device, non_blocking=True) for name, value in self.inputs.items()}
        return Batch(inputs, self.labels.to(device, non_blocking=True))


def _at(rows: Rows, column: str, row: int) -> str:
    """Where a bad value stands: in the batch and, where the rows know it, in the stream."""
    positions = getattr(rows, "positions", None)
    stream = "" if positions is None else f" (row {int(positions[row])} of the stream)"
    return f"column {column!r}, row {row} of the batch{stream}"


def text_inputs(config: TaskConfig, tokenizer: Any) -> Inputs:
    """Tokenize one text, or a pair, padded to the longest in the batch and cut at max_length."""
    columns = [name for name in (config.columns.text, config.columns.text_b) if name is not None]

    def inputs(rows: Rows) -> dict[str, Tensor]:
        texts = [rows.texts(column) for column in columns]
        for column, values in zip(columns, texts, strict=True):
            for row, value in enumerate(values):
                if not isinstance(value, str):
                    raise TypeError(f"{_at(rows, column, row)}: {value!r} is no text")
        empty = not texts[0]
        # A tokenizer cannot pad nothing; a blank row tells which tensors the model expects.
        given = [[""]] * len(columns) if empty else texts
        encoded = tokenizer(
            *given, padding="longest", truncation=True, max_length=config.max_length, return_tensors="pt"
        )
        return {name: value[:0] if empty else value for name, value in encoded.items()}

    return inputs


def image_inputs(config: TaskConfig, processor: Any, channels: int) -> Inputs:
    """Resize, crop, scale and normalise as the model's own processor says, in its PIL form (no torchvision)."""
    column = config.columns.image
    assert column is not None
    overrides = _size_overrides(processor, config.image_size)

    def inputs(rows: Rows) -> dict[str, Tensor]:
        images = [_with_channels(rows, image, channels, column, row) for row, image in enumerate(rows.images(column))]
        given = images or [np.zeros((32, 32, channels), np.uint8)]
        encoded = processor(images=given, return_tensors="pt", input_data_format="channels_last", **overrides)
        return {"pixel_values": encoded["pixel_values"][: len(images)]}

    return inputs


def _size_overrides(processor: Any, image_size: int | None) -> dict[str, Any]:
    if image_size is None:
        return {}
    size = dict(processor.size or {})
    overrides: dict[str, Any] = {"do_resize": True, "size": {key: image_size for key in size if size[key] is not None}}
    if getattr(processor, "do_center_crop", False):
        overrides["crop_size"] = {"height": image_size, "width": image_size}
    return overrides


def _with_channels(
    rows: Rows, image: npt.NDArray[np.uint8], channels: int, column: str, row: int
) -> npt.NDArray[np.uint8]:
    array = np.asarray(image)
    if array.dtype != np.uint8 or array.ndim not in (2, 3):
        raise ValueError(
            f"{_at(rows, column, row)}: an image of type {array.dtype} and shape {array.shape}; "
            "expected uint8, height x width or height x width x channels"
        )
    if array.ndim == 2:
        array = array[:, :, None]
    found = array.shape[2]
    if found == 4 and channels == 3:
        return array[:, :, :3]
    if found == 1 and channels == 3:
        return np.repeat(array, 3, axis=2)
    if found == 3 and channels == 1:
        luma = array @ np.array([0.299, 0.587, 0.114])
        return np.rint(luma).astype(np.uint8)[:, :, None]
    if found != channels:
        raise ValueError(f"{_at(rows, column, row)}: an image of {found} channels, but the model takes {channels}")
    return array


def table_inputs(config: TaskConfig) -> Inputs:
    """Stack the feature columns."""
    columns = config.columns.features or []

    def inputs(rows: Rows) -> dict[str, Tensor]:
        values = np.array(rows.table(columns), dtype=np.float32)
        if values.ndim != 2 or values.shape[1] != len(columns):
            raise ValueError(
                f"columns.features names {len(columns)} columns, but the rows came as shape {values.shape}"
            )
        if not np.isfinite(values).all():
            row, column = (int(index) for index in np.argwhere(~np.isfinite(values))[0])
            raise ValueError(
                f"{_at(rows, columns[column], row)}: {values[row, column]} is no finite number; "
                "clean the rows or fill the gaps when preparing the stream"
            )
        return {"features": torch.from_numpy(values)}

    return inputs


def labels_to_tensor(rows: Rows, config: TaskConfig) -> Tensor:
    """Labels as the observation model wants them: int64 (B) for categorical, else float32 (B, num_labels)."""
    names = config.columns.label_names
    arrays = [np.asarray(rows.labels(name)) for name in names]
    values = arrays[0] if config.columns.label is not None else np.stack(arrays, axis=1)
    if values.dtype.kind not in "biuf":
        raise ValueError(f"column {names[0]!r}: labels of type {values.dtype}; expected numbers")
    if config.observation == "categorical":
        return torch.from_numpy(_class_labels(rows, values, names[0], config.num_labels))
    values = (
        values.astype(np.float32).reshape(len(values), -1) if values.size else np.zeros((0, config.num_labels), "f4")
    )
    if values.shape[1] != config.num_labels:
        raise ValueError(
            f"column {names[0]!r}: labels of {values.shape[1]} numbers a row, but num_labels is {config.num_labels}"
        )
    if config.observation == "bernoulli":
        _refuse(rows, values, (values != 0) & (values != 1), names, "a bernoulli label is 0 or 1")
    else:
        _refuse(rows, values, ~np.isfinite(values), names, "a gaussian label is a finite number")
    return torch.from_numpy(values)


def _class_labels(rows: Rows, values: npt.NDArray[Any], name: str, num_labels: int) -> npt.NDArray[np.int64]:
    if values.ndim != 1:
        raise ValueError(f"column {name!r}: labels of shape {values.shape}; a categorical label is one integer a row")
    allowed = f"a class is an integer from 0 to {num_labels - 1}; raise num_labels or renumber the classes"
    with np.errstate(invalid="ignore"):
        bad = ~((values >= 0) & (values < num_labels) & (values == np.floor(values)))
    _refuse(rows, values[:, None], bad[:, None], [name], allowed)
    return values.astype(np.int64)


def _refuse(
    rows: Rows, values: npt.NDArray[Any], bad: npt.NDArray[np.bool_], names: Sequence[str], allowed: str
) -> None:
    if bad.any():
        row, output = (int(index) for index in np.argwhere(bad)[0])
        name = names[output] if len(names) > 1 else names[0]
        raise ValueError(f"{_at(rows, name, row)}: label {values[row, output]}; {allowed}")
