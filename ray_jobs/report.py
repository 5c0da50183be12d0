"""From a results folder to tables, plots and one self-contained HTML page.

python -m ray_jobs.report results/mnist
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import jinja2
import matplotlib as mpl
import numpy as np
import optuna
import pandas as pd
import typer
import yaml
from matplotlib import pyplot as plt
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from loko.config import ConfigError, validate
from ray_jobs.choice import Choice
from ray_jobs.cli import fail, make_app
from ray_jobs.places import Place, below
from ray_jobs.results import chosen, pareto
from ray_jobs.settings import SearchConfig, in_one_line
from ray_jobs.study import distribution

__all__ = ["write"]

app = make_app()

_COLORS = ("#0b6e99", "#d9480f", "#5f3dc4", "#2b8a3e", "#c2255c", "#a67c00", "#495057", "#1098ad")
_LABEL_ONLY = "#868e96"
_BETA = "optimizer.noise_decay"
_STARTS = {
    "optimizer.initial_covariance": "initial covariance p₀",
    "optimizer.prior_variance": "prior variance of a logit v",
}
_STYLE: Any = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e9ecef",
    "axes.edgecolor": "#adb5bd",
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "font.size": 10,
    "legend.frameon": False,
    "figure.dpi": 110,
    "savefig.bbox": "tight",
}


@app.command(help="Write the tables, plots and HTML page of a search from its results folder.")
def main(folder: Annotated[str, typer.Argument(help="results folder or URL, such as results/mnist")]) -> None:
    """Write a report again."""
    place = Place(folder)
    with fail(), place.working_folder() as here:
        write(here, location=folder)


@dataclass(frozen=True)
class _Results:
    """What a results folder holds."""

    config: SearchConfig
    rungs: pd.DataFrame  # a row a rung a trial
    stream: dict[str, Any]
    best: str

    @property
    def metric(self) -> str:
        return self.config.search.metric

    @property
    def quality(self) -> str:
        """accuracy, or mse for numbers."""
        return "accuracy" if "accuracy" in self.rungs else "mse"

    @cached_property
    def choices(self) -> dict[str, Choice | None]:
        """What is taken of each candidate, or None if none of its trials came to the end; every panel asks for it."""
        return {name: chosen(self.config, self.rungs, name) for name in self.config.candidates}

    def best_run(self, candidate: str) -> pd.DataFrame | None:
        """Rungs of the trial that is taken of a candidate."""
        choice = self.choices[candidate]
        return None if choice is None else choice.run

    def color(self, candidate: str) -> str:
        """A candidate has the same colour in every plot."""
        return _COLORS[list(self.config.candidates).index(candidate) % len(_COLORS)]


def write(folder: Path, console: Console | None = None, location: str | None = None) -> None:
    """Write report.html and plots/*.png into a results folder and print the table.

    Args:
        folder: the results folder.
        console: where the table is printed.
        location: what the user calls the folder, if not by its path.

    Raises:
        ConfigError: the folder holds no finished search.
    """
    results = _read(folder)
    rows = [_summary(results, name) for name in results.config.candidates]
    figures: list[tuple[str, str, Callable[[_Results], Figure | None]]] = [
        ("pareto", "What a better prediction costs", _trade_off),
        ("online", "Online NLL and " + results.quality, _online),
        ("landscape", "Initial covariance p₀ × noise decay β", _landscape),
        ("importance", "What mattered", _importance),
        ("filter", "Inside the filter", _traces),
    ]
    plots = []
    (folder / "plots").mkdir(exist_ok=True)
    with mpl.rc_context(_STYLE):
        for name, title, draw in figures:
            figure = draw(results)
            if figure is None:
                continue
            data = io.BytesIO()
            figure.savefig(data, format="png")
            plt.close(figure)
            (folder / "plots" / f"{name}.png").write_bytes(data.getvalue())
            plots.append({"title": title, "about": _ABOUT[name], "data": base64.b64encode(data.getvalue()).decode()})
    page = jinja2.Environment(
        loader=jinja2.PackageLoader("ray_jobs"), autoescape=True, undefined=jinja2.StrictUndefined
    ).get_template("report.html")
    html = page.render(
        name=results.config.name,
        headline=_headline(results, rows),
        columns=_columns(rows, tuple(rows[0])),
        rows=rows,
        front=_front(results),
        plots=plots,
        config=results.best,
        settings=results.config.search,
        stream=results.stream,
        folder=folder.name,
    )
    (folder / "report.html").write_text(html)
    _print(results, rows, location or str(folder), console or Console())


def _read(folder: Path) -> _Results:
    for name in ("search.yaml", "stream.json", "results.parquet", "best.yaml"):
        if not (folder / name).is_file():
            raise ConfigError(
                f"{folder} holds no finished search ({name} is missing); run python -m ray_jobs.tune first"
            )
    plain = yaml.safe_load((folder / "search.yaml").read_text())
    plain.setdefault("search", {}).setdefault("caution", 0.0)  # before there was any, the lowest was taken
    config = validate(SearchConfig, plain, str(folder / "search.yaml"))
    rungs = pd.read_parquet(folder / "results.parquet")
    stream = json.loads((folder / "stream.json").read_text())
    best = (folder / "best.yaml").read_text()
    return _Results(config, rungs, stream, best)


def _summary(results: _Results, candidate: str) -> dict[str, str]:
    trials = results.rungs[results.rungs.candidate == candidate].drop_duplicates("trial")
    counts = trials.status.value_counts()
    learned = results.rungs[results.rungs.candidate == candidate].groupby("trial").rows.max().sum()
    row = {
        "candidate": candidate,
        "trials": str(len(trials)),
        "stopped early": str(counts.get("stopped", 0)),
        "failed": str(counts.get("failed", 0)),
    }
    if results.config.search.budget is not None:
        row["rows learned"] = f"{learned:,}"
    choice = results.choices[candidate]
    last: Any = {} if choice is None else choice.run.iloc[-1].to_dict()
    quality = results.quality
    shown = ("nll", quality, "window_nll", f"window_{quality}", "heldout_nll", f"heldout_{quality}", "heldout_ece")
    row |= {key.replace("_", " "): _number(last.get(key)) for key in shown if key in results.rungs}
    row["ms a row"] = _number(1e3 * last["learn_seconds"] / last["rows"], 1) if last else ""
    settings = in_one_line(json.loads(last["params"]), 4) if last else "no trial came to the end"
    row["best settings"] = f"{settings} ({choice.about})" if choice is not None and choice.about else settings
    return row


def _headline(results: _Results, rows: list[dict[str, str]]) -> str:
    complete = [row for row in rows if row["nll"]]
    ranked = sorted(complete, key=lambda row: float(row["nll"]))
    text = f"{ranked[0]['candidate']} is ahead with an online NLL of {ranked[0]['nll']}"
    if len(ranked) > 1:
        text += ", before " + ", ".join(f"{row['candidate']} {row['nll']}" for row in ranked[1:])
    return text + f". Each had {results.config.search.limits}, all on the same {results.stream['rows']:,} rows."


def _front(results: _Results) -> list[dict[str, str]]:
    """The Pareto front of a search with several metrics, the first metric's best first."""
    objectives = results.config.search.objectives
    if len(objectives) == 1:
        return []
    return [
        {
            "candidate": row.candidate,
            **{key: f"{row[key]:.4g}" for key in objectives},
            "settings": in_one_line(json.loads(row.params), 4),
            "file": f"pareto/{place}-{row.candidate}.yaml",
        }
        for place, (_, row) in enumerate(pareto(results.rungs, objectives).iterrows(), start=1)
    ]


def _trade_off(results: _Results) -> Figure | None:
    """Complete trials by their first two metrics, the front joined by a line."""
    objectives = results.config.search.objectives
    if len(objectives) == 1:
        return None
    first, second = objectives[:2]
    last = results.rungs[results.rungs.status == "complete"].sort_values("rows").groupby("trial").tail(1)
    figure, axis = plt.subplots(figsize=(7, 4.2), layout="constrained")
    front = pareto(results.rungs, objectives).sort_values(second)
    if len(objectives) == 2:  # of more, the front is no line here
        axis.step(front[second], front[first], where="post", color="#adb5bd", lw=1.2, zorder=1)
    for name in results.config.candidates:
        mine = last[last.candidate == name]
        axis.scatter(mine[second], mine[first], color=results.color(name), label=name, s=45, zorder=2)
    axis.scatter(front[second], front[first], facecolors="none", edgecolors="#212529", s=95, linewidths=1.2, zorder=3)
    axis.set(xlabel=_words(second), ylabel=_words(first))
    if (last[second] > 0).all():
        _logarithmic(axis)
    _limit(axis, last[first].to_numpy(float))
    axis.legend()
    return figure


def _words(metric: str) -> str:
    words = {"nll": "online NLL", "mse": "online MSE"}
    return words.get(metric, metric.replace("_", " ").replace("nll", "NLL").replace("mse", "MSE"))


class _Plain(ticker.LogFormatter):
    """Labels those ticks that matplotlib would, with 0.02 instead of 2·10⁻²."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        return f"{x:g}" if super().__call__(x, pos) else ""


def _logarithmic(axis: Axes) -> None:
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter(_Plain())
    axis.xaxis.set_minor_formatter(_Plain(minor_thresholds=(1.5, 0.5)))


def _online(results: _Results) -> Figure:
    quality = results.quality
    window = results.config.experiment.window
    panels = (
        ("nll", "Online NLL, cumulative"),
        (quality, f"Online {quality}, cumulative"),
        ("window_nll", f"NLL, last {window} rows"),
        (f"window_{quality}", f"{quality.capitalize()}, last {window} rows"),
    )
    figure, axes = plt.subplots(2, 2, figsize=(11, 7), sharex=True, layout="constrained")
    for axis, (key, title) in zip(axes.flat, panels, strict=True):
        axis.set_title(title)
        for name in results.config.candidates:
            run = results.best_run(name)
            if run is not None:
                axis.plot(run.rows, run[key], color=results.color(name), label=name, lw=1.8, marker=_marker(run))
        some = results.rungs[results.rungs.status == "complete"].sort_values("rows").drop_duplicates("rows")
        if f"label_only_{key}" in some:
            axis.plot(some.rows, some[f"label_only_{key}"], color=_LABEL_ONLY, ls=":", label="label only")
        _mark_changes(axis, results)
        _mark_alarms(axis, results)
        if key.endswith("nll"):
            shown = [line.get_ydata() for line in axis.lines if len(np.atleast_1d(line.get_ydata())) > 2]
            _limit(axis, np.concatenate([np.asarray(y, float) for y in shown] or [np.zeros(0)]))
    for axis in axes[1]:
        axis.set_xlabel("rows")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return figure


def _marker(run: pd.DataFrame) -> str | None:
    """A run of one rung has no line to draw."""
    return "o" if len(run) == 1 else None


def _limit(axis: Axes, values: Any) -> None:
    """One diverged candidate must not flatten the others: the axis ends a little above where most of them are."""
    values = values[np.isfinite(values)]
    if not len(values):
        return
    top = 3 * np.quantile(values, 0.7)
    if values.max() > top:
        axis.set_ylim(0, top)


def _mark_changes(axis: Axes, results: _Results) -> None:
    for point in results.stream["change_points"]:
        axis.axvline(point["row"], color="#212529", lw=0.9, ls="--")
        axis.annotate(
            point["description"], (point["row"], 1), (4, -3), xycoords=("data", "axes fraction"),
            textcoords="offset points", rotation=90, va="top", fontsize=8, color="#495057",
        )  # fmt: skip


def _mark_alarms(axis: Axes, results: _Results) -> None:
    """Where a candidate's change detector sounded: the last alarm of each rung, on the edge."""
    for name in results.config.candidates:
        run = results.best_run(name)
        if run is None or "drift_row" not in run:
            continue
        for row in run.drift_row[run.drift_row > 0].unique():
            axis.plot(row, 0, "^", color=results.color(name), transform=axis.get_xaxis_transform(), clip_on=False, ms=7)


def _shared_rung(results: _Results, candidate: str) -> pd.DataFrame:
    """Every trial of a candidate at the last rung that all of them reached, so that they can be compared."""
    mine = results.rungs[results.rungs.candidate == candidate]
    if mine.empty:
        return mine.assign(values=[])
    rows = int(mine.groupby("trial").rows.max().min())
    at = mine[mine.rows == rows]
    return at.assign(values=[json.loads(params) for params in at.params])


def _landscape(results: _Results) -> Figure | None:
    starts = {
        name: key
        for name, candidate in results.config.candidates.items()
        for key in _STARTS
        if {key, _BETA} <= set(candidate.space)
    }
    searched = {name: _shared_rung(results, name) for name in starts}
    shown = {n: at[np.isfinite(at[results.metric])] for n, at in searched.items()}
    shown = {n: finite for n, finite in shown.items() if len(finite)}
    if not shown:
        return None
    figure, axes = plt.subplots(1, len(shown), figsize=(5.5 * len(shown), 4.2), squeeze=False, layout="constrained")
    for axis, (name, finite) in zip(axes[0], shown.items(), strict=True):
        start, beta = ([values[key] for values in finite["values"]] for key in (starts[name], _BETA))
        drawn = axis.scatter(
            start, beta, c=finite[results.metric], cmap="viridis_r", s=90, edgecolors="#212529",
            linewidths=[2.0 if status == "complete" else 0.4 for status in finite.status],
        )  # fmt: skip
        _logarithmic(axis)
        axis.set(title=name, xlabel=_STARTS[starts[name]], ylabel="noise decay β")
        figure.colorbar(drawn, ax=axis, label=f"{results.metric} at row {int(finite.rows.iloc[0])}")
    return figure


def _importance(results: _Results) -> Figure | None:
    found = {name: shares for name in results.config.candidates if (shares := _shares(results, name))}
    if not found:
        return None
    figure, axes = plt.subplots(1, len(found), figsize=(3.6 * len(found), 2.6), squeeze=False, layout="constrained")
    for axis, (name, shares) in zip(axes[0], found.items(), strict=True):
        keys = list(reversed(shares))
        axis.barh(
            [key.removeprefix("optimizer.") for key in keys], [shares[k] for k in keys], color=results.color(name)
        )
        axis.set(title=name, xlim=(0, 1), xlabel="share")
        axis.grid(axis="y", visible=False)
    return figure


def _shares(results: _Results, candidate: str) -> dict[str, float]:
    """Optuna's importances from all trials at the rung they share; needs a few trials and two keys."""
    space = results.config.candidates[candidate].space
    at = _shared_rung(results, candidate)
    at = at[np.isfinite(at[results.metric])]
    if len(space) < 2 or len(at) < 4 or at[results.metric].nunique() < 2:
        return {}
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study()
    distributions = {key: distribution(allowed) for key, allowed in space.items()}
    for value, params in zip(at[results.metric], at["values"], strict=True):
        study.add_trial(optuna.create_trial(params=params, distributions=distributions, value=float(value)))
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    return optuna.importance.get_param_importances(study, evaluator=evaluator)


def _traces(results: _Results) -> Figure | None:
    runs = {n: run for n in results.config.candidates if (run := results.best_run(n)) is not None}
    panels = (("trace_p", "Trace of P over its first value"), ("trace_r", "Trace of R"),
              ("consistency", "Normalised innovation eᵀS⁻¹e / N"))  # fmt: skip
    runs = {n: run for n, run in runs.items() if "trace_p" in run and run.trace_p.notna().any()}
    if not runs:
        return None
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
    for axis, (key, title) in zip(axes, panels, strict=True):
        axis.set(title=title, xlabel="rows")
        for name, run in runs.items():
            values = run[key] / run[key].iloc[0] if key == "trace_p" else run[key]
            axis.plot(run.rows, values, color=results.color(name), label=name, lw=1.6, marker=_marker(run))
        if key == "consistency":
            axis.axhline(1, color="#868e96", lw=0.8)
            axis.set_yscale("log")
        _mark_changes(axis, results)
    axes[0].legend()
    return figure


_ABOUT = {
    "pareto": "Every complete trial. Ringed: those on the Pareto front; no other trial is better in every metric. "
    "Left of and below the line there is none.",
    "online": "The trial that is taken of each candidate. Every row is predicted and scored before it is learned. The "
    "dotted line is a predictor that sees labels only; dashed lines mark where the stream changes, triangles "
    "the last alarm of a change detector (drift_detector) before each rung.",
    "landscape": "Every trial, coloured at the last rung that all of them reached. Thick rims: trials that ran to the "
    "end of the stream; thin rims: stopped early.",
    "importance": "Shares of the variance of the metric that each searched setting explains (fANOVA), over all trials "
    "at the rung they share. With few trials these are hints.",
    "filter": "How certain the filter has become (trace of the parameter covariance P), how noisy it thinks the labels "
    "are (trace of R), and how large its surprises are beside what it expected (one is consistent).",
}


_PRINTED = ("candidate", "trials", "stopped early", "failed", "nll", "accuracy", "mse", "heldout nll", "ms a row")


def _columns(rows: list[dict[str, str]], wanted: tuple[str, ...]) -> list[str]:
    """Those that are there and say something; settings stand below the table."""
    hidden = {"best settings"} | ({"failed"} if all(row["failed"] == "0" for row in rows) else set())
    return [column for column in wanted if column in rows[0] and column not in hidden]


def _print(results: _Results, rows: list[dict[str, str]], location: str, console: Console) -> None:
    table = Table(title=f"Search {results.config.name}", title_justify="left", show_edge=False)
    columns = _columns(rows, _PRINTED)
    for column in columns:
        table.add_column(column, justify="left" if column == "candidate" else "right", no_wrap=column == "candidate")
    for row in rows:
        table.add_row(*(row[column] for column in columns))
    console.print(table)
    for row in rows:
        console.print(f"  {row['candidate']}: {row['best settings']}", highlight=False, soft_wrap=True)
    console.print(_headline(results, rows), highlight=False, soft_wrap=True)
    if front := _front(results):
        table = Table(title="Pareto front: no trial is better in every metric", title_justify="left", show_edge=False)
        columns = [column for column in front[0] if column != "settings"]  # they are in the file
        for column in columns:
            numbers = column in results.config.search.objectives
            table.add_column(column, justify="right" if numbers else "left", overflow="fold")
        for row in front:
            table.add_row(*(row[column] for column in columns))
        console.print(table)
    console.print(f"Report: {below(location, 'report.html')}", highlight=False, soft_wrap=True)


def _number(value: Any, digits: int = 4) -> str:
    return "" if value is None or not np.isfinite(value) else f"{value:.{digits}f}"


if __name__ == "__main__":
    app()
