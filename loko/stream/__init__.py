"""Ordered, sharded, seekable rows with one global row cursor, and drift as a view on them."""

from loko.stream.columns import ColumnKind, tensor_column, tensor_field
from loko.stream.drift import (
    ChangePoint,
    ColorJitter,
    Drift,
    ImageDrift,
    LabelDrift,
    LabelShift,
    Relabel,
    Rotation,
    drift_from_config,
)
from loko.stream.errors import StreamError
from loko.stream.order import slice_of
from loko.stream.stream import ArrowStream, StreamBatch, concatenate
from loko.stream.writing import write_shards

__all__ = [
    "ArrowStream",
    "ChangePoint",
    "ColorJitter",
    "ColumnKind",
    "Drift",
    "ImageDrift",
    "LabelDrift",
    "LabelShift",
    "Relabel",
    "Rotation",
    "StreamBatch",
    "StreamError",
    "concatenate",
    "drift_from_config",
    "slice_of",
    "tensor_column",
    "tensor_field",
    "write_shards",
]
