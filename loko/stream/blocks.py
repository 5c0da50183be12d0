"""Rows in their order, a block at a time.

A `BlockSource` is a sequence of rows cut into blocks, each of which is loaded on its own: that is what makes seeking
cost the same anywhere. Shards are a source; a shuffle, a new order and a concatenation are sources on top of others.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from loko.stream.columns import Layout, to_numpy
from loko.stream.order import Int64Array, permutation
from loko.stream.shards import Shard, ShardReader

if TYPE_CHECKING:
    from loko.stream.drift import Drift

SHUFFLE_WINDOW_BYTES = 64 << 20
_REORDER_ROWS = 1024


class Block:
    """Consecutive rows of a stream, in memory.

    `rows` are untouched by drift; `row_ids` says where each lies in the shards, an int standing for consecutive ids
    from it on; `begin` is the stream position of row 0, `first` the same as the drifts count it. Columns become NumPy
    once a block, so that a batch of one row costs a slice.
    """

    __slots__ = ("_arrays", "_row_ids", "begin", "drifts", "first", "labels", "layout", "locate", "pixels", "rows")

    def __init__(
        self, rows: pa.RecordBatch, row_ids: Int64Array | int, layout: Layout, locate: Callable[[int], str]
    ) -> None:
        self.rows = rows
        self.layout = layout
        self.locate = locate
        self.begin = 0
        self.first = 0
        self.drifts: tuple[Drift, ...] = ()
        self._row_ids = row_ids
        self._arrays: dict[str, npt.NDArray[Any]] = {}
        # Whole columns that batches cut their slices from, filled by StreamBatch with what no drift has to touch.
        self.pixels: dict[str, npt.NDArray[np.uint8]] = {}
        self.labels: dict[str, npt.NDArray[Any]] = {}

    @property
    def row_ids(self) -> Int64Array:
        if isinstance(self._row_ids, int):
            self._row_ids = np.arange(self._row_ids, self._row_ids + self.rows.num_rows)
        return self._row_ids

    def array(self, column: str) -> npt.NDArray[Any]:
        """A tensor or number column, (rows, *shape), read-only where it views the file."""
        values = self._arrays.get(column)
        if values is None:
            shape = self.layout.shapes[column]
            assert shape is not None
            values = self._arrays[column] = to_numpy(self.rows.column(column), shape, self.layout.dtypes[column])
        return values

    def label_array(self, column: str) -> npt.NDArray[Any]:
        """A label column as stored, int64, or float32 if it holds floats; a copy, so that it may be written to."""
        self.layout.check(column, "label")
        values = self.array(column)
        return values.astype(np.float32 if values.dtype.kind == "f" else np.int64)


Loader = Callable[[int], Block]


class BlockSource(Protocol):
    """Rows cut into blocks: block k holds the positions offsets[k] to offsets[k + 1]."""

    offsets: Int64Array
    light: bool  # a load only maps memory: not worth a thread

    def open(self, layout: Layout, verify: bool) -> Loader:
        """A function from k to block k, whose rows have exactly this layout. It holds files open and belongs to one
        thread.
        """

    def group_bytes(self) -> list[int]:
        """About how many bytes each block holds."""


class ShardRows:
    """Rows [start, stop) of the shards, in the order they were written; a block is a row group."""

    def __init__(self, shards: Sequence[Shard], start: int, stop: int) -> None:
        self.shards = shards
        self.light = all(shard.format == "arrow" for shard in shards)
        self._groups: list[tuple[int, int, int]] = []  # shard, row group, row id of its first row
        self._slices: list[tuple[int, int]] = []  # of the row group, which [start, stop) may cut
        first = 0
        for number, shard in enumerate(shards):
            for group, rows in enumerate(shard.group_rows):
                low, high = max(start - first, 0), min(stop - first, rows)
                if low < high:
                    self._groups.append((number, group, first))
                    self._slices.append((low, high))
                first += rows
        self.offsets = _offsets(high - low for low, high in self._slices)
        self._firsts = [first for _, _, first in self._groups]

    def open(self, layout: Layout, verify: bool) -> Loader:
        # Shards are read front to back, or, shuffled, all at once: a few open files are enough.
        reader = lru_cache(maxsize=8)(lambda number: ShardReader(self.shards[number], layout.schema, verify))

        def load(k: int) -> Block:
            (number, group, first), (low, high) = self._groups[k], self._slices[k]
            rows = reader(number).read(group)
            if high - low < rows.num_rows:
                rows = rows.slice(low, high - low)
            reader(number).check_values(rows, group, low)
            return Block(rows, first + low, layout, self.locate)

        return load

    def group_bytes(self) -> list[int]:
        return [self.shards[number].group_bytes[group] for number, group, _ in self._groups]

    def locate(self, row_id: int) -> str:
        """The file, row group and row of a row id, for messages."""
        number, group, first = self._groups[bisect_right(self._firsts, row_id) - 1]
        return f"{self.shards[number].path}, row group {group}, row {row_id - first} of it"


class Shuffled:
    """Another source's rows in an order that depends on the seed alone.

    Blocks are shuffled, then gathered into windows of SHUFFLE_WINDOW_BYTES or a little more, then the rows of each
    window are shuffled. A source that fits one window is thus shuffled uniformly; a longer one mixes rows within a
    window. What is kept in memory is one window, and seeking loads one window: neither grows with the stream.
    """

    light = False

    def __init__(self, source: BlockSource, seed: int) -> None:
        self.source = source
        self.seed = seed
        sizes = source.group_bytes()
        self._windows: list[list[int]] = []
        filled = SHUFFLE_WINDOW_BYTES
        for k in permutation(len(sizes), seed):
            if filled >= SHUFFLE_WINDOW_BYTES:
                self._windows.append([])
                filled = 0
            self._windows[-1].append(int(k))
            filled += sizes[k]
        for window in self._windows:
            window.sort()  # the rows are shuffled anyway; reading them in file order opens each file once
        lengths = np.diff(source.offsets)
        self.offsets = _offsets(int(lengths[window].sum()) for window in self._windows)

    def open(self, layout: Layout, verify: bool) -> Loader:
        load_inner = self.source.open(layout, verify)

        def load(k: int) -> Block:
            blocks = [load_inner(inner) for inner in self._windows[k]]
            order = permutation(int(self.offsets[k + 1] - self.offsets[k]), self.seed, k)
            return _gather(blocks, order)

        return load

    def group_bytes(self) -> list[int]:
        sizes = self.source.group_bytes()
        return [sum(sizes[inner] for inner in window) for window in self._windows]


class Reordered:
    """Another source's rows in an order given outright: position p holds the source's position order[p]."""

    light = False

    def __init__(self, source: BlockSource, order: Int64Array) -> None:
        self.source = source
        self.order = order
        self.offsets = _offsets(min(_REORDER_ROWS, len(order) - low) for low in range(0, len(order), _REORDER_ROWS))

    def open(self, layout: Layout, verify: bool) -> Loader:
        # Each class runs through the source at its own pace, so neighbouring blocks share most of what they read.
        load_inner = lru_cache(maxsize=32)(self.source.open(layout, verify))

        def load(k: int) -> Block:
            wanted = self.order[self.offsets[k] : self.offsets[k + 1]]
            numbers = np.searchsorted(self.source.offsets, wanted, side="right") - 1
            used, which = np.unique(numbers, return_inverse=True)
            blocks = [load_inner(int(number)) for number in used]
            firsts = _offsets(block.rows.num_rows for block in blocks)
            return _gather(blocks, firsts[which] + wanted - self.source.offsets[numbers])

        return load

    def group_bytes(self) -> list[int]:
        total = sum(self.source.group_bytes()) // max(1, len(self.offsets) - 1)
        return [total] * (len(self.offsets) - 1)


class Drifting:
    """Another source's rows, each block told which drifts act on it and from which position they count."""

    def __init__(self, source: BlockSource, drifts: tuple["Drift", ...]) -> None:
        self.source = source
        self.drifts = drifts
        self.offsets = source.offsets
        self.light = source.light

    def open(self, layout: Layout, verify: bool) -> Loader:
        load_inner = self.source.open(layout, verify)

        def load(k: int) -> Block:
            block = load_inner(k)
            block.first, block.drifts = int(self.offsets[k]), self.drifts
            return block

        return load

    def group_bytes(self) -> list[int]:
        return self.source.group_bytes()


class Joined:
    """Several sources one after the other; `totals` are how many row ids each of them uses."""

    def __init__(self, sources: Sequence[BlockSource], totals: Sequence[int]) -> None:
        self.sources = sources
        self.light = all(source.light for source in sources)
        self._row_id_starts = _offsets(totals)
        self._block_starts = _offsets(len(source.offsets) - 1 for source in sources)
        self.offsets = _offsets(int(n) for source in sources for n in np.diff(source.offsets))

    def open(self, layout: Layout, verify: bool) -> Loader:
        loaders = [source.open(layout, verify) for source in self.sources]

        def load(k: int) -> Block:
            number = bisect_right(self._block_starts, k) - 1
            block = loaders[number](k - int(self._block_starts[number]))
            start, locate = int(self._row_id_starts[number]), block.locate
            rows = pa.RecordBatch.from_arrays(block.rows.columns, schema=layout.schema)
            moved = Block(rows, block.row_ids + start, layout, lambda row_id: locate(row_id - start))
            moved.first, moved.drifts = block.first, block.drifts
            return moved

        return load

    def group_bytes(self) -> list[int]:
        return [size for source in self.sources for size in source.group_bytes()]


class ReadAhead:
    """Loads blocks on demand, and the next `ahead` ones meanwhile in one background thread (pyarrow lets go of the
    GIL).

    Closing waits for at most one load. What goes wrong in the thread is raised where the block is asked for.
    """

    def __init__(self, load: Loader, count: int, ahead: int) -> None:
        self._load = load
        self._count = count
        self._ahead = ahead
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="loko-stream") if ahead else None
        self._pending: dict[int, Future[Block]] = {}

    def __call__(self, k: int) -> Block:
        if self._pool is None:
            return self._load(k)
        for passed in [number for number in self._pending if number < k]:
            self._pending.pop(passed).cancel()
        for number in range(k, min(k + 1 + self._ahead, self._count)):
            if number not in self._pending:
                self._pending[number] = self._pool.submit(self._load, number)
        return self._pending.pop(k).result()

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


def _gather(blocks: Sequence[Block], order: Int64Array) -> Block:
    """The rows of the blocks laid end to end, taken in `order`."""
    rows = blocks[0].rows if len(blocks) == 1 else pa.concat_batches([block.rows for block in blocks])
    row_ids = np.concatenate([block.row_ids for block in blocks])
    return Block(rows.take(pa.array(order)), row_ids[order], blocks[0].layout, blocks[0].locate)


def _offsets(lengths: Iterable[int]) -> Int64Array:
    return np.cumsum([0, *lengths], dtype=np.int64)
