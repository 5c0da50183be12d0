"""The rows of J, (N, n), held in less memory than N·n numbers where they are products.

A linear map that sees one vector a row, such as the head of a classifier, has a Jacobian of rank one a row: ``δ xᵀ``.
The head of RoBERTa is two thirds of what LoRA trains there, and its δ and x are a four-hundredth of their products.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

__all__ = ["Jacobian", "Rows"]


@dataclass
class _Factors:
    """Columns of one weight (out × in): row (b, j) of them is the outer product of ``delta[b, j]`` and ``given[b]``."""

    delta: Tensor  # (B, m, out)
    given: Tensor  # (B, in)

    def columns(self, start: int, stop: int) -> Tensor:
        """(B·m, stop − start)."""
        width = self.given.shape[1]
        first, last = start // width, -(-stop // width)
        products = self.delta[:, :, first:last, None] * self.given[:, None, None, :]
        return products.flatten(2).flatten(0, 1)[:, start - first * width : stop - first * width]


class Rows:
    """J of one batch, to be filled once and read by columns: ``rows[:, a:b]`` is a tensor (N, b − a) of ``dtype``.

    Args:
        buffer: memory for what is not factored, (B, m, and as many columns as that has).
        parameters: key, number of elements and outputs (rows of a weight) of each parameter, in the order of columns.
        factored: keys of the weights kept as factors.
        dtype: of what is read; ``buffer`` may be of less precision.
    """

    def __init__(
        self, buffer: Tensor, parameters: Iterable[tuple[int, int, int]], factored: Collection[int], dtype: torch.dtype
    ) -> None:
        self.dense = buffer
        self.dtype = dtype
        self.columns: dict[int, slice] = {}
        self.factors: dict[int, _Factors] = {}
        # Columns [first, last), the key of what is factored there, and where in the buffer they are if nothing is.
        self._places: list[tuple[int, int, int | None, int]] = []
        column = used = 0
        for key, group in groupby(parameters, lambda parameter: parameter[0] if parameter[0] in factored else None):
            first, at = column, used
            for own, size, outputs in group:
                if key is None:
                    self.columns[own] = slice(used, used + size)
                    used += size
                else:
                    delta = buffer.new_zeros(*buffer.shape[:2], outputs, dtype=dtype)
                    self.factors[own] = _Factors(delta, delta.new_zeros(len(buffer), size // outputs))
                column += size
            self._places.append((first, column, key, at))
        self.shape = torch.Size((buffer.shape[0] * buffer.shape[1], column))

    def keep(self, key: int, some: slice, given: Tensor, delta: Tensor) -> None:
        """The factors of one weight: inputs (B, in), and δ (m', B, out) of ``some`` of the observed outputs."""
        self.factors[key].given = given
        self.factors[key].delta[:, some] = delta.transpose(0, 1)

    def weighted(self, key: int, weights: Tensor) -> Tensor:
        """The sum of the rows with weights (N,), of one parameter's columns, flat."""
        if key in self.factors:
            factors = self.factors[key]
            summed = (weights.view(*factors.delta.shape[:2], 1) * factors.delta).sum(1)
            return (summed.mT @ factors.given).flatten()
        return weights @ self.dense.flatten(0, 1)[:, self.columns[key]].to(self.dtype)

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def device(self) -> torch.device:
        return self.dense.device

    def new_zeros(self, *size: int, dtype: torch.dtype | None = None) -> Tensor:
        """As of a tensor."""
        return self.dense.new_zeros(size, dtype=dtype or self.dtype)

    def new_empty(self, *size: int) -> Tensor:
        """As of a tensor."""
        return self.dense.new_empty(size, dtype=self.dtype)

    def __getitem__(self, index: tuple[slice, slice]) -> Tensor:
        start, stop, _ = index[1].indices(self.shape[1])
        parts = []
        for first, last, key, at in self._places:
            low, high = max(start, first), min(stop, last)
            if low >= high:
                continue
            if key is None:
                dense = self.dense.flatten(0, 1)
                parts.append(dense[:, at + low - first : at + high - first].to(self.dtype))
            else:
                parts.append(self.factors[key].columns(low - first, high - first))
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


Jacobian = Tensor | Rows
