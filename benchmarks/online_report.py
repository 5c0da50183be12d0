"""What the online benchmark's cells say: table, goals, plot, and the README's passage, from the files alone."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks.goals import Goal
from benchmarks.online_streams import BATCH

_STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}


def is_filter(name: str) -> bool:
    """Whether an optimizer of the benchmark is a Kalman filter."""
    return name.startswith("loko")


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % interval by Student's t (NaN for one value)."""
    count = len(values)
    if count < 2:
        return (values[0] if count else math.nan), math.nan
    return statistics.fmean(values), _STUDENT.get(count, 2.0) * statistics.stdev(values) / math.sqrt(count)


def rows_to(run: pd.DataFrame, target: float) -> float:
    """The first rung from which on the cumulative NLL stays at or below a target; infinite if it never does."""
    above = run[run.nll > target].rows.max()
    later = run.rows if math.isnan(above) else run[run.rows > above].rows
    return float(later.min()) if len(later) else math.inf


def rows_to_recover(run: pd.DataFrame, share: float = 0.9) -> float:
    """Rows after the change until three rungs in a row reach ``share`` of the accuracy of the five before it."""
    change = run.change.iloc[0]
    correct = run.accuracy * run.rows
    rungs = pd.DataFrame(
        {"rows": run.rows, "accuracy": correct.diff().fillna(correct) / run.rows.diff().fillna(run.rows)}
    )
    before = rungs[rungs.rows <= change].accuracy.tail(5).mean()
    after = rungs[rungs.rows > change]
    good = (after.accuracy >= share * before).rolling(3).sum() == 3
    return float(after.rows[good].min() - change) if good.any() else math.inf


def last(table: pd.DataFrame, stream: str, name: str, key: str) -> dict[int, float]:
    """A figure at the end of the stream, by order."""
    chosen = table[(table.stream == stream) & (table.optimizer == name) & table.finished]
    return dict(zip(chosen.order, chosen[key], strict=True)) if key in chosen else {}


def paired(table: pd.DataFrame, stream: str, name: str, other: str) -> tuple[float, float]:
    """Mean and half interval of the difference of online NLL between two optimizers, by order."""
    ours, theirs = last(table, stream, name, "nll"), last(table, stream, other, "nll")
    return interval([ours[order] - theirs[order] for order in ours if order in theirs])


def best_gradient(table: pd.DataFrame, stream: str) -> str | None:
    """The tuned gradient optimizer with the lowest mean online NLL."""
    means = {
        name: statistics.fmean(values.values())
        for name in dict.fromkeys(table.optimizer)
        if not is_filter(name) and (values := last(table, stream, name, "nll"))
    }
    return min(means, key=lambda name: means[name]) if means else None


def goals(table: pd.DataFrame) -> list[Goal]:
    """The figures that the filter was meant to reach, over the streams measured."""
    names = list(dict.fromkeys(table.stream)) if len(table) else []
    rivals = {name: rival for name in names if (rival := best_gradient(table, name)) is not None}
    lines: list[Goal] = []
    for filtered, allowed in (("loko-default", 1), ("loko-tuned", 0)):
        ours = {n: r for n, r in rivals.items() if last(table, n, filtered, "nll")}
        if not ours:
            continue
        differences = {n: paired(table, n, filtered, r) for n, r in ours.items()}
        if filtered == "loko-default":
            won = sum(mean <= 0 for mean, _ in differences.values())
            title = f"streams of {len(ours)} on which {filtered} is at or below every tuned gradient optimizer"
        else:
            won = sum(mean + half < 0 for mean, half in differences.values())
            title = f"streams of {len(ours)} on which {filtered} is below the best by more than the 95 % interval"
        needed = max(1, len(ours) - allowed)
        lines.append(Goal(title, f">= {needed}", won, won >= needed))
        ratios = [
            statistics.fmean(last(table, n, filtered, "nll").values())
            / statistics.fmean(last(table, n, r, "nll").values())
            for n, r in ours.items()
        ]
        mean = statistics.geometric_mean(ratios)
        lines.append(
            Goal(f"online NLL, {filtered} / best tuned gradient, geometric mean", "<= 0.85", mean, mean <= 0.85)
        )
    shares, recovered = [], []
    for name in names:
        for order, target in last(table, name, "adamw", "nll").items():
            run = table[(table.stream == name) & (table.optimizer == "loko-default") & (table.order == order)]
            adamw = table[(table.stream == name) & (table.optimizer == "adamw") & (table.order == order)]
            if not len(run):
                continue
            shares.append(rows_to(run, target) / float(adamw.rows.max()))
            if run.change.notna().all():
                ours_back, theirs_back = rows_to_recover(run), rows_to_recover(adamw)
                if math.isfinite(min(ours_back, theirs_back)):
                    recovered.append(ours_back / theirs_back)  # zero where AdamW never does
    if shares:
        value = statistics.median(shares)
        lines.append(Goal("rows to AdamW's final NLL, loko-default / AdamW, median", "<= 0.5", value, value <= 0.5))
    if recovered:
        value = statistics.median(recovered)
        title = "rows to 90 % of the accuracy before a drift, loko-default / AdamW, median"
        lines.append(Goal(title, "<= 0.5", value, value <= 0.5))
    return lines


_COLUMNS = {
    "window_nll": "last 500",
    "accuracy": "accuracy",
    "near_future_accuracy": "near future",
    "heldout_accuracy": "held-out",
    "heldout_ece": "ECE",
}


def summary(table: pd.DataFrame) -> list[list[str]]:
    """Rows of the table: a stream's optimizers, the best online NLL first, behind them who sees labels only."""
    lines: list[list[str]] = []
    for stream in dict.fromkeys(table.stream):
        rival = best_gradient(table, stream)
        present = [n for n in dict.fromkeys(table.optimizer) if last(table, stream, n, "nll")]
        for name in sorted(present, key=lambda n: statistics.fmean(last(table, stream, n, "nll").values())):
            mean, half = interval(list(last(table, stream, name, "nll").values()))
            against = (
                "" if rival in (None, name) else "{:+.3f} ± {:.3f}".format(*paired(table, stream, name, str(rival)))
            )
            others = [interval(list(last(table, stream, name, key).values()))[0] for key in _COLUMNS]
            seconds, rows = (
                interval(list(last(table, stream, name, k).values()))[0] for k in ("learn_cpu_seconds", "rows")
            )
            memory = interval(list(last(table, stream, name, "peak_megabytes").values()))[0]
            runs = table[(table.stream == stream) & (table.optimizer == name)].groupby("order")
            back = [rows_to_recover(run) for _, run in runs if run.change.notna().all()]
            targets = last(table, stream, "adamw", "nll")
            reached = [to_target(run, targets[order]) for order, run in runs if order in targets]
            shown = [f"{value:.3f}" for value in others]
            medians = [_median(back), *(_median([one[i] for one in reached], digits) for i, digits in ((0, 0), (1, 1)))]
            costs = [f"{1e3 * seconds / rows * BATCH:.0f}", f"{memory:.0f}"]
            lines.append([stream, name, f"{mean:.3f} ± {half:.3f}", against, *shown, *medians, *costs])
        labels = last(table, stream, present[0], "label_only_nll").values()
        lines.append([stream, "labels only", f"{statistics.fmean(labels):.3f}", *[""] * (len(HEAD) - 3)])
    return lines


def to_target(run: pd.DataFrame, target: float) -> tuple[float, float]:
    """Rows, and seconds of learning, to a cumulative NLL that the run stays at or below; infinite if it never does."""
    rows = rows_to(run, target)
    seconds = run[run.rows == rows].learn_cpu_seconds
    return rows, float(seconds.iloc[0]) if len(seconds) else math.inf


def _median(values: Sequence[float], digits: int = 0) -> str:
    if not values:
        return ""
    middle = statistics.median(values)
    return f"{middle:.{digits}f}" if math.isfinite(middle) else "never"


HEAD = [
    "stream",
    "optimizer",
    "online NLL",
    "− best gradient",
    *_COLUMNS.values(),
    "rows to recover",
    "rows to AdamW's NLL",
    "seconds to it",
    "ms a step",
    "MiB",
]


def plot(table: pd.DataFrame, path: Path) -> None:
    """Mean NLL of each stretch of rows over the orders, a panel a stream."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(table.stream))
    columns = min(4, len(names) + 1)
    lines = -(-(len(names) + 1) // columns)  # one place more, for the legend
    figure, grid = plt.subplots(
        lines, columns, figsize=(3.7 * columns, 3.1 * lines), squeeze=False, layout="constrained"
    )
    axes = list(grid.flat)
    everyone = list(dict.fromkeys(table.optimizer))
    colours = {name: plt.get_cmap("tab20")(i % 20) for i, name in enumerate(everyone)}
    for axis, stream in zip(axes, names, strict=False):
        for name in dict.fromkeys(table[table.stream == stream].optimizer):
            runs = table[(table.stream == stream) & (table.optimizer == name)]
            curves = runs.pivot_table(index="rows", columns="order", values="nll").mul(runs.rows.unique(), axis=0)
            steps = np.diff(curves.index.to_numpy(), prepend=0)[:, None]
            local = (curves.diff().fillna(curves) / steps).mean(axis=1).rolling(5, min_periods=1).mean()
            style = {"lw": 2.0} if is_filter(name) else {"lw": 1.1, "ls": "--"}
            layer = 3 if name == "loko-default" else 2
            axis.plot(local.index, local, label=name, color=colours[name], zorder=layer, **style)
        change = table[table.stream == stream].change.dropna()
        if len(change):
            axis.axvline(change.iloc[0], color="#868e96", lw=0.8)
        axis.set(title=stream, xlabel="rows", ylabel="NLL, last five rungs")
        lowest = min(line.get_ydata().min() for line in axis.get_lines() if len(line.get_ydata()) > 2)
        highest = float(np.nanpercentile(table[table.stream == stream].nll, 97)) * 1.05
        axis.set_ylim(lowest - 0.05 * (highest - lowest), highest)
    for axis in axes[len(names) :]:
        axis.axis("off")
    handles = [plt.Line2D([], [], color=colours[n], lw=2, ls="-" if is_filter(n) else "--", label=n) for n in everyone]
    axes[len(names)].legend(handles=handles, loc="center", ncols=1 + (len(everyone) > 9), frameon=False, fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *lines]) + "\n"


def overview(table: pd.DataFrame) -> str:
    """Mean online NLL of every optimizer on every stream, the lowest in bold, as a table in Markdown."""
    streams = list(dict.fromkeys(table.stream))
    means: dict[str, dict[str, float]] = {}
    for name in dict.fromkeys(table.optimizer):
        found = {stream: last(table, stream, name, "nll") for stream in streams}
        means[name] = {stream: statistics.fmean(values.values()) for stream, values in found.items() if values}
    labels = {s: statistics.fmean(table[(table.stream == s) & table.finished].label_only_nll) for s in streams}
    best = {stream: min(values[stream] for values in means.values() if stream in values) for stream in streams}

    def cell(stream: str, values: dict[str, float]) -> str:
        if stream not in values:
            return ""
        return f"**{values[stream]:.3f}**" if values[stream] == best[stream] else f"{values[stream]:.3f}"

    lines = [[name, *(cell(stream, values) for stream in streams)] for name, values in means.items()]
    lines.append(["labels only", *(f"{labels[stream]:.3f}" for stream in streams)])
    return markdown(["online NLL", *streams], lines)


def publish(readme: Path, passage: str, mark: str = "online") -> None:
    """Put a generated passage into a README, between ``<!-- online -->`` and ``<!-- /online -->``.

    Raises:
        ValueError: the README has no such place.
    """
    text = readme.read_text()
    opening, closing = f"<!-- {mark} -->\n", f"<!-- /{mark} -->"
    start, end = text.find(opening), text.find(closing)
    if start < 0 or end < start:
        raise ValueError(f"{readme.name} has no passage between {opening.strip()} and {closing}")
    readme.write_text(text[: start + len(opening)] + passage + text[end:])
