"""From what Tune kept to the files of a results folder: results.parquet, best.yaml, adapter/, pareto/."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from loko import online
from loko.config import ExperimentConfig, validate
from loko.tasks import save_adapter
from ray_jobs.choice import Choice, choose
from ray_jobs.halving import fronts
from ray_jobs.places import below
from ray_jobs.settings import SearchConfig

if TYPE_CHECKING:  # the report has no need of Ray
    from ray import tune

__all__ = ["chosen", "collect", "pareto"]

_TUNE_COLUMNS = {
    "timestamp",
    "checkpoint_dir_name",
    "should_checkpoint",
    "done",
    "training_iteration",
    "trial_id",
    "date",
    "time_this_iter_s",
    "time_total_s",
    "pid",
    "hostname",
    "node_ip",
    "time_since_restore",
    "iterations_since_restore",
}


def collect(config: SearchConfig, folder: Path, location: str, grids: dict[str, tune.ResultGrid]) -> None:
    """Write results.parquet (a row a rung a trial), the winner's config and adapter, and with several metrics pareto/.

    Args:
        config: the search.
        folder: where to write.
        location: what the user calls that folder.
        grids: candidate -> what Tune kept of its trials.

    Raises:
        RuntimeError: no trial came to the end of the stream.
    """
    frames = []
    results: dict[str, tune.Result] = {}
    for candidate, grid in grids.items():
        for result in sorted(grid, key=lambda one: one.path):  # Tune's own order changes when a search goes on
            frame = result.metrics_dataframe
            if frame is None or result.metrics is None:
                continue
            frame = frame.drop_duplicates("rows", keep="first")  # a resumed trial reports its last rung again
            finished = bool(result.metrics.get("finished"))
            status = "failed" if result.error else "complete" if finished else "stopped"
            frame = frame.assign(candidate=candidate, trial=result.metrics["trial_id"], status=status)
            frames.append(frame.assign(params=json.dumps(result.config)))
            results[result.metrics["trial_id"]] = result
    table = pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=["candidate"])
    found = {candidate: choice for candidate in grids if (choice := chosen(config, table, candidate)) is not None}
    if not found:
        raise RuntimeError(
            f"no trial of {config.name} reached the end of the stream; the errors are in {below(location, 'tune')}"
        )
    kept = [c for c in table.columns if not c.startswith("config/") and c not in _TUNE_COLUMNS]
    pq.write_table(pa.Table.from_pandas(table[kept], preserve_index=False), folder / "results.parquet")
    best = min(found, key=lambda candidate: _score(config, found[candidate]))
    _write_best(config, folder, location, best, found[best], results[found[best].trial])
    if len(config.search.objectives) > 1:
        _write_pareto(config, folder, location, table)


def pareto(rungs: pd.DataFrame, objectives: list[str]) -> pd.DataFrame:
    """Last rungs of the complete trials that no other is better than in every metric, the first metric's best first."""
    last = rungs[rungs.status == "complete"].sort_values("rows").groupby("trial").tail(1)
    last = last.dropna(subset=objectives)
    points = [tuple(map(float, row)) for row in last[objectives].to_numpy()]
    best = last[[front == 0 for front in fronts(points)]]
    return best.sort_values(objectives).reset_index(drop=True)


def chosen(config: SearchConfig, rungs: pd.DataFrame, candidate: str) -> Choice | None:
    """What is taken of a candidate; None if no trial of it came to the end."""
    mine = rungs[rungs.candidate == candidate]
    points = config.candidates[candidate].points
    return None if mine.empty else choose(mine, config.search.metric, points, config.search.caution)


def _score(config: SearchConfig, choice: Choice) -> float:
    """NaN counts as the worst."""
    score = float(choice.run[config.search.metric].iloc[-1])
    return score if math.isfinite(score) else math.inf


def _write_best(
    config: SearchConfig, folder: Path, location: str, candidate: str, choice: Choice, result: tune.Result
) -> None:
    plain = config.experiment_of(candidate, result.config or {})
    score = float(choice.run[config.search.metric].iloc[-1])
    about = f" ({choice.about})" if choice.about else ""
    what = f"The winner of the search {config.name}: {candidate}, {config.search.metric} {score!r}{about}."
    _write_experiment(folder / "best.yaml", below(location, "best.yaml"), what, plain)
    assert result.checkpoint is not None
    with result.checkpoint.as_directory() as saved:
        model = online.trained_model(validate(ExperimentConfig, plain), Path(saved))
    save_adapter(model, folder / "adapter")


def _write_pareto(config: SearchConfig, folder: Path, location: str, rungs: pd.DataFrame) -> None:
    """A runnable config for every point of the front, and the table of them."""
    objectives = config.search.objectives
    best = pareto(rungs, objectives)
    (folder / "pareto").mkdir(exist_ok=True)
    for old in (folder / "pareto").glob("*.yaml"):
        old.unlink()
    names = [f"{place}-{candidate}.yaml" for place, candidate in enumerate(best.candidate, start=1)]
    for name, (_, row) in zip(names, best.iterrows(), strict=True):
        figures = ", ".join(f"{key} {row[key]!r}" for key in objectives)
        what = f"On the Pareto front of the search {config.name}: {row.candidate}, {figures}."
        plain = config.experiment_of(row.candidate, json.loads(row.params))
        _write_experiment(folder / "pareto" / name, below(location, "pareto", name), what, plain)
    best.assign(file=names)[["file", "candidate", "trial", *objectives, "params"]].to_csv(
        folder / "pareto" / "front.csv", index=False
    )


def _write_experiment(path: Path, shown: str, what: str, plain: dict[str, Any]) -> None:
    head = f"# {what}\n# Run it: python -m ray_jobs.train {_as_typed(shown)}\n"
    path.write_text(head + yaml.safe_dump(plain, sort_keys=False))


def _as_typed(location: str) -> str:
    """A path as the user would type it here."""
    here = not location.count("://") and Path(location).is_relative_to(Path.cwd())
    return os.path.relpath(location) if here else location
