"""A search of packed trials, from its file to its results."""

import json
import subprocess
from pathlib import Path
from typing import Any

import jobs
import pandas as pd
import psutil
import pytest
import test_tune
import yaml

from loko import online
from loko.config import ConfigError, ExperimentConfig, validate
from ray_jobs.settings import SearchConfig, read

SEARCH = {"trials": 4, "pack": 3, "asha": {"grace_rows": 48, "reduction_factor": 2}}


def same_as_alone(folder: Path, rungs: pd.DataFrame) -> None:
    """Each trial's figures are those of the loop by itself, without Ray and without a pack."""
    config = read(SearchConfig, folder / "search.yaml", [])
    for _, mine in rungs.groupby("trial"):
        plain = config.experiment_of(mine.candidate.iloc[0], json.loads(mine.params.iloc[0]))
        alone = list(online.advance(online.start(validate(ExperimentConfig, plain))))
        expected = [report["nll"] for report in alone][: len(mine)]
        assert list(mine.nll) == pytest.approx(expected, abs=1e-5)


@pytest.mark.slow
@pytest.mark.ray
def test_a_packed_search_leaves_what_any_search_does(tmp_path: Path) -> None:
    done = jobs.run("ray_jobs.tune", jobs.search(tmp_path, search=SEARCH))
    assert done.returncode == 0, done.stdout + done.stderr
    same_as_alone(tmp_path, test_tune.check(tmp_path))


@pytest.mark.slow
@pytest.mark.ray
def test_trials_outlive_their_host(tmp_path: Path) -> None:
    """SIGKILL of the process that learns for all trials, twice: each trial goes on from its last rung in a new one."""
    path = jobs.search(tmp_path, rows=480, search={"trials": 3, "pack": 3, "concurrent": 3, "asha": None})
    plain = yaml.safe_load(path.read_text())
    del plain["candidates"]["adamw"]
    path.write_text(yaml.safe_dump(plain))
    results, log = tmp_path / "results", tmp_path / "log"
    with jobs.started("ray_jobs.tune", path, when=lambda: test_tune.progressed(results, "loko", 4), log=log) as process:
        first = hosts_of(process)
        first[0].kill()
        jobs.wait_until(lambda: test_tune.progressed(results, "loko", 12), process, log)
        second = hosts_of(process)
        assert first[0] not in second
        second[0].kill()
        assert process.wait(jobs.LIMIT) == 0, log.read_text()
    rungs = test_tune.check(tmp_path)
    assert set(rungs.status) == {"complete"}
    same_as_alone(tmp_path, rungs)


def hosts_of(process: subprocess.Popen[Any]) -> list[psutil.Process]:
    """The processes of a search that hold a backbone each, by the name that Ray gives them."""
    family = psutil.Process(process.pid).children(recursive=True)
    return [one for one in family if " ".join(one.cmdline()).startswith("ray::Host")]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"experiment.workers": 2}, r"packs trials of one worker, and experiment\.workers = 2"),
        (
            {"candidates.loko.space": {"task.adapter.rank": {"integer": [1, 4]}}, "candidates.loko.points": []},
            r"candidates\.loko\.space has task\.adapter\.rank; take those out, or search\.pack: 1",
        ),
    ],
)
def test_a_search_that_cannot_be_packed_says_why(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    path = jobs.search(tmp_path, search=SEARCH)
    plain = yaml.safe_load(path.read_text())
    for dotted, value in changes.items():
        *parents, last = dotted.split(".")
        place = plain
        for parent in parents:
            place = place[parent]
        place[last] = value
    path.write_text(yaml.safe_dump(plain))
    with pytest.raises(ConfigError, match=message):
        read(SearchConfig, path, [])
