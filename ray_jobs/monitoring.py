"""What a run says of itself, for Prometheus, through Ray's own metrics: every node exports what its workers set."""

from __future__ import annotations

import math
import time
from typing import Any

from ray.util.metrics import Counter, Gauge

__all__ = ["COUNTERS", "GAUGES", "Monitor"]

TAGS = ("run", "candidate", "trial")
GAUGES = {
    "loko_rows_per_second": "rows learned a second since the last rung, with all that goes on between rungs",
    "loko_nll": "online negative log-likelihood, cumulative",
    "loko_window_nll": "online negative log-likelihood of the window",
    "loko_window_accuracy": "online accuracy of the window",
    "loko_gain": "share of a batch's innovation that the filter believes, 0 to 1",
    "loko_trace_p": "trace of the parameter covariance P",
    "loko_trace_r": "trace of the observation noise R",
    "loko_consistency": "normalised innovation squared over its degrees of freedom; 1 is consistent",
    "loko_surprise": "consistency of the last steps over the usual; an alarm for drift",
}
COUNTERS = {
    "loko_rows": "rows learned",
    "loko_skipped_rows": "rows of batches that were skipped for not being finite",
    "loko_drifts": "alarms of the change detector",
}


class Monitor:
    """Sets the metrics of one run at each of its rungs.

    Prometheus sees them as ``ray_loko_...``, the counters with ``_total`` behind, labelled by run, candidate and trial.

    Args:
        labels: run, candidate and trial.
        rows: rows learned before this process took over, which another one has counted.
    """

    def __init__(self, labels: dict[str, str], rows: int = 0) -> None:
        self._labels = {tag: labels.get(tag, "") for tag in TAGS}
        self._gauges = {name: Gauge(name, description=text, tag_keys=TAGS) for name, text in GAUGES.items()}
        self._counters = {name: Counter(name, description=text, tag_keys=TAGS) for name, text in COUNTERS.items()}
        self._told: dict[str, int] | None = None if rows else dict.fromkeys(COUNTERS, 0)
        self._rows = rows
        self._since = time.perf_counter()

    def __call__(self, report: dict[str, Any]) -> None:
        """Take a report of the loop."""
        now, rows = time.perf_counter(), int(report["rows"])
        counts = {name: int(report.get(name.removeprefix("loko_"), 0)) for name in COUNTERS}
        values = {name: report.get(name.removeprefix("loko_")) for name in GAUGES}
        if rows > self._rows:
            values["loko_rows_per_second"] = (rows - self._rows) / (now - self._since)
        for name, value in values.items():
            if value is not None and math.isfinite(value):
                self._gauges[name].set(float(value), self._labels)
        before = {**(counts if self._told is None else self._told), "loko_rows": self._rows}
        for name, count in counts.items():
            if count > before[name]:
                self._counters[name].inc(count - before[name], self._labels)
        self._rows, self._told, self._since = rows, counts, now
