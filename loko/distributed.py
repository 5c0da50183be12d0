"""One filter over several workers, exactly: rows are split over the ranks, parameters and covariance too.

Each rank runs the forward and the Jacobian of its own rows. An all-to-all then gives rank j every row of its slice of
the columns; whatever is a sum over parameters is all-reduced; every rank solves the same small system; the slices of
the update are gathered. The result is one worker's on the whole batch, up to the order of summation, and memory and
work for the covariance fall as one over the number of workers (docs/filter.md §9).
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from loko.stream.order import slice_of

__all__ = ["Exact", "Ranks"]


class Ranks:
    """Rows and sums over a process group; without one, a world of one worker that communicates nothing.

    Args:
        group: a process group (gloo or NCCL) whose ranks each call every method in the same order, or None.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group
        self.rank = dist.get_rank(group) if group is not None else 0
        self.world_size = dist.get_world_size(group) if group is not None else 1
        self.bytes_sent = 0

    def gather_rows(self, rows: Tensor) -> Tensor:
        """Concatenate every rank's rows (B_r, …), in rank order."""
        if self.world_size == 1:
            return rows
        counts = self._counts(rows)
        padded = rows.new_zeros(max(counts), *rows.shape[1:])
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded, group=self.group)
        self._sent(padded, self.world_size - 1)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    def reduce(self, partial: Tensor) -> Tensor:
        """Sum over the ranks. In float64, so that the sum does not depend on how many there are beyond 1e-15."""
        if self.world_size == 1:
            return partial
        total = partial.double()
        dist.all_reduce(total, group=self.group)
        self._sent(total, 1)
        return total

    def own_rows(self, count: int, device: torch.device) -> slice:
        """Where this rank's ``count`` rows are among those of all ranks."""
        if self.world_size == 1:
            return slice(0, count)
        first = sum(self._counts(torch.empty(count, device=device))[: self.rank])
        return slice(first, first + count)

    def _counts(self, rows: Tensor) -> list[int]:
        own = torch.tensor([len(rows)], device=rows.device)
        counts = [torch.empty_like(own) for _ in range(self.world_size)]
        dist.all_gather(counts, own, group=self.group)
        return [int(count) for count in counts]

    def _sent(self, tensor: Tensor, copies: int) -> None:
        self.bytes_sent += copies * tensor.numel() * tensor.element_size()


class Exact(Ranks):
    """The exact distributed update: each rank holds a slice of the ``size`` = n parameters' covariance."""

    def __init__(self, size: int, group: dist.ProcessGroup | None) -> None:
        super().__init__(group)
        self.bounds = [slice_of(0, size, rank, self.world_size) for rank in range(self.world_size)]
        self.own = slice(*self.bounds[self.rank])

    def exchange(self, jacobian: Tensor) -> Tensor:
        """From this rank's rows of all columns (N_r, n) to all rows of this rank's columns (N, n_r)."""
        if self.world_size == 1:
            return jacobian
        counts = self._counts(jacobian)
        width = self.own.stop - self.own.start
        sent = torch.cat([jacobian[:, start:stop].reshape(-1) for start, stop in self.bounds])
        received = jacobian.new_empty(sum(counts) * width)
        dist.all_to_all_single(
            received,
            sent,
            [count * width for count in counts],
            [len(jacobian) * (stop - start) for start, stop in self.bounds],
            group=self.group,
        )
        self._sent(sent, 1)
        return received.view(sum(counts), width)

    def gather_columns(self, part: Tensor) -> Tensor:
        """Concatenate every rank's slice (…, n_r) along the last dimension into (…, n)."""
        if self.world_size == 1:
            return part
        return self.gather_rows(part.movedim(-1, 0).contiguous()).movedim(0, -1).contiguous()
