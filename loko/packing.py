"""Several runs over one frozen backbone: their rows coincide, so they pass through its layers together.

An adapter and its filter are small, the backbone is not. Runs of one search differ in their optimizer, and see the same
rows in the same order. So K of them make one forward on K·B rows: what lies before the first adapted layer is computed
once on B rows, every frozen layer in one larger product, and each adapted layer gives each run's slice to that run's
own parameters. Rows do not mix, so one backward pass serves all runs too, each row of outputs with its own run's seed.

    pack = Pack(config)                                     # loads stream and backbone
    runs = [pack.start(one) for one in configs]             # they differ in their optimizer
    for reports in pack.advance(runs): ...                  # at each rung; runs may be left out from the next one on

Each run is an ``online.Run`` like any other, with a model, a filter, metrics and checkpoints of its own, and the same
figures as alone, up to the order in which products are summed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from loko import online
from loko.config import ExperimentConfig
from loko.jacobian import JacobianEngine
from loko.learner import GradientLearner, KalmanLearner
from loko.optimizer import LoKO, Pending
from loko.tasks import Batch, Task

__all__ = ["Pack", "PackedModel", "PackingError"]

_MEND = "run this candidate unpacked (search.pack: 1)"


class PackingError(ValueError):
    """A model or a learner that cannot share its backbone; the message says which part of it."""


@dataclass
class _Call:
    """One call of an adapted layer for all runs: input and output (K·B, …)."""

    layer: str
    input: Tensor
    output: Tensor


def _linear(layers: Sequence[nn.Module], inputs: Tensor) -> Tensor:
    """Each run's linear map on its slice, as one batched product."""
    weight = torch.stack([layer.weight for layer in layers])  # type: ignore[misc]
    flat = inputs.reshape(len(layers), -1, inputs.shape[-1])
    if layers[0].bias is None:
        outputs = torch.bmm(flat, weight.mT)
    else:
        bias = torch.stack([layer.bias for layer in layers])  # type: ignore[misc]
        outputs = torch.baddbmm(bias[:, None], flat, weight.mT)
    return outputs.view(*inputs.shape[:-1], -1)


def _slices(layers: Sequence[nn.Module], inputs: Tensor) -> Tensor:
    """Each run's layer on its slice, one after another."""
    return torch.stack([layer(part) for layer, part in zip(layers, inputs, strict=True)])


_KINDS: dict[type[nn.Module], Callable[[Sequence[nn.Module], Tensor], Tensor]] = {
    nn.Linear: _linear,
    nn.Conv2d: _slices,
    nn.Embedding: _slices,
    nn.LayerNorm: _slices,
}
_PROOF_SPREAD = 0.05
_PROOF_TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


class PackedModel:
    """The forward of K copies of one model that differ in their trainable parameters.

    The layers that own trainable parameters (LoRA's A and B, a new head) are called once for all copies; everything
    between them runs as it stands in the model, on K·B rows.

    Args:
        task: the task on a model whose own trainable parameters are never used.

    Raises:
        PackingError: a trainable parameter outside of a linear, convolution, embedding or layer-norm layer.
    """

    def __init__(self, task: Task) -> None:
        self._source = task
        self._task = task.twin()
        self._models: list[nn.Module] = []
        self._layers: dict[str, list[nn.Module]] = {}
        self._rows = 0
        self._apart = False
        self._calls: list[_Call] = []
        host = self._task.model
        trained = sorted({name.rpartition(".")[0] for name, p in host.named_parameters() if p.requires_grad})
        for name in trained:
            layer = host.get_submodule(name)
            kind = next((k for base, k in _KINDS.items() if type(layer) is base), None)
            if kind is None:
                raise PackingError(
                    f"{name} is a {type(layer).__name__} with trainable parameters; runs can share a backbone where "
                    f"those belong to {', '.join(base.__name__ for base in _KINDS)}; {_MEND}"
                )
            layer.forward = self._adapted(name, kind)
        self._trained = trained
        for root in _frozen_roots(host, "", trained):
            root.forward = self._once(root.forward)

    def __call__(self, models: Sequence[nn.Module], batch: Batch) -> Tensor:
        """Outputs of each model for the batch, (K, B, C); ``layers`` and ``calls`` tell of it until the next call."""
        count = len(models)
        if self._models != list(models):
            self._models = list(models)
            self._layers = {name: [model.get_submodule(name) for model in models] for name in self._trained}
        self._rows, self._apart, self._calls = len(batch), False, []

        def repeated(tensor: Tensor) -> Tensor:
            return tensor.expand(count, *tensor.shape).flatten(0, 1)

        inputs = {name: repeated(value) for name, value in batch.inputs.items()}
        outputs = self._task.logits(Batch(inputs, repeated(batch.labels)))
        return outputs.unflatten(0, (count, len(batch)))

    @property
    def layers(self) -> dict[str, list[nn.Module]]:
        """The adapted layers by name, each the models' own."""
        return self._layers

    def take_calls(self) -> list[_Call]:
        """The calls of adapted layers in the last forward; with them goes its graph."""
        calls, self._calls = self._calls, []
        return calls

    def prove(self, batch: Batch) -> None:
        """Compare two models of random trainable parameters, packed, with each of them alone.

        Raises:
            PackingError: the outputs differ: a parameter that is read past its layer's forward, rows that mix.
        """
        tasks = [self._source.twin() for _ in range(2)]
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in (p for task in tasks for p in task.model.parameters() if p.requires_grad):
                p.add_(torch.randn(p.shape, generator=generator).to(p), alpha=_PROOF_SPREAD)
            packed = self([task.model for task in tasks], batch)
            alone = torch.stack([task.logits(batch) for task in tasks])
        tolerance = _PROOF_TOLERANCE["float32" if self._task.config.dtype == "float32" else "bfloat16"]
        error = float((packed - alone).abs().max() / (1.0 + alone.abs().max()))
        if not error <= tolerance:
            raise PackingError(
                f"the outputs of two models that share a backbone differ from those of each alone, by {error:.1e}: a "
                f"trainable parameter is read past its layer, or rows of a batch depend on each other; {_MEND}"
            )

    def _adapted(self, name: str, kind: Callable[[Sequence[nn.Module], Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def forward(inputs: Tensor) -> Tensor:
            self._apart = True
            parts = inputs.unflatten(0, (len(self._models), -1))
            outputs = kind(self._layers[name], parts).flatten(0, 1)
            if outputs.requires_grad:
                self._calls.append(_Call(name, inputs.detach(), outputs))
            return outputs

        return forward

    def _once(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """The forward of a frozen module; on one model's rows while the rows of all models are still the same."""

        def shared(*args: Any, **kwargs: Any) -> Any:
            if self._apart or len(self._models) == 1:
                return forward(*args, **kwargs)
            cut = [self._cut(value) for value in (*args, *kwargs.values())]
            if not any(was for was, _ in cut):
                return forward(*args, **kwargs)
            values = [value for _, value in cut]
            outputs = forward(*values[: len(args)], **dict(zip(kwargs, values[len(args) :], strict=True)))
            if isinstance(outputs, Tensor) and len(outputs) == self._rows:
                return outputs.expand(len(self._models), *outputs.shape).flatten(0, 1)
            return forward(*args, **kwargs)

        return shared

    def _cut(self, value: Any) -> tuple[bool, Any]:
        """One model's rows of a value, and whether it had those of all; what only looks like rows is left whole."""
        count, rows = len(self._models), self._rows
        if not isinstance(value, Tensor) or value.dim() == 0 or len(value) != count * rows:
            return False, value
        parts = value.unflatten(0, (count, rows))
        same = bool((parts[1:] == parts[:1]).all())
        return same, parts[0] if same else value


def _frozen_roots(module: nn.Module, name: str, trained: Sequence[str]) -> Iterator[nn.Module]:
    """The outermost modules that are called and have no adapted layer inside."""
    inside = any(not name or layer == name or layer.startswith(f"{name}.") for layer in trained)
    if not inside and not isinstance(module, _CONTAINERS):
        yield module
    elif name not in trained:
        for child, inner in module.named_children():
            yield from _frozen_roots(inner, f"{name}.{child}" if name else child, trained)


class Pack:
    """Runs that share one stream and one frozen backbone.

    Args:
        config: of any of the runs; they differ in ``optimizer`` only.
        device: see ``online.start``.
        validate: see ``online.start``.

    Raises:
        PackingError: a model whose runs cannot share it.
        StreamError, ConfigError, ValueError: see ``online.start``.
    """

    def __init__(self, config: ExperimentConfig, *, device: torch.device | None = None, validate: bool = True) -> None:
        self._first = online.start(config, device=device, validate=validate)
        self._model = PackedModel(self._first.task)
        self._proven = False

    def start(self, config: ExperimentConfig) -> online.Run:
        """A run that stands before the first row; ``online.resume`` takes it further.

        Raises:
            ValueError: it differs from the others in more than its optimizer.
        """
        return online.start(config, device=self._first.device, validate=False, beside=self._first)

    def advance(self, runs: Sequence[online.Run]) -> Iterator[list[online.Report]]:
        """Learn the rest of the stream; yields the reports of all runs at each rung and after the last row.

        Raises:
            PackingError: the runs stand before different rows; a parameter that needs backward passes of its own.
        """
        cursors = sorted({run.cursor for run in runs})
        if len(cursors) > 1:
            raise PackingError(f"runs can only go on together from one row of the stream; these stand at {cursors}")
        return online.advance_together(runs, self)

    def predict(self, runs: Sequence[online.Run], batch: Batch) -> list[Tensor]:
        """Each run's outputs (B, C); nothing is learned."""
        if len(runs) == 1:
            return [runs[0].task.logits(batch)]
        with torch.no_grad():
            outputs = self._model([run.task.model for run in runs], batch)
        return list(outputs)

    def learn(self, runs: Sequence[online.Run], batch: Batch) -> list[Tensor]:
        """Each run's outputs before its update, (B, C)."""
        if not self._proven:
            self._model.prove(batch)
            self._proven = True
        ready = [_ready(run.learner, len(batch)) for run in runs]
        if sum(ready) < 2:
            return [run.learner.learn(batch) for run in runs]
        packed = iter(self._learn([run for run, now in zip(runs, ready, strict=True) if now], batch))
        return [next(packed) if now else run.learner.learn(batch) for run, now in zip(runs, ready, strict=True)]

    def _learn(self, runs: Sequence[online.Run], batch: Batch) -> list[Tensor]:
        """One forward, and as many backward passes as the run that needs most of them."""
        with torch.enable_grad():
            outputs = self._model([run.task.model for run in runs], batch)
        calls = self._model.take_calls()
        gradient = {k: run.learner for k, run in enumerate(runs) if isinstance(run.learner, GradientLearner)}
        filters = {k: _filter(run.learner) for k, run in enumerate(runs) if k not in gradient}
        if gradient:
            for learner in gradient.values():
                learner.optimizer.zero_grad(set_to_none=True)
            loss = torch.stack([learner.loss(outputs[k], batch.labels) for k, learner in gradient.items()]).sum()
            parameters = [p for learner in gradient.values() for p in learner.parameters]
            loss.backward(inputs=parameters, retain_graph=bool(filters))
        pending = {k: _observe(optimizer, outputs[k], batch.labels) for k, optimizer in filters.items()}
        jacobians: dict[int, Tensor] = {}
        if filters:
            engine = next(iter(filters.values())).engine
            seeds = {k: one.seeds for k, one in pending.items()}
            jacobians = _jacobians(engine, outputs, calls, self._model.layers, seeds)
        del calls
        # Parameters move in place, so every backward pass comes first.
        for learner in gradient.values():
            learner.descend(len(batch))
        predicted = list(outputs.detach())
        for k, optimizer in filters.items():
            predicted[k] = optimizer.assimilate(pending[k], jacobians[k], partial(_again, runs[k], batch))
        return predicted


def _ready(learner: online.Learner, rows: int) -> bool:
    """Whether a run can learn such a batch with others; a filter's first step, which proves its Jacobian and
    measures its adapters, is its own.

    Raises:
        PackingError: a learner that can never.
    """
    if isinstance(learner, GradientLearner):
        if learner.learns_elsewhere:
            name = type(learner.optimizer).__name__
            raise PackingError(
                f"{name} learns at other parameters than it predicts with, in a pass of its own; {_MEND}"
            )
        return True
    optimizer = _filter(learner)
    engine = optimizer.engine
    if engine.proven(rows) and engine.exact_names:
        raise PackingError(
            f"{engine.exact_names[0]} takes the exact route of Jacobians, with backward passes of its own; {_MEND}"
        )
    return engine.proven(rows) and optimizer.started


def _again(run: online.Run, batch: Batch) -> tuple[Tensor, Tensor]:
    return run.task.logits(batch), batch.labels


def _filter(learner: online.Learner) -> LoKO:
    if isinstance(learner, KalmanLearner) and isinstance(learner.optimizer, LoKO):
        return learner.optimizer
    raise PackingError(f"a {type(learner).__name__} of several workers cannot share its backbone; {_MEND}")


def _observe(optimizer: LoKO, outputs: Tensor, labels: Tensor) -> Pending:
    pending = optimizer.observe(lambda: (outputs, labels))
    assert pending is not None
    return pending


def _jacobians(
    engine: JacobianEngine,
    outputs: Tensor,
    calls: Sequence[_Call],
    layers: dict[str, list[nn.Module]],
    seeds: dict[int, Tensor],
) -> dict[int, Tensor]:
    """J of each filter, (B·m, n), from the backward passes that the one with most outputs needs.

    Args:
        engine: of the first of those runs; the others' columns are alike.
        outputs: (K, B, C).
        calls: those recorded on the way to them.
        layers: the models' own adapted layers by name.
        seeds: by run, the combinations of outputs that its filter observes, (m, C) or (B, m, C).
    """
    count, batch, size = outputs.shape
    own_place = next(iter(seeds))  # the run whose engine it is
    passes = max(seed.shape[-2] for seed in seeds.values())
    together = outputs.new_zeros(count, batch, passes, size)
    for k, seed in seeds.items():
        together[k, :, : seed.shape[-2]] = seed.to(outputs)
    own = ((layers[call.layer][own_place], call.input, call.output) for call in calls)
    jacobian = engine.of_calls(own, outputs.flatten(0, 1), together.flatten(0, 1)).view(count, batch, passes, -1)
    return {k: jacobian[k, :, : seed.shape[-2]].flatten(0, 1) for k, seed in seeds.items()}
