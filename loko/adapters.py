"""The units of a low-rank adapter: how large its factors may be is a matter of the layer that it adapts.

A layer gives W x + s B A x with W frozen. p₀, the variance that the logits ask for (``loko.start``), knows nothing of
that: where the head starts near zero B hardly moves a logit at first, whatever its variance, and a p₀ that suits the
head lets s B A x be ten times as large as W x, or a tenth of it. In its own unit a factor has the variance 1 when

- A, which starts from random numbers, has a tenth of the mean square that it starts with,
- B, which starts at zero, makes s B A x as large as what the layer gives: E‖s B A x‖² = ‖W x + s B A x‖² over the
  first rows, with the A of the start.

A factor starts from the geometric mean of p₀ and ξ times its unit (docs/initial_covariance.md).
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from loko.covariance import Reduce

__all__ = ["Units"]

_OF_A = 0.1
"""A's share of what it starts with: it is there already, and B moves the layer without it."""

_PLAIN = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Units:
    """Measures the units of the factors of adapters: layers as PEFT builds them for LoRA and its kin.

    A factor that is not measured has no unit: those of embeddings, of bare parameters, of variants whose A or B is no
    plain map of what the layer is given, of layers that the first rows do not reach, and behind an A of zeros.

    Args:
        model: the model.
        parameters: ``id`` of the parameters that are asked for.
    """

    def __init__(self, model: nn.Module, parameters: Container[int]) -> None:
        self._layers: list[_Layer] = []
        for module in model.modules():
            of_peft: Any = module  # which types none of it
            for name, first in getattr(of_peft, "lora_A", {}).items():
                layer = _Layer(of_peft, name, first, of_peft.lora_B[name])
                if layer.plain and (id(layer.first.weight) in parameters or id(layer.second.weight) in parameters):
                    self._layers.append(layer)
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
            if down > 0:
                first, second = layer.first.weight, layer.second
                units[id(first)] = _OF_A * float(first.detach().double().square().mean())
                units[id(second.weight)] = given / (down * len(second.weight) / getattr(second, "groups", 1))
        return {key: unit for key, unit in units.items() if 0 < unit < math.inf}


@dataclass(frozen=True)
class _Layer:
    """A layer with one of its adapters: A and B."""

    module: Any
    name: str
    first: Any
    second: Any

    @property
    def plain(self) -> bool:
        """Whether the layer adds s B A x, x what it is given."""
        plain = (
            type(self.first) in _PLAIN and type(self.second) in _PLAIN and not hasattr(self.module, "parameter_name")
        )
        return plain and self.first.weight.shape[1] == self.module.in_features

    def measure(self, sums: Tensor) -> Any:
        """A hook that adds ‖W x + s B A x‖² and s² ‖A x‖² to ``sums``, (2,)."""

        @torch.no_grad()
        def measure(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
            given = (*inputs, *named.values())[0]
            down = self.module.scaling[self.name] * self.first(given.to(self.first.weight.dtype))
            for index, values in enumerate((output, down)):
                sums[index] += values.detach().double().square().sum().cpu()

        return measure
