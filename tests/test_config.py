"""Configs: every error names the key, the value and what is allowed."""

from pathlib import Path
from typing import Any

import pytest
import tiny

from loko.config import ConfigError, ExperimentConfig, GradientConfig, LokoConfig, StreamConfig, validate


def wrong(**changes: Any) -> str:
    """The message of an experiment with these changes."""
    with pytest.raises(ConfigError) as caught:
        tiny.config(Path("rows"), **changes)
    return str(caught.value)


def test_defaults_are_those_of_the_library() -> None:
    config = tiny.config(Path("rows"), optimizer={"name": "loko"})
    assert isinstance(config.optimizer, LokoConfig)
    assert config.kalman_arguments()["initial_covariance"] == "auto"
    assert config.kalman_arguments()["observation"] == "categorical"
    assert "name" not in config.kalman_arguments()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"batch_sise": 4}, ["batch_sise", "unknown key"]),
        ({"optimizer": {"name": "loko", "lr": 1e-3}}, ["optimizer.loko.lr", "unknown key"]),
        ({"optimizer": {"name": "adamw", "rank": 4}}, ["optimizer.adamw.rank", "unknown key"]),
        ({"optimizer": {"name": "adam"}}, ["optimizer", "adam", "adamw", "loko"]),
        ({"batch_size": 0}, ["batch_size", "got 0", "greater than or equal to 1"]),
        ({"batch_size": "four"}, ["batch_size", "'four'", "integer"]),
        ({"workers": 0}, ["workers", "got 0", "greater than or equal to 1"]),
        ({"optimizer": {"name": "loko", "noise_decay": 1.0}}, ["noise_decay", "got 1.0", "less than 1"]),
        ({"optimizer": {"name": "loko", "initial_covariance": 0}}, ["initial_covariance", "got 0", "greater than 0"]),
        ({"optimizer": {"name": "loko", "initial_covariance": float("inf")}}, ["initial_covariance", "inf", "finite"]),
        ({"optimizer": {"name": "loko", "linearization": 1.5}}, ["linearization", "1.5", "less than or equal to 1"]),
        ({"optimizer": {"name": "loko", "noise": "emma"}}, ["noise", "'emma'", "'ema_residual'", "'fixed'"]),
        ({"optimizer": {"name": "adamw", "lr": -1}}, ["lr", "got -1", "greater than 0"]),
        ({"report_every": 10}, ["report_every = 10", "batch_size = 4", "multiple"]),
        ({"stream": {}}, ["stream.paths", "missing"]),
        ({"stream": {"paths": "x", "start": -1}}, ["stream.start", "got -1"]),
        ({"stream": {"paths": "x", "then": [{"path": "y"}]}}, ["stream.then.0.path", "unknown key"]),
    ],
)
def test_what_is_wrong_is_named(changes: dict[str, Any], words: list[str]) -> None:
    message = wrong(**changes)
    assert message.startswith("config cannot be used:")
    for word in words:
        assert word in message, message


def test_every_wrong_key_has_its_line() -> None:
    message = wrong(batch_size=0, window="wide", nonsense=1)
    assert [line.split(":")[0].strip() for line in message.splitlines()[1:]] == ["batch_size", "window", "nonsense"]


@pytest.mark.parametrize("noise", ["categorical", "categorical_ema"])
def test_numbers_have_no_categorical_noise(noise: str) -> None:
    task = {**tiny.experiment(Path("rows"))["task"], "observation": "gaussian"}
    message = wrong(task=task, optimizer={"name": "loko", "noise": noise})
    assert repr(noise) in message
    assert "use 'ema', 'ema_residual' or 'fixed'" in message
    assert tiny.config(Path("rows"), task=task, optimizer={"name": "loko", "noise": "ema_residual"})


def test_no_config_at_all() -> None:
    with pytest.raises(ConfigError, match="whole file"):
        validate(ExperimentConfig, None, "empty.yaml")


def test_a_config_is_the_same_after_yaml() -> None:
    config = tiny.config(Path("rows"), heldout={"paths": ["x", "y"], "then": [{"paths": "z"}]})
    assert validate(ExperimentConfig, config.model_dump(mode="json")) == config


def test_the_learning_rate_of_a_gradient_optimizer_is_a_number() -> None:
    assert validate(GradientConfig, {"name": "sgd"}).lr == 1e-3
    assert validate(StreamConfig, {"paths": "x"}).then == []
    with pytest.raises(ConfigError, match="lr: got 'high'"):
        validate(GradientConfig, {"name": "sgd", "lr": "high"})
