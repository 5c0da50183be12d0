"""A checksum for every shard, in a file beside them, because Arrow IPC has none of its own."""

import json
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow as pa

from loko.stream.errors import StreamError

MANIFEST = "loko_manifest.json"
_CHUNK = 1 << 20


@dataclass(frozen=True)
class ShardRecord:
    """What a shard was when it was written. `row_groups` is empty for Parquet, whose pages carry their own
    checksums.
    """

    size: int
    rows: int
    crc32: int
    row_groups: tuple[int, ...] = ()


def write_manifest(folder: Path, shards: Mapping[str, ShardRecord]) -> None:
    """Write the manifest of `folder`; keys are file names."""
    records = {name: asdict(record) for name, record in shards.items()}
    (folder / MANIFEST).write_text(json.dumps({"version": 1, "shards": records}, indent=1))


def read_manifest(folder: Path) -> dict[str, ShardRecord]:
    """The manifest of `folder` by file name, {} where there is none.

    Raises:
        StreamError: if there is one but it cannot be read.
    """
    path = folder / MANIFEST
    try:
        shards = json.loads(path.read_text())["shards"]
        return {
            name: ShardRecord(**{**record, "row_groups": tuple(record["row_groups"])})
            for name, record in shards.items()
        }
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise StreamError(
            f"{path}: not a readable manifest ({error}); prepare the folder again, or remove the file"
        ) from error


def crc32_of_file(path: Path) -> int:
    """CRC-32 of a file's bytes."""
    crc = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            crc = zlib.crc32(chunk, crc)
    return crc


def crc32_of_batch(batch: pa.RecordBatch) -> int:
    """CRC-32 of the buffers of a record batch as it lies in an IPC file."""
    crc = 0
    for column in batch.columns:
        for buffer in column.buffers():
            if buffer is not None:
                crc = zlib.crc32(buffer, crc)
    return crc
