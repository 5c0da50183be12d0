"""Metrics for Prometheus: what a run reports is what is set, and the dashboard asks for nothing else."""

import json
import math
import re
from typing import Any

import jobs
import pytest

from ray_jobs import monitoring
from ray_jobs.monitoring import COUNTERS, GAUGES, TAGS, Monitor

DASHBOARD = json.loads((jobs.ROOT / "ray_jobs" / "dashboards" / "loko.json").read_text())
LABELS = {"run": "mnist", "candidate": "loko", "trial": "1"}


class Recorded:
    """A metric that remembers."""

    values: dict[str, float]

    def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
        self._name = name
        assert tag_keys == TAGS
        assert description

    def set(self, value: float, tags: dict[str, str]) -> None:
        assert tags == LABELS
        self.values[self._name] = value

    def inc(self, value: float, tags: dict[str, str]) -> None:
        assert tags == LABELS
        self.values[self._name] = self.values.get(self._name, 0) + value


@pytest.fixture
def values(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    Recorded.values = {}
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr(monitoring, "Gauge", Recorded)
    monkeypatch.setattr(monitoring, "Counter", Recorded)
    monkeypatch.setattr(monitoring.time, "perf_counter", lambda: next(clock))
    return Recorded.values


def report(rows: int, **more: Any) -> dict[str, Any]:
    return {"rows": rows, "nll": 0.5, "skipped_rows": 0.0, "rows_digest": "ab", "finished": False, **more}


def test_a_rung_sets_what_it_says(values: dict[str, float]) -> None:
    monitor = Monitor(LABELS)
    monitor(report(200, trace_p=3.0, consistency=math.nan))
    assert values == {"loko_rows_per_second": 20.0, "loko_nll": 0.5, "loko_trace_p": 3.0, "loko_rows": 200}
    monitor(report(300, skipped_rows=8.0))
    assert (values["loko_rows"], values["loko_skipped_rows"], values["loko_rows_per_second"]) == (300, 8, 10.0)


def test_a_resumed_run_counts_only_what_is_new(values: dict[str, float]) -> None:
    monitor = Monitor(LABELS, rows=200)
    monitor(report(200, skipped_rows=8.0))  # the rung that it goes on from is reported again
    assert "loko_rows" not in values
    assert "loko_rows_per_second" not in values
    monitor(report(250, skipped_rows=12.0, drifts=1.0))
    assert (values["loko_rows"], values["loko_skipped_rows"], values["loko_drifts"]) == (50, 4, 1)


def test_the_dashboard_asks_for_what_is_exported() -> None:
    expressions = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
    queries = [one["query"]["query"] for one in DASHBOARD["templating"]["list"] if isinstance(one["query"], dict)]
    asked = set(re.findall(r"ray_loko_\w+", " ".join(expressions + queries)))
    assert asked == {f"ray_{name}" for name in GAUGES} | {f"ray_{name}_total" for name in COUNTERS}
    labels = set(re.findall(r"(\w+)=~", " ".join(expressions)))
    assert labels - {"SessionName"} <= set(TAGS)
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
