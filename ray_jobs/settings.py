"""Search configs, and YAML files with dotted overrides on the command line."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, Field, model_validator
from yaml import YAMLError

from loko.config import ConfigError, ExperimentConfig, validate

__all__ = [
    "AshaConfig",
    "BudgetConfig",
    "Candidate",
    "Range",
    "SearchConfig",
    "SearchSettings",
    "describe",
    "in_one_line",
    "is_storage",
    "read",
    "with_values",
]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Range(_Strict):
    """What a searched key may be: exactly one of the kinds."""

    log_uniform: tuple[float, float] | None = Field(default=None, description="[low, high], uniform in the logarithm")
    uniform: tuple[float, float] | None = Field(default=None, description="[low, high]")
    log_integer: tuple[int, int] | None = Field(default=None, description="[low, high], both included")
    integer: tuple[int, int] | None = Field(default=None, description="[low, high], both included")
    choice: list[Any] | None = Field(default=None, min_length=1, description="list of values")

    @model_validator(mode="after")
    def _one_kind(self) -> Range:
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of {', '.join(type(self).model_fields)}; got {given or 'none'}")
        if given[0] != "choice":
            low, high = getattr(self, given[0])
            if not low < high or (given[0].startswith("log") and low <= 0):
                raise ValueError(f"{given[0]} = [{low}, {high}]; the low end must be below the high end, and above 0")
        return self

    @property
    def corners(self) -> list[Any]:
        """Values that have to be valid for the whole range to be."""
        if self.choice is not None:
            return self.choice
        return list(self.log_uniform or self.uniform or self.log_integer or self.integer or ())


class Candidate(_Strict):
    """One optimizer of a search, with its own space."""

    optimizer: dict[str, Any] = Field(description="the optimizer section, as in an experiment; what is not searched")
    space: dict[str, Range] = Field(default_factory=dict, description="dotted key of the experiment -> range")
    points: list[dict[str, Any]] = Field(default_factory=list, description="values tried first, by the same keys")


class AshaConfig(_Strict):
    """Asynchronous successive halving on the row cursor."""

    grace_rows: int = Field(default=400, ge=1, description="rows every trial may learn; a multiple of report_every")
    reduction_factor: float = Field(default=3, gt=1, description="of this many trials at a rung one goes on")


class BudgetConfig(_Strict):
    """What a candidate may cost, over all starts of the search. Spent, no trial begins, and those that run end at their
    next rung, unless none has come to the end of the stream yet."""

    rows: int | None = Field(default=None, ge=1, description="rows learned in all trials of a candidate")
    hours: float | None = Field(default=None, gt=0, description="hours of searching a candidate")

    @model_validator(mode="after")
    def _says_something(self) -> BudgetConfig:
        if self.rows is None and self.hours is None:
            raise ValueError("give rows or hours, or leave budget out; the number of trials is search.trials")
        return self

    def __str__(self) -> str:
        parts = [f"{self.rows:,} rows"] if self.rows is not None else []
        parts += [f"{self.hours:g} hours"] if self.hours is not None else []
        return " or ".join(parts)


RankingMetric = Literal["nll", "window_nll", "near_future_nll", "mse", "window_mse", "near_future_mse"]
Metric = RankingMetric | Literal["seconds_per_row"]


class SearchSettings(_Strict):
    """How the candidates are searched; the same for each of them."""

    trials: int | None = Field(default=8, ge=1, description="trials a candidate; null needs a budget")
    budget: BudgetConfig | None = Field(default=None, description="what a candidate may cost beside; null is no limit")
    metric: RankingMetric = Field(default="nll", description="what is minimised: a key of every report")
    metrics: list[Metric] | None = Field(
        default=None,
        min_length=2,
        description="several to minimise at once, such as [nll, seconds_per_row]; the first is metric, the winner's",
    )
    caution: float = Field(
        default=2.0,
        ge=0,
        allow_inf_nan=False,
        description="standard errors by which a trial must beat its candidate's first point, in nll or mse, to be "
        "taken instead; 0 takes the lowest",
    )
    sampler: Literal["tpe", "gp", "nsga2", "random"] = Field(default="tpe", description="Optuna sampler")
    seed: int = Field(default=0, ge=0, description="seed of the sampler")
    asha: AshaConfig | None = Field(
        default_factory=AshaConfig, description="early stopping; null runs every trial whole"
    )
    concurrent: int | None = Field(
        default=None,
        ge=1,
        description="trials at a time; null is what the cluster holds, counted anew as nodes come and go",
    )
    pack: int = Field(
        default=1, ge=1, description="trials that share a process and its one copy of the backbone; 1 is each its own"
    )
    storage: str | None = Field(
        default=None,
        description="where the study is: sqlite:///PATH, postgresql://USER@HOST/DB, journal:PATH; null: in results",
    )
    warm_start: str | None = Field(
        default=None,
        description="results folder of an earlier search, or STORAGE#NAME: its trials are added to the study",
    )
    max_failures: int = Field(
        default=2, ge=0, description="times in a row a trial is restarted without reaching a further rung"
    )

    @model_validator(mode="after")
    def _is_a_search(self) -> SearchSettings:
        if self.trials is None and self.budget is None:
            raise ValueError("trials = null needs a budget, such as budget: {hours: 2}; nothing would end the search")
        if self.metrics is not None:
            first, repeated = self.metrics[0], len(set(self.metrics)) < len(self.metrics)
            if first == "seconds_per_row" or repeated:
                raise ValueError(
                    f"metrics = {self.metrics}; each once, and first what decides the winner, not seconds_per_row"
                )
            if "metric" in self.model_fields_set and self.metric != first:
                raise ValueError(f"metric = {self.metric!r} and metrics = {self.metrics}; leave metric out")
            self.metric = first
        for key in ("storage", "warm_start"):
            _check_storage(key, getattr(self, key))
        return self

    @property
    def limits(self) -> str:
        """What ends the search of a candidate, for people."""
        trials = "" if self.trials is None else f"{self.trials} trials"
        if self.budget is None:
            return trials
        return f"{trials}, at most {self.budget}" if trials else f"as many trials as {self.budget} allow"

    @property
    def objectives(self) -> list[str]:
        """What is minimised, first what decides the winner."""
        return list(self.metrics or [self.metric])


_STORAGES = ("sqlite", "postgresql", "mysql", "mariadb", "oracle", "mssql")


def is_storage(text: str) -> bool:
    """Whether a text is the URL of a storage, not a path."""
    return text.startswith("journal:") or ("://" in text and text.split("+")[0].split(":")[0] in _STORAGES)


def _check_storage(key: str, text: str | None) -> None:
    """A storage by its scheme, and without a password, which would be written into every results folder."""
    if text is None or (key == "warm_start" and not is_storage(text)):
        return
    parts = urlsplit(text)
    if parts.password or "password=" in parts.query:
        raise ValueError(
            f"{key} holds a password, which would be written into the results; leave it out and give it through "
            "PGPASSWORD, ~/.pgpass or what else the database's driver reads"
        )
    if not is_storage(text):
        raise ValueError(
            f"{key} = {text!r}; allowed: journal:PATH, sqlite:///PATH, postgresql://USER@HOST/NAME, mysql://…"
        )


class SearchConfig(_Strict):
    """A search: several candidates on one experiment, the same number of trials each."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="name of the search, and of its studies")
    results: str | None = Field(default=None, description="folder of the results; null is results/NAME")
    experiment: ExperimentConfig = Field(description="stream, task and loop; its optimizer is a candidate's")
    candidates: dict[str, Candidate] = Field(min_length=1, description="name -> optimizer and space")
    search: SearchSettings = Field(default_factory=lambda: SearchSettings(), description="trials, sampler, stopping")

    @model_validator(mode="after")
    def _fits_together(self) -> SearchConfig:
        asha, every = self.search.asha, self.experiment.report_every
        if asha is not None and asha.grace_rows % every:
            raise ValueError(
                f"search.asha.grace_rows = {asha.grace_rows} is not a multiple of experiment.report_every = {every}; "
                "trials are compared at rungs, where they report"
            )
        if self.search.storage is None and "://" in self.folder and not self.folder.startswith("file://"):
            raise ValueError(
                f"results = {self.folder!r} needs search.storage, such as postgresql://USER@HOST/DB, or journal:PATH "
                "on a shared file system; the default, SQLite, needs a folder"
            )
        for name, candidate in self.candidates.items():
            self._check(name, candidate)
        self._check_pack()
        return self

    def _check_pack(self) -> None:
        """Packed trials see the same batches and the same backbone: they differ in their optimizer."""
        if self.search.pack == 1:
            return
        if self.experiment.most_workers > 1:
            raise ValueError(
                f"search.pack = {self.search.pack} packs trials of one worker, and experiment.workers = "
                f"{self.experiment.workers}; use one of the two"
            )
        for name, candidate in self.candidates.items():
            others = sorted(key for key in candidate.space if not key.startswith("optimizer."))
            if others:
                raise ValueError(
                    f"search.pack = {self.search.pack} packs trials that differ in their optimizer, but "
                    f"candidates.{name}.space has {', '.join(others)}; take those out, or search.pack: 1"
                )

    def _check(self, name: str, candidate: Candidate) -> None:
        """Every corner of a candidate's space must be a valid experiment, so that no trial fails on its config."""
        plain = self.experiment_of(name, {key: allowed.corners[0] for key, allowed in candidate.space.items()})
        validate(ExperimentConfig, plain, f"candidates.{name}")
        for key, allowed in candidate.space.items():
            for value in allowed.corners:
                validate(
                    ExperimentConfig, with_values(plain, {key: value}), f"candidates.{name}.space, {key} = {value}"
                )
        for point in candidate.points:
            unknown = sorted(set(point) ^ set(candidate.space))
            if unknown:
                raise ValueError(
                    f"candidates.{name}.points: a point names exactly the keys of space; differs: {unknown}"
                )
            validate(ExperimentConfig, with_values(plain, point), f"candidates.{name}.points, {point}")

    def experiment_of(self, candidate: str, values: dict[str, Any]) -> dict[str, Any]:
        """The experiment of one trial as plain data: a candidate with values for its searched keys."""
        plain = self.experiment.model_dump(mode="json")
        plain["optimizer"] = self.candidates[candidate].optimizer
        return with_values(plain, values)

    @property
    def folder(self) -> str:
        """Where the results are."""
        return self.results or f"results/{self.name}"


def with_values(data: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """A copy of nested dicts with dotted keys set."""
    result = copy.deepcopy(data)
    for dotted, value in values.items():
        *parents, last = dotted.split(".")
        place = result
        for parent in parents:
            place = place.setdefault(parent, {})
            if not isinstance(place, dict):
                raise ConfigError(f"{dotted}: {parent} is {place!r} and has no keys below it")
        place[last] = value
    return result


def in_one_line(values: dict[str, Any], digits: int) -> str:
    """Searched values for a person, without the section they all share."""
    return ", ".join(
        f"{key.removeprefix('optimizer.')} {value:.{digits}g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in values.items()
    )


Config = TypeVar("Config", bound=BaseModel)


def read(kind: type[Config], path: Path, overrides: list[str]) -> Config:
    """Read a YAML file, apply overrides such as ``search.trials=4``, and validate.

    Raises:
        ConfigError: the file cannot be read, an override is no ``key=value``, or a key is wrong.
    """
    for override in overrides:
        if "=" not in override:
            raise ConfigError(f"{override!r} is no override; write it as key=value, such as search.trials=4")
    try:
        loaded = OmegaConf.load(path)
        if not OmegaConf.is_dict(loaded):
            raise ConfigError(f"{path} is a list or plain text; a config has keys")
        merged = OmegaConf.merge(loaded, OmegaConf.from_dotlist(overrides))
        _refuse_resolvers(OmegaConf.to_container(merged, resolve=False), path)
        data = OmegaConf.to_container(merged, resolve=True)
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such file") from None
    except (OSError, YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    return validate(kind, data, str(path))


_RESOLVER = re.compile(r"\$\{\s*[A-Za-z_][\w.]*\s*:")


def _refuse_resolvers(value: Any, path: Path) -> None:
    """A config may refer to its own keys, ``${experiment.seed}``, and to nothing else.

    A resolver such as ``${oc.env:AWS_SECRET_ACCESS_KEY}`` would bring what is in the environment of whoever runs a file
    into results that others read.
    """
    if isinstance(value, dict):
        for one in (*value, *value.values()):
            _refuse_resolvers(one, path)
    elif isinstance(value, list):
        for one in value:
            _refuse_resolvers(one, path)
    elif isinstance(value, str) and (found := _RESOLVER.search(value)):
        raise ConfigError(
            f"{path}: {found[0]}…}} calls a resolver; a config refers to its own keys only, such as "
            "${experiment.seed}. To take a value from the environment, give it as an override: key=$VARIABLE"
        )


def describe(kind: type[BaseModel], prefix: str = "") -> list[tuple[str, str, str]]:
    """(dotted key, default, description) of every key of a config, for ``--help``."""
    rows: list[tuple[str, str, str]] = []
    for name, info in kind.model_fields.items():
        inner = [
            t
            for t in (info.annotation, *_arguments(info.annotation))
            if isinstance(t, type) and issubclass(t, BaseModel)
        ]
        default = "required" if info.is_required() else str(info.get_default(call_default_factory=True))
        single = len(inner) == 1 and not str(info.annotation).startswith(("dict", "list"))
        if inner and single and inner[0] is not kind:
            rows += describe(inner[0], f"{prefix}{name}.")
        elif inner and inner[0] is not kind:
            place = f"{prefix}{name}." if not str(info.annotation).startswith("dict") else f"{prefix}{name}.NAME."
            keys: dict[str, tuple[str, str, str]] = {}
            for row in (row for model in inner for row in describe(model, place)):
                keys.setdefault(row[0], row)  # members of a union share the key that tells them apart
            rows += keys.values()
        else:
            rows.append((prefix + name, default, info.description or ""))
    return rows


def _arguments(annotation: Any) -> tuple[Any, ...]:
    arguments = getattr(annotation, "__args__", ())
    return (*arguments, *(a for outer in arguments for a in _arguments(outer)))
