"""One interface, ``learn(batch) -> outputs``, over the Kalman filter and over any gradient optimizer."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from loko.config import ExperimentConfig, GradientConfig, LokoConfig
from loko.consensus import Consensus
from loko.distributed import Ranks
from loko.optimizer import LoKO, parameter_groups
from loko.tasks import Batch, Task

__all__ = ["GradientLearner", "KalmanLearner", "Learner", "build_learner"]


Builder = Callable[[Any, GradientConfig], torch.optim.Optimizer]


class Learner(Protocol):
    """Predicts a batch, then learns it. With several workers every method is collective."""

    def learn(self, batch: Batch) -> Tensor: ...
    def diagnostics(self) -> dict[str, float]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class KalmanLearner:
    """LoKO on a task."""

    def __init__(
        self,
        task: Task,
        arguments: dict[str, Any],
        group: dist.ProcessGroup | None = None,
        sync_every: int | None = None,
    ) -> None:
        self._task = task
        self.optimizer: LoKO | Consensus
        if group is None or sync_every is None:
            self.optimizer = LoKO(task.model, group=group, **arguments)
        else:
            self.optimizer = Consensus(LoKO(task.model, **arguments), group, sync_every)

    def learn(self, batch: Batch) -> Tensor:
        """The outputs before the update, (B, C)."""
        return self.optimizer.step(lambda: (self._task.logits(batch), batch.labels))

    def diagnostics(self) -> dict[str, float]:
        """See ``LoKO.diagnostics``."""
        return self.optimizer.diagnostics()

    def state_dict(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state)


class GradientLearner:
    """One gradient step a batch on the mean negative log-likelihood.

    With several workers the gradient is that of the mean over the global batch, as one worker would have it.

    Some optimizers learn at other parameters than they predict with: schedule-free ones at y instead of the average x
    (arXiv 2405.15682), IVON at samples. For them the batch is predicted first, and passed once more to learn it;
    between two steps the model always holds the parameters to predict with.
    """

    def __init__(self, task: Task, optimizer: torch.optim.Optimizer, group: dist.ProcessGroup | None = None) -> None:
        self._task = task
        self._group = group
        self._ranks = Ranks(group, next(task.model.parameters()).device)
        # LoRA-FA's groups hold frozen parameters too.
        self.parameters = [p for g in optimizer.param_groups for p in g["params"] if p.requires_grad]
        self._skipped = 0
        self.optimizer = optimizer

    def learn(self, batch: Batch) -> Tensor:
        """The outputs before the update, (B, C). A batch with a non-finite gradient is skipped, and counted."""
        self.optimizer.zero_grad(set_to_none=True)
        predicted = None
        if self.learns_elsewhere:
            with torch.no_grad():
                predicted = self._task.logits(batch)
            self.optimizer.train()  # type: ignore[attr-defined]
        with self._ranks.together():
            outputs = self._task.logits(batch)
            if len(batch):
                self.loss(outputs, batch.labels).backward()
        self.descend(len(batch))
        if self.learns_elsewhere:
            self.optimizer.eval()  # type: ignore[attr-defined]
        return outputs.detach() if predicted is None else predicted

    @property
    def learns_elsewhere(self) -> bool:
        """Whether gradients are wanted at other parameters than those to predict with."""
        return hasattr(self.optimizer, "train")

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """The loss of a batch, summed over its rows."""
        return _LOSSES[self._task.observation](outputs, labels).sum()

    def descend(self, rows: int) -> None:
        """One step along the gradients of the loss of so many rows of this worker, summed, that the parameters hold."""
        rows = self._average_gradients(rows)
        grads = [p.grad for p in self.parameters if p.grad is not None]
        if not grads or bool(torch.isfinite(torch.stack(torch._foreach_norm(grads, torch.inf))).all()):
            self.optimizer.step()
        else:
            self._skipped += rows

    def _average_gradients(self, rows: int) -> int:
        if self._group is not None:
            device = self.parameters[0].device
            flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in self.parameters])
            total = torch.cat([flat, torch.tensor([float(rows)], device=device)]).double()
            dist.all_reduce(total, group=self._group)
            rows = int(total[-1])
            parts = total[:-1].to(flat.dtype).split([p.numel() for p in self.parameters])
            for p, part in zip(self.parameters, parts, strict=True):
                p.grad = part.view_as(p).clone()
        if grads := [p.grad for p in self.parameters if p.grad is not None]:
            torch._foreach_div_(grads, rows)
        return rows

    def diagnostics(self) -> dict[str, float]:
        """How many rows were skipped."""
        return {"skipped_rows": float(self._skipped)}

    def state_dict(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer.state_dict(), "skipped": self._skipped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        self._skipped = state["skipped"]


_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "categorical": lambda outputs, labels: F.cross_entropy(outputs, labels, reduction="none"),
    "bernoulli": lambda outputs, labels: F.binary_cross_entropy_with_logits(outputs, labels, reduction="none").sum(1),
    "gaussian": lambda outputs, labels: (outputs - labels).square().sum(1) / 2,
}


def build_learner(config: ExperimentConfig, task: Task, group: dist.ProcessGroup | None = None) -> Learner:
    """The learner a config names."""
    if isinstance(config.optimizer, LokoConfig):
        return KalmanLearner(task, config.kalman_arguments(), group, config.optimizer.sync_every)
    return GradientLearner(task, build_optimizer(task.model, config.optimizer), group)


def build_optimizer(model: nn.Module, config: GradientConfig) -> torch.optim.Optimizer:
    """A gradient optimizer with the head's learning rate apart from the adapter's.

    Raises:
        ValueError: options the optimizer does not take, or a model it does not fit; the message says which.
    """
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError(f"optimizer {config.name!r}: the model has no trainable parameter; give it an adapter")
    if config.name in _OF_LORA and not any("lora_A" in name for name, _ in model.named_parameters()):
        raise ValueError(f"optimizer {config.name!r} is one of LoRA; use task.adapter.method lora, rslora or dora")
    try:
        optimizer = _OPTIMIZERS[config.name](model, config)
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise ValueError(f"optimizer {config.name!r} with options {config.options}: {error}") from error
    head = {id(p) for g in parameter_groups(model) if g["name"] == "head" for p in g["params"]}
    _split_off(optimizer, head, config.head_lr_ratio)
    return optimizer


def _split_off(optimizer: torch.optim.Optimizer, chosen: set[int], ratio: float) -> None:
    """Give the chosen parameters groups of their own at ``ratio`` times the learning rate."""
    for group in list(optimizer.param_groups):
        inside = [id(p) in chosen for p in group["params"]]
        if not any(inside):
            continue
        if not all(inside):
            # LoRA-FA keeps lists beside the parameters, an item each.
            lists: list[str] = [key for key in ("params", "names", "scaling_factors") if key in group]
            ours = {key: [item for item, ok in zip(group[key], inside, strict=True) if ok] for key in lists}
            rest = {key: [item for item, ok in zip(group[key], inside, strict=True) if not ok] for key in lists}
            group.update(rest)
            group = {**group, **ours}
            optimizer.param_groups.append(group)
        group["lr"] = group["lr"] * ratio


def _torch(kind: Callable[..., torch.optim.Optimizer], **defaults: Any) -> Builder:
    def build(model: nn.Module, config: GradientConfig) -> torch.optim.Optimizer:
        return kind(_trainable(model), lr=config.lr, **{**defaults, **config.options})

    return build


def _trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


class _WithAdamW(torch.optim.Optimizer):
    """An optimizer for the parameters it is made for, and AdamW for the others; each at its own group's rate."""

    def __init__(
        self,
        kind: Callable[..., torch.optim.Optimizer],
        chosen: list[nn.Parameter],
        others: list[nn.Parameter],
        lr: float,
        **options: Any,
    ) -> None:
        super().__init__([*chosen, *others], {"lr": lr})
        self._parts: list[torch.optim.Optimizer] = [kind(chosen, lr=lr, **options)] if chosen else []
        self._parts += [torch.optim.AdamW(others, lr=lr)] if others else []

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        rates = {id(p): g["lr"] for g in self.param_groups for p in g["params"]}
        for part in self._parts:
            for group in part.param_groups:
                params = group["params"]
                for rate in sorted({rates[id(p)] for p in params}):
                    group["params"], group["lr"] = [p for p in params if rates[id(p)] == rate], rate
                    part.step()
                group["params"] = params

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "parts": [part.state_dict() for part in self._parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "parts"})
        for part, state in zip(self._parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)


def _muon(model: nn.Module, config: GradientConfig) -> torch.optim.Optimizer:
    """Muon on matrices and AdamW on everything else, as Muon's authors use it: Muon takes no vectors."""
    params = _trainable(model)
    matrices, others = [p for p in params if p.dim() == 2], [p for p in params if p.dim() != 2]
    return _WithAdamW(torch.optim.Muon, matrices, others, config.lr, **config.options)


def _lora_rite(model: nn.Module, config: GradientConfig) -> torch.optim.Optimizer:
    """LoRA-RITE on the pairs A, B of LoRA (arXiv 2410.20625), which it takes in turn, and AdamW on the head."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    halves: list[dict[str, nn.Parameter]] = [
        {name.replace(half, ""): p for name, p in named if half in name and p.dim() == 2}
        for half in ("lora_A", "lora_B")
    ]
    pairs = [p for key in halves[0] if key in halves[1] for p in (halves[0][key], halves[1][key])]
    paired = {id(p) for p in pairs}
    others = [p for _, p in named if id(p) not in paired]
    return _WithAdamW(_peer("LoRARite"), pairs, others, config.lr, **config.options)


def _peer(name: str) -> Callable[..., torch.optim.Optimizer]:
    """An optimizer of the package pytorch-optimizer, which takes any option and says nothing of those it lacks."""
    try:
        import pytorch_optimizer
    except ImportError:
        raise ValueError("it comes from the package pytorch-optimizer: pip install 'loko[peers]'") from None
    kind: Callable[..., torch.optim.Optimizer] = getattr(pytorch_optimizer, name)
    known = set(inspect.signature(kind).parameters) - {"params", "kwargs"}

    def build(params: Any, **options: Any) -> torch.optim.Optimizer:
        for unknown in sorted(set(options) - known):
            raise ValueError(f"unknown option {unknown!r}; there are: {', '.join(sorted(known))}")
        return kind(params, **options)

    return build


def _from_peer(name: str, **defaults: Any) -> Builder:
    return lambda model, config: _torch(_peer(name), **defaults)(model, config)


def _ivon(model: nn.Module, config: GradientConfig) -> torch.optim.Optimizer:
    """IVON (arXiv 2402.17641): AdamW's cost, and a variational Gaussian whose samples give the gradients."""
    try:
        import ivon
    except ImportError:
        raise ValueError("it comes from the package ivon-opt, whose licence is the GPL: pip install ivon-opt") from None

    class Ivon(ivon.IVON):
        """IVON with samples drawn by ``train`` and taken back by ``step`` or ``eval``, and with all its state saved."""

        _sampled: Any = None

        def train(self) -> None:
            """Sample the parameters to take the gradient at."""
            self._sampled = self._sample_params()

        def step(self, closure: Any = None) -> None:
            """Learn from the gradient at the sample."""
            self._take_back(learn=True)
            super().step()

        def eval(self) -> None:
            """The mean again, also after a batch that was skipped."""
            self._take_back(learn=False)

        def _take_back(self, learn: bool) -> None:
            if self._sampled is not None:
                self._restore_param_average(learn, *self._sampled)
            self._sampled = None

        def state_dict(self) -> dict[str, Any]:
            return {**super().state_dict(), "current_step": self.current_step}

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            rest = dict(state_dict)
            self.current_step = rest.pop("current_step")
            super().load_state_dict(rest)

    # Its buffers are laid out a group, so the head's group has to be there from the start.
    groups = [
        {"params": params}
        for kind in (True, False)
        if (params := [p for g in parameter_groups(model) if (g["name"] == "head") is kind for p in g["params"]])
    ]
    return Ivon(groups, lr=config.lr, **{"ess": 1000.0, **config.options})


def _lora_plus(model: Any, config: GradientConfig) -> torch.optim.Optimizer:
    from peft.optimizers import create_loraplus_optimizer

    options = {"loraplus_lr_ratio": 16.0, **config.options}
    return create_loraplus_optimizer(model, torch.optim.AdamW, lr=config.lr, **options)


def _lora_fa(model: Any, config: GradientConfig) -> torch.optim.Optimizer:
    from peft.optimizers import create_lorafa_optimizer

    adapter = model.peft_config[model.active_adapter]
    # Newer versions of PEFT see it in the adapter, and warn.
    scaled = {"use_rslora": True} if adapter.use_rslora else {}
    return create_lorafa_optimizer(
        model, r=adapter.r, lora_alpha=adapter.lora_alpha, lr=config.lr, **scaled, **config.options
    )


def _riemannian(model: Any, config: GradientConfig) -> torch.optim.Optimizer:
    from peft.optimizers import create_riemannian_optimizer

    return create_riemannian_optimizer(model, torch.optim.AdamW, lr=config.lr, **config.options)


_OF_LORA = ("lora_plus", "lora_fa", "riemannian", "lora_rite")
_OPTIMIZERS: dict[str, Builder] = {
    # Fused, on the CPU too: a loop over many small parameters would cost as much as their forward.
    "adamw": _torch(torch.optim.AdamW, fused=True),
    "adagrad": _torch(torch.optim.Adagrad),
    "sgd": _torch(torch.optim.SGD, momentum=0.9, fused=True),
    "muon": _muon,
    "lora_plus": _lora_plus,
    "lora_fa": _lora_fa,
    "riemannian": _riemannian,
    "schedule_free": _from_peer("ScheduleFreeAdamW"),
    "lora_rite": _lora_rite,
    "soap": _from_peer("SOAP", weight_decay=0.0),
    "ivon": _ivon,
}
