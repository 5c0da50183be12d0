"""Per-sample Jacobians of the trainable parameters, from one forward and one backward per observed output.

The *hook route* keeps, for each trainable linear map, its input a and its output o. One backward pass of the sum over
the batch of output c to the *outputs o* (not to the parameters) gives every sample's δ at once, and the map's Jacobian
is the contraction of δ with a. The *exact route* differentiates to the parameter itself, one pass per sample and
output: slow, but right for whatever a parameter does. Every parameter is on one of the two, and the first step proves
it: a parameter for which a random vector–Jacobian product through J is not autograd's own moves to the exact route.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parameter import Parameter

from loko.rows import Jacobian, Rows

__all__ = ["JacobianEngine", "JacobianError"]

log = logging.getLogger(__name__)

_PASS_ELEMENTS = 2**19  # of the largest δ of one pass: above it, passes together run no faster than one by one,
_FEWEST_TOGETHER = 4  # nor do so few of them, which only take more memory

_FACTORED_ELEMENTS = 2**17  # of a weight: below it, keeping its J as factors saves little

_CHECK_TOLERANCE = 1e-2  # above the noise of TF32 and of cancelling sums, far below what a missed use of a weight does


class JacobianError(RuntimeError):
    """The forward pass cannot be differentiated per sample; the message says which parameter and what to do."""


@dataclass
class _Call:
    """One call of one map: input and output with the batch in front."""

    module: nn.Module
    input: Tensor
    output: Tensor


Contraction = Callable[[nn.Module, Tensor, Tensor], Tensor]


def _linear_weight(module: nn.Module, inputs: Tensor, delta: Tensor) -> Tensor:
    """(B, m, out·in) from inputs (B, …, in) and delta (m, B, …, out)."""
    outputs, batch, width = delta.shape[0], delta.shape[1], delta.shape[-1]
    if delta.dim() == 3:
        return (delta.transpose(0, 1)[..., None] * inputs[:, None, None, :]).flatten(2)
    delta = delta.reshape(outputs, batch, -1, width).permute(1, 2, 0, 3)
    inputs = inputs.reshape(batch, -1, inputs.shape[-1])  # (B, T, in)
    weight = delta.reshape(batch, -1, outputs * width).mT @ inputs
    return weight.view(batch, outputs, -1)


def _linear_bias(module: nn.Module, inputs: Tensor, delta: Tensor) -> Tensor:
    """(B, m, out) from delta (m, B, …, out)."""
    return delta.reshape(*delta.shape[:2], -1, delta.shape[-1]).sum(2).transpose(0, 1)


def _conv2d_weight(module: nn.Module, inputs: Tensor, delta: Tensor) -> Tensor:
    """(B, m, out·in/groups·kh·kw) from inputs (B, in, h, w) and delta (m, B, out, h', w')."""
    assert isinstance(module, nn.Conv2d)
    outputs, batch = delta.shape[:2]
    if module.padding_mode != "zeros" or isinstance(module.padding, str):
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        inputs = F.pad(inputs, module._reversed_padding_repeated_twice, mode=mode)
        padding: tuple[int, ...] = (0, 0)
    else:
        padding = module.padding
    patches = F.unfold(inputs, module.kernel_size, module.dilation, padding, module.stride)  # (B, in·kh·kw, T)
    patches = patches.view(batch, module.groups, -1, patches.shape[-1])
    delta = delta.reshape(outputs, batch, module.groups, module.out_channels // module.groups, -1)
    return torch.einsum("mbgot,bgit->bmgoi", delta, patches).reshape(batch, outputs, -1)


def _conv2d_bias(module: nn.Module, inputs: Tensor, delta: Tensor) -> Tensor:
    """(B, m, out) from delta (m, B, out, h', w')."""
    return delta.flatten(3).sum(-1).transpose(0, 1)


def _embedding_weight(module: nn.Module, inputs: Tensor, delta: Tensor) -> Tensor:
    """(B, m, rows·width) from indices (B, …) and delta (m, B, …, width)."""
    assert isinstance(module, nn.Embedding)
    outputs, batch, width = delta.shape[0], delta.shape[1], delta.shape[-1]
    delta = delta.reshape(outputs, batch, -1, width).transpose(0, 1)  # (B, m, T, width)
    index = inputs.reshape(batch, 1, -1, 1)
    if module.padding_idx is not None:
        delta = delta * (index != module.padding_idx)
    weight = delta.new_zeros(batch, outputs, module.num_embeddings, width)
    weight.scatter_add_(2, index.expand_as(delta), delta)
    return weight.flatten(2)


_CONTRACTIONS: dict[type[nn.Module], dict[str, Contraction]] = {
    nn.Linear: {"weight": _linear_weight, "bias": _linear_bias},
    nn.Conv2d: {"weight": _conv2d_weight, "bias": _conv2d_bias},
    nn.Embedding: {"weight": _embedding_weight},
}


def _contractions(module: nn.Module) -> dict[str, Contraction] | None:
    """The hook route of a module, or None: subclasses count only where they keep the forward of their base."""
    for base, contractions in _CONTRACTIONS.items():
        if isinstance(module, base) and type(module).forward is base.forward:
            rescaled = isinstance(module, nn.Embedding) and (
                module.max_norm is not None or module.scale_grad_by_freq or module.sparse
            )
            return None if rescaled else contractions
    return None


class JacobianEngine:
    """Jacobians of named parameters of a model, laid out flat in the order given.

    Args:
        model: the module whose forward is recorded.
        parameters: names (as in ``model.named_parameters()``) and parameters; their order is the order of columns.
        backward_dtype: what the backward passes compute products in, where it is not the dtype of the forward. What
            they sum up stays in that of J. The proof of the routes is always made at full precision.

    Raises:
        JacobianError: a compiled model.

    Use it as::

        with engine.record():
            outputs = model(x)                      # (B, C)
        rows = engine.jacobian(outputs, contrast)   # (B·m, n)
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Sequence[tuple[str, Parameter]],
        backward_dtype: torch.dtype | None = None,
    ) -> None:
        if any(hasattr(module, "_orig_mod") for module in model.modules()):
            raise JacobianError(
                "the model was compiled by torch.compile, whose backward pass runs only once a forward; give LoKO, and "
                "call in the closure, the model from before (it is in the compiled one's _orig_mod)"
            )
        self.names = [name for name, _ in parameters]
        self.parameters = [parameter for _, parameter in parameters]
        self.sizes = [parameter.numel() for parameter in self.parameters]
        self.size = sum(self.sizes)
        self.dtype = torch.float32
        for parameter in self.parameters:
            self.dtype = torch.promote_types(self.dtype, parameter.dtype)
        self._ids = {id(p) for p in self.parameters}
        self._batch_norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        self._maps = [
            module
            for module in model.modules()
            if _contractions(module) is not None and any(id(p) in self._ids for p in module.parameters(recurse=False))
        ]
        self._keys = {id(module): {id(p) for p in self._owned(module)} for module in self._maps}
        mapped = {id(p) for module in self._maps for p in module.parameters(recurse=False)}
        self._exact = {id(p) for p in self.parameters if id(p) not in mapped}
        self._calls: list[_Call] = []
        self._buffer: Tensor | None = None
        self._backward_dtype = backward_dtype
        self._vmaps = True
        self._proven = 0  # 1: on a batch of one row; 2: on several rows, which alone can show that samples mix
        self._proven_together = False  # several outputs in one pass

    @property
    def exact_names(self) -> list[str]:
        """Names of the parameters on the exact route: B·m backward passes a step instead of m."""
        return [name for name, p in zip(self.names, self.parameters, strict=True) if id(p) in self._exact]

    @contextmanager
    def record(self) -> Iterator[None]:
        """Record the forward passes made inside; every hook is gone afterwards, also after an error."""
        training = next((m for m in self._batch_norms if m.training), None)
        if training is not None:
            raise JacobianError(
                f"{type(training).__name__} is in training mode, which couples the samples of a batch, so that no "
                "sample has a Jacobian of its own; call model.eval() before the step"
            )
        self._calls = []
        handles = [module.register_forward_hook(self._keep, with_kwargs=True) for module in self._maps]
        try:
            with torch.enable_grad():
                yield
        except BaseException:
            self._calls = []  # and with them the graph
            raise
        finally:
            for handle in handles:
                handle.remove()

    def _keep(self, module: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor], output: Tensor) -> None:
        if output.requires_grad:
            self._calls.append(_Call(module, (*inputs, *named.values())[0].detach(), output))

    def jacobian(self, outputs: Tensor, contrast: Tensor) -> Jacobian:
        """J = ∂(contrast · outputs)/∂θ for every sample, (B·m, n), rows sample by sample; good until the next call.

        Its dtype is that of the parameters, float32 at least. A tensor, or ``Rows`` where some of it is kept in factors
        or, with ``backward_dtype``, in less precision.

        Frees the recorded forward. The routes are proven on the first finite batch of one row, and again on the first
        of several (see the module's docstring).

        Args:
            outputs: (B, C), made inside ``record()``.
            contrast: the observed combinations of the outputs, (m, C), or (B, m, C) for each sample its own.

        Raises:
            JacobianError: a parameter without a path to the outputs, samples that depend on each other.
        """
        batch, observed = len(outputs), contrast.shape[-2]
        calls, self._calls = self._calls, []
        if batch == 0:
            return outputs.new_empty(0, self.size, dtype=self.dtype)
        if not outputs.requires_grad:
            raise JacobianError(
                "the outputs do not depend on any trainable parameter: the closure must run the model given to LoKO, "
                "without torch.no_grad() or detach(), and return its outputs"
            )
        seeds = contrast.to(outputs).expand(batch, -1, -1)
        rows = min(batch, 2)
        unproven = self._proven < rows or any(c.output.shape[0] != batch and self._hooks(c) for c in calls)
        if unproven:
            calls = self._route(calls, outputs)
        calls = [call for call in calls if self._hooks(call)]
        together = min(observed, self._outputs_a_pass(calls)) > 1
        unproven = unproven or (together and not self._proven_together)
        jacobian = self._rows(calls, outputs, seeds, None if unproven else self._backward_dtype)
        if unproven and bool(torch.isfinite(outputs).all()):
            wrong = self._prove(calls, outputs, seeds, jacobian)
            self._proven = max(self._proven, rows)
            self._proven_together = self._proven_together or together
            if wrong or self._backward_dtype is not None:  # as in every later step: a run that resumes proves again
                del jacobian  # and its memory
                jacobian = self._rows(calls, outputs, seeds, self._backward_dtype)
        return jacobian if jacobian.factors or jacobian.dense.dtype != self.dtype else jacobian.dense.flatten(0, 1)

    def proven(self, rows: int) -> bool:
        """Whether the routes have been proven on a batch like one of so many rows."""
        return self._proven >= min(rows, 2)

    def of_calls(self, calls: Iterable[tuple[nn.Module, Tensor, Tensor]], outputs: Tensor, seeds: Tensor) -> Tensor:
        """J as ``jacobian`` gives it, always as a tensor, from a forward that other models took part in.

        Args:
            calls: a map of this model, and its input and output in that forward, all models' rows in front.
            outputs: (B, C), of all models' rows.
            seeds: the combinations of outputs that each row observes, (B, m, C).

        Raises:
            JacobianError: a parameter on the exact route, which needs passes of its own.
        """
        if self._exact:
            raise JacobianError(f"{self.exact_names[0]} takes the exact route, whose passes no other model can share")
        rows = self._empty(seeds, frozenset(), self._backward_dtype or self.dtype)
        self._hooked([_Call(*call) for call in calls], outputs, seeds, rows, self._backward_dtype)
        return rows[:, :]

    def _rows(self, calls: list[_Call], outputs: Tensor, seeds: Tensor, dtype: torch.dtype | None) -> Rows:
        """J by the routes that are known, from passes in a dtype."""
        rows = self._empty(seeds, self._factored(calls), dtype or self.dtype)
        self._hooked(calls, outputs, seeds, rows, dtype)
        self._exactly(self._exact, outputs, seeds, rows)
        return rows

    def _factored(self, calls: list[_Call]) -> frozenset[int]:
        """The weights, all used by one call on one vector a row, whose J is kept as two factors."""
        used = Counter(id(call.module) for call in calls)
        return frozenset(
            id(call.module.weight)
            for call in calls
            if isinstance(call.module, nn.Linear) and call.output.dim() == 2 and used[id(call.module)] == 1
            and call.module.weight.numel() >= _FACTORED_ELEMENTS and id(call.module.weight) in self._ids
        ) - self._exact  # fmt: skip

    def _empty(self, seeds: Tensor, factored: frozenset[int], dtype: torch.dtype) -> Rows:
        """J to be filled, in one buffer that steps share: it is by far the largest thing a step would allocate."""
        batch, observed = seeds.shape[:2]
        width = self.size - sum(p.numel() for p in self.parameters if id(p) in factored)
        count = batch * observed * width
        fits = self._buffer is not None and len(self._buffer) >= count
        if self._buffer is None or not fits or (self._buffer.device, self._buffer.dtype) != (seeds.device, dtype):
            self._buffer = None  # before there are two
            self._buffer = torch.empty(count, dtype=dtype, device=seeds.device)
        parameters = ((id(p), p.numel(), len(p) if p.dim() else 1) for p in self.parameters)
        return Rows(self._buffer[:count].view(batch, observed, width), parameters, factored, self.dtype)

    def _owned(self, module: nn.Module) -> list[Parameter]:
        return [p for p in module.parameters(recurse=False) if id(p) in self._ids]

    def _hooks(self, call: _Call) -> bool:
        return not self._keys[id(call.module)] <= self._exact

    def _route(self, calls: list[_Call], outputs: Tensor) -> list[_Call]:
        """Choose every parameter's route, raise for one that has none; returns the calls the outputs depend on.

        A parameter once found to need the exact route stays there.
        Some modules are also called aside, with no path to the outputs (DoRA's norms): those calls are left out.
        """
        grads = torch.autograd.grad(
            outputs,
            [*self.parameters, *(call.output for call in calls)],
            torch.randn(outputs.shape, generator=torch.Generator().manual_seed(0)).to(outputs),
            retain_graph=True,
            allow_unused=True,
        )
        lost = [name for name, grad in zip(self.names, grads, strict=False) if grad is None]
        if lost and not self._proven:
            raise JacobianError(
                f"{len(lost)} trainable parameters have no path to the outputs, so no row can ever teach them "
                f"(first: {lost[0]}); set requires_grad=False on them, or use them in the forward pass"
            )
        calls = [call for call, grad in zip(calls, grads[len(self.names) :], strict=True) if grad is not None]
        served = {id(p) for call in calls for p in self._owned(call.module)}
        served -= {id(p) for call in calls if call.output.shape[0] != len(outputs) for p in self._owned(call.module)}
        self._exact |= {id(p) for p in self.parameters if id(p) not in served}
        if self._exact and not self._proven:
            names = self.exact_names
            log.info("%d of %d parameters take the exact route (first: %s)", len(names), len(self.names), names[0])
        return calls

    def _hooked(
        self, calls: list[_Call], outputs: Tensor, seeds: Tensor, rows: Rows, dtype: torch.dtype | None
    ) -> None:
        """Backward passes to the outputs of the maps, for a few outputs at once, each contracted before the next.

        Under autocast a backward pass makes its products in the lower precision, and hands every gradient on in the
        dtype of the forward.
        """
        at_once = self._outputs_a_pass(calls)
        targets = [call.output for call in calls]
        for first in range(0, seeds.shape[1], at_once):
            some = slice(first, first + at_once)
            with torch.autocast(outputs.device.type, dtype, enabled=dtype is not None):
                reached, deltas = self._backward(targets, outputs, seeds[:, some].transpose(0, 1))
            made = ((calls[i].module, calls[i].input, delta) for i, delta in zip(reached, deltas, strict=True))
            self._contract(made, rows, some)

    def _outputs_a_pass(self, calls: list[_Call]) -> int:
        """How many outputs share one vmapped backward pass.

        A function of shapes alone, so that no run depends on its machine. Small tensors are all overhead, and one pass
        for several outputs saves most of it; large ones run no faster together, and take their number times the memory.
        """
        largest = max((call.output.numel() for call in calls), default=1)
        fit = _PASS_ELEMENTS // largest
        return fit if self._vmaps and fit >= _FEWEST_TOGETHER else 1

    def _backward(self, targets: list[Tensor], outputs: Tensor, seeds: Tensor) -> tuple[list[int], Sequence[Tensor]]:
        """Which targets the outputs depend on, and the gradients (k, …) to those from seeds (k, B, C)."""
        reached: list[int] = []

        def gradients(seed: Tensor) -> list[Tensor]:
            grads = torch.autograd.grad(outputs, targets, seed, retain_graph=True, allow_unused=True)
            reached[:] = [index for index, grad in enumerate(grads) if grad is not None]
            return [grad for grad in grads if grad is not None]

        if not targets:
            return [], []
        if len(seeds) > 1:
            try:
                with warnings.catch_warnings():
                    # Of operations that vmap has no rule for, and runs once an output: as a loop would.
                    warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
                    return reached, torch.vmap(gradients)(seeds)
            except RuntimeError as error:
                self._vmaps = False
                log.info("the backward pass cannot be vmapped, and runs once an output: %s", error)
        if len(seeds) == 1:
            return reached, [grad[None] for grad in gradients(seeds[0])]
        each = [gradients(seed) for seed in seeds]
        return reached, [torch.stack(grads) for grads in zip(*each, strict=True)]

    def _contract(self, deltas: Iterable[tuple[nn.Module, Tensor, Tensor]], rows: Rows, some: slice) -> None:
        """Write into J what inputs (B, …) and δ (m', B, …) of maps give for some of the observed outputs.

        Other columns of this route are 0.
        """
        written, jacobian = set(self._exact), rows.dense[:, some]
        for module, given, delta in deltas:
            inputs = given.to(self.dtype) if given.is_floating_point() else given
            contractions = _contractions(module)
            assert contractions is not None
            for name, contraction in contractions.items():
                key = id(getattr(module, name))
                if key not in self._ids or key in self._exact:
                    continue
                if key in rows.factors:
                    rows.keep(key, some, inputs, delta)
                    continue
                part = contraction(module, inputs, delta.to(self.dtype))
                if key in written:  # the module was called more than once
                    jacobian[:, :, rows.columns[key]] += part
                else:
                    jacobian[:, :, rows.columns[key]] = part
                    written.add(key)
        for key, columns in rows.columns.items():
            if key not in written:
                jacobian[:, :, columns] = 0.0

    def _exactly(self, keys: set[int], outputs: Tensor, seeds: Tensor, rows: Rows) -> None:
        parameters = [p for p in self.parameters if id(p) in keys]
        for row in range(len(outputs) if parameters else 0):
            for index, seed in enumerate(seeds[row]):
                alone = torch.zeros_like(outputs)
                alone[row] = seed
                grads = torch.autograd.grad(outputs, parameters, alone, retain_graph=True, allow_unused=True)
                for parameter, grad in zip(parameters, grads, strict=True):
                    columns = rows.dense[row, index, rows.columns[id(parameter)]]
                    if grad is None:  # not used for this batch (a branch, an expert)
                        columns.zero_()
                    else:
                        columns.copy_(grad.flatten())

    def _prove(self, calls: list[_Call], outputs: Tensor, seeds: Tensor, rows: Rows) -> bool:
        """Prove on a batch that J is the Jacobian. What the hook route gets wrong takes the exact one; True if any."""
        wrong = self._mixed(calls, outputs) if len(outputs) > 1 and calls else set()
        generator = torch.Generator().manual_seed(0)
        weights = torch.randn(seeds.shape[:2], generator=generator).to(seeds.device, self.dtype)
        expected = torch.autograd.grad(
            outputs,
            self.parameters,
            torch.einsum("bm,bmc->bc", weights.to(seeds), seeds),
            retain_graph=True,
            materialize_grads=True,
        )
        resolution = max(torch.finfo(t.dtype).eps for t in (outputs, *(c.output for c in calls)))
        loose = max(_CHECK_TOLERANCE, 40 * resolution)
        # Sums that cancel (the bias of attention keys, which softmax ignores) are rounding noise on either side.
        noise = min(100 * resolution, _CHECK_TOLERANCE) * math.hypot(*(float(grad.norm()) for grad in expected))
        for parameter, want in zip(self.parameters, expected, strict=True):
            got, want = rows.weighted(id(parameter), weights.flatten()), want.flatten().to(self.dtype)
            if float((got - want).norm()) > loose * float(want.norm()) + noise:
                wrong.add(id(parameter))
        wrong -= self._exact
        if wrong:
            names = [name for name, p in zip(self.names, self.parameters, strict=True) if id(p) in wrong]
            log.warning(
                "%d parameters are used in more ways than their module shows (tied weights, an in-place operation on "
                "its output, a batch that is not in front) and take the exact route, one backward pass a row and "
                "output (first: %s)",
                len(names),
                names[0],
            )
            self._exact |= wrong
        return bool(wrong)

    def _mixed(self, calls: list[_Call], outputs: Tensor) -> set[int]:
        """Parameters of maps whose rows are not the samples; raises where samples depend on each other."""
        wrong: set[int] = set()
        for row in (0, len(outputs) - 1):
            alone = torch.zeros_like(outputs)
            alone[row] = 1.0
            alone[row, 0] = 2.0  # softmax-like outputs have a constant sum
            grads = torch.autograd.grad(outputs, [c.output for c in calls], alone, retain_graph=True, allow_unused=True)
            for call, grad in zip(calls, grads, strict=True):
                if grad is None or not _reaches_others(grad, row, 0):
                    continue
                shared = isinstance(call.module, nn.Embedding) and call.input.dim() == 1  # positions, as many as rows
                second = grad.dim() > 2 and grad.shape[1] == len(outputs) and not _reaches_others(grad, row, 1)
                if not (shared or second):
                    raise JacobianError(
                        "the output of one sample depends on another sample of the batch (batch statistics, attention "
                        "over the batch), so no sample has a Jacobian of its own; use a model that treats rows alone"
                    )
                wrong |= {id(p) for p in self._owned(call.module)}
        return wrong


def _reaches_others(grad: Tensor, row: int, dim: int) -> bool:
    """Whether a gradient is non-zero anywhere but at one index of a dimension."""
    others = [index for index in range(grad.shape[dim]) if index != row]
    return bool(grad.index_select(dim, torch.tensor(others, device=grad.device)).any())
