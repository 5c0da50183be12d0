"""What a task is: which model, which adapter on it, which columns feed it; checked before anything is loaded."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

__all__ = ["AdapterConfig", "AdapterMethod", "ColumnsConfig", "Kind", "ObservationKind", "TaskConfig"]

Kind = Literal["text", "text_pair", "image", "table"]
ObservationKind = Literal["categorical", "bernoulli", "gaussian"]
AdapterMethod = Literal["lora", "rslora", "dora", "ia3", "vera", "none"]

DEFAULT_RANK = 8
TABLE_MODEL = "mlp"

# PEFT's own names of what AdapterConfig sets itself; giving them a second time would leave open which one wins.
_COVERED_OPTIONS = {
    "r": "adapter.rank",
    "lora_alpha": "adapter.alpha",
    "target_modules": "adapter.target_modules",
    "modules_to_save": "adapter.modules_to_save",
    "use_rslora": "adapter.method: rslora",
    "use_dora": "adapter.method: dora",
}
_INTERNAL_OPTIONS = {
    "task_type",
    "peft_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
}


def peft_config_class(method: AdapterMethod) -> type:
    """The PEFT config class behind a method."""
    import peft

    return {"ia3": peft.IA3Config, "vera": peft.VeraConfig}.get(method, peft.LoraConfig)


class AdapterConfig(BaseModel):
    """An adapter, in PEFT's terms."""

    model_config = ConfigDict(extra="forbid")

    method: AdapterMethod = Field(default="lora", description="PEFT method; none trains parameters of the model itself")
    rank: int | None = Field(
        default=None, ge=1, description="rank of the update (lora, rslora, dora, vera); null means 8"
    )
    alpha: float | None = Field(
        default=None,
        gt=0,
        description="numerator of the update's scale (lora, dora: alpha / rank); null means alpha = rank",
    )
    target_modules: list[str] | Literal["all-linear"] = Field(
        default="all-linear",
        description="modules that get an adapter, by name or end of name; all-linear: every one but the head",
    )
    modules_to_save: list[str] = Field(
        default_factory=list, description="further modules trained and saved whole; the head always is"
    )
    options: dict[str, Any] = Field(
        default_factory=dict, description="anything else that the method's PEFT config class takes, by PEFT's own name"
    )

    @field_validator("target_modules")
    @classmethod
    def _some_target(cls, value: list[str] | str) -> list[str] | str:
        if value == []:
            raise ValueError('adapter.target_modules is empty: name modules, write "all-linear", or set method: none')
        return value

    @model_validator(mode="after")
    def _fits_the_method(self) -> AdapterConfig:
        if self.rank is not None and self.method in ("ia3", "none"):
            raise ValueError(f"adapter.rank is {self.rank}, but method {self.method} has no rank: leave rank out")
        if self.alpha is not None and self.method in ("ia3", "vera", "none"):
            raise ValueError(f"adapter.alpha is {self.alpha}, but method {self.method} has no alpha: leave alpha out")
        if not self.options:
            return self
        if self.method == "none":
            raise ValueError(
                f"adapter.options has {sorted(self.options)}, but method none takes no options: remove them"
            )
        known = {field.name for field in dataclasses.fields(peft_config_class(self.method))} - _INTERNAL_OPTIONS
        for key in self.options:
            if key in _COVERED_OPTIONS:
                raise ValueError(f"adapter.options.{key} is set by another key: use {_COVERED_OPTIONS[key]} instead")
            if key not in known:
                allowed = ", ".join(sorted(known - set(_COVERED_OPTIONS)))
                raise ValueError(f"adapter.options.{key} is no option of PEFT's {self.method}; allowed are: {allowed}")
        return self


class ColumnsConfig(BaseModel):
    """Which columns of the stream feed the model."""

    model_config = ConfigDict(extra="forbid")

    text: str | None = Field(default=None, description="column of the text (kinds text and text_pair)")
    text_b: str | None = Field(default=None, description="column of the second text (kind text_pair)")
    image: str | None = Field(default=None, description="column of the image (kind image)")
    features: list[str] | None = Field(default=None, min_length=1, description="numeric columns, in order (kind table)")
    label: str | None = Field(default=None, description="column of the label; give this or labels")
    labels: list[str] | None = Field(default=None, min_length=1, description="one column an output, instead of label")

    @property
    def label_names(self) -> list[str]:
        """The label columns, whether given as one or as several."""
        return [self.label] if self.label is not None else list(self.labels or [])

    @property
    def names(self) -> list[str]:
        """Every column the task reads: what a stream has to carry."""
        single = [name for name in (self.text, self.text_b, self.image) if name is not None]
        return [*single, *(self.features or []), *self.label_names]


_COLUMNS_OF_KIND: dict[str, set[str]] = {
    "text": {"text"},
    "text_pair": {"text", "text_b"},
    "image": {"image"},
    "table": {"features"},
}


class TaskConfig(BaseModel):
    """A model with its adapter, and how rows become its inputs."""

    model_config = ConfigDict(extra="forbid")

    kind: Kind = Field(description="what a row holds: text, text_pair, image or table")
    model: str = Field(
        description="folder, hub name, or package:NAME for a model that an installed Python package carries; "
        "for kind table: mlp, built from hidden_sizes"
    )
    revision: str | None = Field(
        default=None, description="branch, tag or commit of a hub model; null means its main branch"
    )
    num_labels: int = Field(ge=1, description="outputs of the model: classes, or numbers to predict")
    observation: ObservationKind = Field(
        default="categorical",
        description="one class a row, yes or no for each output, or a real number for each output",
    )
    columns: ColumnsConfig = Field(description="which columns of the stream feed the model")
    adapter: AdapterConfig = Field(default_factory=AdapterConfig, description="the adapter that is trained")
    freeze_backbone: bool = Field(
        default=True, description="with adapter.method none: true trains the head alone, false every parameter"
    )
    max_length: int = Field(default=128, ge=1, description="longest text in tokens; what is longer is cut")
    image_size: int | None = Field(
        default=None,
        ge=1,
        description="side of the image the model gets, in pixels; null means what its processor says",
    )
    hidden_sizes: list[int] = Field(
        default_factory=lambda: [64, 64], description="hidden layers of the mlp (kind table)"
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        default="float32", description="precision of the frozen weights; what is trained stays float32"
    )
    attn_implementation: Literal["eager", "sdpa", "flash_attention_2"] | None = Field(
        default=None, description="attention kernel; null leaves the choice to transformers"
    )
    seed: int = Field(default=0, ge=0, description="seed of the new head and of the adapter")

    @field_validator("hidden_sizes")
    @classmethod
    def _positive_sizes(cls, value: list[int]) -> list[int]:
        if any(size < 1 for size in value):
            raise ValueError(f"hidden_sizes is {value}: every hidden layer needs a size of at least 1")
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> TaskConfig:
        self._check_columns()
        if self.observation == "categorical" and self.num_labels < 2:
            raise ValueError(
                f"num_labels is {self.num_labels}, but a categorical observation needs at least 2 classes: "
                "raise num_labels, or use observation bernoulli (one yes or no) or gaussian (one number)"
            )
        if self.observation == "categorical" and self.columns.labels is not None:
            raise ValueError(
                f"columns.labels is {self.columns.labels}, but a categorical observation has one label a row: "
                "use columns.label, or observation bernoulli or gaussian"
            )
        if self.columns.labels is not None and len(self.columns.labels) != self.num_labels:
            raise ValueError(
                f"columns.labels names {len(self.columns.labels)} columns, but num_labels is {self.num_labels}: "
                "they must agree"
            )
        if not self.freeze_backbone and self.adapter.method != "none":
            raise ValueError(
                f"freeze_backbone is false, but adapter.method is {self.adapter.method}: an adapter leaves the model "
                "frozen; set adapter.method: none to train the model itself"
            )
        if self.kind == "table" and self.model != TABLE_MODEL:
            raise ValueError(
                f"model is {self.model!r}, but a task of kind table only knows {TABLE_MODEL!r}: write that"
            )
        return self

    def _check_columns(self) -> None:
        needed = _COLUMNS_OF_KIND[self.kind]
        for name in ("text", "text_b", "image", "features"):
            value = getattr(self.columns, name)
            if name in needed and value is None:
                raise ValueError(f"columns.{name} is missing: a task of kind {self.kind} reads it; name the column")
            if name not in needed and value is not None:
                raise ValueError(
                    f"columns.{name} is {value!r}, but a task of kind {self.kind} does not read it: remove it"
                )
        if (self.columns.label is None) == (self.columns.labels is None):
            raise ValueError("columns needs exactly one of label (one column) and labels (a list of columns)")
