"""What a benchmark was meant to reach and what it reached: one shape for every benchmark, printed and as JSON."""

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_PACKAGES = ("torch", "peft", "transformers", "pyarrow", "numpy", "ray", "optuna")


@dataclass(frozen=True)
class Goal:
    """One line of the goal table: its name, the goal in words, the measured figure and whether it meets the goal."""

    name: str
    goal: str
    measured: float
    met: bool


def machine() -> dict[str, Any]:
    """What the figures depend on: processors, versions, date."""
    return {
        "cpus": os.cpu_count(),
        "processor": platform.processor() or platform.machine(),
        "system": platform.system(),
        "python": platform.python_version(),
        "packages": {name: found for name in _PACKAGES if (found := _version(name))},
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def write(path: Path, goals: Sequence[Goal], **extra: Any) -> None:
    """Write the goals, the machine and whatever else the benchmark measured as one JSON object."""
    path.parent.mkdir(parents=True, exist_ok=True)
    result = {"goals": [asdict(goal) for goal in goals], "machine": machine(), **extra}
    path.write_text(json.dumps(result, indent=2) + "\n")


def print_goals(goals: Sequence[Goal]) -> None:
    """Print the goal lines: the end of every benchmark's table."""
    for goal in goals:
        print(f"{'met' if goal.met else 'MISSED':6}  {goal.name}: {goal.measured:.4g} (goal: {goal.goal})")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
