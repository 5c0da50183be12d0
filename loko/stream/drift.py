"""Drift as a view on real rows: what changes, from which row of the stream on, and how suddenly.

Each kind is a frozen dataclass of plain numbers, so that a YAML list of dictionaries builds it (`drift_from_config`).
`at` is the stream position of the change. With `until` it ramps up linearly between the two instead of switching; with
`every` it recurs, on for that many rows, off for as many. Nothing is drawn while streaming: what happens to a row
follows from its position, its identity and the seed, whatever the batch size, the rank or the cursor a run resumed
from.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from loko.stream.errors import StreamError
from loko.stream.order import Int64Array, uniform

Floats = npt.NDArray[np.float64]
ImageArray = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class ChangePoint:
    """A row at which the stream changes."""

    row: int
    kind: str
    description: str


@dataclass(frozen=True, kw_only=True)
class Drift(ABC):
    """What every kind shares: when it acts, and how strongly.

    Attributes:
        at: stream position of the change, 0 or more.
        until: end of a linear ramp that begins at `at`; None switches at once.
        every: length in rows of each phase of a recurring drift; None stays on.
        seed: of what the drift draws for each row.
    """

    kind: ClassVar[str]

    at: int
    until: int | None = None
    every: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        self._need(_is_int(self.at) and self.at >= 0, "at", "an integer, 0 or more")
        self._need(_is_int(self.seed) and self.seed >= 0, "seed", "an integer, 0 or more")
        self._need(
            self.until is None or (_is_int(self.until) and self.until > self.at), "until", "an integer above `at`"
        )
        self._need(self.every is None or (_is_int(self.every) and self.every >= 1), "every", "an integer, 1 or more")
        self._need(
            self.until is None or self.every is None, "every", "absent where `until` is set: a drift ramps or recurs"
        )

    def strength(self, positions: Int64Array) -> Floats:
        """How far the drift has gone at each stream position, from 0 (not at all) to 1."""
        since = positions - self.at
        if self.every is not None:
            return ((since >= 0) & (since // self.every % 2 == 0)).astype(np.float64)
        if self.until is not None:
            return np.clip(since / (self.until - self.at), 0.0, 1.0)
        return (since >= 0).astype(np.float64)

    def change_points(self, rows: int) -> Iterator[ChangePoint]:
        """The rows below `rows` at which the drift starts, ends its ramp, or toggles."""
        if self.every is not None:
            for count, row in enumerate(range(self.at, rows, self.every)):
                yield ChangePoint(row, self.kind, f"{self.describe()} {'off' if count % 2 else 'on'}")
        elif self.until is not None:
            for row, what in ((self.at, "begins"), (self.until, "complete")):
                if row < rows:
                    yield ChangePoint(row, self.kind, f"{self.describe()} {what}")
        elif self.at < rows:
            yield ChangePoint(self.at, self.kind, self.describe())

    @abstractmethod
    def describe(self) -> str:
        """The change in a few words."""

    def _need(self, fine: bool, key: str, allowed: str) -> None:
        if not fine:
            raise StreamError(f"drift {self.kind}: {key} is {getattr(self, key)!r}; it must be {allowed}")


class ImageDrift(Drift):
    """A drift of what a row looks like."""

    @abstractmethod
    def change(self, image: ImageArray, strength: float, row_id: int) -> ImageArray:
        """The image, (H, W) or (H, W, C) uint8, at a strength above 0; shape and dtype stay."""


class LabelDrift(Drift):
    """A drift of what a row is called."""

    @abstractmethod
    def change(self, labels: npt.NDArray[Any], strength: Floats, row_ids: Int64Array) -> npt.NDArray[Any]:
        """The labels, (B,) integers, at the strength (B,) of each row."""


@dataclass(frozen=True, kw_only=True)
class Rotation(ImageDrift):
    """Images turned counterclockwise about their centre, corners filled with 0; a ramp turns them bit by bit.

    Attributes:
        degrees: the angle. Multiples of 90 only move pixels; other angles are interpolated.
    """

    kind = "rotation"
    degrees: float

    def __post_init__(self) -> None:
        super().__post_init__()
        self._need(_is_number(self.degrees), "degrees", "a finite number")

    def describe(self) -> str:
        return f"rotated by {self.degrees:g} degrees"

    def change(self, image: ImageArray, strength: float, row_id: int) -> ImageArray:
        angle = self.degrees * strength % 360.0
        square = image.shape[0] == image.shape[1]
        if angle == 0.0:
            return image
        if angle == 180.0:
            return image[::-1, ::-1]
        if angle == 90.0 and square:
            return image.swapaxes(0, 1)[::-1]
        if angle == 270.0 and square:
            return image[::-1].swapaxes(0, 1)
        turned = Image.fromarray(image).rotate(angle, resample=Image.Resampling.BILINEAR)
        return np.asarray(turned)


@dataclass(frozen=True, kw_only=True)
class ColorJitter(ImageDrift):
    """Brightness, contrast and saturation of each image multiplied by factors of its own.

    Each factor lies in [1 - x, 1 + x] (never below 0) and is drawn for the row, in the order and with the meaning they
    have in torchvision's ColorJitter; a ramp widens x from 0. Greyscale images have no saturation to change.
    """

    kind = "color_jitter"
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("brightness", "contrast", "saturation"):
            value = getattr(self, key)
            self._need(_is_number(value) and value >= 0, key, "a finite number, 0 or more")

    def describe(self) -> str:
        factors = (("brightness", self.brightness), ("contrast", self.contrast), ("saturation", self.saturation))
        return "colours jittered: " + ", ".join(f"{name} {value:g}" for name, value in factors)

    def change(self, image: ImageArray, strength: float, row_id: int) -> ImageArray:
        row = np.array([row_id])
        ranges = (self.brightness, self.contrast, self.saturation)
        brightness, contrast, saturation = (
            max(0.0, 1.0 + strength * x * (2.0 * float(uniform(row, self.seed, i)[0]) - 1.0))
            for i, x in enumerate(ranges)
        )
        pixels = np.clip(image.astype(np.float32) * np.float32(brightness), 0, 255)
        mean = _grey(pixels).mean()
        pixels = np.clip(mean + (pixels - mean) * np.float32(contrast), 0, 255)
        if image.ndim == 3:
            grey = _grey(pixels)[..., None]
            pixels = np.clip(grey + (pixels - grey) * np.float32(saturation), 0, 255)
        return np.rint(pixels).astype(np.uint8)


@dataclass(frozen=True, kw_only=True)
class Relabel(LabelDrift):
    """Labels renamed while the rows stay: a shift of the concept. A ramp renames a growing share of the rows.

    Attributes:
        mapping: "flip" (0 becomes 1 and 1 becomes 0), a permutation as a list (label i becomes mapping[i]), or a
            dictionary from old to new, in which labels that are not named stay.
    """

    kind = "relabel"
    mapping: Literal["flip"] | Sequence[int] | Mapping[int, int]

    def __post_init__(self) -> None:
        super().__post_init__()
        allowed = "'flip', a permutation such as [1, 2, 0], or a dictionary such as {0: 1, 1: 0} of integers, 0 or more"
        pairs = self._pairs()
        self._need(
            bool(pairs) and all(_is_int(x) and x >= 0 for pair in pairs.items() for x in pair), "mapping", allowed
        )
        self._need(isinstance(self.mapping, Mapping) or set(pairs) == set(pairs.values()), "mapping", allowed)

    def describe(self) -> str:
        return "labels renamed: " + ", ".join(f"{old} to {new}" for old, new in self._pairs().items() if old != new)

    def change(self, labels: npt.NDArray[Any], strength: Floats, row_ids: Int64Array) -> npt.NDArray[Any]:
        if labels.dtype != np.int64 or labels.ndim != 1:
            raise StreamError(
                f"drift {self.kind}: it renames integer labels (B,), not {labels.dtype} of shape {labels.shape}"
            )
        pairs = self._pairs()
        if not isinstance(self.mapping, Mapping):
            unknown = labels[(labels < 0) | (labels >= len(pairs))]
            self._need(not unknown.size, "mapping", f"long enough to name label {unknown[:1]}, which the stream holds")
        renamed = np.array([pairs.get(int(label), int(label)) for label in labels], np.int64)
        return np.where(uniform(row_ids, self.seed) < strength, renamed, labels)

    def _pairs(self) -> dict[int, int]:
        if self.mapping == "flip":
            return {0: 1, 1: 0}
        if isinstance(self.mapping, Mapping):
            # JSON and dotted overrides make strings of integer keys.
            return {int(k) if isinstance(k, str) and k.isdigit() else k: v for k, v in self.mapping.items()}
        return (
            dict(enumerate(self.mapping))
            if isinstance(self.mapping, Sequence) and not isinstance(self.mapping, str)
            else {}
        )


@dataclass(frozen=True, kw_only=True)
class LabelShift(Drift):
    """Other class frequencies: from `at` on the rows come in an order in which each is of class c with probability
    priors[c].

    Every row still comes exactly once, and rows of one class keep their order. The priors therefore hold until a class
    they need has run out; that row is recorded as a change point too. A ramp mixes the old frequencies with the new.

    Attributes:
        priors: a weight for each class, as a list or a dictionary; they need not add up to 1.
        column: the label column.
    """

    kind = "label_shift"
    priors: Sequence[float] | Mapping[int, float]
    column: str = "label"

    def __post_init__(self) -> None:
        super().__post_init__()
        allowed = "weights by class, 0 or more and not all 0, such as [0.9, 0.1] or {0: 0.9, 1: 0.1}"
        weights = self._weights()
        fine = all(_is_int(k) and _is_number(v) and v >= 0 for k, v in weights.items())
        self._need(fine and sum(weights.values()) > 0, "priors", allowed)
        self._need(isinstance(self.column, str) and bool(self.column), "column", "the name of a column")

    def describe(self) -> str:
        return "class frequencies " + ", ".join(f"{label}: {weight:g}" for label, weight in self._weights().items())

    def order(self, labels: npt.NDArray[np.int64]) -> tuple[Int64Array, list[ChangePoint]]:
        """The order (N,) of the stream positions whose labels (N,) are given, and where a class ran out, if one did.

        Raises:
            StreamError: if the labels are no integers (N,), or one of them has no prior.
        """
        if labels.ndim != 1 or labels.dtype != np.int64:
            raise StreamError(
                f"drift {self.kind}: column {self.column!r} must hold one integer a row, not {labels.dtype}"
            )
        classes, members = np.unique(labels[self.at :], return_inverse=True)
        weights = self._weights()
        for label in classes:
            self._need(int(label) in weights, "priors", f"a weight for every class; label {label} has none")
        target = np.array([weights[int(label)] for label in classes], np.float64)
        queues = [self.at + np.flatnonzero(members == c) for c in range(len(classes))]
        natural = np.array([len(queue) for queue in queues], np.float64)
        taken = np.zeros(len(classes), np.int64)
        order = np.arange(len(labels))
        ran_out: list[ChangePoint] = []
        position = self.at
        while position < len(labels):
            # A stretch is drawn as if no class could run out, then cut where the first one does.
            stretch = np.arange(position, min(position + 4096, len(labels)))
            left = natural - taken
            new = np.where(left > 0, target if (target * (left > 0)).any() else natural, 0.0)
            old = np.where(left > 0, natural, 0.0)
            shifted = uniform(stretch, self.seed, 1) < self.strength(stretch)
            point = uniform(stretch, self.seed, 2)
            drawn = np.where(shifted, _draw(new, point), _draw(old, point))
            for c in np.unique(drawn):
                places = np.flatnonzero(drawn == c)
                if len(places) > left[c]:
                    drawn, stretch = drawn[: places[int(left[c])]], stretch[: places[int(left[c])]]
            for c in np.unique(drawn):
                places = np.flatnonzero(drawn == c)
                order[stretch[places]] = queues[c][taken[c] : taken[c] + len(places)]
                taken[c] += len(places)
            position += len(stretch)
            gone = classes[(taken == natural) & (target > 0)]
            if len(gone) and not ran_out and position < len(labels):
                ran_out = [ChangePoint(position, self.kind, f"class {gone[0]} has run out, the priors no longer hold")]
        return order, ran_out

    def _weights(self) -> dict[int, float]:
        if isinstance(self.priors, Mapping):
            return {int(k) if isinstance(k, str) and k.isdigit() else k: v for k, v in self.priors.items()}
        return (
            dict(enumerate(self.priors))
            if isinstance(self.priors, Sequence) and not isinstance(self.priors, str)
            else {-1: 0}
        )


DRIFTS: dict[str, type[Drift]] = {drift.kind: drift for drift in (Rotation, ColorJitter, Relabel, LabelShift)}


def drift_from_config(config: Mapping[str, Any]) -> Drift:
    """The drift that a dictionary such as {"kind": "rotation", "at": 1000, "degrees": 90} describes.

    Raises:
        StreamError: naming the key, its value and what is allowed, for an unknown kind or key, a missing key or a bad
        value.
    """
    if not isinstance(config, Mapping):
        raise StreamError(
            f"drift: {config!r} is no dictionary; write one such as {{kind: rotation, at: 1000, degrees: 90}}"
        )
    kind = config.get("kind")
    if kind not in DRIFTS:
        raise StreamError(f"drift: kind is {kind!r}; allowed: {', '.join(DRIFTS)}")
    drift = DRIFTS[kind]
    known = {entry.name: entry for entry in fields(drift)}
    for key, value in config.items():
        if key != "kind" and key not in known:
            raise StreamError(f"drift {kind}: unknown key {key!r} (value {value!r}); allowed: {', '.join(known)}")
    for key, entry in known.items():
        if entry.default is MISSING and key not in config:
            raise StreamError(f"drift {kind}: key {key!r} is missing; it has no default")
    return drift(**{key: value for key, value in config.items() if key != "kind"})


def _draw(weights: Floats, point: Floats) -> npt.NDArray[np.int64]:
    """For each point in [0, 1) the index it falls on when the weights are laid end to end."""
    ends = np.cumsum(weights)
    return np.searchsorted(ends, point * ends[-1], side="right")


def _grey(pixels: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    if pixels.ndim == 2:
        return pixels
    return pixels[..., :3] @ np.array([0.299, 0.587, 0.114], np.float32) if pixels.shape[2] >= 3 else pixels[..., 0]


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and bool(np.isfinite(value))
