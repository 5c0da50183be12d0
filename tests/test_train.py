"""One run as its user starts it: the same figures as the loop alone, for one worker and for several."""

import json
from pathlib import Path
from typing import Any

import jobs
import pytest
import tiny
import yaml
from safetensors.torch import load_file

from loko import online
from loko.config import ConfigError, ExperimentConfig
from loko.stream import write_shards
from ray_jobs import train
from ray_jobs.settings import read

pytestmark = pytest.mark.ray


def written(folder: Path, **changes: Any) -> Path:
    """An experiment's YAML file, beside its rows."""
    path = folder / "best.yaml"
    plain = tiny.experiment(tiny.shards(folder / "rows", 96), report_every=24, heldout={"paths": str(folder / "rows")})
    path.write_text(yaml.safe_dump({**plain, **changes}))
    return path


def alone(path: Path) -> tuple[online.Run, online.Report]:
    """The loop without Ray."""
    run = online.start(read(ExperimentConfig, path, []))
    *_, last = online.advance(run)
    return run, last


@pytest.mark.parametrize(
    ("workers", "name"), [(1, "loko"), *(pytest.param(2, name, marks=pytest.mark.slow) for name in ("loko", "adamw"))]
)
def test_a_run_gives_the_figures_of_the_loop(tmp_path: Path, workers: int, name: str) -> None:
    path = written(tmp_path, optimizer={"name": name})
    done = jobs.run("ray_jobs.train", path, f"workers={workers}", "cpus_per_worker=0.5", "--results", tmp_path / "runs")
    assert done.returncode == 0, done.stdout + done.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    report = json.loads((folder / "report.json").read_text())
    run, expected = alone(path)
    tolerance = 1e-6 if workers == 1 else 1e-5
    for key in ("nll", "window_nll", "near_future_nll", "heldout_nll"):
        assert report[key] == pytest.approx(expected[key], abs=tolerance), key
    for key in ("rows", "rows_digest", "finished", "accuracy", "label_only_nll"):
        assert report[key] == expected[key], key
    assert f"{expected['rows_digest']}" in done.stdout
    saved = load_file(folder / "adapter" / "adapter_model.safetensors")
    learned = {key.replace(".default", ""): p for key, p in run.task.model.named_parameters() if p.requires_grad}
    assert len(saved) == len(learned)
    for key, value in saved.items():
        same = learned.get(key, learned.get(key.replace("classifier.", "classifier.modules_to_save.")))
        assert same is not None, key
        assert value.numpy() == pytest.approx(same.detach().numpy(), abs=tolerance * 10)


@pytest.mark.slow
@pytest.mark.parametrize("damaged", ["nothing", "checkpoint", "list"])
def test_a_run_that_is_killed_goes_on(tmp_path: Path, damaged: str) -> None:
    """SIGKILL of the driver and its workers; under the same name the run goes on from its last whole rung."""
    path = written(tmp_path, stream={"paths": str(tiny.shards(tmp_path / "long", 2000))})
    arguments = ("ray_jobs.train", path, "--name", "one", "--results", tmp_path / "runs")

    def two_rungs() -> bool:
        return len(list((tmp_path / "runs" / "one" / "train").glob("checkpoint_*/checkpoint.json"))) >= 2

    jobs.run_and_kill(*arguments, when=two_rungs, log=tmp_path / "log")
    assert not (tmp_path / "runs" / "one" / "report.json").exists()
    kept = tmp_path / "runs" / "one" / "train"
    if damaged == "checkpoint":  # and no more than cut off, as a disk that was full leaves it
        newest = max(kept.glob("checkpoint_*/checkpoint.json")).with_name("state.pt")
        newest.write_bytes(newest.read_bytes()[:-100])
    if damaged == "list":
        (kept / "checkpoint_manager_snapshot.json").write_text('{"checkpoint_results": [')
    done = jobs.run(*arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "runs" / "one" / "report.json").read_text())
    _, expected = alone(path)
    assert (report["nll"], report["rows_digest"]) == (expected["nll"], expected["rows_digest"])


@pytest.mark.slow
def test_a_bad_label_of_one_worker_is_told_at_once(tmp_path: Path) -> None:
    """A row of the second worker cannot be learned: nobody waits, nothing is tried again, the error is shown."""
    table = tiny.table(96)
    labels = table["label"].to_numpy().copy()
    labels[47] = 9  # of the batch 44 .. 47 the second worker has the last two rows
    write_shards(table.set_column(4, "label", [labels]), tmp_path / "bad")
    path = written(tmp_path, stream={"paths": str(tmp_path / "bad")}, near_future=0)
    done = jobs.run("ray_jobs.train", path, "workers=2", "cpus_per_worker=0.5", "--results", tmp_path / "runs")
    assert done.returncode == 2, done.stdout + done.stderr
    assert "rank 1 of 2 failed" in done.stderr
    assert "9" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_run_of_that_name_with_another_config_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path)
    other = read(ExperimentConfig, path, ["seed=7"])
    train.claim(tmp_path / "runs" / "one" / "experiment.yaml", other)
    with pytest.raises(ConfigError, match=r"results of another config .*choose another folder or name"):
        train.run(read(ExperimentConfig, path, []), "one", tmp_path / "runs")


def test_bad_rows_are_found_before_any_worker(tmp_path: Path) -> None:
    path = written(tmp_path, stream={"paths": str(tmp_path / "nowhere")})
    with pytest.raises(ValueError, match="nowhere"):
        train.run(read(ExperimentConfig, path, []), "one", tmp_path / "runs")


def test_a_mistake_is_told_in_a_line(tmp_path: Path) -> None:
    done = jobs.run("ray_jobs.train", written(tmp_path), "workers=0")
    assert done.returncode == 2
    assert "workers: got 0: Input should be greater than or equal to 1" in done.stderr
    assert "Traceback" not in done.stderr
