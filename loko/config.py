"""Typed configs. Every error names the key, the value and what is allowed; a config never names code to import."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, TypeAdapter, ValidationError, model_validator

from loko.tasks import TaskConfig

__all__ = [
    "ConfigError",
    "ExperimentConfig",
    "GradientConfig",
    "LokoConfig",
    "OptimizerConfig",
    "StreamConfig",
    "readable",
    "validate",
]


class ConfigError(ValueError):
    """A config that cannot be run; the message lists every key that is wrong, with its value and what to do."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class StreamConfig(_Strict):
    """Rows in order, from Arrow IPC or Parquet shards."""

    paths: str | list[str] = Field(description="file, folder, glob, or a list of them; shards in lexical order")
    shuffle_seed: int | None = Field(None, description="deterministic shuffle; null keeps the order of the shards")
    start: int = Field(0, ge=0, description="first row")
    stop: int | None = Field(None, ge=1, description="row after the last; null is the end")
    drift: list[dict[str, Any]] = Field(
        default_factory=list, description="drift views, such as {kind: rotation, at: 1000, degrees: 90}"
    )
    then: list[StreamConfig] = Field(
        default_factory=list, description="streams that follow this one: other domains, each with a change point"
    )


_Variance = Annotated[
    Annotated[Literal["auto"], Tag("auto")] | Annotated[float, Field(gt=0, allow_inf_nan=False), Tag("number")],
    Discriminator(lambda value: "auto" if value == "auto" else "number"),
]


_Count = Annotated[int, Field(ge=1)]
_Workers = Annotated[
    Annotated[_Count, Tag("number")] | Annotated[tuple[_Count, _Count], Tag("range")],
    Discriminator(lambda value: "range" if isinstance(value, list | tuple) else "number"),
]


MERGED = {"covariance": "diagonal", "initial_covariance": 0.3, "scale_adaptation": 0.0, "prediction": "plug_in"}
"""The filter that ``sync_every`` takes where nothing else is given."""


class LokoConfig(_Strict):
    """The Kalman filter; the keys are those of ``loko.LoKO``."""

    name: Literal["loko"] = Field(
        "loko",
        description="loko, or a gradient optimizer: adamw, adagrad, sgd, muon, lora_plus, lora_fa, riemannian, "
        "schedule_free, lora_rite, soap, ivon",
    )
    covariance: Literal["low_rank", "diagonal", "block_diagonal"] = Field(
        "low_rank",
        description="kind of parameter covariance; block_diagonal (a block a tensor) for small models, one worker",
    )
    rank: int = Field(16, ge=0, description="rank L of low_rank")
    direction_decay: float = Field(
        0.95, ge=0, le=1, description="share φ of low_rank's directions kept a step; the rest goes into the diagonal"
    )
    initial_covariance: _Variance = Field(
        "auto", description="variance p0 before the first row; auto: the first batch sets it"
    )
    prior_variance: float = Field(
        6.0, gt=0, allow_inf_nan=False, description="variance v of a logit from row to row that auto starts with"
    )
    adapter_variance: float = Field(
        50.0,
        ge=0,
        allow_inf_nan=False,
        description="variance ξ of an adapter's factors, in their own unit, that auto meets half way; 0 leaves p0",
    )
    initial_distribution: Literal["constant", "uniform"] = Field("constant", description="p0, or U(0, p0]")
    scales: dict[str, float] = Field(default_factory=dict, description="factors on p0 by group: A, B, head, other")
    noise: Literal["ema", "ema_residual", "categorical", "categorical_ema", "fixed"] = Field(
        "ema", description="estimator of the observation noise R"
    )
    noise_decay: float = Field(0.98, ge=0, lt=1, description="decay β of the moving average of R")
    initial_noise: float | None = Field(None, gt=0, description="R's start r0; null takes what suits the observation")
    noise_excess: float = Field(0.3, ge=0, description="fraction κ of categorical_ema")
    linearization: float = Field(0.25, ge=0, le=1, description="0 is the tangent, above 0 the secant's weight ω")
    output_tolerance: float = Field(0.01, ge=0, lt=1, description="probability a row may leave out; 0 is exact")
    max_outputs: int | None = Field(None, ge=1, description="most backward passes a step; null is as many as needed")
    jacobian_megabytes: float = Field(
        1024.0, gt=0, description="most memory for J; beyond it fewer outputs are observed"
    )
    backward_dtype: Literal["bfloat16"] | None = Field(
        None, description="dtype of the products of the backward passes; null is that of the forward"
    )
    forgetting: float = Field(1.0, gt=0, le=1, description="forgetting factor λ a step")
    scale_adaptation: float = Field(
        0.2, ge=0, le=1, description="rate μ at which the scale of P follows the online loss; 0 leaves P alone"
    )
    drift_adaptation: float = Field(
        0.0, ge=0, le=1, description="share of the start that P goes back to when innovations are larger than usual"
    )
    drift_detector: Literal["adwin"] | None = Field(
        None, description="detector of drift in the losses (needs river); drift_adaptation then waits for its alarm"
    )
    process_noise: float = Field(0.0, ge=0, allow_inf_nan=False, description="variance q added a step")
    prediction: Literal["expected", "plug_in"] = Field(
        "expected", description="what is scored: labels as expected under P as far as that is trusted, or the outputs"
    )
    sync_every: int | None = Field(
        None,
        ge=1,
        description="several workers: null is the exact update, k merges independent filters every k steps; they are "
        "diagonal, start from an initial_covariance of 0.3 unless it is given, and go without scale_adaptation",
    )
    max_skipped: int = Field(10, ge=0, description="batches in a row that may be skipped for not being finite")
    seed: int = Field(0, ge=0, description="seed of the uniform start")

    @model_validator(mode="before")
    @classmethod
    def _merged(cls, data: Any) -> Any:
        """Filters that are merged cannot be the default ones; what is not given takes what goes with it."""
        if isinstance(data, dict) and data.get("sync_every") is not None:
            return {**MERGED, **data}
        return data


class GradientConfig(_Strict):
    """A gradient optimizer on the mean loss of each batch, one step a batch."""

    name: Literal[
        "adamw",
        "adagrad",
        "sgd",
        "muon",
        "lora_plus",
        "lora_fa",
        "riemannian",
        "schedule_free",
        "lora_rite",
        "soap",
        "ivon",
    ] = Field(description="torch.optim, peft.optimizers, pytorch-optimizer (from schedule_free on), or ivon-opt")
    lr: float = Field(1e-3, gt=0, allow_inf_nan=False, description="learning rate of the adapter")
    head_lr_ratio: float = Field(1.0, gt=0, description="the head's learning rate over the adapter's")
    options: dict[str, Any] = Field(default_factory=dict, description="further arguments of the optimizer")


OptimizerConfig = Annotated[LokoConfig | GradientConfig, Field(discriminator="name")]


class ExperimentConfig(_Strict):
    """One run: a model learns a stream, each row once."""

    stream: StreamConfig = Field(description="what is predicted, scored and learned")
    heldout: StreamConfig | None = Field(None, description="rows scored once, at the end")
    task: TaskConfig = Field(description="model, adapter and columns")
    optimizer: OptimizerConfig = Field(default_factory=lambda: LokoConfig(), description="loko or a gradient optimizer")
    batch_size: int = Field(4, ge=1, description="rows a step, over all workers")
    report_every: int = Field(200, ge=1, description="rows between two rungs: a report and a checkpoint")
    window: int = Field(500, ge=1, description="rows of the windowed metrics")
    near_future: int = Field(100, ge=0, description="steps ahead of the near-future accuracy; 0 leaves it out")
    workers: _Workers = Field(
        1,
        description="workers that share one filter; more than one uses Ray Train; [1, 4]: as many as there is room for",
    )
    cpus_per_worker: float = Field(1, gt=0, description="CPUs a worker takes")
    gpus_per_worker: float | None = Field(None, ge=0, description="GPUs a worker takes; null is 1 where there are any")
    threads: int = Field(1, ge=1, description="torch threads a worker")
    seed: int = Field(0, ge=0, description="seed of everything random in the loop (dropout, if it is on)")

    @model_validator(mode="after")
    def _fits_together(self) -> ExperimentConfig:
        if self.report_every % self.batch_size:
            raise ValueError(
                f"report_every = {self.report_every} is not a multiple of batch_size = {self.batch_size}; rungs stand "
                "between two batches, so that every trial is compared after the same rows"
            )
        if self.least_workers > self.most_workers:
            raise ValueError(f"workers = {list(self.workers)}: the first is the least, the second the most")  # type: ignore[arg-type]
        if isinstance(self.optimizer, LokoConfig) and self.task.observation != "categorical":
            needs = self.optimizer.noise.startswith("categorical")
            if needs and self.task.observation == "gaussian":
                raise ValueError(
                    f"optimizer.noise = {self.optimizer.noise!r} is implied by predicted probabilities, and "
                    "observation = 'gaussian' has none; use 'ema', 'ema_residual' or 'fixed'"
                )
        return self

    @property
    def least_workers(self) -> int:
        """Fewer than that do not start."""
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def most_workers(self) -> int:
        """More than that are not asked for."""
        return self.workers if isinstance(self.workers, int) else self.workers[1]

    def kalman_arguments(self) -> dict[str, Any]:
        """The keyword arguments of :class:`loko.LoKO` for this run."""
        assert isinstance(self.optimizer, LokoConfig)
        return {**self.optimizer.model_dump(exclude={"name", "sync_every"}), "observation": self.task.observation}


_TAGS = ("number", "range", "auto")
"""Parts of a pydantic location that are no keys of the file: which kind of value it was taken for."""

Config = TypeVar("Config", bound=BaseModel)


def validate(kind: type[Config], data: Any, source: str = "config") -> Config:
    """``kind.model_validate`` with an error for people.

    Raises:
        ConfigError: one line for each key that is wrong.
    """
    try:
        return TypeAdapter(kind).validate_python(data)
    except ValidationError as error:
        raise ConfigError(readable(error, source)) from None


def readable(error: ValidationError, source: str) -> str:
    """One line for each wrong key: the dotted key, the value, what is allowed."""
    lines = [f"{source} cannot be used:"]
    for item in error.errors(include_url=False):
        key = ".".join(str(part) for part in item["loc"] if part not in _TAGS) or "(whole file)"
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            message = "unknown key; `--help` lists the keys there are"
        elif item["type"] == "missing":
            message = "missing, and there is no default"
        elif item["type"] != "value_error":
            message = f"got {item['input']!r}: {message}"
        lines.append(f"  {key}: {message}")
    return "\n".join(lines)
