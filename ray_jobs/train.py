"""One run: Ray Train workers around the prequential loop.

python -m ray_jobs.train results/mnist/best.yaml workers=2
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from pydantic import BaseModel
from rich.console import Console
from rich.table import Table

from loko import online
from loko.config import ConfigError, ExperimentConfig, validate
from loko.tasks import save_adapter
from ray_jobs import cluster
from ray_jobs.cli import Overrides, fail, help_for, make_app
from ray_jobs.settings import read

app = make_app()

_SHOWN = ("rows", "nll", "accuracy", "mse", "window_nll", "window_accuracy", "label_only_nll", "near_future_accuracy",
          "heldout_nll", "heldout_accuracy", "heldout_ece", "skipped_rows", "learn_seconds", "rows_digest")  # fmt: skip


@app.command(help="Learn a stream once, as the YAML file of an experiment says.", epilog=help_for(ExperimentConfig))
def main(
    config: Annotated[Path, typer.Argument(help="YAML file of the experiment, such as results/mnist/best.yaml")],
    overrides: Overrides = None,
    name: Annotated[
        str | None, typer.Option(help="name of the run; a run of that name goes on. Default: the file's")
    ] = None,
    results: Annotated[Path, typer.Option(help="folder of all runs")] = Path("results/runs"),
    max_failures: Annotated[int, typer.Option(help="times that workers may die; -1 is any number of times")] = 10,
) -> None:
    """Run an experiment, or go on with it where it stopped."""
    with fail():
        experiment = read(ExperimentConfig, config, overrides or [])
        report = run(experiment, name or _default_name(config), results, max_failures)
    _print(report)


def run(config: ExperimentConfig, name: str, results: Path, max_failures: int = 10) -> dict[str, Any]:
    """Run an experiment on Ray Train workers; returns the last report. Run again under its name, it goes on.

    Writes ``results/name/``: experiment.yaml, report.json and adapter/, beside what Train keeps.

    Raises:
        ConfigError: a run of that name with another config.
        StreamError, ValueError: rows or a model that cannot be used, before any worker starts.
    """
    folder = (results / name).absolute()
    claim(folder / "experiment.yaml", config)
    online.start(config)  # finds bad rows and models while the error still has a reader
    cluster.connect(dashboard=True)
    result = cluster.run_workers(
        config.model_dump(mode="json"),
        name="train",
        storage=str(folder),
        max_failures=max_failures,
        labels={"run": name},
    )
    report = {key: value for key, value in result.metrics.items() if isinstance(value, str | int | float | bool)}
    with result.checkpoint.as_directory() as saved:
        save_adapter(online.trained_model(config, Path(saved)), folder / "adapter")
    (folder / "report.json").write_text(json.dumps(report, indent=1))
    return report


def claim(path: Path, config: BaseModel) -> None:
    """Write a config beside its results, or make sure that the results there are of this very config.

    A file of an earlier version, which lacks keys that are at their defaults here, is written anew.

    Raises:
        ConfigError: they are of another.
    """
    plain = config.model_dump(mode="json")
    text = yaml.safe_dump(plain, sort_keys=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    there = path.read_text() if path.exists() else None
    if there == text:
        return
    if there is not None:
        try:
            other = validate(type(config), yaml.safe_load(there), str(path)).model_dump(mode="json")
        except (ConfigError, yaml.YAMLError):
            other = {}
        if other != plain:
            differs = ", ".join(_differing(plain, other)[:5])
            raise ConfigError(
                f"{path.parent} holds the results of another config (differs: {differs}; compare {path} with yours); "
                "choose another folder or name for new results, or remove those"
            )
    fresh = path.with_suffix(".new")
    fresh.write_text(text)
    fresh.replace(path)  # all of it or nothing, whenever the job is killed


def _differing(ours: Any, theirs: Any, key: str = "") -> list[str]:
    """Dotted keys at which two plain configs differ."""
    if not (isinstance(ours, dict) and isinstance(theirs, dict)):
        return [] if ours == theirs else [key or "all of it"]
    return [
        found
        for name in dict.fromkeys([*ours, *theirs])
        for found in _differing(ours.get(name), theirs.get(name), f"{key}.{name}".removeprefix("."))
    ]


def _default_name(config: Path) -> str:
    return "-".join([*config.parent.parts[-1:], config.stem]) if config.parent.name else config.stem


def _print(report: dict[str, Any]) -> None:
    table = Table(show_header=False)
    for key in _SHOWN:
        if key in report:
            value = report[key]
            table.add_row(key, f"{value:.6f}" if isinstance(value, float) else str(value))
    Console().print(table)


if __name__ == "__main__":
    app()
