"""The search in the terminal: a live table of candidates, or a line a trial where the output is no terminal."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from ray import tune
from rich.console import Console
from rich.live import Live
from rich.table import Table

from ray_jobs.settings import SearchConfig, in_one_line
from ray_jobs.study import Spent

__all__ = ["Progress"]


@dataclass
class _Candidate:
    running: dict[str, int] = field(default_factory=dict)
    finished: int = 0
    stopped: int = 0
    failed: int = 0
    best: float | None = None
    best_accuracy: float | None = None
    best_values: str = ""


class ReportProgress(tune.Callback):
    """Passes on what Tune tells of trials. Tune pickles it with the experiment, so it holds a name only."""

    def __init__(self, candidate: str) -> None:
        self._candidate = candidate

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any) -> None:
        if _active is not None:
            _active.rung(self._candidate, trial.trial_id, int(result.get("rows", 0)))

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        if _active is not None:
            _active.end(self._candidate, trial.trial_id, trial.last_result, trial.config, failed=False)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        if _active is not None:
            _active.end(self._candidate, trial.trial_id, trial.last_result, trial.config, failed=True)


class Progress:
    """Counts and best results of every candidate; a context manager around the whole search."""

    def __init__(self, config: SearchConfig) -> None:
        self._metrics = config.search.objectives
        self._metric = self._metrics[0]
        self._trials = config.search.trials
        self._limits = config.search.limits
        self._candidates = {name: _Candidate() for name in config.candidates}
        self._current = ""
        self._console = Console()
        self._live: Live | None = None
        self._started = time.monotonic()
        self._title = config.name

    def __enter__(self) -> Progress:
        global _active
        _active = self
        if self._console.is_terminal:
            self._live = Live(get_renderable=self._table, console=self._console, refresh_per_second=2)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        global _active
        _active = None
        if self._live is not None:
            self._live.stop()

    def begin(self, candidate: str) -> None:
        """The trials that follow are this candidate's."""
        self._current = candidate
        if self._live is None:
            self._say(f"[{self._clock()}] {candidate}: {self._limits}")

    def rung(self, candidate: str, trial: str, rows: int) -> None:
        """A trial has come this far."""
        self._candidates[candidate].running[trial] = rows

    def end(self, candidate: str, trial: str, result: dict[str, Any], values: dict[str, Any], failed: bool) -> None:
        """A trial's end, by itself, by the scheduler or by an error."""
        state = self._candidates[candidate]
        state.running.pop(trial, None)
        state.finished += 1
        whole = bool(result.get("finished"))
        state.failed += failed
        state.stopped += not whole and not failed
        if whole and not failed:
            self._note_best(state, result, values)
        if self._live is None:
            figures = (f"{key} {result.get(key, float('nan')):.4g}" for key in self._metrics)
            what = "failed" if failed else ", ".join(figures)
            rows = int(result.get("rows", 0))
            note = "" if whole or failed else f" (stopped at row {rows})"
            self._say(f"[{self._clock()}] {candidate} {self._count(state)}: {what}{note}  {in_one_line(values, 3)}")

    def spent(self, candidate: str, cost: Spent) -> None:
        """A candidate's budget is spent, and no trial runs any more."""
        clock = f"{int(cost.seconds) // 60}:{int(cost.seconds) % 60:02d}"
        self._say(
            f"[{self._clock()}] {candidate}: budget spent, {cost.rows:,} rows in {cost.trials} trials and {clock}"
        )

    def _say(self, line: str) -> None:
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    def _note_best(self, state: _Candidate, result: dict[str, Any], values: dict[str, Any]) -> None:
        score = float(result[self._metric])
        if state.best is None or score < state.best:
            state.best, state.best_accuracy, state.best_values = score, result.get("accuracy"), in_one_line(values, 3)

    def _count(self, state: _Candidate) -> str:
        return str(state.finished) if self._trials is None else f"{state.finished}/{self._trials}"

    def _clock(self) -> str:
        seconds = int(time.monotonic() - self._started)
        return f"{seconds // 60}:{seconds % 60:02d}"

    def _table(self) -> Table:
        table = Table(title=f"{self._title}  {self._clock()}", title_justify="left")
        for text in ("candidate", "running, at row", "with"):
            table.add_column(text)
        for number in ("trials", "stopped early", f"best {self._metric}", "accuracy"):
            table.add_column(number, justify="right")
        for name, state in self._candidates.items():
            table.add_row(
                name,
                ", ".join(str(rows) for rows in state.running.values()),
                state.best_values,
                self._count(state) + (f" ({state.failed} failed)" if state.failed else ""),
                str(state.stopped or ""),
                "" if state.best is None else f"{state.best:.4f}",
                "" if state.best_accuracy is None else f"{state.best_accuracy:.3f}",
            )
        return table


_active: Progress | None = None
