"""Writing shards that ArrowStream reads fast and can check."""

from collections.abc import Iterable, Iterator
from itertools import chain, groupby
from operator import itemgetter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from loko.stream.errors import StreamError
from loko.stream.manifest import ShardRecord, crc32_of_batch, crc32_of_file, write_manifest
from loko.stream.shards import Format

_GROUP_BYTES = 4 << 20
_MAX_SHARDS = 100_000  # as many as five digits keep in lexical order


def write_shards(
    rows: pa.Table | pa.RecordBatch | Iterable[pa.Table | pa.RecordBatch],
    folder: Path,
    *,
    format: Format = "arrow",
    rows_per_shard: int = 65_536,
    row_group_size: int | None = None,
) -> list[Path]:
    """Write rows, in order, as shards part-00000, part-00001 … and a manifest of their checksums into a folder.

    Neither format is compressed, so that Arrow shards can be mapped; Parquet pages carry checksums.

    Args:
        rows: one table or an iterable of them, all of one schema; read once, never held as a whole.
        folder: made if it is missing; what is in it stays.
        row_group_size: rows of a row group (record batch); None chooses about 4 MiB, between 64 and 4,096 rows.

    Raises:
        StreamError: if there are no rows, a size is below 1, the format is unknown or there would be over 100,000
        shards.
    """
    if format not in ("arrow", "parquet"):
        raise StreamError(f"format is {format!r}; allowed: arrow, parquet")
    for name, size in (("rows_per_shard", rows_per_shard), ("row_group_size", row_group_size)):
        if size is not None and size < 1:
            raise StreamError(f"{name} is {size}; it must be at least 1")
    folder.mkdir(parents=True, exist_ok=True)
    tables = [rows] if isinstance(rows, (pa.Table, pa.RecordBatch)) else rows
    records: dict[str, ShardRecord] = {}
    for number, groups in groupby(_row_groups(tables, rows_per_shard, row_group_size), key=itemgetter(0)):
        if number >= _MAX_SHARDS:
            raise StreamError(f"more than {_MAX_SHARDS} shards; raise rows_per_shard, which is {rows_per_shard}")
        path = folder / f"part-{number:05d}.{format}"
        _write(path, format, (group for _, group in groups))
        records[path.name] = _record(path, format)
    if not records:
        raise StreamError(f"{folder}: there are no rows to write")
    write_manifest(folder, records)
    return [folder / name for name in records]


def _row_groups(
    tables: Iterable[pa.Table | pa.RecordBatch], rows_per_shard: int, row_group_size: int | None
) -> Iterator[tuple[int, pa.Table]]:
    """The rows as row groups, each with the number of its shard."""
    shard, in_shard, held = 0, 0, None
    for rows in tables:
        table = pa.Table.from_batches([rows]) if isinstance(rows, pa.RecordBatch) else rows
        if row_group_size is None and len(table):
            # A multiple of 64, so that batches of the usual sizes do not lie across two row groups.
            fitting = _GROUP_BYTES // max(1, table.nbytes // len(table))
            row_group_size = max(64, min(4096, fitting // 64 * 64))
        held = table if held is None else pa.concat_tables([held, table])
        while row_group_size is not None and len(held) >= (size := min(row_group_size, rows_per_shard - in_shard)):
            yield shard, held.slice(0, size)
            held, in_shard = held.slice(size), in_shard + size
            if in_shard == rows_per_shard:
                shard, in_shard = shard + 1, 0
    if held is not None and len(held):
        yield shard, held


def _write(path: Path, format: Format, groups: Iterator[pa.Table]) -> None:
    first = next(groups)
    if format == "parquet":
        # A dictionary of images or sentences only costs time: they hardly ever repeat.
        with pq.ParquetWriter(
            path, first.schema, compression="none", use_dictionary=False, write_page_checksum=True
        ) as writer:
            for group in chain([first], groups):
                writer.write_table(group, row_group_size=len(group))
    else:
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, first.schema) as writer:
            for group in chain([first], groups):
                writer.write_table(group.combine_chunks(), max_chunksize=len(group))


def _record(path: Path, format: Format) -> ShardRecord:
    """What the finished file is, read back from it."""
    size, crc = path.stat().st_size, crc32_of_file(path)
    if format == "parquet":
        return ShardRecord(size, pq.read_metadata(path).num_rows, crc)
    with pa.memory_map(str(path)) as source, pa.ipc.open_file(source) as reader:
        batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        return ShardRecord(size, sum(b.num_rows for b in batches), crc, tuple(crc32_of_batch(b) for b in batches))
