"""Tasks: from a config to a model with its adapter, and from rows to what that model is called with.

``build(config)`` gives a :class:`Task`: ``task.model`` in eval mode, ``task.collate(rows)`` a :class:`Batch`,
``task.logits(batch)`` the outputs (B, num_labels). The same config and seed give the same model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from loko.tasks.collate import Batch, Inputs, Rows, image_inputs, labels_to_tensor, table_inputs, text_inputs
from loko.tasks.config import AdapterConfig, ColumnsConfig, ObservationKind, TaskConfig
from loko.tasks.models import adapt, load_backbone, resolve_model, save_adapter, share_frozen

__all__ = ["AdapterConfig", "Batch", "ColumnsConfig", "Rows", "Task", "TaskConfig", "build", "save_adapter"]


@dataclass(frozen=True)
class Task:
    """A model with its adapter, and the way from rows to its inputs."""

    config: TaskConfig
    model: nn.Module
    collate: Callable[[Rows], Batch]

    @property
    def observation(self) -> ObservationKind:
        """What a label says about the outputs."""
        return self.config.observation

    @property
    def num_labels(self) -> int:
        """Outputs of the model."""
        return self.config.num_labels

    def twin(self) -> Task:
        """The same task on a model with trainable parameters of its own, and the very same frozen ones."""
        return replace(self, model=share_frozen(self.model))

    def logits(self, batch: Batch) -> Tensor:
        """Run the model: float32 outputs (B, num_labels). No row, no run."""
        if len(batch) == 0:
            return torch.zeros(0, self.num_labels, device=batch.labels.device)
        with torch.autocast(batch.labels.device.type, torch.bfloat16, enabled=self.config.dtype == "bfloat16"):
            logits: Tensor = self.model(**batch.inputs).logits
        return logits.float()


def build(config: TaskConfig) -> Task:
    """Load the model, add head and adapter from the seed, and make the collate function that fits it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        backbone = load_backbone(config)
        inputs = _inputs(config, backbone)
        model = adapt(backbone, config)

    def collate(rows: Rows) -> Batch:
        return Batch(inputs(rows), labels_to_tensor(rows, config))

    return Task(config, model, collate)


def _inputs(config: TaskConfig, model: nn.Module) -> Inputs:
    if config.kind == "table":
        return table_inputs(config)
    if config.kind == "image":
        return _image_inputs(config, model)
    return _text_inputs(config, model)


def _text_inputs(config: TaskConfig, model: Any) -> Inputs:
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        resolve_model(config.model), revision=config.revision or "main", trust_remote_code=False
    )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if model.config.pad_token_id is None:
        # Decoders classify at the last token that is no padding, so they have to know which that is.
        model.config.pad_token_id = tokenizer.pad_token_id
    limit = min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", config.max_length))
    if config.max_length > limit:
        raise ValueError(f"max_length is {config.max_length}, but model {config.model!r} reads at most {limit} tokens")
    return text_inputs(config, tokenizer)


def _image_inputs(config: TaskConfig, model: Any) -> Inputs:
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(
            resolve_model(config.model), revision=config.revision or "main", trust_remote_code=False, backend="pil"
        )
    except OSError as error:
        raise ValueError(
            f"model {config.model!r} has no preprocessor_config.json, so how its images are scaled is unknown: "
            "save the image processor it was trained with beside it"
        ) from error
    channels = int(getattr(model.config, "num_channels", 3))
    if processor.do_normalize and len(processor.image_mean) != channels:
        raise ValueError(
            f"model {config.model!r} takes {channels} channels, but its preprocessor_config.json has "
            f"{len(processor.image_mean)} means: the two must agree"
        )
    return image_inputs(config, processor, channels)
