"""Models: found by path, hub name or Python package, loaded through transformers, given an adapter by PEFT."""

from __future__ import annotations

import copy
import importlib.util
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import peft
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn

from loko.tasks.config import DEFAULT_RANK, TaskConfig, peft_config_class

__all__ = [
    "TableMLP",
    "TableOutput",
    "adapt",
    "head_names",
    "load_backbone",
    "resolve_model",
    "save_adapter",
    "share_frozen",
]

_PACKAGE_PREFIX = "package:"
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")


class TableOutput(NamedTuple):
    """Shaped like a transformers output, so that every kind of task is called the same way."""

    logits: Tensor


class TableMLP(nn.Module):
    """A plain network on a row of numbers."""

    base_model_prefix = "body"

    def __init__(self, num_features: int, hidden_sizes: list[int], num_labels: int) -> None:
        super().__init__()
        sizes = [num_features, *hidden_sizes]
        layers: list[nn.Module] = []
        for before, after in pairwise(sizes):
            layers += [nn.Linear(before, after), nn.GELU()]
        self.body = nn.Sequential(*layers)
        self.classifier = nn.Linear(sizes[-1], num_labels)

    def forward(self, features: Tensor) -> TableOutput:
        """One row of outputs for each row of features."""
        return TableOutput(self.classifier(self.body(features)))


def resolve_model(model: str) -> str:
    """What transformers is asked for: ``package:NAME[/FOLDER]`` becomes the folder in that installed package."""
    if model.startswith(_PACKAGE_PREFIX):
        return str(_package_folder(model))
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"model {model!r} is a folder without config.json: give the folder save_pretrained wrote")
        return str(path)
    if path.is_absolute() or model.startswith((".", "~")):
        raise ValueError(f"model {model!r} looks like a folder, but there is none: check the path")
    return model


def _package_folder(model: str) -> Path:
    name, _, folder = model.removeprefix(_PACKAGE_PREFIX).partition("/")
    # find_spec of a top-level name locates the package without running it.
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"model {model!r}: no Python package {name!r} is installed here; install it, or give a folder")
    root = Path(next(iter(spec.submodule_search_locations))) / folder
    found = sorted(
        config.parent
        for config in root.rglob("config.json")
        if any(next(config.parent.glob(pattern), None) for pattern in _WEIGHTS)
    )
    if len(found) == 1:
        return found[0]
    if not found:
        raise ValueError(f"model {model!r}: no folder in it holds a config.json with weights beside it")
    choices = ", ".join(
        f"{_PACKAGE_PREFIX}{name}/{path.relative_to(root.parent if folder else root)}" for path in found
    )
    raise ValueError(f"model {model!r}: several folders in it hold a model; choose one of {choices}")


def load_backbone(config: TaskConfig) -> nn.Module:
    """The model with its head, not yet adapted; a head that the checkpoint lacks, or has in another size, is new."""
    if config.kind == "table":
        return TableMLP(len(config.columns.features or []), config.hidden_sizes, config.num_labels)
    auto = (
        transformers.AutoModelForImageClassification
        if config.kind == "image"
        else transformers.AutoModelForSequenceClassification
    )
    options: dict[str, Any] = {"num_labels": config.num_labels, "dtype": getattr(torch, config.dtype)}
    if config.attn_implementation is not None:
        options["attn_implementation"] = config.attn_implementation
    try:
        with _quiet():
            model, info = auto.from_pretrained(
                resolve_model(config.model),
                revision=config.revision or "main",
                trust_remote_code=False,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **options,
            )
    except OSError as error:
        raise ValueError(
            f"model {config.model!r} could not be loaded: {error}\nGive a folder, a hub name that can be reached "
            "from here, or package:NAME"
        ) from error
    _check_loading(config, model, info)
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bar and no report on a new head, which is meant to be new; _check_loading tells what is not."""
    log = transformers.utils.logging
    verbosity, bar = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(verbosity)
        if bar:
            log.enable_progress_bar()


def _check_loading(config: TaskConfig, model: nn.Module, info: dict[str, Any]) -> None:
    heads = tuple(f"{name}." for name in head_names(model))
    mismatched = sorted(key[0] for key in info.get("mismatched_keys", ()) if not key[0].startswith(heads))
    if mismatched:
        raise ValueError(f"model {config.model!r}: weights of another shape than its config.json says: {mismatched}")
    missing = sorted(key for key in info.get("missing_keys", ()) if not key.startswith(heads))
    if missing:
        warnings.warn(
            f"model {config.model!r} has no weights for {missing}: they are random and, unless named in "
            "adapter.modules_to_save, stay so",
            stacklevel=2,
        )


def head_names(model: nn.Module) -> list[str]:
    """The children beside the model's body: its head, and whatever stands between the two."""
    body = getattr(model, "base_model_prefix", "")
    names = [name for name, child in model.named_children() if name != body and any(True for _ in child.parameters())]
    if body not in dict(model.named_children()):
        names = [name for name in names if name in ("classifier", "score", "head")]
    if not names:
        raise ValueError(f"{type(model).__name__} has no classification head that can be told from its body")
    return names


def adapt(model: nn.Module, config: TaskConfig) -> nn.Module:
    """Freeze the model, add the adapter, and leave exactly the adapter and the head trainable, in float32."""
    heads = head_names(model)
    if config.adapter.method == "none":
        saved = _expand(model, config.adapter.modules_to_save, "adapter.modules_to_save", leaves=False)
        trained = tuple(f"{name}." for name in [*heads, *saved])
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not config.freeze_backbone or name.startswith(trained))
    else:
        model = peft.get_peft_model(model, _peft_config(model, heads, config))
    for parameter in model.parameters():
        if parameter.requires_grad:
            # An update below the resolution of bfloat16 would be lost.
            parameter.data = parameter.data.float()
    return model.eval()


def share_frozen(model: nn.Module) -> nn.Module:
    """A copy whose frozen parameters and buffers are the model's own tensors; trainable parameters are copied."""
    frozen = [*(p for p in model.parameters() if not p.requires_grad), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in frozen})


def _peft_config(model: nn.Module, heads: list[str], config: TaskConfig) -> Any:
    adapter = config.adapter
    options = dict(adapter.options)
    if adapter.target_modules == "all-linear":
        options["target_modules"] = _all_linear(model, heads)
    else:
        options["target_modules"] = _expand(model, adapter.target_modules, "adapter.target_modules", outside=heads)
    options["modules_to_save"] = list(dict.fromkeys([*heads, *adapter.modules_to_save]))
    _expand(model, adapter.modules_to_save, "adapter.modules_to_save", leaves=False)
    if adapter.method == "ia3":
        names = options.get("feedforward_modules") or []
        options["feedforward_modules"] = _expand(model, names, "adapter.options.feedforward_modules", outside=heads)
    else:
        options["r"] = adapter.rank or DEFAULT_RANK
    if adapter.method in ("lora", "rslora", "dora"):
        options["lora_alpha"] = adapter.alpha if adapter.alpha is not None else options["r"]
        options["use_rslora"] = adapter.method == "rslora"
        options["use_dora"] = adapter.method == "dora"
    if config.kind in ("text", "text_pair"):
        options["task_type"] = peft.TaskType.SEQ_CLS
    try:
        return peft_config_class(adapter.method)(**options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"PEFT refuses the {adapter.method} adapter: {error}") from error


def _inside(name: str, parents: Iterable[str]) -> bool:
    return any(name == parent or name.startswith(f"{parent}.") for parent in parents)


def _all_linear(model: nn.Module, heads: list[str]) -> list[str]:
    linear = (nn.Linear, transformers.pytorch_utils.Conv1D)
    names = [name for name, module in model.named_modules() if isinstance(module, linear) and not _inside(name, heads)]
    if not names:
        raise ValueError(f"adapter.target_modules is all-linear, but {type(model).__name__} has no linear layer")
    return names


def _expand(
    model: nn.Module, names: Iterable[str], key: str, *, outside: Iterable[str] = (), leaves: bool = True
) -> list[str]:
    """Full names for names or ends of names, each of which has to match something."""
    modules = [
        name
        for name, module in model.named_modules()
        if name and not _inside(name, outside) and (not leaves or next(module.children(), None) is None)
    ]
    full: list[str] = []
    for name in names:
        matches = [module for module in modules if module == name or module.endswith(f".{name}")]
        if not matches:
            weighted = {module.rpartition(".")[2] for module in modules if _has_weight(model.get_submodule(module))}
            raise ValueError(
                f"{key} names {name!r}, which {type(model).__name__} does not have outside its head; "
                f"there are: {', '.join(sorted(weighted))}"
            )
        full += matches
    return list(dict.fromkeys(full))


def _has_weight(module: nn.Module) -> bool:
    return getattr(module, "weight", None) is not None


def save_adapter(model: nn.Module, path: str | Path) -> None:
    """Write the adapter and the head in PEFT's own format, or, where there is no adapter, the whole model."""
    if isinstance(model, peft.PeftModel):
        # "auto" would ask the hub whether the vocabulary grew; it never does here.
        model.save_pretrained(str(path), save_embedding_layers=False)
    elif isinstance(model, transformers.PreTrainedModel):
        model.save_pretrained(str(path))
    else:
        Path(path).mkdir(parents=True, exist_ok=True)
        save_file(
            {name: value.contiguous() for name, value in model.state_dict().items()}, Path(path) / "model.safetensors"
        )
