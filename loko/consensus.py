"""Several filters that meet now and then: cheaper than the exact distributed update, and not the same.

Every rank filters its own rows with its own covariance. Every few steps the posteriors are multiplied and what they
shared beforehand is divided out (docs/filter.md §9), by one all-reduce of 2n numbers.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from loko.covariance import Covariance
from loko.distributed import Ranks
from loko.optimizer import Closure, LoKO

__all__ = ["Consensus"]


class Consensus:
    """Independent filters over a process group, merged every ``every`` steps.

    With Λ a diagonal precision, 0 the state after the last merge (carried on by forgetting and process noise) and w the
    ranks: ``Λ = Λ₀ + Σ_w (Λ_w − Λ₀)`` and ``θ = θ₀ + Λ⁻¹ Σ_w Λ_w (θ_w − θ₀)``. Exact for a linear model with fixed
    noise whose information is diagonal; otherwise an approximation. R is averaged.

    Args:
        optimizer: this rank's filter, built without a group, the same on every rank, with a diagonal covariance
            (``covariance="diagonal"``, or ``rank=0``).
        group: ranks that call every method in the same order.
        every: steps between two merges, at least 1.

    Raises:
        ValueError: a covariance whose product is not of its own kind, or ``every`` below 1.
    """

    def __init__(self, optimizer: LoKO, group: dist.ProcessGroup, every: int) -> None:
        if every < 1:
            raise ValueError(f"sync_every = {every}; allowed: >= 1, or None for the exact update")
        if optimizer.settings["covariance"] != "diagonal" and optimizer.settings["rank"] > 0:
            raise ValueError(
                f"sync_every = {every} merges diagonal covariances only: set covariance='diagonal' or rank=0, or leave "
                "sync_every out for the exact update"
            )
        if optimizer.settings.get("initial_covariance") == "auto":
            raise ValueError("sync_every does not go with initial_covariance = 'auto': each rank would set its own")
        for key in ("scale_adaptation", "drift_adaptation"):
            if optimizer.settings[key] > 0:
                raise ValueError(
                    f"sync_every does not go with {key} = {optimizer.settings[key]:g}: each rank would follow its own "
                    f"rows, and the posteriors have to share their prior; set {key}: 0"
                )
        detector = optimizer.settings["drift_detector"]
        if detector is not None:
            raise ValueError(
                f"sync_every does not go with drift_detector = {detector!r}: each rank would hear its own rows only; "
                "leave it out"
            )
        if optimizer.settings["prediction"] != "plug_in":
            raise ValueError(
                "sync_every does not go with prediction = 'expected': each rank would learn from its own rows how far "
                "P is to be trusted; set prediction: plug_in"
            )
        self.optimizer = optimizer
        self._prior: Covariance
        self._ranks = Ranks(group, optimizer.parameters[0].device)
        self._every = every
        self._taken = 0
        self._begin()

    def step(self, closure: Closure) -> Tensor:
        """``LoKO.step`` on this rank's rows, of which there may be none; then a merge, if it is time."""
        with self._ranks.together():
            outputs = self.optimizer.step(closure)
        self._prior = self.optimizer.predicted(self._prior)
        self._steps += 1
        self._taken += 1
        if self._steps == self._every:
            self.synchronize()
        return outputs

    def synchronize(self) -> None:
        """Merge now; a collective call."""
        if self._steps == 0:
            return
        own, shared = self.optimizer.covariance.marginal().double().reciprocal(), self._prior.marginal().double()
        moved = own * (self._flat() - self._start)
        information, shift = self._ranks.reduce(torch.stack([own - shared.reciprocal(), moved]))
        # Rounding must not make a rank's rows take information away.
        variance = 1.0 / (shared.reciprocal() + information.clamp_min(0.0))
        mean = self._start + variance * shift
        parameters = self.optimizer.parameters
        for p, part in zip(parameters, mean.split([p.numel() for p in parameters]), strict=True):
            p.data.copy_(part.view_as(p))
        kind = type(self.optimizer.covariance)
        self.optimizer.covariance = kind.start(variance.to(parameters[0].dtype), 0)
        self.optimizer.average_noise(self._ranks)
        self._begin()

    def diagnostics(self) -> dict[str, float]:
        """This rank's, with what all merges sent."""
        own = self.optimizer.diagnostics()
        return {**own, **self._ranks.traffic(self._taken)}

    def state_dict(self) -> dict[str, Any]:
        """Merge, then the state of the one filter there is; a collective call."""
        self.synchronize()
        return self.optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a merged state, with any number of ranks."""
        self.optimizer.load_state_dict(state)
        self._begin()

    def _begin(self) -> None:
        self._steps = 0
        self._start = self._flat()
        self._prior = self.optimizer.covariance

    def _flat(self) -> Tensor:
        return torch.cat([p.detach().flatten().double() for p in self.optimizer.parameters])
