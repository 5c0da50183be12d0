"""Any source of rows -> Arrow or Parquet shards that `loko.stream.ArrowStream` reads.

    python -m ray_jobs.prepare SOURCE DEST [key=value …]

HF `datasets` is the way in; the shards are written once, with their checksums, and are all that a run needs.
"""

import io
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import datasets
import numpy as np
import pyarrow as pa
import typer
from datasets import Dataset
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError
from rich.console import Console
from rich.table import Table
from yaml import YAMLError

from loko.stream import ArrowStream, tensor_column, tensor_field, write_shards
from loko.stream.manifest import MANIFEST
from ray_jobs.cli import fail, make_app
from ray_jobs.settings import describe

_FILES = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".arrow": "arrow"}
_IMAGES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


class PrepareError(ValueError):
    """A source, destination or option that cannot be used; the message says what to do."""


class Options(BaseModel):
    """What `key=value` may set."""

    model_config = ConfigDict(extra="forbid")

    split: str = Field("train", description="which split of the source, e.g. validation or train[:1000]")
    config: str | None = Field(None, description="configuration of a hub data set, e.g. sst2 of nyu-mll/glue")
    columns: dict[str, str] | list[str] | None = Field(
        None, description="columns to keep: [sentence,label], or renamed: {text: sentence, label: label}"
    )
    label: str | None = Field(
        None, description="label column; names in it become integers. `label` where there is a column of that name"
    )
    shuffle_seed: int | None = Field(
        None, ge=0, description="shuffle the rows with this seed before anything is cut off"
    )
    rows: PositiveInt | None = Field(None, description="keep only the first so many rows")
    image_size: PositiveInt | None = Field(
        None, description="resize images to this square and store raw pixels, fast to read; none: as they are encoded"
    )
    image_mode: Literal["L", "RGB"] | None = Field(
        None, description="L (grey) or RGB for image_size; none: that of the first image"
    )
    format: Literal["arrow", "parquet"] = Field(
        "arrow", description="arrow is the fastest to read, parquet more widespread"
    )
    rows_per_shard: PositiveInt = Field(65_536, description="rows of one file")
    row_group_size: PositiveInt | None = Field(None, description="rows read at once; none: about 4 MiB of them")


def prepare(source: str, destination: Path, options: Options, overwrite: bool = False) -> ArrowStream:
    """Write the rows of `source` as shards into the folder `destination`, all of it or nothing.

    Args:
        source: a CSV, TSV, JSON, JSON lines, Parquet or Arrow file; a folder of such files, of images (one subfolder a
            class) or as `Dataset.save_to_disk` leaves it; otherwise the name of a data set on the Hugging Face hub.
        overwrite: replace a destination that holds something.

    Returns:
        The finished shards as a stream, validated.

    Raises:
        PrepareError: if the destination is in use, or the source cannot be read as the options say.
        StreamError: if a row holds a null or a NaN; the destination is then left as it was.
    """
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())) and not overwrite:
        raise PrepareError(f"{destination} is not empty: choose another folder, or pass --overwrite to replace it")
    destination.parent.mkdir(parents=True, exist_ok=True)
    # Beside the destination, hence on the same disk: the rename at the end is one step.
    with tempfile.TemporaryDirectory(prefix=f".{destination.name}-", dir=destination.parent) as scratch:
        shards = Path(scratch) / "shards"
        rows = _select(_load(source, options, Path(scratch) / "cache"), options)
        write_shards(
            _tables(rows, options),
            shards,
            format=options.format,
            rows_per_shard=options.rows_per_shard,
            row_group_size=options.row_group_size,
        )
        ArrowStream(shards).validate()
        if destination.is_dir():
            destination.rename(Path(scratch) / "replaced")
        elif destination.exists():
            destination.unlink()
        shards.rename(destination)
    return ArrowStream(destination)


def _load(source: str, options: Options, cache: Path) -> Dataset:
    """The source as a map-style data set. Conversions of local files go to `cache`, which is thrown away."""
    path = Path(source)
    saved = (path / "state.json").exists()
    how: dict[str, Any] = _reader(path) if path.exists() and not saved else {}
    try:
        if saved:
            return datasets.load_from_disk(source)
        if how:
            return datasets.load_dataset(**how, split=options.split, cache_dir=str(cache))
        return datasets.load_dataset(source, options.config, split=options.split)
    except Exception as error:  # datasets raises whatever its readers and the network raise
        hint = "" if path.exists() else "; there is no such file or folder, so it was looked up on the hub"
        raise PrepareError(f"{source}: cannot be read with split={options.split} ({error}){hint}") from error


def _reader(path: Path) -> dict[str, Any]:
    """What `datasets.load_dataset` needs to know of a local path."""
    inside = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    files = [p for p in inside if p.name != MANIFEST]
    suffixes = {p.suffix.lower() for p in files}
    if path.is_dir() and suffixes & _IMAGES:
        return {"path": "imagefolder", "data_dir": str(path)}
    readable = [p for p in files if p.suffix.lower() in _FILES]
    kinds = {_FILES[p.suffix.lower()] for p in readable}
    if len(kinds) != 1:
        found = ", ".join(sorted(suffixes)) or "nothing"
        raise PrepareError(
            f"{path}: one kind of file is needed, found {found}; readable: {', '.join(_FILES)} and images"
        )
    delimiter = {"sep": "\t"} if readable[0].suffix.lower() == ".tsv" else {}
    return {"path": kinds.pop(), "data_files": [str(p) for p in readable], **delimiter}


def _select(rows: Dataset, options: Options) -> Dataset:
    """Rows and columns as the options ask, labels as integers."""
    if options.columns is not None:
        wanted = options.columns if isinstance(options.columns, Mapping) else {name: name for name in options.columns}
        for name in wanted:
            if name not in rows.column_names:
                raise PrepareError(f"columns: {name!r} is not there; columns are: {', '.join(rows.column_names)}")
        rows = rows.select_columns(list(wanted))
        rows = rows.rename_columns({old: new for old, new in wanted.items() if old != new})
    if options.shuffle_seed is not None:
        rows = rows.shuffle(seed=options.shuffle_seed)
    if options.rows is not None:
        rows = rows.select(range(min(options.rows, len(rows))))
    if len(rows) == 0:
        raise PrepareError("the source holds no rows")
    label = options.label or ("label" if "label" in rows.column_names else None)
    if label is not None and label not in rows.column_names:
        raise PrepareError(f"label: {label!r} is not there; columns are: {', '.join(rows.column_names)}")
    if label is not None and rows.features[label] in (datasets.Value("string"), datasets.Value("large_string")):
        rows = rows.class_encode_column(label)
    return rows


def _tables(rows: Dataset, options: Options) -> Iterator[pa.Table]:
    """The rows as Arrow tables of one schema, a few at a time."""
    images = {name for name, feature in rows.features.items() if isinstance(feature, datasets.Image)}
    tensors = (datasets.Array2D, datasets.Array3D)
    arrays = {name for name, feature in rows.features.items() if isinstance(feature, tensors)}
    labels = {
        name: feature.names for name, feature in rows.features.items() if isinstance(feature, datasets.ClassLabel)
    }
    mode = options.image_mode
    for table in rows.with_format("arrow").iter(batch_size=256):
        fields, columns = [], []
        for name, column in zip(table.column_names, table.itercolumns(), strict=True):
            column = column.combine_chunks()
            if name in images:
                encoded = [_image_bytes(item, name) for item in column.to_pylist()]
                if options.image_size is None:
                    column = pa.array([{"bytes": data, "path": None} for data in encoded], _ENCODED)
                    field = pa.field(name, _ENCODED)
                else:
                    mode = mode or _mode(encoded[0])
                    pixels = np.stack([_pixels(data, options.image_size, mode) for data in encoded])
                    field, column = tensor_field(name, pixels.shape[1:]), tensor_column(pixels)
            elif name in arrays:
                values = np.asarray(column.to_pylist(), rows.features[name].dtype)
                field, column = tensor_field(name, values.shape[1:], str(values.dtype)), tensor_column(values)
            else:
                names = {"names": "\n".join(labels[name])} if name in labels else None
                field = pa.field(name, column.type, metadata=names)
            fields.append(field)
            columns.append(column)
        yield pa.table(columns, schema=pa.schema(fields))


_ENCODED = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def _image_bytes(item: dict[str, Any] | None, column: str) -> bytes:
    """The encoded image of a row; a folder of images only names the files."""
    if item is None or (item["bytes"] is None and item["path"] is None):
        raise PrepareError(f"column {column!r}: a row has no image; drop such rows from the source first")
    return item["bytes"] if item["bytes"] is not None else Path(item["path"]).read_bytes()


def _mode(encoded: bytes) -> Literal["L", "RGB"]:
    with Image.open(io.BytesIO(encoded)) as image:
        return "L" if image.mode in ("L", "1", "I;16") else "RGB"


def _pixels(encoded: bytes, size: int, mode: str) -> np.ndarray:
    with Image.open(io.BytesIO(encoded)) as image:
        return np.asarray(image.convert(mode).resize((size, size), Image.Resampling.BICUBIC))


def parse_options(arguments: list[str]) -> Options:
    """Options from `key=value` arguments.

    Raises:
        PrepareError: naming the key, its value and what is allowed.
    """
    given: dict[Any, Any] = {}
    for argument in arguments:
        if "=" not in argument:
            raise PrepareError(f"{argument!r}: options are written key=value; keys: {', '.join(Options.model_fields)}")
        try:
            given |= OmegaConf.to_container(OmegaConf.from_dotlist([argument]))
        except (OmegaConfBaseException, YAMLError) as error:
            raise PrepareError(f"{argument!r} cannot be parsed ({error}); put quotes around the whole of it") from error
    try:
        return Options.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        key = str(first["loc"][0])
        if first["type"] == "extra_forbidden":
            raise PrepareError(
                f"unknown key {key!r} (value {first['input']!r}); keys: {', '.join(Options.model_fields)}"
            ) from error
        meaning = Options.model_fields[key].description
        raise PrepareError(f"{key} is {given[key]!r}: {first['msg']}; it is: {meaning}") from error


def summary(stream: ArrowStream, folder: Path) -> Table:
    """What was written, as a table for the terminal."""
    table = Table(title=str(folder), show_header=False)
    shards = sorted(path for path in folder.iterdir() if path.name.startswith("part-"))
    table.add_row("rows", f"{len(stream):,}")
    table.add_row("shards", f"{len(shards):,}")
    table.add_row("size", f"{stream.nbytes / 2**20:,.1f} MiB")
    for field in stream.schema:
        shape = (field.metadata or {}).get(b"shape")
        table.add_row(f"column {field.name}", f"tensor {shape.decode()}" if shape else str(field.type))
    if "label" in stream.schema.names and pa.types.is_integer(stream.schema.field("label").type):
        narrow = ArrowStream(folder, columns=["label"])
        values, counts = np.unique(
            np.concatenate([b.labels("label") for b in narrow.batches(4096)]), return_counts=True
        )
        shown = [f"{value}: {count:,}" for value, count in zip(values[:20], counts[:20], strict=True)]
        table.add_row("labels", ", ".join(shown) + (" …" if len(values) > 20 else ""))
    return table


_HELP = """Turn any source of rows into Arrow shards, the form in which every job here reads its stream.

SOURCE may be a CSV, TSV, JSON (lines), Parquet or Arrow file, a folder of such files, a folder of images with one
subfolder a class, or a data set on the hub. Nothing is left half done: DEST appears when all is written and checked.

\b
Examples:
  python -m ray_jobs.prepare reviews.csv data/reviews shuffle_seed=0
  python -m ray_jobs.prepare nyu-mll/glue data/sst2 config=sst2 'columns=[sentence,label]'
  python -m ray_jobs.prepare photos/ data/photos image_size=64 format=parquet

\b
Options, written key=value [default]:
"""
_KEYS = "\n".join(f"  {key:<15} {text} [{default}]" for key, default, text in describe(Options))
app = make_app()


@app.command(help=_HELP + _KEYS)
def main(
    source: Annotated[str, typer.Argument(help="A file, a folder, or the name of a data set on the Hugging Face hub.")],
    dest: Annotated[Path, typer.Argument(help="Folder to write the shards into.")],
    options: Annotated[list[str] | None, typer.Argument(help="key=value …, see above", show_default=False)] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace DEST if it holds something.")] = False,
) -> None:
    with fail():
        stream = prepare(source, dest, parse_options(options or []), overwrite)
    Console().print(summary(stream, dest))


if __name__ == "__main__":
    app()
