"""Online metrics: every row is predicted, scored, and only then learned from.

:class:`OnlineMetrics` takes the outputs made *before* the model learned a batch and keeps, cumulatively and over the
last ``window`` rows: the NLL, and the accuracy (categorical, bernoulli) or the squared error (gaussian). Beside them
stands a predictor that sees labels alone, the floor a model has to beat: class frequencies with Laplace's one extra row
a class, or for numbers their running mean. It sees the labels of every earlier row, also those of the same batch, so
its figures depend neither on the batch size nor on how rows are shared out.

A row whose outputs are not all finite is counted in ``nonfinite_rows``, its outputs taken as zero (for classes:
uniform), and its accuracy as 0. A model cannot gain by falling silent, and one bad row does not turn every later figure
into NaN.

All sums are float64. A batch on another device is brought to the CPU first.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["OnlineMetrics", "calibration_error", "evaluate"]

ObservationKind = Literal["categorical", "bernoulli", "gaussian"]


class _Scores(NamedTuple):
    """NLL and quality (accuracy, or squared error) of each row."""

    nll: Tensor
    quality: Tensor


class _Sums:
    """Cumulative sums of scores, and with a window the last so many of them in a ring."""

    def __init__(self, window: int = 0) -> None:
        self.rows = 0
        self.nll = 0.0
        self.quality = 0.0
        self.ring = torch.zeros(2, window, dtype=torch.float64)

    def add(self, scores: _Scores) -> None:
        window = self.ring.shape[1]
        count = scores.nll.shape[0]
        if window and count:
            kept = torch.stack(tuple(scores))[:, -window:]
            slots = (torch.arange(count - kept.shape[1], count) + self.rows) % window
            self.ring[:, slots] = kept
        self.rows += count
        self.nll += float(scores.nll.sum())
        self.quality += float(scores.quality.sum())

    def means(self) -> tuple[float, float]:
        return (self.nll / self.rows, self.quality / self.rows) if self.rows else (math.nan, math.nan)

    def window_means(self) -> tuple[float, float]:
        filled = self.ring[:, : self.rows]
        if filled.shape[1] == 0:
            return math.nan, math.nan
        nll, quality = filled.mean(dim=1).tolist()
        return nll, quality

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows, "nll": self.nll, "quality": self.quality, "ring": self.ring.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["ring"].shape != self.ring.shape:
            raise ValueError(
                f"these metrics were saved with window {state['ring'].shape[1]}, but window is {self.ring.shape[1]}: "
                "go on with the window the run was started with"
            )
        self.rows, self.nll, self.quality = state["rows"], state["nll"], state["quality"]
        self.ring.copy_(state["ring"])


class _Observation(ABC):
    """How outputs and labels score, and what a predictor that sees labels alone would have said."""

    quality: str

    @abstractmethod
    def labels(self, labels: Tensor) -> Tensor:
        """Labels in the form the other functions take."""

    @abstractmethod
    def score(self, outputs: Tensor, labels: Tensor) -> _Scores:
        """Score the model's outputs, float64 and finite."""

    @abstractmethod
    def score_label_only(self, labels: Tensor) -> _Scores:
        """Score the label-only predictor on these rows in order, learning each after it was scored."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]: ...

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def _before(values: Tensor) -> Tensor:
    """Sum over the earlier rows of this batch."""
    return values.cumsum(dim=0) - values


class _Categorical(_Observation):
    quality = "accuracy"

    def __init__(self, num_labels: int) -> None:
        self.counts = torch.zeros(num_labels, dtype=torch.float64)

    def labels(self, labels: Tensor) -> Tensor:
        return labels.to("cpu", torch.int64)

    def score(self, outputs: Tensor, labels: Tensor) -> _Scores:
        nll = F.cross_entropy(outputs, labels, reduction="none")
        return _Scores(nll, (outputs.argmax(dim=1) == labels).double())

    def score_label_only(self, labels: Tensor) -> _Scores:
        one_hot = F.one_hot(labels, len(self.counts)).double()
        seen = self.counts + 1 + _before(one_hot)
        self.counts += one_hot.sum(dim=0)
        probability = seen / seen.sum(dim=1, keepdim=True)
        nll = -probability.gather(1, labels[:, None])[:, 0].log()
        return _Scores(nll, (seen.argmax(dim=1) == labels).double())

    def state_dict(self) -> dict[str, Any]:
        return {"counts": self.counts.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.counts.copy_(state["counts"])


class _Bernoulli(_Observation):
    quality = "accuracy"

    def __init__(self, num_labels: int) -> None:
        self.rows = 0
        self.ones = torch.zeros(num_labels, dtype=torch.float64)

    def labels(self, labels: Tensor) -> Tensor:
        return labels.to("cpu", torch.float64).reshape(-1, len(self.ones))

    def score(self, outputs: Tensor, labels: Tensor) -> _Scores:
        nll = F.binary_cross_entropy_with_logits(outputs, labels, reduction="none").sum(dim=1)
        return _Scores(nll, ((outputs > 0) == (labels > 0.5)).double().mean(dim=1))

    def score_label_only(self, labels: Tensor) -> _Scores:
        ones = self.ones + 1 + _before(labels)
        rows = self.rows + 2 + torch.arange(len(labels), dtype=torch.float64)[:, None]
        self.ones += labels.sum(dim=0)
        self.rows += len(labels)
        probability = ones / rows
        nll = F.binary_cross_entropy(probability, labels, reduction="none").sum(dim=1)
        return _Scores(nll, ((probability > 0.5) == (labels > 0.5)).double().mean(dim=1))

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows, "ones": self.ones.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rows = state["rows"]
        self.ones.copy_(state["ones"])


class _Spread:
    """Running variance of one predictor's errors, used after its row is scored; starts as one row of variance 1."""

    def __init__(self, size: int) -> None:
        self.rows = 0
        self.squares = torch.zeros(size, dtype=torch.float64)

    def score(self, errors: Tensor) -> _Scores:
        squares = errors.square()
        rows = self.rows + 1 + torch.arange(len(errors), dtype=torch.float64)[:, None]
        variance = (self.squares + 1 + _before(squares)) / rows
        self.rows += len(errors)
        self.squares += squares.sum(dim=0)
        nll = 0.5 * (squares / variance + variance.log() + math.log(2 * math.pi))
        return _Scores(nll.sum(dim=1), squares.mean(dim=1))

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows, "squares": self.squares.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rows = state["rows"]
        self.squares.copy_(state["squares"])


class _Gaussian(_Observation):
    """Each output its own variance, that of the errors made so far; so the NLL tells how large errors are, in nats."""

    quality = "mse"

    def __init__(self, num_labels: int) -> None:
        self.sum = torch.zeros(num_labels, dtype=torch.float64)
        self.errors = _Spread(num_labels)
        self.label_only_errors = _Spread(num_labels)

    def labels(self, labels: Tensor) -> Tensor:
        return labels.to("cpu", torch.float64).reshape(-1, len(self.sum))

    def score(self, outputs: Tensor, labels: Tensor) -> _Scores:
        return self.errors.score(labels - outputs)

    def score_label_only(self, labels: Tensor) -> _Scores:
        rows = self.label_only_errors.rows + 1 + torch.arange(len(labels), dtype=torch.float64)[:, None]
        mean = (self.sum + _before(labels)) / rows
        self.sum += labels.sum(dim=0)
        return self.label_only_errors.score(labels - mean)

    def state_dict(self) -> dict[str, Any]:
        spreads = {"errors": self.errors.state_dict(), "label_only_errors": self.label_only_errors.state_dict()}
        return {"sum": self.sum.clone(), **spreads}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sum.copy_(state["sum"])
        self.errors.load_state_dict(state["errors"])
        self.label_only_errors.load_state_dict(state["label_only_errors"])


_OBSERVATIONS: dict[str, type[_Categorical | _Bernoulli | _Gaussian]] = {
    "categorical": _Categorical,
    "bernoulli": _Bernoulli,
    "gaussian": _Gaussian,
}


def _make(observation: str, num_labels: int) -> _Observation:
    if observation not in _OBSERVATIONS:
        raise ValueError(f"observation is {observation!r}; allowed are: {', '.join(_OBSERVATIONS)}")
    return _OBSERVATIONS[observation](num_labels)


def _finite(outputs: Tensor, labels: Tensor, num_labels: int) -> tuple[Tensor, Tensor]:
    """Outputs as float64 on the CPU with rows that are not finite set to zero, and which those are."""
    outputs = outputs.detach().to("cpu", torch.float64)
    if outputs.ndim != 2 or outputs.shape[1] != num_labels or len(outputs) != len(labels):
        raise ValueError(
            f"outputs of shape {tuple(outputs.shape)} for {len(labels)} labels; expected ({len(labels)}, {num_labels})"
        )
    broken = ~outputs.isfinite().all(dim=1)
    return outputs.masked_fill(broken[:, None], 0.0), broken


class OnlineMetrics:
    """Prequential metrics of one run.

    Args:
        num_labels: outputs of the model.
        observation: categorical, bernoulli or gaussian.
        window: how many of the last rows the ``window_`` figures cover.
        near_future: how many rows ahead the loop scores for the ``near_future_`` figures.
    """

    def __init__(
        self, num_labels: int, observation: ObservationKind = "categorical", window: int = 500, near_future: int = 100
    ) -> None:
        for name, value in (("num_labels", num_labels), ("window", window), ("near_future", near_future)):
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        self.num_labels = num_labels
        self.observation = observation
        self.window = window
        self.near_future = near_future
        self.nonfinite_rows = 0
        self._kind = _make(observation, num_labels)
        # Its spread of errors is its own: scoring rows ahead must not change how the rows themselves are scored.
        self._future_kind = _make(observation, num_labels)
        self._model = _Sums(window)
        self._label_only = _Sums()
        self._future = _Sums()

    @property
    def rows(self) -> int:
        """Rows scored so far."""
        return self._model.rows

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Score outputs (B, num_labels) that were made before any of these rows was learned from."""
        labels = self._kind.labels(labels)
        outputs, broken = _finite(logits, labels, self.num_labels)
        self.nonfinite_rows += int(broken.sum())
        self._model.add(self._score(self._kind, outputs, labels, broken))
        self._label_only.add(self._kind.score_label_only(labels))

    def update_near_future(self, logits: Tensor, labels: Tensor) -> None:
        """Score outputs of the present model on rows that it will meet ``near_future`` rows later."""
        labels = self._kind.labels(labels)
        outputs, broken = _finite(logits, labels, self.num_labels)
        self._future.add(self._score(self._future_kind, outputs, labels, broken))

    @staticmethod
    def _score(kind: _Observation, outputs: Tensor, labels: Tensor, broken: Tensor) -> _Scores:
        scores = kind.score(outputs, labels)
        if kind.quality == "accuracy":
            return scores._replace(quality=scores.quality.masked_fill(broken, 0.0))
        return scores

    def result(self) -> dict[str, float]:
        """Every figure under a flat key; before the first row they are NaN, and near_future_ keys are left out."""
        quality = self._kind.quality
        figures: dict[str, float] = {"rows": self.rows, "nonfinite_rows": self.nonfinite_rows}
        figures["nll"], figures[quality] = self._model.means()
        figures["window_nll"], figures[f"window_{quality}"] = self._model.window_means()
        figures["label_only_nll"], figures[f"label_only_{quality}"] = self._label_only.means()
        if self._future.rows:
            figures["near_future_nll"], figures[f"near_future_{quality}"] = self._future.means()
        return figures

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers only; torch.load takes it with weights_only=True."""
        return {
            "observation": self.observation,
            "num_labels": self.num_labels,
            "nonfinite_rows": self.nonfinite_rows,
            "kind": self._kind.state_dict(),
            "future_kind": self._future_kind.state_dict(),
            "model": self._model.state_dict(),
            "label_only": self._label_only.state_dict(),
            "future": self._future.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where the saved metrics stopped, bit for bit."""
        saved = (state["observation"], state["num_labels"])
        if saved != (self.observation, self.num_labels):
            raise ValueError(
                f"these metrics were saved for observation {saved[0]} with {saved[1]} outputs, but this run has "
                f"{self.observation} with {self.num_labels}: it is a checkpoint of another task"
            )
        self._model.load_state_dict(state["model"])
        self._label_only.load_state_dict(state["label_only"])
        self._future.load_state_dict(state["future"])
        self._kind.load_state_dict(state["kind"])
        self._future_kind.load_state_dict(state["future_kind"])
        self.nonfinite_rows = state["nonfinite_rows"]


def evaluate(logits: Tensor, labels: Tensor, observation: ObservationKind = "categorical") -> dict[str, float]:
    """Score a held-out set as a whole: nll, accuracy and ece, or mse; rows and nonfinite_rows as in OnlineMetrics.

    The Gaussian NLL takes each output's variance from these very errors: the best that any fixed variance gives.
    """
    if logits.ndim != 2:
        raise ValueError(f"logits have shape {tuple(logits.shape)}; expected (rows, outputs)")
    kind = _make(observation, logits.shape[1])
    labels = kind.labels(labels)
    outputs, broken = _finite(logits, labels, logits.shape[1])
    figures: dict[str, float] = {"rows": len(labels), "nonfinite_rows": int(broken.sum())}
    if len(labels) == 0:
        keys = ["nll", kind.quality] + (["ece"] if observation == "categorical" else [])
        return figures | dict.fromkeys(keys, math.nan)
    if observation == "gaussian":
        squares = (labels - outputs).square().mean(dim=0)
        figures["nll"] = float(0.5 * (squares.clamp_min(1e-300).log() + math.log(2 * math.pi) + 1).sum())
        figures["mse"] = float(squares.mean())
        return figures
    scores = OnlineMetrics._score(kind, outputs, labels, broken)
    figures["nll"], figures["accuracy"] = float(scores.nll.mean()), float(scores.quality.mean())
    if observation == "categorical":
        figures["ece"] = calibration_error(outputs.softmax(dim=1).amax(dim=1), scores.quality)
    return figures


def calibration_error(confidence: Tensor, correct: Tensor, bins: int = 15) -> float:
    """Expected calibration error: |accuracy − confidence| in bins of equal width (arXiv 1706.04599)."""
    # Bins are open below and closed above, as in the paper.
    index = (confidence * bins).ceil().long().clamp(1, bins) - 1
    gap = torch.zeros(bins, dtype=torch.float64).index_add_(0, index, correct.double() - confidence.double())
    return cast(float, (gap.abs().sum() / len(confidence)).item())
