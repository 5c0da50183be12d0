"""Runs without Ray, in one process or in several that share one filter over gloo: what others are compared with."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from loko import online
from loko.config import ExperimentConfig, validate

RUNG = 100


def experiment(data: Path, rows: int, **changes: Any) -> dict[str, Any]:
    """Real digits (``ray_jobs.embedded``), turned half way through, on a small pretrained ConvNeXt."""
    return {
        "stream": {
            "paths": str(data / "stream"),
            "stop": rows,
            "drift": [{"kind": "rotation", "at": rows // 2, "degrees": 90}],
        },
        "task": {
            "kind": "image",
            "model": str(data / "model"),
            "num_labels": 10,
            "columns": {"image": "image", "label": "label"},
            "adapter": {"method": "lora", "rank": 8, "alpha": 16, "target_modules": ["pwconv1", "pwconv2"]},
        },
        "optimizer": {"name": "loko"},
        "batch_size": 4,
        "report_every": RUNG,
        **changes,
    }


def run(config: dict[str, Any], folder: Path, workers: int = 1) -> online.Report:
    """Learn a stream to its end in so many processes; the last report, and in the folder the last checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    if workers == 1:
        _finish(online.start(validate(ExperimentConfig, config)), folder)
    else:
        (folder / "store").unlink(missing_ok=True)
        torch.multiprocessing.start_processes(
            _rank, (config, str(folder), workers), nprocs=workers, start_method="spawn"
        )
    report: online.Report = json.loads((folder / "report.json").read_text())
    return report


def join(rank: int, folder: str, workers: int) -> None:
    """Make this process one of a gloo group that meets in a folder."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=workers)


def _rank(rank: int, config: dict[str, Any], folder: str, workers: int) -> None:
    join(rank, folder, workers)
    _finish(online.start(validate(ExperimentConfig, config), group=dist.group.WORLD), Path(folder))
    dist.destroy_process_group()


def _finish(one: online.Run, folder: Path) -> None:
    *_, last = online.advance(one)
    online.save(one, folder)
    if one.ranks.rank == 0:
        (folder / "report.json").write_text(json.dumps(last))
