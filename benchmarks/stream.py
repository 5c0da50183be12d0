"""ArrowStream beside a bare pyarrow loop over the same rows: rows/s, for both formats and several batch sizes.

    python -m benchmarks.stream [--json PATH]

Both sides read the same shards of 28 x 28 uint8 images with labels and end in the same two tensors a batch, pixels
(B, 28, 28) uint8 and labels (B,) int64. The bare loop is the tightest we know: one file handle, each row group turned
into NumPy once, batches cut across row groups, and no cursor, ranks, row ids, null check, drift or checksum. The sides
take turns, and a ratio is taken within each round, so that a busy machine slows both.
"""

import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import typer

from benchmarks.goals import Goal, print_goals, write
from loko.stream import ArrowStream, tensor_column, tensor_field, write_shards

SIDE, ROWS, SHARDS = 28, 65_536, 4
BATCH_SIZES = (1, 16, 64)
GOAL = 0.9
Arrays = tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]


def make_rows(rows: int) -> pa.Table:
    """Images as sparse as digits are, with labels."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (rows, SIDE, SIDE), dtype=np.uint8)
    pixels[rng.random(pixels.shape, dtype=np.float32) < 0.8] = 0
    schema = pa.schema([tensor_field("image", (SIDE, SIDE)), pa.field("label", pa.int64())])
    return pa.table([tensor_column(pixels), pa.array(rng.integers(0, 10, rows))], schema=schema)


def bare(folder: Path, batch_size: int) -> Iterator[Arrays]:
    """The rows of a folder of shards with pyarrow and NumPy alone."""
    pixels, labels = [], []
    held = 0
    for group in _row_groups(folder):
        image, label = group.column(0), group.column(1)
        width = image.type.byte_width
        flat = np.frombuffer(image.buffers()[1], np.uint8, len(image) * width, image.offset * width)
        x, y = flat.reshape(-1, SIDE, SIDE), label.to_numpy()
        low = 0
        if held:
            low = min(batch_size - held, len(y))
            pixels.append(x[:low])
            labels.append(y[:low])
            held += low
            if held < batch_size:
                continue
            yield np.concatenate(pixels), np.concatenate(labels)
            pixels, labels, held = [], [], 0
        whole = low + (len(y) - low) // batch_size * batch_size
        for start in range(low, whole, batch_size):
            stop = start + batch_size
            yield x[start:stop], y[start:stop]
        if whole < len(y):
            pixels, labels, held = [x[whole:]], [y[whole:]], len(y) - whole
    if held:
        yield np.concatenate(pixels), np.concatenate(labels)


def _row_groups(folder: Path) -> Iterator[pa.RecordBatch]:
    for path in sorted(folder.glob("part-*")):
        if path.suffix == ".parquet":
            file = pq.ParquetFile(path, memory_map=True, pre_buffer=False)
            for i in range(file.num_row_groups):
                table = file.read_row_group(i, columns=["image", "label"], use_threads=False)
                yield table.to_batches()[0]
        else:
            reader = pa.ipc.open_file(pa.memory_map(str(path)))
            for i in range(reader.num_record_batches):
                yield reader.get_batch(i)


def run_bare(folder: Path, batch_size: int) -> int:
    """One pass of the bare loop into tensors, one pixel and one label of each batch read; the rows seen."""
    seen = 0
    for x, y in bare(folder, batch_size):
        pixels, labels = torch.from_numpy(x), torch.from_numpy(y)
        int(pixels[-1, SIDE // 2, SIDE // 2]) + int(labels[-1])
        seen += len(labels)
    return seen


def run_stream(stream: ArrowStream, batch_size: int) -> int:
    """The same pass through ArrowStream."""
    seen = 0
    for batch in stream.batches(batch_size):
        pixels, labels = torch.from_numpy(batch.pixels("image")), torch.from_numpy(batch.labels("label"))
        int(pixels[-1, SIDE // 2, SIDE // 2]) + int(labels[-1])
        seen += len(labels)
    return seen


def rate(run: Callable[[], int], rows: int) -> float:
    """Rows a second from opening the files to the last row."""
    start = time.perf_counter()
    seen = run()
    seconds = time.perf_counter() - start
    assert seen == rows, (seen, rows)
    return rows / seconds


def compare(folder: Path, batch_size: int, repeats: int, validated: bool) -> dict[str, float]:
    """Median rows/s of both sides and the median of the rounds' ratios."""
    stream = ArrowStream(folder, columns=["image", "label"])
    if validated:
        stream.validate()
    sides = (lambda: run_bare(folder, batch_size)), (lambda: run_stream(stream, batch_size))
    rounds = []
    # A pass in large batches is over in milliseconds: it takes more of them to tell the sides apart.
    for number in range(1 + repeats * max(1, batch_size // 2)):
        first = number % 2  # neither side always runs on the caches the other one warmed
        rates = {side: rate(sides[side], len(stream)) for side in (first, 1 - first)}
        rounds.append((rates[0], rates[1]))
    rounds = rounds[1:]
    return {
        "bare_rows_per_second": median(b for b, _ in rounds),
        "stream_rows_per_second": median(s for _, s in rounds),
        "ratio": median(s / b for b, s in rounds),
    }


def main(
    json: Annotated[Path | None, typer.Option(help="Write the figures and the goals to this file.")] = None,
    rows: Annotated[int, typer.Option(help="Rows of the stream.")] = ROWS,
    repeats: Annotated[
        int, typer.Option(help="Rounds at batch 1; larger batches get more, and one more warms up.")
    ] = 9,
) -> None:
    """Measure ArrowStream against a bare pyarrow loop over the same rows."""
    warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
    torch.set_num_threads(1)
    results: list[dict[str, Any]] = []
    goals: list[Goal] = []
    print(f"{'format':8} {'batch':>5} {'validated':>9} {'bare rows/s':>14} {'stream rows/s':>14} {'ratio':>6}")
    with tempfile.TemporaryDirectory() as scratch:
        table = make_rows(rows)
        for format in ("arrow", "parquet"):
            folder = Path(scratch) / format
            write_shards(table, folder, format=format, rows_per_shard=-(-rows // SHARDS))
            # A stream that was not validated verifies checksums as it reads, which the bare loop does not: no goal.
            for validated in (True, False):
                for batch_size in BATCH_SIZES:
                    result = compare(folder, batch_size, repeats, validated)
                    results.append({"format": format, "batch_size": batch_size, "validated": validated, **result})
                    rates = f"{result['bare_rows_per_second']:14,.0f} {result['stream_rows_per_second']:14,.0f}"
                    ratio = result["ratio"]
                    print(
                        f"{format:8} {batch_size:5} {validated!s:>9} {rates} {ratio:6.2f}",
                        flush=True,
                    )
                    if validated:
                        name = f"stream throughput, {format}, batch {batch_size}"
                        goals.append(
                            Goal(name, f"at least {GOAL} of a bare pyarrow loop", round(ratio, 3), ratio >= GOAL)
                        )
    print_goals(goals)
    if json is not None:
        write(json, goals, results=results)


if __name__ == "__main__":
    typer.run(main)
