"""Shards on disk: finding them, opening them, reading one row group, checking every byte.

A row group is Parquet's row group or Arrow IPC's record batch: the unit that is read, checked and named in errors.
"""

import glob
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq

from loko.stream import columns as cols
from loko.stream.errors import StreamError
from loko.stream.manifest import ShardRecord, crc32_of_batch, crc32_of_file, read_manifest

Format = Literal["arrow", "parquet"]
StreamPath = str | os.PathLike[str]

SUFFIXES: dict[str, Format] = {
    ".arrow": "arrow",
    ".ipc": "arrow",
    ".feather": "arrow",
    ".parquet": "parquet",
    ".pq": "parquet",
}
_MAGIC: dict[Format, bytes] = {"arrow": b"ARROW1", "parquet": b"PAR1"}


@dataclass(frozen=True)
class Shard:
    """One file as its footer describes it."""

    path: Path
    format: Format
    schema: pa.Schema
    group_rows: tuple[int, ...]
    group_bytes: tuple[int, ...]
    size: int

    @property
    def rows(self) -> int:
        return sum(self.group_rows)


def find_shards(paths: StreamPath | Iterable[StreamPath]) -> list[Path]:
    """The files that `paths` (a file, a folder, a glob, or several of them) stands for, in lexical order.

    Raises:
        StreamError: if something is missing, named twice, or not an Arrow or Parquet file by its suffix.
    """
    given = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
    found: list[Path] = []
    for item in [os.fspath(path) for path in given]:
        path = Path(item)
        if path.is_dir():
            files = [p for p in path.iterdir() if p.suffix in SUFFIXES and not p.name.startswith((".", "_"))]
            missing = sorted(set(read_manifest(path)) - {p.name for p in files})
            if missing:
                raise StreamError(
                    f"{path}: shard {missing[0]} is in the manifest but not in the folder; prepare it again"
                )
        elif path.exists():
            files = [path]
        else:
            files = [Path(p) for p in glob.glob(item, recursive=True)]
        if not files:
            what = "no Arrow or Parquet file in this folder" if path.is_dir() else "no such file, folder or glob match"
            raise StreamError(f"{item}: {what}; `python -m ray_jobs.prepare` makes shards from other sources")
        found.extend(files)
    if not found:
        raise StreamError("no paths given: name a file, a folder, a glob or a list of them")
    found.sort(key=str)
    for before, path in pairwise(found):
        if before == path:
            raise StreamError(f"{path}: named twice; each shard may be in a stream once (concatenate() joins streams)")
    for path in found:
        if path.suffix not in SUFFIXES:
            raise StreamError(f"{path}: unknown suffix {path.suffix!r}; allowed: {', '.join(SUFFIXES)}")
    return found


def open_shard(path: Path, recorded: ShardRecord | None = None) -> Shard:
    """Read a shard's footer and compare the file with what the manifest recorded of it, if there is one.

    Raises:
        StreamError: if the file is cut off, is no Arrow or Parquet file, or is not the size the manifest records.
    """
    kind = SUFFIXES[path.suffix]
    try:
        size = path.stat().st_size
        _check_magic(path, kind, size)
        if kind == "parquet":
            with pq.ParquetFile(path, memory_map=True) as file:
                groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
                rows, sizes = [g.num_rows for g in groups], [g.total_byte_size for g in groups]
                schema = file.schema_arrow
        else:
            rows, schema = _ipc_groups(path)
            sizes = [size // max(1, len(rows))] * len(rows)
    except (pa.ArrowException, OSError) as error:
        raise StreamError(f"{path}: cannot be opened, its footer is damaged or it is not {kind} ({error})") from error
    for field in schema:
        cols.check_field(field, str(path))
    if recorded is not None and (recorded.size, recorded.rows) != (size, sum(rows)):
        raise StreamError(
            f"{path}: {size} bytes and {sum(rows)} rows, but the manifest records {recorded.size} and {recorded.rows}; "
            "the file was changed or cut off: prepare it again"
        )
    return Shard(path, kind, schema, tuple(rows), tuple(sizes), size)


def _check_magic(path: Path, kind: Format, size: int) -> None:
    magic = _MAGIC[kind]
    with path.open("rb") as file:
        head = file.read(len(magic))
        file.seek(max(0, size - len(magic)))
        tail = file.read()
    if size == 0:
        raise StreamError(f"{path}: the file is empty (0 bytes); write it again")
    if head != magic:
        hint = (
            "; an Arrow IPC *stream*, as HF datasets caches it, has no footer to seek with" if kind == "arrow" else ""
        )
        raise StreamError(f"{path}: not an {kind} file{hint}: convert it with `python -m ray_jobs.prepare`")
    if tail != magic or size < 2 * len(magic):
        raise StreamError(f"{path}: truncated, the {kind} footer is missing; copy or prepare the file again")


def _ipc_groups(path: Path) -> tuple[list[int], pa.Schema]:
    with pa.memory_map(str(path)) as source, pa.ipc.open_file(source) as whole:
        schema = whole.schema
        # One narrow field is enough to count rows; asking for all would decompress all where a file is compressed.
        narrow = min(range(len(schema)), key=lambda i: _width(schema.field(i).type), default=None)
        options = pa.ipc.IpcReadOptions(included_fields=[] if narrow is None else [narrow])
        with pa.ipc.open_file(source, options=options) as reader:
            return [reader.get_batch(i).num_rows for i in range(reader.num_record_batches)], schema


def _width(kind: pa.DataType) -> int:
    try:
        return kind.bit_width
    except ValueError:
        return 1 << 62  # variable


def open_shards(paths: StreamPath | Iterable[StreamPath], columns: Sequence[str] | None) -> list[Shard]:
    """Open every shard and check that they agree on the columns that will be read (None: all).

    Raises:
        StreamError: see `find_shards` and `open_shard`; a missing column; formats or schemas that differ; no rows at
        all.
    """
    found = find_shards(paths)
    manifests = {folder: read_manifest(folder) for folder in {path.parent for path in found}}
    shards = [open_shard(path, manifests[path.parent].get(path.name)) for path in found]
    first = shards[0]
    for shard in shards:
        if shard.format != first.format:
            raise StreamError(
                f"{shard.path}: {shard.format}, but {first.path} is {first.format}; one stream reads one format "
                "(concatenate() joins streams of different formats)"
            )
        for name in columns if columns is not None else first.schema.names:
            if shard.schema.get_field_index(name) < 0:
                exist = ", ".join(shard.schema.names) or "none"
                raise StreamError(f"{shard.path}: missing column {name!r}; columns there are: {exist}")
            check_same_field(first.schema.field(name), shard.schema.field(name), str(first.path), str(shard.path))
        extra = [name for name in shard.schema.names if name not in first.schema.names]
        if columns is None and extra:
            raise StreamError(
                f"{shard.path}: column {extra[0]!r} is not in {first.path}; the shards have different schemas: "
                "name the `columns` they share, or prepare them together"
            )
    if sum(shard.rows for shard in shards) == 0:
        raise StreamError(f"{first.path}: the stream is empty, its {len(shards)} shard(s) hold no rows")
    return shards


def check_same_field(first: pa.Field, other: pa.Field, first_where: str, other_where: str) -> None:
    """Raise StreamError unless a column means the same in two places: the same type, and shape if it is a tensor."""
    # Arrow's equality, unlike its spelling, does not mind that Parquet names the items of a list otherwise.
    if _meaning(first) != _meaning(other):
        raise StreamError(
            f"{other_where}, column {other.name!r}: {_spelled(other)}, but {_spelled(first)} in {first_where}; "
            "the schemas differ: prepare them together, or leave the column out of `columns`"
        )


def _meaning(field: pa.Field) -> tuple[object, ...]:
    shape = cols.tensor_shape(field)
    return field.type, shape, None if shape is None else cols.tensor_dtype(field)


def _spelled(field: pa.Field) -> str:
    shape = cols.tensor_shape(field)
    return f"{field.type} of shape {shape} and {cols.tensor_dtype(field)}" if shape else str(field.type)


class ShardReader:
    """Reads the columns of `schema` of one shard, a row group at a time; holds the file open, so make one per iterator.

    `verify` checks what is read: Parquet's page checksums, every offset of a text or binary column, UTF-8.
    """

    def __init__(self, shard: Shard, schema: pa.Schema, verify: bool) -> None:
        self.shard = shard
        self.schema = schema
        self.columns: list[str] = schema.names
        self.verify = verify
        # What does not depend on the row group is worked out here: small row groups are read by the thousand.
        self._as_stored = shard.format == "arrow" and schema.equals(shard.schema, check_metadata=True)
        self._hiding = [cols.may_hide(kind) for kind in schema.types]
        self._parquet: pq.ParquetFile | None = None
        try:
            if shard.format == "parquet":
                # pre_buffer copies what a memory map already holds.
                self._parquet = pq.ParquetFile(
                    shard.path, memory_map=True, pre_buffer=False, page_checksum_verification=verify
                )
            else:
                # All fields: asking for some makes Arrow copy them, where the others cost nothing in a memory map.
                self._ipc = pa.ipc.open_file(pa.memory_map(str(shard.path)))
        except (pa.ArrowException, OSError) as error:
            raise StreamError(f"{shard.path}: cannot be opened any more ({error})") from error

    def read(self, group: int) -> pa.RecordBatch:
        """Row group `group` with exactly the schema asked for.

        Raises:
            StreamError: naming the columns that cannot be decoded.
        """
        try:
            if self._as_stored:
                batch = self._ipc.get_batch(group)
            else:
                batch = pa.RecordBatch.from_arrays(self._decode(group, self.columns), schema=self.schema)
            batch.validate(full=self.verify)
        except (pa.ArrowException, OSError) as error:
            raise StreamError(
                f"{self.shard.path}, column {self._guilty(group)}, row group {group}: corrupted ({error}); "
                "copy or prepare the file again"
            ) from error
        if batch.num_rows != self.shard.group_rows[group]:
            raise StreamError(
                f"{self.shard.path}, row group {group}: the file changed since it was opened; open it again"
            )
        return batch

    def check_values(self, batch: pa.RecordBatch, group: int, first: int) -> None:
        """Raise StreamError at the first null, NaN or infinity in `batch`, the rows of row group `group` from
        `first` on.
        """
        for name, column, hiding in zip(self.columns, batch.columns, self._hiding, strict=True):
            if not hiding and column.null_count == 0:
                continue
            row = cols.first_bad_row(column)
            if row is not None:
                raise StreamError(
                    f"{self.shard.path}, column {name!r}, row group {group}, row {first + row} of it: "
                    "null or not a finite number; every row of a stream is learned from: drop or fill such rows first"
                )

    def _decode(self, group: int, columns: list[str]) -> list[pa.Array]:
        if self._parquet is None:
            batch = self._ipc.get_batch(group)
            return [batch.column(name) for name in columns]
        table = self._parquet.read_row_group(group, columns=columns, use_threads=False)
        chunked = [table.column(name) for name in columns]
        return [column.chunk(0) if column.num_chunks == 1 else column.combine_chunks() for column in chunked]

    def _guilty(self, group: int) -> str:
        """The columns that cannot be read on their own: Arrow's messages do not name them."""
        bad = []
        for name in self.columns:
            try:
                self._decode(group, [name])[0].validate(full=True)
            except (pa.ArrowException, OSError):
                bad.append(repr(name))
        return ", ".join(bad) or "unknown"


def check_bytes(shard: Shard) -> None:
    """Compare a shard with the checksums in its folder's manifest; do nothing where there is none.

    Raises:
        StreamError: naming the row group that differs, where the manifest can tell.
    """
    recorded = read_manifest(shard.path.parent).get(shard.path.name)
    if recorded is None or crc32_of_file(shard.path) == recorded.crc32:
        return
    where = "outside its row groups" if shard.format == "arrow" else "outside the columns this stream reads"
    if recorded.row_groups:
        with pa.memory_map(str(shard.path)) as source, pa.ipc.open_file(source) as reader:
            for group, crc in enumerate(recorded.row_groups):
                if crc32_of_batch(reader.get_batch(group)) != crc:
                    where = f"row group {group}"
                    break
    raise StreamError(
        f"{shard.path}, {where}: checksum differs from the manifest, bytes were changed; prepare it again"
    )
