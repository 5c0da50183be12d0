"""The units of a low-rank adapter: how large its factors may be is a matter of the layer that it adapts.

A layer gives (W + s B A) x with W frozen. p₀, the variance that the logits ask for (``loko.start``), knows nothing of
that: where the head starts near zero B hardly moves a logit at first, whatever its variance, and a p₀ that suits the
head lets s B A x be ten times as large as W x, or a tenth of it. In its own unit a factor has the variance 1 when

- A, which starts from random numbers, has a tenth of the mean square that it starts with,
- B, which starts at zero, makes s B A x as large as what the layer gives: E‖s B A x‖² = ‖(W + s B A) x‖² over the first
  rows, with the A of the start.

A factor starts from the geometric mean of p₀ and κ times its unit (docs/initial_covariance.md).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from loko.covariance import Reduce

__all__ = ["Units"]

_OF_A = 0.1
"""A's share of what it starts with: it is there already, and B moves the layer without it."""


class Units:
    """Measures the units of the factors of a model's adapters: layers as PEFT builds them for LoRA and its kin.

    A factor that is not measured has no unit: those of embeddings and of layers that the first rows do not reach, and a
    B behind an A of zeros.
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers: list[_Layer] = []
        for module in model.modules():
            layer: Any = module  # of PEFT, which types none of it
            if hasattr(layer, "base_layer") and hasattr(layer, "scaling"):
                for name, first in getattr(layer, "lora_A", {}).items():
                    if not isinstance(first, nn.Module):  # AdaLoRA's bare matrices, which have a third between them
                        continue
                    self._layers.append(_Layer(module, first, layer.lora_B[name], float(layer.scaling[name])))
        self._sums = torch.zeros(len(self._layers), 2, dtype=torch.float64)

    def __len__(self) -> int:
        return len(self._layers)

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Measure in the forward passes made inside, and forget those of before."""
        self._sums.zero_()
        handles = [
            layer.module.register_forward_hook(layer.measure(sums), with_kwargs=True)
            for layer, sums in zip(self._layers, self._sums, strict=True)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def found(self, reduce: Reduce, device: torch.device) -> dict[int, float]:
        """The unit of a factor by ``id`` of the parameter; a collective call.

        Args:
            reduce: sums over the ranks, each of which measured its own rows.
            device: where it sums.
        """
        units: dict[int, float] = {}
        for layer, (given, down) in zip(self._layers, reduce(self._sums.to(device)).tolist(), strict=True):
            units[id(layer.first.weight)] = _OF_A * float(layer.first.weight.detach().double().square().mean())
            units[id(layer.second.weight)] = given / (len(layer.second.weight) * down) if down > 0 else 0.0
        return {key: unit for key, unit in units.items() if 0 < unit < math.inf}


@dataclass(frozen=True)
class _Layer:
    """A layer with one of its adapters: A, B and s."""

    module: nn.Module
    first: Any
    second: Any
    scaling: float

    def measure(self, sums: Tensor) -> Any:
        """A hook that adds ‖(W + s B A) x‖² and s² ‖A x‖² to ``sums``, (2,)."""

        @torch.no_grad()
        def measure(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
            if not isinstance(output, Tensor):  # attention as one module, which gives its weights as well
                return
            given = (*inputs, *named.values())[0]
            down = self.first.forward(given.to(self.first.weight.dtype))  # so that no hook of the Jacobian's sees it
            for index, (values, factor) in enumerate(((output, 1.0), (down, self.scaling))):
                sums[index] += factor**2 * values.detach().double().square().sum().cpu()

        return measure
