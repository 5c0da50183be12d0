"""Whole searches of other kinds, from their file to their results: several metrics, budgets, a start, a bucket."""

import json
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jobs
import pandas as pd
import pytest
import yaml
from optuna.trial import TrialState
from pyarrow import fs
from test_cluster import free_ports
from test_tune import check, trials_of

from loko import online
from loko.config import ExperimentConfig
from ray_jobs.places import Place
from ray_jobs.settings import SearchConfig, read

pytestmark = [pytest.mark.ray, pytest.mark.slow]

ROWS = 96


def search(folder: Path, **settings: Any) -> subprocess.CompletedProcess[str]:
    """A search of one candidate in this folder, a trial at a time, run to its end."""
    folder.mkdir(exist_ok=True)
    path = jobs.search(folder, ROWS, search={"concurrent": 1, **settings})
    plain = yaml.safe_load(path.read_text())
    del plain["candidates"]["adamw"]
    path.write_text(yaml.safe_dump(plain))
    done = jobs.run("ray_jobs.tune", path)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def rungs_of(folder: Path) -> pd.DataFrame:
    return pd.read_parquet(folder / "results" / "results.parquet")


@pytest.fixture(scope="module")
def spent(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A search with a budget in rows, and what it said."""
    folder = tmp_path_factory.mktemp("spent")
    return folder, search(folder, trials=None, budget={"rows": 250}, asha=None).stdout


def test_several_metrics_leave_a_front(tmp_path: Path) -> None:
    path = jobs.search(
        tmp_path, ROWS, search={"trials": 4, "metrics": ["nll", "seconds_per_row"], "asha": None, "caution": 0}
    )
    done = jobs.run("ray_jobs.tune", path)
    assert done.returncode == 0, done.stdout + done.stderr
    results, config = tmp_path / "results", read(SearchConfig, path, [])
    # The front over both candidates, from what Optuna wrote down.
    told = [(name, t) for name, trials in trials_of(tmp_path, config).items() for t in trials]
    assert [t.state for _, t in told] == [TrialState.COMPLETE] * 8
    front = sorted(
        (*t.values, name, json.dumps(t.params, sort_keys=True))
        for name, t in told
        if not any(o.values[0] <= t.values[0] and o.values[1] <= t.values[1] for _, o in told if o is not t)
    )
    table = pd.read_csv(results / "pareto" / "front.csv")
    params = [json.dumps(json.loads(text), sort_keys=True) for text in table.params]
    assert list(zip(table.nll, table.seconds_per_row, table.candidate, params, strict=True)) == front
    # The cheapest and the best are on it, whatever else is, and each is a config that runs as it is.
    assert table.nll.min() == min(t.values[0] for _, t in told)
    assert table.seconds_per_row.min() == min(t.values[1] for _, t in told)
    assert sorted(path.name for path in (results / "pareto").glob("*.yaml")) == sorted(table.file)
    for name, nll in zip(table.file, table.nll, strict=True):
        *_, last = online.advance(online.start(read(ExperimentConfig, results / "pareto" / name, [])))
        assert last["nll"] == pytest.approx(nll, abs=1e-12)
    assert yaml.safe_load((results / "best.yaml").read_text()) == yaml.safe_load(
        (results / "pareto" / table.file[0]).read_text()
    )
    page = (results / "report.html").read_text()
    assert "What a better prediction costs" in page
    for name in table.file:  # whole, in the terminal as in the report
        assert f"pareto/{name}" in done.stdout
        assert f"pareto/{name}" in page


def test_a_budget_in_rows_is_kept_to_the_rung(spent: tuple[Path, str]) -> None:
    folder, said = spent
    ends = rungs_of(folder).groupby("trial").rows.max()
    # 96 + 96, then the third trial is over at the first rung at which 250 rows are spent.
    assert sorted(ends) == [72, 96, 96]
    assert "loko: as many trials as 250 rows allow" in said
    assert re.search(r"loko: budget spent, 264 rows in 3 trials and \d+:\d\d", said)
    assert "as many trials as 250 rows allow" in (folder / "results" / "report.html").read_text()


def test_a_budget_in_hours_always_pays_for_a_result(tmp_path: Path) -> None:
    done = search(tmp_path, trials=None, budget={"hours": 1e-6}, asha=None)
    rungs = rungs_of(tmp_path)
    assert rungs.trial.nunique() == 1
    assert rungs.status.unique() == ["complete"]
    assert re.search(r"loko: budget spent, 96 rows in 1 trials and \d+:\d\d", done.stdout)


def test_an_earlier_search_is_a_start(spent: tuple[Path, str], tmp_path: Path) -> None:
    # The same rows, made again in another folder: the earlier figures stand beside the new ones.
    earlier, new = spent[0], tmp_path
    done = search(new, trials=2, asha=None, warm_start=str(earlier / "results"))
    assert f"loko: 3 earlier trials of {earlier / 'results'} added" in done.stdout
    rungs = rungs_of(new)
    assert rungs.trial.nunique() == 2  # only what was run here is in the results
    config = read(SearchConfig, new / "search.yaml", [])
    trials = trials_of(new, config)["loko"]
    before = {json.dumps(json.loads(p), sort_keys=True): v for p, v in _finals(rungs_of(earlier))}
    mine = {json.dumps(json.loads(p), sort_keys=True): v for p, v in _finals(rungs)}
    assert {json.dumps(t.params, sort_keys=True): t.value for t in trials} == pytest.approx({**before, **mine})
    # A given point is tried by both; what the sampler drew was not drawn again.
    assert len(before.keys() & mine.keys()) == 1
    assert "starting from what" in (new / "results" / "report.html").read_text()


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A bucket of an S3 server on loopback, and the environment of those who use it.

    The server is moto's. It cannot be installed beside Optuna's and matplotlib's dateutil, so it is a program here.
    """
    program = shutil.which("moto_server")
    if program is None:
        pytest.skip("moto_server is not here; pip install 'moto[server]' into an environment of its own, on the PATH")
    for key, value in {"ACCESS_KEY_ID": "x", "SECRET_ACCESS_KEY": "x", "DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(f"AWS_{key}", value)
    (port,) = free_ports(1)
    log = tmp_path_factory.mktemp("s3") / "log"
    # Small files in one request: Arrow does not take moto's answer to the end of a multipart upload.
    query = f"endpoint_override=127.0.0.1:{port}&scheme=http&allow_delayed_open=true"
    with log.open("w") as file:
        server = subprocess.Popen([program, "-H", "127.0.0.1", "-p", str(port)], stdout=file, stderr=file)
    try:
        jobs.wait_until(lambda: listens(port), server, log)
        fs.FileSystem.from_uri(f"s3://loko?{query}&allow_bucket_creation=true")[0].create_dir("loko")
        yield f"s3://loko/searches/tiny?{query}"
    finally:
        server.terminate()
        server.wait()


def listens(port: int) -> bool:
    with socket.socket() as one:
        return one.connect_ex(("127.0.0.1", port)) == 0


def test_results_in_a_bucket(bucket: str, tmp_path: Path) -> None:
    """Killed, and run again on the same bucket: the files and figures of any search, and none of them here."""
    results, log = tmp_path / "results", tmp_path / "log"
    results.mkdir()
    search = {"trials": 2, "asha": None, "caution": 0, "storage": f"sqlite:///{results / 'study.db'}"}
    path = jobs.search(tmp_path, rows=400, results=bucket, search=search)
    place = Place(bucket)

    def progressed() -> bool:
        return any("checkpoint_000003" in place.names("tune", "loko", trial) for trial in place.names("tune", "loko"))

    jobs.run_and_kill("ray_jobs.tune", path, when=progressed, log=log)
    done = jobs.run("ray_jobs.tune", path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"Report: {place.at('report.html')}" in done.stdout
    assert [one.name for one in results.iterdir()] == ["study.db"]
    with place.working_folder() as copy:
        shutil.copytree(copy, results, dirs_exist_ok=True)
    check(tmp_path)
    assert {"adapter", "best.yaml", "plots", "report.html", "results.parquet", "search.yaml"} <= set(place.names())
    # The report again, and the winner, from what lies in the bucket.
    again = jobs.run("ray_jobs.report", bucket)
    assert again.returncode == 0, again.stdout + again.stderr
    *_, last = online.advance(online.start(read(ExperimentConfig, results / "best.yaml", [])))
    assert last["nll"] == pytest.approx(rungs_of(tmp_path).query("finished").nll.min(), abs=1e-12)


def _finals(rungs: pd.DataFrame) -> list[tuple[str, float]]:
    last = rungs.sort_values("rows").groupby("trial").tail(1)
    return list(zip(last.params, last.nll, strict=True))
