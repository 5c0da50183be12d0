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
import psutil
import pytest
import test_tune
import typer
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from ray_jobs import cli

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
def cluster() -> Iterator[tuple[dict[str, str], dict[str, Path]]]:
    """Two nodes of one CPU each on loopback: the environment of those who submit jobs, and each node's folder."""
    port, dashboard, client, *others = free_ports(7)
    # Ray's sockets live below its temporary folder, and their paths must be short.
    temporary = tempfile.mkdtemp(prefix="loko-ray-")
    folders = {name: Path(temporary, name) for name in ("head", "worker")}
    environment = jobs.environment(RAY_AUTH_MODE="token", HOME=temporary, RAY_USAGE_STATS_ENABLED="0")
    roles = {
        "head": ["--head", f"--port={port}", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}",
                 f"--ray-client-server-port={client}"],
        "worker": [f"--address=127.0.0.1:{port}"],
    }  # fmt: skip
    try:
        run_ray("get-auth-token", "--generate", env=environment)
        for name, role in roles.items():
            agent, metrics = others.pop(), others.pop()
            # Each its own temporary folder: see test_a_working_folder_that_is_gone_is_said.
            run_ray(
                "start", *role, "--node-ip-address=127.0.0.1", "--num-cpus=1", f"--temp-dir={folders[name]}",
                f"--dashboard-agent-listen-port={agent}", f"--metrics-export-port={metrics}", "--disable-usage-stats",
                env=environment,
            )  # fmt: skip
        yield {**environment, "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}"}, folders
    finally:
        stop(temporary)
        shutil.rmtree(temporary, ignore_errors=True)


def run_ray(*arguments: str, env: dict[str, str]) -> str:
    """A command of Ray's, run in the repository; gives what it said."""
    done = subprocess.run([RAY, *arguments], cwd=jobs.ROOT, env=env, capture_output=True, text=True, timeout=jobs.LIMIT)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


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
def test_a_search_is_submitted_to_a_cluster(cluster: tuple[dict[str, str], dict[str, Path]], tmp_path: Path) -> None:
    environment, folders = cluster
    path = jobs.search(tmp_path)
    said = run_ray(
        "job", "submit", "--working-dir", ".", "--", sys.executable, "-m", "ray_jobs.tune", str(path), env=environment
    )
    assert "succeeded" in said
    assert "is ahead with an online NLL of" in said
    rungs = test_tune.check(tmp_path)
    assert rungs.groupby("candidate").trial.nunique().to_dict() == {"adamw": 2, "loko": 2}
    assert (tmp_path / "results" / "report.html").exists()
    # Each node was sent the working directory, and ran trials from it.
    for name, folder in folders.items():
        (session,) = folder.glob("session_2*")
        assert list(session.glob("runtime_resources/working_dir_files/_ray_pkg_*/ray_jobs/tune.py")), name
        assert list(session.glob("logs/worker-*-*.out")), name


def test_a_working_folder_that_is_gone_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two nodes that share a temporary folder unpack a job's working directory over each other: its driver stands in
    a folder that was removed, and Python's own error does not say which."""
    folder = tmp_path / "working_dir"
    folder.mkdir()
    monkeypatch.chdir(folder)
    folder.rmdir()
    with pytest.raises(typer.Exit), cli.fail():
        os.path.abspath("results")
    assert "give each `ray start` its own --temp-dir" in capsys.readouterr().err
