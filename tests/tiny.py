"""A tiny learning problem made on the spot: rows of four numbers in three classes, and a network of eight units."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from loko.config import ExperimentConfig, validate
from loko.stream import write_shards

FEATURES = ["a", "b", "c", "d"]
CLASSES = 3


def table(rows: int, seed: int = 0) -> pa.Table:
    """Rows whose class shows in their features, in an order that does not give it away."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(CLASSES, size=rows)
    centres = np.random.default_rng(99).normal(size=(CLASSES, len(FEATURES)))
    values = (centres[labels] + 0.7 * rng.normal(size=(rows, len(FEATURES)))).astype(np.float32)
    return pa.table({**{name: values[:, i] for i, name in enumerate(FEATURES)}, "label": labels})


def shards(folder: Path, rows: int, seed: int = 0) -> Path:
    """The same rows as shards of 16 in row groups of 8, so that most runs cross both."""
    write_shards(table(rows, seed), folder, rows_per_shard=16, row_group_size=8)
    return folder


def experiment(paths: Path, **changes: Any) -> dict[str, Any]:
    """An experiment as plain data: LoRA on a small network, five rungs in forty rows."""
    return {
        "stream": {"paths": str(paths)},
        "task": {
            "kind": "table",
            "model": "mlp",
            "num_labels": CLASSES,
            "hidden_sizes": [8],
            "columns": {"features": FEATURES, "label": "label"},
            "adapter": {"method": "lora", "rank": 2, "alpha": 4},
        },
        "optimizer": {"name": "loko", "covariance": "low_rank", "rank": 3},
        "batch_size": 4,
        "report_every": 8,
        "window": 12,
        "near_future": 1,
        **changes,
    }


def config(paths: Path, **changes: Any) -> ExperimentConfig:
    """The same, validated."""
    return validate(ExperimentConfig, experiment(paths, **changes))


def assert_same(actual: Any, expected: Any, where: str = "") -> None:
    """Nested dicts, lists and tensors equal bit for bit."""
    assert type(actual) is type(expected), where
    if isinstance(expected, torch.Tensor):
        assert actual.dtype == expected.dtype, where
        assert torch.equal(actual, expected), where
    elif isinstance(expected, dict):
        assert list(actual) == list(expected), where
        for key in expected:
            assert_same(actual[key], expected[key], f"{where}.{key}")
    elif isinstance(expected, list | tuple):
        assert len(actual) == len(expected), where
        for number, (one, other) in enumerate(zip(actual, expected, strict=True)):
            assert_same(one, other, f"{where}[{number}]")
    else:
        assert actual == expected or (actual != actual and expected != expected), where
