"""The slow, obvious filter: a full-covariance extended Kalman filter on dense float64 matrices.

It shares no algebra with loko. J comes from ``torch.func.jacrev``; every class keeps its own row, and the one direction
in which probabilities carry nothing (their sum) is removed by an orthonormal basis instead of a reference class; the
covariance is updated in covariance form with explicit inverses. A *restriction* is what is done to the exact posterior
after each step: nothing, its diagonal, the diagonal of its inverse, or a truncation of its inverse.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

LINKS = {
    "categorical": lambda z: z.softmax(-1),
    "bernoulli": lambda z: z.sigmoid(),
    "gaussian": lambda z: z,
}
DEFAULT_NOISE = {"categorical": lambda c: 1 / c, "bernoulli": lambda c: 0.25, "gaussian": lambda c: 1.0}


def flat(parameters: Sequence[Tensor]) -> Tensor:
    return torch.cat([p.detach().double().flatten() for p in parameters])


def jacobian(model: nn.Module, names: Sequence[str], x: object) -> tuple[Tensor, Tensor]:
    """Outputs (B, C) and ∂outputs/∂θ (B, C, n) by jacrev over functional_call, parameters in the order of ``names``."""
    values = {name: dict(model.named_parameters())[name].detach() for name in names}

    def forward(p: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        out = torch.func.functional_call(model, p, (x,))
        return out, out

    parts, outputs = torch.func.jacrev(forward, has_aux=True)(values)
    return outputs.detach(), torch.cat([parts[name].flatten(2) for name in names], 2).detach()


@dataclass
class Oracle:
    """The filter over a model's named parameters, in the same settings as loko.LoKO; it moves the model's own θ."""

    model: nn.Module
    names: Sequence[str]
    variance: Tensor
    restriction: str = "full"  # full, diagonal (of P), precision (diagonal of P⁻¹), blocks, or truncated
    rank: int = 0
    direction_decay: float = 1.0
    noise: str = "ema"
    decay: float = 0.95
    initial_noise: float | None = None
    excess: float = 0.3
    omega: float = 0.0
    forgetting: Tensor | float = 1.0
    process_noise: Tensor | float = 0.0
    observation: str = "categorical"
    R: Tensor | None = field(default=None, init=False)
    consistency: float = field(default=float("nan"), init=False)
    gain: float = field(default=float("nan"), init=False)

    def __post_init__(self) -> None:
        self.P = torch.diag(self.variance.double())
        self.u = 1 / self.variance.double()
        self.forgetting = torch.as_tensor(self.forgetting, dtype=torch.float64).expand(len(self.variance))
        self.process_noise = torch.as_tensor(self.process_noise, dtype=torch.float64).expand(len(self.variance))

    def basis(self, classes: int) -> Tensor:
        """Orthonormal columns spanning what the observation can see."""
        if self.observation != "categorical":
            return torch.eye(classes, dtype=torch.float64)
        ones = torch.ones(classes, 1, dtype=torch.float64)
        return torch.linalg.svd(torch.eye(classes) - ones @ ones.T / classes)[0][:, : classes - 1]

    def link(self, mean: Tensor) -> Tensor:
        if self.observation == "gaussian":
            return torch.eye(mean.shape[1], dtype=torch.float64).repeat(len(mean), 1, 1)
        if self.observation == "bernoulli":
            return torch.diag_embed(mean * (1 - mean))
        return torch.stack([torch.diag(p) - torch.outer(p, p) for p in mean])

    def step(self, x: Tensor, labels: Tensor) -> Tensor:
        z, J = jacobian(self.model, self.names, x)
        batch, classes = z.shape
        J = J.reshape(batch * classes, -1)
        mean = LINKS[self.observation](z)
        y = nn.functional.one_hot(labels, classes).double() if self.observation == "categorical" else labels
        e = (y - mean).flatten()
        link = torch.block_diag(*self.link((1 - self.omega) * mean + self.omega * y))
        V = self.basis(classes)
        stacked = torch.block_diag(*[V] * batch)
        logits = self.noise in ("categorical", "categorical_ema")
        if self.R is None:
            scale = self.initial_noise or DEFAULT_NOISE[self.observation](classes)
            self.R = torch.zeros(classes, classes).double() if logits else scale * V @ V.T

        grow = self.forgetting.rsqrt()
        P = grow[:, None] * self.P * grow + torch.diag(self.process_noise)
        self.u = 1 / (1 / (self.forgetting * self.u) + self.process_noise)

        if logits:
            K = J @ P @ J.T
            if self.noise == "categorical_ema":
                blocks = [K[i : i + classes, i : i + classes] for i in range(0, len(K), classes)]
                self.R = self.decay * self.R + (1 - self.decay) * self.excess * sum(blocks) / batch
            T = torch.block_diag(*[self.R] * batch)
            eye = torch.eye(len(K), dtype=torch.float64)
            delta = P @ J.T @ torch.linalg.inv(eye + link @ (K + T)) @ e
            information = J.T @ link @ torch.linalg.inv(eye + T @ link) @ J
            posterior = torch.linalg.inv(torch.linalg.inv(P) + information)
        else:
            H = link @ J
            if self.noise == "ema":
                self.R = self.decay * self.R + (1 - self.decay) * self.matched(e, H, P, classes)
            seen = stacked.T @ H
            S = seen @ P @ seen.T + torch.block_diag(*[V.T @ self.R @ V] * batch)
            gain = P @ seen.T @ torch.linalg.inv(S)
            delta = gain @ stacked.T @ e
            posterior = P - gain @ S @ gain.T
            self.consistency = float(e @ stacked @ torch.linalg.inv(S) @ stacked.T @ e)
            self.gain = float((seen @ gain).trace()) / len(S)
        self.P = self.restrict((posterior + posterior.T) / 2)
        self.move(delta)
        if self.noise == "ema_residual":
            after = LINKS[self.observation](self.model(x).detach())
            self.R = self.decay * self.R + (1 - self.decay) * self.matched((y - after).flatten(), H, self.P, classes)
        return z

    @staticmethod
    def matched(e: Tensor, H: Tensor, P: Tensor, classes: int) -> Tensor:
        total = torch.zeros(classes, classes, dtype=torch.float64)
        for i in range(0, len(e), classes):
            rows = slice(i, i + classes)
            total += torch.outer(e[rows], e[rows]) + H[rows] @ P @ H[rows].T
        return total / (len(e) // classes)

    def restrict(self, posterior: Tensor) -> Tensor:
        if self.restriction == "full":
            return posterior
        if self.restriction == "diagonal":
            return torch.diag(posterior.diagonal())
        if self.restriction == "blocks":
            sizes = [dict(self.model.named_parameters())[name].numel() for name in self.names]
            within = torch.block_diag(*[torch.full((k, k), self.direction_decay, dtype=torch.float64) for k in sizes])
            return posterior * within.fill_diagonal_(1.0)
        precision = torch.linalg.inv(posterior)
        if self.restriction == "precision":
            return torch.diag(1 / precision.diagonal())
        data = precision - torch.diag(self.u)  # W̃ᵀW̃, n × n
        scale = self.u.sqrt()  # strength is measured against the diagonal as it was
        whitened = data / scale[:, None] / scale
        values, vectors = torch.linalg.eigh((whitened + whitened.T) / 2)
        kept = (vectors[:, -self.rank :] * values[-self.rank :]) @ vectors[:, -self.rank :].T
        kept = kept * scale[:, None] * scale
        kept = self.direction_decay * kept
        self.u = self.u + (data - kept).diagonal()
        return torch.linalg.inv(torch.diag(self.u) + kept)

    @torch.no_grad()
    def move(self, delta: Tensor) -> None:
        parameters = dict(self.model.named_parameters())
        for name, part in zip(self.names, delta.split([parameters[n].numel() for n in self.names]), strict=True):
            parameters[name] += part.view_as(parameters[name])


def covariance_of(optimizer: torch.optim.Optimizer) -> Tensor:
    """The dense P that a LoKO's state stands for."""
    state = optimizer.state_dict()["filter"]["covariance"]
    if "variance" in state:
        return torch.diag(state["variance"].double())
    if "columns" in state:
        place, columns = state["place"].long().tolist(), state["columns"].double()
        dense = torch.zeros(len(place), len(place), dtype=torch.float64)
        for j, own in enumerate(place):
            size = next((k for k in range(j + 1, len(place)) if place[k] == 0), len(place)) - (j - own)
            dense[j - own : j - own + size, j] = columns[:size, j]
        return dense
    factor = state["factor"].double()
    return torch.linalg.inv(torch.diag(state["precision"].double()) + factor.T @ factor)


def reduced_noise(R: Tensor, noise: str, reference: int = -1) -> Tensor:
    """R (of probabilities) with a class dropped, or T (of logits) as differences to that class."""
    keep = torch.eye(len(R), dtype=torch.float64)[[c for c in range(len(R)) if c != reference % len(R)]]
    if noise in ("categorical", "categorical_ema"):
        keep[:, reference] -= 1.0
    return keep @ R @ keep.T
