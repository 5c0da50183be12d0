"""What a column holds, and how it becomes NumPy: the only place that knows Arrow types."""

import io
import json
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from loko.stream.errors import StreamError

ColumnKind = Literal["image", "label", "text", "number"]

_ALLOWED: dict[str, str] = {
    "image": "an encoded image (struct with `bytes`, or binary) or a uint8 tensor of shape (H, W) or (H, W, C)",
    "label": "integers, booleans, floats, or fixed-size lists of them",
    "text": "strings",
    "number": "integers, booleans, floats, or fixed-size lists of them",
}


def tensor_field(name: str, shape: tuple[int, ...], dtype: str = "uint8", **metadata: str) -> pa.Field:
    """The field of a raw tensor column: fixed-size binary, its shape and dtype in the field's metadata.

    Fixed-size binary because it is the one layout that both formats read back as fast as memory: Parquet takes twenty
    times longer over fixed-size lists, and so over Arrow's tensor extension type.
    """
    width = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    return pa.field(name, pa.binary(width), metadata={"shape": json.dumps(list(shape)), "dtype": dtype, **metadata})


def tensor_column(values: npt.NDArray[Any]) -> pa.Array:
    """The rows of `values` (N, ...) as the fixed-size binary array that `tensor_field` describes. Nothing is copied
    where `values` is contiguous."""
    values = np.ascontiguousarray(values)
    width = int(np.prod(values.shape[1:], dtype=np.int64)) * values.itemsize
    return pa.Array.from_buffers(pa.binary(width), len(values), [None, pa.py_buffer(values)])


def tensor_shape(field: pa.Field) -> tuple[int, ...] | None:
    """The shape of one row of a raw tensor column, () for a plain number, None for a column that is not a tensor."""
    kind = field.type
    declared = json.loads((field.metadata or {}).get(b"shape", b"null"))
    if isinstance(kind, pa.FixedShapeTensorType):
        return tuple(kind.shape)
    if pa.types.is_fixed_size_binary(kind) and not pa.types.is_decimal(kind):
        return tuple(declared) if declared is not None else None
    shape: tuple[int, ...] = ()
    while pa.types.is_fixed_size_list(kind):
        shape, kind = (*shape, kind.list_size), kind.value_type
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)):
        return None
    return tuple(declared) if declared is not None and shape else shape


def tensor_dtype(field: pa.Field) -> np.dtype[Any]:
    """The dtype of a column for which `tensor_shape` is not None."""
    kind = field.type
    if pa.types.is_fixed_size_binary(kind):
        return np.dtype((field.metadata or {}).get(b"dtype", b"uint8").decode())
    if isinstance(kind, pa.FixedShapeTensorType):
        kind = kind.value_type
    while pa.types.is_fixed_size_list(kind):
        kind = kind.value_type
    return np.dtype(kind.to_pandas_dtype())


def is_encoded(field: pa.Field) -> bool:
    """Whether the column holds encoded images: {bytes, path} as HF `datasets` writes them, or plain binary."""
    return _has_bytes(field.type) or pa.types.is_binary(field.type) or pa.types.is_large_binary(field.type)


def is_text(field: pa.Field) -> bool:
    """Whether the column holds strings."""
    return pa.types.is_string(field.type) or pa.types.is_large_string(field.type)


def check_field(field: pa.Field, where: str) -> None:
    """Raise StreamError if the field's metadata contradicts its type."""
    try:
        shape = tensor_shape(field)
        size = None if shape is None else int(np.prod(shape, dtype=np.int64))
        dtype = None if shape is None else tensor_dtype(field)
    except (TypeError, ValueError) as error:
        raise StreamError(
            f"{where}, column {field.name!r}: its shape or dtype metadata is unreadable ({error})"
        ) from error
    if size is None or dtype is None:
        return
    kind = field.type
    if pa.types.is_fixed_size_binary(kind) and kind.byte_width != size * dtype.itemsize:
        raise StreamError(
            f"{where}, column {field.name!r}: rows of {kind.byte_width} bytes do not hold shape {shape} of {dtype}; "
            "correct the field's `shape` metadata or write the shards again"
        )
    length = 1
    while pa.types.is_fixed_size_list(kind):
        length, kind = length * kind.list_size, kind.value_type
    if pa.types.is_fixed_size_list(field.type) and length != size:
        raise StreamError(f"{where}, column {field.name!r}: lists of {length} values do not hold shape {shape}")


def check_kind(field: pa.Field, kind: ColumnKind, where: str) -> None:
    """Raise StreamError unless the column can be read as `kind`."""
    if kind not in get_args(ColumnKind):
        raise StreamError(f"column {field.name!r} is asked for as {kind!r}; allowed: {', '.join(get_args(ColumnKind))}")
    shape = tensor_shape(field)
    if kind == "image":
        fits = is_encoded(field) or (shape is not None and len(shape) in (2, 3) and tensor_dtype(field) == np.uint8)
    elif kind == "text":
        fits = is_text(field)
    else:
        fits = shape is not None
    if not fits:
        held = f"{field.type}" + (f" of shape {shape}" if shape else "")
        raise StreamError(
            f"{where}, column {field.name!r}: wrong type {held} for {kind}; allowed: {_ALLOWED[kind]}. "
            "Name another column, or convert it with `python -m ray_jobs.prepare`"
        )


class Layout:
    """A schema with what its columns hold worked out once, so that handing out a batch asks no Arrow type anything."""

    def __init__(self, schema: pa.Schema) -> None:
        self.schema = schema
        self.shapes = {field.name: tensor_shape(field) for field in schema}
        self.dtypes = {field.name: tensor_dtype(field) for field in schema if self.shapes[field.name] is not None}
        self.encoded = {field.name for field in schema if is_encoded(field)}
        self._checked: set[tuple[str, ColumnKind]] = set()

    def check(self, column: str, kind: ColumnKind, where: str = "this stream") -> None:
        """Raise StreamError unless there is such a column and it can be read as `kind`."""
        if (column, kind) in self._checked:
            return
        if self.schema.get_field_index(column) < 0:
            raise StreamError(f"{where}: missing column {column!r}; columns read: {', '.join(self.schema.names)}")
        check_kind(self.schema.field(column), kind, where)
        self._checked.add((column, kind))


def to_numpy(column: pa.Array, shape: tuple[int, ...], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """A tensor or number column as one array (N, *shape), a view of the Arrow buffer where Arrow allows one.

    The column must hold no null.
    """
    kind = column.type
    if pa.types.is_fixed_size_binary(kind):
        start, width = column.offset * kind.byte_width, len(column) * kind.byte_width
        flat = np.frombuffer(column.buffers()[1], np.uint8, width, start)
        return flat.view(dtype).reshape(len(column), *shape)
    if isinstance(kind, pa.FixedShapeTensorType):
        return column.to_numpy_ndarray()
    while pa.types.is_fixed_size_list(column.type):
        column = column.flatten()
    flat = column.to_numpy(zero_copy_only=False)
    return flat.reshape(-1, *shape)


def to_bytes(column: pa.Array) -> list[bytes]:
    """The encoded images of a column, one bytes object a row."""
    return (column.field("bytes") if _has_bytes(column.type) else column).to_pylist()


def decode_image(encoded: bytes) -> npt.NDArray[np.uint8]:
    """An encoded image as (H, W) uint8 if it is greyscale, (H, W, 3) otherwise.

    Raises:
        OSError, ValueError or SyntaxError: whatever PIL raises for bytes it cannot decode.
    """
    with Image.open(io.BytesIO(encoded)) as image:
        mode = {"L": "L", "1": "L"}.get(image.mode, "RGB")
        return np.asarray(image if image.mode == mode else image.convert(mode))


def may_hide(kind: pa.DataType) -> bool:
    """Whether a column of this type can hold a bad row and still have a null count of 0."""
    return pa.types.is_floating(kind) or pa.types.is_nested(kind) or isinstance(kind, pa.ExtensionType)


def first_bad_row(column: pa.Array) -> int | None:
    """The first row that is null, or holds a null, a NaN or an infinity; None if there is none."""
    bad = _bad_rows(column)
    return None if bad is None or not bad.any() else int(bad.argmax())


def _bad_rows(column: pa.Array) -> npt.NDArray[np.bool_] | None:
    """A mask of the bad rows, or None where the column's statistics already rule them out."""
    kind = column.type
    if isinstance(kind, pa.ExtensionType):
        return _bad_rows(column.storage)
    bad = column.is_null().to_numpy(zero_copy_only=False) if column.null_count else None
    inner: Any = None
    if pa.types.is_fixed_size_list(kind):
        # flatten() leaves out the items of null lists: fill them, so that items and rows keep step.
        values = column.values.slice(column.offset * kind.list_size, len(column) * kind.list_size)
        items = _bad_rows(values)
        inner = None if items is None else items.reshape(len(column), -1).any(axis=1)
    elif pa.types.is_floating(kind):
        inner = ~np.isfinite(column.to_numpy(zero_copy_only=False))
    elif _has_bytes(kind):
        # HF `datasets` leaves `path` empty on purpose; only the bytes are read.
        inner = _bad_rows(column.field("bytes"))
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind):
        items = _bad_rows(column.flatten())
        if items is not None:
            parents = pc.list_parent_indices(column).to_numpy()
            inner = np.zeros(len(column), bool)
            inner[parents[items]] = True
    if bad is None or inner is None:
        return inner if bad is None else bad
    return bad | inner


def _has_bytes(kind: pa.DataType) -> bool:
    return pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0
