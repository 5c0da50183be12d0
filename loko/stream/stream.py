"""ArrowStream: an ordered, seekable stream of rows with one global row cursor."""

import hashlib
import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from loko.stream import columns as cols
from loko.stream.blocks import Block, BlockSource, Drifting, Joined, ReadAhead, Reordered, ShardRows, Shuffled
from loko.stream.columns import ColumnKind
from loko.stream.drift import ChangePoint, Drift, ImageDrift, LabelDrift, LabelShift, drift_from_config
from loko.stream.errors import StreamError
from loko.stream.order import Int64Array, slice_of
from loko.stream.shards import StreamPath, check_bytes, check_same_field, open_shards


class StreamBatch:
    """One rank's rows of one global batch.

    Attributes:
        start, stop: the cursor range [start, stop) of the global batch; `stop` is the cursor to go on from.

    `len(batch)` is the number of rows B of this rank, 0 where the last batch has fewer rows than ranks. `rows` are
    the rows as stored; `images`, `pixels`, `labels` and the other accessors apply the stream's drift.
    """

    __slots__ = ("_block", "_high", "_low", "start", "stop")

    def __init__(self, start: int, stop: int, block: Block, low: int, high: int) -> None:
        self.start = start
        self.stop = stop
        self._block = block
        self._low = low
        self._high = high

    def __len__(self) -> int:
        return self._high - self._low

    def __repr__(self) -> str:
        return f"StreamBatch(rows [{self.start}, {self.stop}), {len(self)} of them on this rank)"

    @property
    def rows(self) -> pa.RecordBatch:
        """This rank's rows as stored, before any drift."""
        return self._block.rows.slice(self._low, self._high - self._low)

    @property
    def positions(self) -> Int64Array:
        """Each row's position in the stream's order, (B,) int64."""
        first = self._block.begin + self._low
        return np.arange(first, first + len(self))

    @property
    def row_ids(self) -> Int64Array:
        """Each row's position in the shards as written, (B,) int64: the same under any shuffle, slice or batch size."""
        return self._block.row_ids[self._low : self._high]

    def images(self, column: str) -> list[npt.NDArray[np.uint8]]:
        """The images of a column, drift applied: B arrays, (H, W) if greyscale, (H, W, C) otherwise, uint8, read-only.

        Raises:
            StreamError: if the column holds no images, or one cannot be decoded (naming file, row group, row).
        """
        block, low, high = self._block, self._low, self._high
        block.layout.check(column, "image")
        if column in block.layout.encoded:
            encoded = cols.to_bytes(block.rows.column(column).slice(low, high - low))
            images = [self._decode(column, row, data) for row, data in enumerate(encoded, low)]
        else:
            images = list(block.array(column)[low:high])
        for drift in block.drifts:
            if isinstance(drift, ImageDrift):
                strengths = drift.strength(np.arange(block.first + low, block.first + high))
                for i in np.flatnonzero(strengths):
                    images[i] = drift.change(images[i], float(strengths[i]), int(block.row_ids[low + i]))
        return images

    def pixels(self, column: str) -> npt.NDArray[np.uint8]:
        """The images of a column, drift applied, as one array (B, H, W) or (B, H, W, C) uint8.

        A view of the file where the column is a raw tensor and nothing drifts: do not write to it.

        Raises:
            StreamError: as `images`, and if the images of the batch differ in size.
        """
        block = self._block
        try:
            return block.pixels[column][self._low : self._high]
        except KeyError:
            block.layout.check(column, "image")
        if column not in block.layout.encoded and not any(isinstance(drift, ImageDrift) for drift in block.drifts):
            block.pixels[column] = block.array(column)
            return block.pixels[column][self._low : self._high]
        images = self.images(column)
        if not images:
            return np.empty((0, *(block.layout.shapes[column] or (0, 0))), np.uint8)
        if len({image.shape for image in images}) > 1:
            raise StreamError(f"column {column!r}: images differ in size; use images(), or prepare with image_size")
        return np.stack(images)

    def labels(self, column: str) -> npt.NDArray[Any]:
        """The labels of a column, drift applied: (B,), or (B, K) for lists; int64, or float32 if it holds floats.

        Raises:
            StreamError: if the column holds no labels, or a drift cannot be applied to them.
        """
        try:
            return self._block.labels[column][self._low : self._high]
        except KeyError:
            self._block.labels[column] = self._drifted_labels(column)
            return self._block.labels[column][self._low : self._high]

    def texts(self, column: str) -> list[str]:
        """The strings of a text column, B of them.

        Raises:
            StreamError: if the column holds no strings.
        """
        self._block.layout.check(column, "text")
        return self._block.rows.column(column).slice(self._low, self._high - self._low).to_pylist()

    def table(self, columns: Sequence[str]) -> npt.NDArray[np.float32]:
        """Number columns side by side, (B, F) float32; a column of fixed-size lists is as many features as it is long.

        Raises:
            StreamError: if a column holds no numbers, or none is named.
        """
        if not columns:
            raise StreamError("table() needs at least one column")
        features = []
        for column in columns:
            self._block.layout.check(column, "number")
            values = self._block.array(column)[self._low : self._high].astype(np.float32)
            features.append(values.reshape(len(values), math.prod(values.shape[1:])))
        return np.concatenate(features, axis=1)

    def _drifted_labels(self, column: str) -> npt.NDArray[Any]:
        """The labels of the whole block."""
        block = self._block
        labels = block.label_array(column)
        for drift in block.drifts:
            if isinstance(drift, LabelDrift):
                strengths = drift.strength(np.arange(block.first, block.first + len(labels)))
                if strengths.any():
                    labels = drift.change(labels, strengths, block.row_ids)
        return labels

    def _decode(self, column: str, row: int, data: bytes) -> npt.NDArray[np.uint8]:
        try:
            return cols.decode_image(data)
        except (OSError, ValueError, SyntaxError) as error:
            where = self._block.locate(int(self._block.row_ids[row]))
            message = f"{where}, column {column!r}: not a readable image ({error}); drop or replace the row"
            raise StreamError(message) from error


class _SpanningBatch(StreamBatch):
    """A batch that lies in several blocks: each accessor joins what the parts give."""

    __slots__ = ("_parts",)

    def __init__(self, parts: Sequence[StreamBatch]) -> None:
        head = parts[0]
        super().__init__(head.start, head.stop, head._block, head._low, head._high)
        self._parts = parts

    def __len__(self) -> int:
        return sum(len(part) for part in self._parts)

    @property
    def rows(self) -> pa.RecordBatch:
        return pa.concat_batches([part.rows for part in self._parts])

    @property
    def row_ids(self) -> Int64Array:
        return np.concatenate([part.row_ids for part in self._parts])

    def images(self, column: str) -> list[npt.NDArray[np.uint8]]:
        return [image for part in self._parts for image in part.images(column)]

    def pixels(self, column: str) -> npt.NDArray[np.uint8]:
        parts = [part.pixels(column) for part in self._parts]
        if len({part.shape[1:] for part in parts}) > 1:
            raise StreamError(f"column {column!r}: images differ in size; use images(), or prepare with image_size")
        return np.concatenate(parts)

    def labels(self, column: str) -> npt.NDArray[Any]:
        return np.concatenate([part.labels(column) for part in self._parts])

    def texts(self, column: str) -> list[str]:
        return [text for part in self._parts for text in part.texts(column)]

    def table(self, columns: Sequence[str]) -> npt.NDArray[np.float32]:
        return np.concatenate([part.table(columns) for part in self._parts])


class ArrowStream:
    """Rows of Arrow IPC or Parquet shards, in order, from any row, for any number of ranks.

    The shards in lexical order of their paths, laid end to end, are the rows; a row's place there is its `row_id`. A
    row's place in the order in which this stream hands rows out is its position, and the cursor is a position: the next
    row. Opening reads footers only; nothing is held open between iterations, so a stream can be pickled to a worker.

    Args:
        paths: a file, a folder, a glob, or several of them. Suffixes .arrow, .ipc, .feather, .parquet, .pq; one
            format only.
        columns: the columns to read; a mapping to "image", "label", "text" or "number" also checks their types
            now. None reads all.
        shuffle_seed: None keeps the order. Otherwise rows come in an order that depends on this seed alone: a uniform
            shuffle up to 64 MiB of stored rows; beyond that, row groups are shuffled, then rows within windows of 64
            MiB.
        start, stop: read row ids [start, stop) only; stop None is the end. Cut before the shuffle, so that two streams
            over different ranges never share a row.
        drift: what changes along the stream, as `Drift` objects or the dictionaries that describe them.

    Attributes:
        schema: of the columns that are read.
        fingerprint: 16 hex digits that tell this stream from another: schema, names, sizes and rows of the shards,
            range, shuffle and drift. A checkpoint holds it, so that a cursor is never used on other rows.
        change_points: rows at which the stream changes, in order.
        nbytes: size of the shards on disk.

    Raises:
        StreamError: for anything that footers can tell: a missing column, a wrong type, a truncated shard, shards that
            differ in schema, an empty stream, a range or a drift that makes no sense.
    """

    schema: pa.Schema
    fingerprint: str
    change_points: list[ChangePoint]
    nbytes: int

    def __init__(
        self,
        paths: StreamPath | Iterable[StreamPath],
        *,
        columns: Sequence[str] | Mapping[str, ColumnKind] | None = None,
        shuffle_seed: int | None = None,
        start: int = 0,
        stop: int | None = None,
        drift: Iterable[Drift | Mapping[str, Any]] = (),
    ) -> None:
        if columns is not None and (isinstance(columns, str) or not columns):
            raise StreamError(f"columns is {columns!r}; it must be None for all, or a list of column names")
        if shuffle_seed is not None and shuffle_seed < 0:
            raise StreamError(f"shuffle_seed is {shuffle_seed}; it must be None or 0 or more")
        self._shards = open_shards(paths, None if columns is None else list(columns))
        stored = self._shards[0].schema
        self.schema = pa.schema([stored.field(name) for name in (stored.names if columns is None else columns)])
        self._layout = cols.Layout(self.schema)
        self.total_rows = sum(shard.rows for shard in self._shards)
        self.nbytes = sum(shard.size for shard in self._shards)
        last = self.total_rows if stop is None else stop
        if not 0 <= start < last <= self.total_rows:
            raise StreamError(f"start {start}, stop {stop}: no such range; the shards hold rows 0 to {self.total_rows}")
        self._verified = False
        # Columns that validate() decodes: those that can only be images, and those that are asked for as such.
        self._image_columns = {
            field.name for field in self.schema if pa.types.is_struct(field.type) and cols.is_encoded(field)
        }
        drifts = tuple(d if isinstance(d, Drift) else drift_from_config(d) for d in drift)
        self._shard_rows = ShardRows(self._shards, start, last)
        source: BlockSource = self._shard_rows
        if shuffle_seed is not None:
            source = Shuffled(source, shuffle_seed)
        points = [point for d in drifts for point in d.change_points(last - start)]
        for shift in (d for d in drifts if isinstance(d, LabelShift)):
            order, ran_out = shift.order(self._labels(source, shift.column))
            source = Reordered(source, order)
            points += ran_out
        self._source: BlockSource = Drifting(source, drifts) if drifts else source
        self.change_points = sorted(points, key=lambda point: point.row)
        names = [(shard.path.name, shard.size, shard.group_rows) for shard in self._shards]
        fields = [(field.name, str(field.type), cols.tensor_shape(field)) for field in self.schema]
        self.fingerprint = _digest(fields, names, start, last, shuffle_seed, drifts)
        if isinstance(columns, Mapping):
            self.require(columns)

    def __len__(self) -> int:
        return int(self._source.offsets[-1])

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self)} rows of {', '.join(self.schema.names)}; {self.fingerprint})"

    def require(self, columns: Mapping[str, ColumnKind]) -> None:
        """Check that columns can be read as "image", "label", "text" or "number".

        Raises:
            StreamError: naming the column, what it holds and what is allowed.
        """
        for name, kind in columns.items():
            self._layout.check(name, kind, self._where())
            if kind == "image":
                self._image_columns.add(name)

    def batches(
        self, batch_size: int, *, cursor: int = 0, rank: int = 0, world_size: int = 1, prefetch: int = 0
    ) -> Iterator[StreamBatch]:
        """Rank `rank`'s part of every global batch from `cursor` on.

        Global batch k holds the positions [cursor + k B, cursor + (k + 1) B), the last one what is left; each rank gets
        its `slice_of` it. Every rank gets every batch, if need be without rows, so that collective operations line up.
        Memory and the time to the first batch do not depend on the cursor or on the stream's length.

        Args:
            batch_size: rows of a global batch, B.
            cursor: position to start from; len(stream) gives no batch.
            prefetch: row groups (windows, if shuffled) to read ahead in a background thread. 0 is fastest where disks
                are: handing a decoded row group over costs more than decoding it. 1 or 2 hide a slow disk or the
                gathering of a large shuffled window. Arrow files in their own order are mapped and never take a thread.

        Raises:
            StreamError: at once for an argument out of range; while iterating for a row group that cannot be read, or
                holds a null, a NaN or an infinity. Closing the iterator, or losing it, ends the thread.
        """
        for name, value, least in (("batch_size", batch_size, 1), ("prefetch", prefetch, 0)):
            if value < least:
                raise StreamError(f"{name} is {value}; it must be at least {least}")
        if not 0 <= cursor <= len(self):
            raise StreamError(f"cursor is {cursor}; the stream has {len(self)} rows, so it must be 0 to {len(self)}")
        slice_of(0, 0, rank, world_size)
        return self._batches(batch_size, cursor, rank, world_size, prefetch)

    def _batches(
        self, batch_size: int, cursor: int, rank: int, world_size: int, prefetch: int
    ) -> Iterator[StreamBatch]:
        offsets: list[int] = self._source.offsets.tolist()
        count, total = len(offsets) - 1, offsets[-1]
        load = self._source.open(self._layout, verify=not self._verified)
        fetch = ReadAhead(load, count, 0 if self._source.light else prefetch)
        block: Block | None = None
        begin = end = 0
        start = cursor
        try:
            while start < total:
                if block is not None and world_size == 1:
                    # Most batches lie in one block: as little as possible happens for each.
                    for stop in range(start + batch_size, end + 1, batch_size):
                        yield StreamBatch(start, stop, block, start - begin, stop - begin)
                        start = stop
                    if start == total:
                        break
                stop = min(start + batch_size, total)
                low, high = slice_of(start, stop, rank, world_size)
                parts: list[StreamBatch] = []
                while not parts or low < high:
                    if low >= end or block is None:
                        # An empty slice at the very end lies in no block; the last one gives it its columns.
                        number = min(bisect_right(offsets, low) - 1, count - 1)
                        block, begin, end = fetch(number), offsets[number], offsets[number + 1]
                        block.begin = begin
                    cut = min(high, end)
                    parts.append(StreamBatch(start, stop, block, low - begin, cut - begin))
                    low = cut
                yield parts[0] if len(parts) == 1 else _SpanningBatch(parts)
                start = stop
        finally:
            fetch.close()

    def validate(self) -> None:
        """Read and decode every row once, and compare every byte of the shards with its checksum where there is one.

        Parquet pages carry checksums if they were written with them, and `write_shards` puts a manifest of checksums
        beside the shards. A stream that was validated reads faster afterwards: it no longer verifies what it reads.

        Raises:
            StreamError: naming file, column, row group and row of the first thing found wrong.
        """
        load = self._shard_rows.open(self._layout, verify=True)
        encoded = [name for name in self._image_columns if cols.is_encoded(self.schema.field(name))]
        for number in range(len(self._shard_rows.offsets) - 1):
            block = load(number)
            for name in encoded:
                for row in range(block.rows.num_rows):
                    StreamBatch(row, row + 1, block, row, row + 1).images(name)
        for shard in self._shards:
            check_bytes(shard)
        self._verified = True

    def _where(self) -> str:
        return str(self._shards[0].path)

    def _labels(self, source: BlockSource, column: str) -> npt.NDArray[np.int64]:
        """A whole label column in the source's order."""
        self.require({column: "label"})
        load = source.open(cols.Layout(pa.schema([self.schema.field(column)])), verify=False)
        return np.concatenate([load(number).label_array(column) for number in range(len(source.offsets) - 1)])


class _JoinedStream(ArrowStream):
    """Streams one after the other; see `concatenate`."""

    def __init__(self, streams: Sequence[ArrowStream]) -> None:
        if not streams:
            raise StreamError("concatenate() needs at least one stream")
        self._streams = list(streams)
        first = self._streams[0]
        for number, stream in enumerate(self._streams):
            where = f"stream {number} of the concatenation ({stream._where()})"
            if set(stream.schema.names) != set(first.schema.names):
                raise StreamError(
                    f"{where} reads columns {', '.join(stream.schema.names)}, the first one "
                    f"{', '.join(first.schema.names)}; open them with the same `columns`"
                )
            for field in first.schema:
                check_same_field(field, stream.schema.field(field.name), first._where(), where)
        self.schema, self._layout = first.schema, first._layout
        self.total_rows = sum(stream.total_rows for stream in self._streams)
        self.nbytes = sum(stream.nbytes for stream in self._streams)
        self._source = Joined([s._source for s in self._streams], [s.total_rows for s in self._streams])
        self._verified = all(stream._verified for stream in self._streams)
        self.change_points, seam = [], 0
        for stream in self._streams:
            if seam:
                self.change_points.append(ChangePoint(seam, "domain", f"rows of {stream._where()} begin"))
            self.change_points += [ChangePoint(seam + p.row, p.kind, p.description) for p in stream.change_points]
            seam += len(stream)
        self.fingerprint = _digest("joined", *(stream.fingerprint for stream in self._streams))

    def require(self, columns: Mapping[str, ColumnKind]) -> None:
        for stream in self._streams:
            stream.require(columns)

    def validate(self) -> None:
        for stream in self._streams:
            stream.validate()
        self._verified = True

    def _where(self) -> str:
        return self._streams[0]._where()


def concatenate(streams: Iterable[ArrowStream]) -> ArrowStream:
    """The streams one after the other as one stream, a change of domain at each seam recorded as a change point.

    Each stream keeps its shuffle and its drift, counted from its own first row. Row ids count on from one stream's
    shards to the next's.

    Raises:
        StreamError: if there is no stream, or the columns they read differ in name, type or shape.
    """
    return _JoinedStream(list(streams))


def _digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
