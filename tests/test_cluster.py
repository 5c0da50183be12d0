"""The launcher file as Ray reads it, and a job submitted to a head node over its dashboard."""

import copy
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jobs
import pandas as pd
import psutil
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

CLUSTER = yaml.safe_load((jobs.ROOT / "cluster.yaml").read_text())
RAY = str(Path(sys.executable).with_name("ray"))


def validated(config: dict[str, Any]) -> dict[str, Any]:
    """What `ray up` does before it asks the cloud for anything."""
    full = prepare_config(copy.deepcopy(config))
    validate_config(full)
    return full


def test_ray_accepts_the_launcher_file() -> None:
    full = validated(CLUSTER)
    types = full["available_node_types"]
    assert types[full["head_node_type"]]["node_config"].get("InstanceMarketOptions") is None
    workers = {name: kind for name, kind in types.items() if name != full["head_node_type"]}
    assert workers
    for kind in workers.values():
        assert kind["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot"
        assert kind["min_workers"] == 0


@pytest.mark.parametrize(
    "mistake",
    [
        lambda c: c.update(max_worker=3),
        lambda c: c.update(head_node_type="haed"),
        lambda c: c["available_node_types"]["gpu-spot"].update(min_workers=99),
        lambda c: c["available_node_types"]["head"].update(resource={"CPU": 4}),
        lambda c: c["docker"].update(imge="rayproject/ray"),
        lambda c: c.pop("head_node_type"),
        lambda c: c.update(idle_timeout_minutes="ten"),
    ],
)
def test_a_mistake_in_it_is_found(mistake: Callable[[dict[str, Any]], None]) -> None:
    config = copy.deepcopy(CLUSTER)
    mistake(config)
    with pytest.raises(Exception, match=r"."):
        validated(config)


def test_the_nodes_have_the_versions_of_the_repository() -> None:
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", (jobs.ROOT / "constraints.txt").read_text(), re.MULTILINE))
    for key in ("image", "head_image"):
        assert CLUSTER["docker"][key].startswith(f"rayproject/ray:{pins['ray']}-py311"), key
    assert any("-c /home/ray/loko/constraints.txt" in command for command in CLUSTER["setup_commands"])


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


@pytest.fixture
def head() -> Iterator[dict[str, str]]:
    """A head node of its own on loopback; gives the environment of those who submit jobs to it."""
    port, dashboard, agent, metrics, client = free_ports(5)
    # Ray's sockets live below its temporary folder, and their paths must be short.
    temporary = tempfile.mkdtemp(prefix="loko-ray-")
    environment = jobs.environment(RAY_AUTH_MODE="token", HOME=temporary, RAY_USAGE_STATS_ENABLED="0")
    command = [
        RAY, "start", "--head", "--node-ip-address=127.0.0.1", f"--port={port}", "--num-cpus=2",
        "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}",
        f"--metrics-export-port={metrics}", f"--ray-client-server-port={client}", f"--temp-dir={temporary}/ray",
        "--disable-usage-stats",
    ]  # fmt: skip
    subprocess.run([RAY, "get-auth-token", "--generate"], env=environment, capture_output=True, timeout=60)
    started = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=jobs.LIMIT)
    try:
        assert started.returncode == 0, started.stdout + started.stderr
        yield {**environment, "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}"}
    finally:
        stop(temporary)
        shutil.rmtree(temporary, ignore_errors=True)


def stop(temporary: str) -> None:
    """SIGKILL the processes of the Ray that was started with this temporary folder, and no others."""
    ours = []
    for process in psutil.process_iter():
        try:
            command, inherited = process.cmdline(), process.environ().get("HOME")
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue
        if process.pid != os.getpid() and (inherited == temporary or any(temporary in word for word in command)):
            ours.append(process)
    for process in ours:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(ours, timeout=60)


@pytest.mark.ray
@pytest.mark.slow
def test_a_search_is_submitted_to_a_head_node(head: dict[str, str], tmp_path: Path) -> None:
    path = jobs.search(tmp_path)
    submitted = subprocess.run(
        [RAY, "job", "submit", "--working-dir", ".", "--", sys.executable, "-m", "ray_jobs.tune", str(path)],
        cwd=jobs.ROOT,
        env=head,
        capture_output=True,
        text=True,
        timeout=jobs.LIMIT,
    )
    said = submitted.stdout + submitted.stderr
    assert submitted.returncode == 0, said
    assert "succeeded" in said
    assert "lowest online NLL" in said
    rungs = pd.read_parquet(tmp_path / "results" / "results.parquet")
    assert rungs.groupby("candidate").trial.nunique().to_dict() == {"adamw": 2, "loko": 2}
    assert (tmp_path / "results" / "report.html").exists()
