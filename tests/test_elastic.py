"""A run with a range of workers: it loses a node and goes on with fewer, and takes the node back when it returns."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jobs
import pytest
import tiny
import yaml
from ray.cluster_utils import Cluster

from loko import online
from loko.config import ExperimentConfig
from ray_jobs.settings import read

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A head without CPUs, and a node with one."""
    made = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 0, "include_dashboard": True, "dashboard_host": "127.0.0.1", "dashboard_port": 0},
    )
    made.add_node(num_cpus=1)
    try:
        yield made
    finally:
        made.shutdown()


def sizes(run: Path) -> list[int]:
    """How many workers wrote each checkpoint that is there, oldest first."""
    found = []
    for path in sorted((run / "train").glob("checkpoint_*/checkpoint.json")):
        try:
            found.append(json.loads(path.read_text())["about"]["workers"])
        except (OSError, ValueError):
            continue
    return found


def test_a_run_goes_on_with_fewer_and_takes_them_back(cluster: Cluster, tmp_path: Path) -> None:
    plain = tiny.experiment(tiny.shards(tmp_path / "rows", 16_000), report_every=100, workers=[1, 2])
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(plain))
    run, log = tmp_path / "runs" / "one", tmp_path / "log"
    second = cluster.add_node(num_cpus=1)
    command = ["ray_jobs.train", path, "--name", "one", "--results", tmp_path / "runs", "--max-failures", "-1"]
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", *map(str, command)],
            env=jobs.environment(RAY_ADDRESS=cluster.address, LOKO_RESIZE_INTERVAL_S="1"),
            stdout=file,
            stderr=file,
            text=True,
            start_new_session=True,
        )
    try:
        jobs.wait_until(lambda: sizes(run)[-1:] == [2], process, log)
        cluster.remove_node(second, allow_graceful=False)
        jobs.wait_until(lambda: sizes(run)[-1:] == [1], process, log)
        cluster.add_node(num_cpus=1)
        jobs.wait_until(lambda: sizes(run)[-1:] == [2], process, log)
        assert process.wait(timeout=jobs.LIMIT) == 0, log.read_text()
    finally:
        if process.poll() is None:
            jobs.kill(process)
    report = json.loads((run / "report.json").read_text())
    alone = online.start(read(ExperimentConfig, path, []))
    *_, expected = online.advance(alone)
    assert (report["rows"], report["rows_digest"]) == (expected["rows"], expected["rows_digest"])
    assert report["nll"] == pytest.approx(expected["nll"], abs=1e-5)
