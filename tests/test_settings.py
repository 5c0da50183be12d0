"""Search configs and their files: what is given is what is run, and what is wrong is named before anything starts."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml
from typer.testing import CliRunner

from loko.config import ConfigError, ExperimentConfig, LokoConfig, validate
from ray_jobs import train, tune
from ray_jobs.settings import Range, SearchConfig, describe, read, with_values


def search(**changes: Any) -> dict[str, Any]:
    """A search as plain data."""
    experiment = tiny.experiment(Path("rows"))
    del experiment["optimizer"]
    return {
        "name": "tiny",
        "experiment": experiment,
        "candidates": {
            "loko": {
                "optimizer": {"name": "loko", "covariance": "diagonal"},
                "space": {"optimizer.initial_covariance": {"log_uniform": [0.01, 10.0]}},
                "points": [{"optimizer.initial_covariance": 1.0}],
            },
            "adamw": {"optimizer": {"name": "adamw"}, "space": {"optimizer.lr": {"log_uniform": [1e-4, 0.1]}}},
        },
        "search": {"trials": 2, "asha": {"grace_rows": 16}},
        **changes,
    }


def wrong(**changes: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        validate(SearchConfig, search(**changes), "search.yaml")
    return str(caught.value)


def candidate(**changes: Any) -> dict[str, Any]:
    return {"candidates": {"one": {"optimizer": {"name": "loko"}, **changes}}}


def test_an_experiment_is_a_candidate_with_its_values() -> None:
    config = validate(SearchConfig, search())
    plain = config.experiment_of("loko", {"optimizer.initial_covariance": 2.0, "batch_size": 8})
    experiment = validate(ExperimentConfig, plain)
    assert isinstance(experiment.optimizer, LokoConfig)
    assert (experiment.optimizer.initial_covariance, experiment.optimizer.covariance) == (2.0, "diagonal")
    assert experiment.batch_size == 8
    assert config.experiment.batch_size == 4
    assert (config.folder, validate(SearchConfig, search(results="elsewhere")).folder) == ("results/tiny", "elsewhere")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"trials": 3}, ["trials", "unknown key"]),
        ({"name": "../up"}, ["name", "'../up'"]),
        ({"candidates": {}}, ["candidates", "at least 1"]),
        ({"search": {"trials": 0}}, ["search.trials", "got 0"]),
        ({"search": {"sampler": "grid"}}, ["search.sampler", "'grid'", "'tpe'", "'gp'", "'random'"]),
        ({"search": {"metric": "accuracy"}}, ["search.metric", "'accuracy'", "'nll'"]),
        ({"search": {"asha": {"grace_rows": 12}}}, ["grace_rows = 12", "report_every = 8"]),
        ({"search": {"asha": {"grace_rows": 16, "reduction_factor": 1}}}, ["reduction_factor", "greater than 1"]),
        (candidate(space={"optimizer.noise_decay": {"uniform": [0.5, 1.0]}}), ["noise_decay", "1.0", "less than 1"]),
        (candidate(space={"optimizer.decay": {"uniform": [0.5, 0.9]}}), ["optimizer.loko.decay", "unknown key"]),
        (candidate(space={"batch_size.x": {"integer": [1, 2]}}), ["batch_size.x", "no keys below"]),
        (candidate(space={"batch_size": {"choice": [4, 3]}}), ["batch_size = 3", "report_every"]),
        (candidate(space={"optimizer.noise": {"choice": ["ema", "emma"]}}), ["noise", "'emma'", "'fixed'"]),
        (
            candidate(
                space={"optimizer.rank": {"integer": [1, 2]}}, points=[{"optimizer.rank": 1, "optimizer.seed": 1}]
            ),
            ["points", "optimizer.seed"],
        ),
        (
            candidate(space={"optimizer.rank": {"integer": [1, 2]}}, points=[{"optimizer.rank": -1}]),
            ["points", "rank", "got -1"],
        ),
        (candidate(optimizer={"name": "loko", "lr": 1}), ["lr", "unknown key"]),
        ({"search": {"trials": None}}, ["search", "trials = null needs a budget"]),
        ({"search": {"budget": {}}}, ["search.budget", "give rows or hours"]),
        ({"search": {"budget": {"trials": 3}}}, ["search.budget.trials", "unknown key"]),
        ({"search": {"metrics": ["nll"]}}, ["search.metrics", "at least 2"]),
        ({"search": {"metrics": ["seconds_per_row", "nll"]}}, ["first what decides the winner"]),
        ({"search": {"metrics": ["nll", "nll"]}}, ["each once"]),
        ({"search": {"metrics": ["nll", "mse"], "metric": "mse"}}, ["metric = 'mse'", "leave metric out"]),
        ({"search": {"storage": "study.db"}}, ["storage = 'study.db'", "sqlite:///PATH", "journal:PATH"]),
        ({"search": {"storage": "redis://host"}}, ["storage = 'redis://host'", "allowed"]),
        ({"results": "s3://bucket/x"}, ["results = 's3://bucket/x' needs search.storage"]),
        (candidate(optimizer={"name": "lok"}), ["optimizer", "lok"]),
    ],
)
def test_what_is_wrong_is_named(changes: dict[str, Any], words: list[str]) -> None:
    message = wrong(**changes)
    assert message.startswith("search.yaml cannot be used:")
    for word in words:
        assert word in message, message


@pytest.mark.parametrize("key", ["storage", "warm_start"])
@pytest.mark.parametrize("where", ["postgresql://loko:hunter2@host/db", "postgresql://loko@host/db?password=hunter2"])
def test_a_password_is_refused_and_not_repeated(key: str, where: str) -> None:
    message = wrong(search={"asha": None, key: where})
    assert f"{key} holds a password" in message
    assert "~/.pgpass" in message
    assert "hunter2" not in message


def test_the_first_of_several_metrics_decides() -> None:
    config = validate(SearchConfig, search(search={"asha": None, "metrics": ["mse", "seconds_per_row"]}))
    assert (config.search.metric, config.search.objectives) == ("mse", ["mse", "seconds_per_row"])
    assert validate(SearchConfig, config.model_dump(mode="json")) == config
    assert validate(SearchConfig, search()).search.objectives == ["nll"]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "exactly one of log_uniform, uniform, log_integer, integer, choice; got none"),
        ({"uniform": [0, 1], "choice": [1]}, "got ['uniform', 'choice']"),
        ({"uniform": [1, 1]}, "uniform = [1.0, 1.0]; the low end must be below"),
        ({"log_uniform": [0, 1]}, "log_uniform = [0.0, 1.0]"),
        ({"log_integer": [4, 2]}, "log_integer = [4, 2]"),
        ({"choice": []}, "choice: got []"),
        ({"normal": [0, 1]}, "normal: unknown key"),
    ],
)
def test_a_range_is_one_of_the_kinds(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        validate(Range, given)
    assert words in str(caught.value)


def test_every_key_is_described_once() -> None:
    for kind in (ExperimentConfig, SearchConfig):
        rows = describe(kind)
        assert [key for key, count in Counter(key for key, _, _ in rows).items() if count > 1] == []
        for key, default, text in rows:
            assert text, key
            assert "Undefined" not in default, key
    keys = {key for key, _, _ in describe(SearchConfig)}
    assert {"name", "experiment.stream.then", "experiment.task.adapter.rank", "experiment.optimizer.lr"} <= keys
    assert {"candidates.NAME.space.NAME.log_uniform", "search.asha.grace_rows", "experiment.optimizer.rank"} <= keys


def test_overrides_replace_what_is_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "search.yaml"
    path.write_text(yaml.safe_dump(search()))
    config = read(
        SearchConfig,
        path,
        ["search.trials=5", "search.asha=null", "candidates.adamw.optimizer.options.eps=1e-6", "experiment.seed=3"],
    )
    assert (config.search.trials, config.search.asha, config.experiment.seed) == (5, None, 3)
    assert config.candidates["adamw"].optimizer == {"name": "adamw", "options": {"eps": 1e-6}}
    assert read(SearchConfig, path, []) == validate(SearchConfig, search())


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["search.trials"], "'search.trials' is no override; write it as key=value"),
        (["search.trails=4"], "search.trails: unknown key"),
        (["search.trials=many"], "search.trials: got 'many'"),
        (["experiment.batch_size=3"], "report_every = 8 is not a multiple of batch_size = 3"),
        (["=4"], "override"),
    ],
)
def test_an_override_that_is_wrong(tmp_path: Path, overrides: list[str], words: str) -> None:
    path = tmp_path / "search.yaml"
    path.write_text(yaml.safe_dump(search()))
    with pytest.raises(ConfigError) as caught:
        read(SearchConfig, path, overrides)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"), [("a: [", "cannot be read"), ("", "missing"), ("- 1\n- 2\n", "list"), ("just words", "keys")]
)
def test_a_file_that_is_no_config(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "search.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read(SearchConfig, path, [])
    assert str(path) in str(caught.value)
    assert words in str(caught.value)
    with pytest.raises(ConfigError, match="there is no such file"):
        read(SearchConfig, tmp_path / "nowhere.yaml", [])


def test_values_are_set_in_a_copy() -> None:
    data = {"a": {"b": 1}}
    assert with_values(data, {"a.b": 2, "a.c.d": 3}) == {"a": {"b": 2, "c": {"d": 3}}}
    assert data == {"a": {"b": 1}}


@pytest.mark.parametrize("job", [train, tune], ids=["train", "tune"])
def test_the_help_lists_every_key(job: Any) -> None:
    shown = CliRunner().invoke(job.app, ["--help"], terminal_width=200)
    assert shown.exit_code == 0
    kind = ExperimentConfig if job is train else SearchConfig
    for key, _, text in describe(kind):
        assert f"{key} " in shown.output, key
        assert text.split()[0] in shown.output


@pytest.mark.parametrize("job", [train, tune], ids=["train", "tune"])
def test_a_job_says_what_is_wrong_and_stops(job: Any, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("nme: x\n")
    result = CliRunner().invoke(job.app, [str(path)])
    assert result.exit_code == 2
    assert "nme: unknown key" in result.stderr
    assert "Traceback" not in result.stderr
