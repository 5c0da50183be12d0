"""What ends up in a results folder: the trial that is taken, and the config that may go on there."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import tiny
import yaml

from loko.config import ConfigError, ExperimentConfig, validate
from ray_jobs import results
from ray_jobs.settings import SearchConfig
from ray_jobs.train import claim
from tests.test_choice import BASE, shifted

KEY = "optimizer.lr"


def search(rows: Path, **settings: float) -> SearchConfig:
    experiment = tiny.experiment(rows)
    del experiment["optimizer"]
    candidate = {
        "optimizer": {"name": "adamw"},
        "space": {KEY: {"log_uniform": [1e-4, 1.0]}},
        "points": [{KEY: 0.01}],
    }
    plain = {"name": "tiny", "experiment": experiment, "candidates": {"adamw": candidate}}
    return validate(SearchConfig, {**plain, "search": settings})


def ended(name: str, losses: list[float], rate: float, folder: Path) -> Any:
    """What Tune keeps of a trial that came to the end, as far as it is looked at."""
    rows = [40 * (i + 1) for i in range(len(losses))]
    nll = [sum(losses[: i + 1]) / (i + 1) for i in range(len(losses))]
    frame = pd.DataFrame({"rows": rows, "nll": nll, "trial_id": name, "finished": [row == rows[-1] for row in rows]})
    checkpoint = SimpleNamespace(as_directory=lambda: nullcontext(folder / name))
    return SimpleNamespace(
        path=str(folder / name), metrics_dataframe=frame, metrics=frame.iloc[-1].to_dict(), error=None,
        config={KEY: rate}, checkpoint=checkpoint,
    )  # fmt: skip


@pytest.mark.parametrize(("caution", "taken", "rate"), [(1.0, "first", 0.01), (0.0, "lucky", 0.1)])
def test_config_and_adapter_are_those_of_the_trial_that_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caution: float, taken: str, rate: float
) -> None:
    """The lowest trial is so by chance: .02 a row, with rungs that differ by up to .3."""
    loaded: list[Path] = []
    monkeypatch.setattr(results.online, "trained_model", lambda _, folder: loaded.append(folder))
    monkeypatch.setattr(results, "save_adapter", lambda *_: None)
    trials = [
        ended("first", BASE, 0.01, tmp_path),
        ended("lucky", shifted([0.3, -0.3, 0.3, -0.2, 0.0]), 0.1, tmp_path),
        ended("worse", [4.0] * 5, 0.5, tmp_path),
    ]
    config = search(tiny.shards(tmp_path / "rows", 24), caution=caution)
    results.collect(config, tmp_path, str(tmp_path), {"adamw": trials})  # type: ignore[dict-item]
    assert loaded == [tmp_path / taken]
    text = (tmp_path / "best.yaml").read_text()
    assert yaml.safe_load(text)["optimizer"] == {"name": "adamw", "lr": rate}
    assert ("the first point; the lowest trial is better by 0.0200 ±" in text) == (taken == "first")
    rungs = pd.read_parquet(tmp_path / "results.parquet")
    assert sorted(rungs.trial.unique()) == ["first", "lucky", "worse"]


def test_a_folder_goes_on_with_its_own_config_only(tmp_path: Path) -> None:
    plain = tiny.experiment(tiny.shards(tmp_path / "rows", 24))
    path, config = tmp_path / "results" / "experiment.yaml", validate(ExperimentConfig, plain)
    claim(path, config)
    written = path.read_text()
    claim(path, config)
    assert path.read_text() == written
    other = validate(ExperimentConfig, {**plain, "window": 77})
    with pytest.raises(ConfigError, match=r"another config \(differs: window; compare .* with yours\)"):
        claim(path, other)
    assert path.read_text() == written


def test_a_key_that_an_earlier_version_did_not_have_is_no_other_config(tmp_path: Path) -> None:
    config = search(tiny.shards(tmp_path / "rows", 24))
    path = tmp_path / "search.yaml"
    older = config.model_dump(mode="json")
    del older["search"]["caution"]
    path.write_text(yaml.safe_dump(older))
    claim(path, config)
    assert yaml.safe_load(path.read_text()) == config.model_dump(mode="json")
    path.write_text("no: config\n")
    with pytest.raises(ConfigError, match="holds the results of another config"):
        claim(path, config)
