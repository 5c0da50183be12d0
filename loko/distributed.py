"""One filter over several workers, exactly: rows are split over the ranks, parameters and covariance too.

Each rank runs the forward and the Jacobian of its own rows. An all-to-all then gives rank j every row of its slice of
the columns; whatever is a sum over parameters is all-reduced; every rank solves the same small system; the slices of
the update are gathered. The result is one worker's on the whole batch, up to the order of summation, and memory and
work for the covariance fall as one over the number of workers (docs/filter.md §9).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from loko.rows import Jacobian
from loko.stream.order import slice_of

__all__ = ["Exact", "PeerError", "Ranks", "Share"]

_MESSAGE_BYTES = 4096


class PeerError(RuntimeError):
    """Another rank failed in its own part of a step; the message holds that rank's error."""


@dataclass
class Share:
    """How many rows each rank brings to a step; ``rows`` is this rank's, ``counts`` those of all, in rank order."""

    rows: int = 0
    counts: list[int] = field(default_factory=list)


class Ranks:
    """Rows and sums over a process group; without one, a world of one worker that communicates nothing.

    Args:
        group: a process group (gloo or NCCL) whose ranks each call every method in the same order, or None.
        device: where the group's tensors live: the CPU for gloo, this rank's GPU for NCCL.
    """

    def __init__(self, group: dist.ProcessGroup | None, device: torch.device | None = None) -> None:
        self.group = group
        self.device = device or torch.device("cpu")
        self.rank = dist.get_rank(group) if group is not None else 0
        self.world_size = dist.get_world_size(group) if group is not None else 1
        self.bytes_sent = 0.0
        self.collectives = 0

    @contextmanager
    def together(self) -> Iterator[Share]:
        """Work that each rank does for itself, such as a forward; an error in it on one rank is raised on all.

        What follows a step's own part is a collective, in which the others would wait for the one that failed until the
        group's timeout. So the block ends with one: the counts of rows that the next collectives need anyway, or that
        there are none because of an error. Collective; the block must not itself be.

        Yields:
            A share, whose ``rows`` the block sets and whose ``counts`` are known after it.

        Raises:
            PeerError: on the ranks whose own part went well. The rank that failed raises its own error.
        """
        share = Share()
        try:
            yield share
        except Exception as error:
            if self.world_size > 1:
                self._spread(self._first_failed(self._counts(-1)), error)
            raise
        share.counts = [share.rows] if self.world_size == 1 else self._counts(share.rows)
        failed = self._first_failed(share.counts)
        if failed is not None:
            raise PeerError(f"rank {failed} of {self.world_size} failed, and with it all: {self._spread(failed)}")

    def _counts(self, rows: int) -> list[int]:
        own = torch.tensor([rows], device=self.device)
        parts = [torch.empty_like(own) for _ in range(self.world_size)]
        dist.all_gather(parts, own, group=self.group)
        self._sent(own, self.world_size - 1)
        return [int(part) for part in torch.cat(parts)]

    @staticmethod
    def _first_failed(counts: list[int]) -> int | None:
        return next((rank for rank, count in enumerate(counts) if count < 0), None)

    def _spread(self, failed: int | None, error: Exception | None = None) -> str:
        """The text of the error of the rank that failed, on every rank."""
        assert failed is not None
        text = f"{type(error).__name__}: {error}".encode()[:_MESSAGE_BYTES]
        message = torch.tensor([*text.ljust(_MESSAGE_BYTES, b"\0")], dtype=torch.uint8, device=self.device)
        self._broadcast(message, failed)
        return bytes(message.tolist()).rstrip(b"\0").decode(errors="replace")

    def same(self, tensor: Tensor) -> Tensor:
        """Rank 0's values of a tensor that every rank has computed from the same numbers.

        Unlike machines round unlike, and where a result is a choice (the sign and order of eigenvectors, whether a
        factorisation succeeded) rounding decides it: ranks that chose differently would hold slices of different
        filters. What is a choice is therefore rank 0's.
        """
        return self.same_of([tensor])[0]

    def same_of(self, tensors: list[Tensor], resize: bool = False) -> list[Tensor]:
        """``same`` of several float64 tensors in one message; with ``resize`` their shapes are rank 0's too."""
        if self.world_size == 1:
            return tensors
        shapes = [tensor.shape for tensor in tensors]
        if resize:
            sizes = torch.tensor([size for shape in shapes for size in shape], device=self.device)
            self._broadcast(sizes, 0)
            found = iter(sizes.tolist())
            shapes = [torch.Size(next(found) for _ in shape) for shape in shapes]
        lengths = [shape.numel() for shape in shapes]
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        if len(flat) != sum(lengths):
            flat = flat.new_empty(sum(lengths))  # another choice here, which rank 0's replaces
        self._broadcast(flat, 0)
        return [part.view(shape) for part, shape in zip(flat.split(lengths), shapes, strict=True)]

    def _broadcast(self, tensor: Tensor, rank: int) -> None:
        source = rank if self.group is None else dist.get_global_rank(self.group, rank)
        dist.broadcast(tensor, source, group=self.group)
        self._sent(tensor, (self.world_size - 1) / self.world_size)

    def gather_rows(self, rows: Tensor, counts: list[int]) -> Tensor:
        """Concatenate every rank's rows (B_r, …), in rank order; ``counts`` are the B_r, as ``together`` gives them."""
        if self.world_size == 1:
            return rows
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
        self._sent(total, 2 * (self.world_size - 1) / self.world_size)
        return total

    def own_rows(self, counts: list[int]) -> slice:
        """Where this rank's rows are among those of all ranks."""
        first = sum(counts[: self.rank])
        return slice(first, first + counts[self.rank])

    def traffic(self, steps: int) -> dict[str, float]:
        """What this rank has sent, in all and a step: bytes, and collectives, each of which waits for every rank."""
        return {
            "bytes_sent": self.bytes_sent,
            "bytes_a_step": self.bytes_sent / max(1, steps),
            "collectives_a_step": self.collectives / max(1, steps),
        }

    def _sent(self, tensor: Tensor, copies: float) -> None:
        """Count what a rank sends: a ring's share of the collective, the same for each rank."""
        self.collectives += 1
        self.bytes_sent += copies * tensor.numel() * tensor.element_size()


class Exact(Ranks):
    """The exact distributed update: each rank holds a slice of the ``size`` = n parameters' covariance."""

    def __init__(self, size: int, group: dist.ProcessGroup | None, device: torch.device | None = None) -> None:
        super().__init__(group, device)
        self.bounds = [slice_of(0, size, rank, self.world_size) for rank in range(self.world_size)]
        self.own = slice(*self.bounds[self.rank])

    def exchange(self, jacobian: Jacobian, counts: list[int]) -> Jacobian:
        """From this rank's rows of all columns (N_r, n) to all rows of its own columns (N, n_r); ``counts``: N_r."""
        if self.world_size == 1:
            return jacobian
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
        self._sent(sent, (self.world_size - 1) / self.world_size)  # its own slice stays
        return received.view(sum(counts), width)

    def gather_columns(self, part: Tensor) -> Tensor:
        """Concatenate every rank's slice (…, n_r) along the last dimension into (…, n)."""
        if self.world_size == 1:
            return part
        counts = [stop - start for start, stop in self.bounds]
        return self.gather_rows(part.movedim(-1, 0).contiguous(), counts).movedim(0, -1).contiguous()
