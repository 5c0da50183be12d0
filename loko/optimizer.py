"""LoKO, the low-rank Kalman optimizer: a ``torch.optim.Optimizer`` that filters where others descend."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parameter import Parameter

from loko.adapters import Units
from loko.covariance import CEILING, COVARIANCES, FLOOR, Covariance, Projection, initial_variance, outward
from loko.detection import DETECTORS, Detector, loss
from loko.distributed import Exact, Ranks
from loko.filter import Innovation, Linearization, cholesky, diagonal_blocks, whitened_innovation
from loko.jacobian import JacobianEngine
from loko.noise import NOISES, EmaResidual
from loko.observation import OBSERVATIONS, Gaussian, ObservationModel, linearize, narrow, outputs_needed
from loko.prediction import Prediction
from loko.rows import Jacobian
from loko.scale import Scale
from loko.start import know_the_mean, spread
from loko.trust import Trust, expected, knows, outputs_of

log = logging.getLogger(__name__)

__all__ = ["PAPER", "LoKO", "NonFiniteError", "parameter_groups"]

PAPER: dict[str, Any] = {
    "covariance": "diagonal",
    "noise": "ema",
    "noise_decay": 0.95,
    "linearization": 0.0,
    "output_tolerance": 0.0,
    "scale_adaptation": 0.0,
    "prediction": "plug_in",
    "initial_distribution": "uniform",
    "initial_covariance": 1.0,
}
"""The filter as published (arXiv 2410.11551): ``LoKO(model, **PAPER)``. The paper sets the scale of the initial
covariance by hand for each task; 1.0 is where a search starts."""

Closure = Callable[[], tuple[Tensor, Tensor]]

_RECENT, _USUAL = 0.7, 0.99
"""Decay of the running means of the innovation test, a step."""

_SETTLED = 20
"""Steps before the innovation test says anything: by then R has been estimated."""

_BACKWARD: dict[str | None, torch.dtype | None] = {None: None, "bfloat16": torch.bfloat16}

_STATE_KEYS = ("parameters", "covariance", "noise", "counters", "scale", "trust", "factors", "detector")
_GROUP_SETTINGS = ("initial_covariance", "forgetting", "process_noise")


class NonFiniteError(RuntimeError):
    """Too many batches in a row gave outputs, Jacobians or innovations that were not finite."""


@dataclass(frozen=True)
class Pending:
    """A batch that was looked at and not yet learned.

    Attributes:
        observed: the linearisation of the global batch.
        directions: directions of the outputs that J needs rows for, (m, C), or (B, m, C) for each row its own.
        free: how many of them, from the first on, owe nothing to the labels.
        seeds: those of this worker's rows.
        outputs, labels: of the global batch.
        own: this worker's rows of it.
    """

    observed: Linearization
    directions: Tensor
    free: int
    seeds: Tensor
    outputs: Tensor
    labels: Tensor
    own: slice

    @property
    def known(self) -> Tensor:
        """The directions that owe nothing to the labels, (free, C), or (B, free, C)."""
        return self.directions[..., : self.free, :]


@dataclass
class _Counters:
    """Checkpointed with the filter."""

    steps: int = 0
    rows: int = 0
    skipped_rows: int = 0
    skipped_in_a_row: int = 0
    jitters: int = 0
    recent: float = 0.0
    usual: float = 0.0
    gained: float = 0.0
    drifts: int = 0
    drift_step: int = 0
    drift_row: int = 0

    def innovated(self, consistency: float, gain: float) -> None:
        """Take one batch's eᵀS⁻¹e / N into both running means, and its gain into that of the last few steps."""
        self.gained += (1 - _RECENT) * (gain - self.gained)
        self.recent += (1 - _RECENT) * (consistency - self.recent)
        self.usual += (1 - _USUAL) * (consistency - self.usual)

    @property
    def alarmed(self) -> bool:
        """Whether the detector found a drift in the last step."""
        return self.drifts > 0 and self.drift_step == self.steps

    @property
    def consistency(self) -> float:
        """The usual eᵀS⁻¹e / N: a mean over the last hundred steps or so."""
        return self.usual / (1 - _USUAL**self.steps)

    @property
    def gain(self) -> float:
        """Share of the innovations of the last few steps that the filter believed."""
        return self.gained / (1 - _RECENT**self.steps)

    @property
    def surprise(self) -> float:
        """eᵀS⁻¹e / N of the last few steps over the usual."""
        usual = self.consistency
        return self.recent / (1 - _RECENT**self.steps) / usual if usual > 0 else 1.0


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """The trainable parameters of a model as named groups: ``A``, ``B`` (of LoRA), ``head`` and ``other``.

    Returns:
        ``[{"name": …, "params": [...]}, …]``, only groups that have parameters, ready for ``LoKO(model, groups)``.
    """
    groups: dict[str, list[Parameter]] = {"A": [], "B": [], "head": [], "other": []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[_role(name)].append(parameter)
    return [{"name": name, "params": params} for name, params in groups.items() if params]


def _role(name: str) -> str:
    if "lora_A" in name or "lora_embedding_A" in name:
        return "A"
    if "lora_B" in name or "lora_embedding_B" in name:
        return "B"
    if "modules_to_save" in name or any(part in ("classifier", "score", "head", "fc") for part in name.split(".")):
        return "head"
    return "other"


class LoKO(torch.optim.Optimizer):
    """Extended Kalman filter over the trainable parameters of a model (arXiv 2410.11551, and docs/filter.md beyond it).

    One call of :meth:`step` runs the forward, predicts, and learns each row of the batch once::

        optimizer = LoKO(model)
        for batch in stream:
            logits = optimizer.step(lambda: (model(**batch.inputs).logits, batch.labels))

    There is no learning rate: step sizes come from the covariance of the parameters and the estimated noise.

    Args:
        model: the module the closure runs; a PeftModel, or any module with some parameters trainable.
        params: parameters or named groups, as in ``torch.optim``; default: ``parameter_groups(model)``. A group may
            set ``initial_covariance``, ``forgetting`` and ``process_noise`` for itself.
        covariance: ``low_rank`` (precision diag + rank L), ``diagonal`` (the paper's), or ``block_diagonal`` (a full
            block for each tensor: for small models, on one worker).
        rank: L of ``low_rank``; 0 is the diagonal precision filter.
        direction_decay: φ in [0, 1]: the share of the directions of ``low_rank`` that is kept a step. The rest goes
            into the diagonal, so that the precision of each parameter stays what it was. 1 keeps them until stronger
            ones come, 0 is the diagonal precision filter.
        initial_covariance: p₀ > 0, variance of every parameter before the first row; or ``auto``: the first batch sets
            it, so that logits have the ``prior_variance`` from row to row, and their mean over the rows counts as known
            (``gaussian``: the variance r₀, or one). The groups then hold their ``scales`` until the first step, and
            p₀ times these from it on.
        prior_variance: v > 0 of ``auto``: by how much the first rows' logits may differ from each other, if all started
            from p₀.
        adapter_variance: ξ ≥ 0 of ``auto``: a low-rank factor starts from the geometric mean of p₀ and ξ times its own
            unit (``loko.adapters``), times its group's ``scales``. 0: from p₀ like every other parameter.
        initial_distribution: ``constant``, or ``uniform`` for U(0, p₀] as in the paper.
        scales: factors on ``initial_covariance`` by group name, such as ``{"head": 1.0, "A": 10.0}``.
        noise: ``ema``, ``ema_residual``, ``categorical``, ``categorical_ema`` or ``fixed`` (see ``loko.noise``).
        noise_decay: β in [0, 1) of the moving averages.
        initial_noise: r₀ > 0; None takes what suits the observation (1/C, ¼ or 1).
        noise_excess: κ ≥ 0 of ``categorical_ema``.
        output_tolerance: τ ≥ 0. Above 0, a step spends backward passes only on outputs whose probability matters: what
            it leaves out sums to at most τ for each row (see ``loko.observation.narrow``). 0 is exact, and so is every
            τ with ``gaussian`` observations and ``categorical_ema`` noise.
        max_outputs: most backward passes a step; None is as many as τ asks for. For very many outputs.
        jacobian_megabytes: most memory for J on one worker. Where the batch needs more, fewer outputs are observed, as
            with ``max_outputs``; the choice is logged once. A fixed number, so that no run depends on its machine.
        backward_dtype: ``bfloat16`` makes the products of the backward passes in it, where the hardware is faster at
            it; J is then off by a few parts in a thousand (docs/step.md). None: in the dtype of the forward.
        linearization: ω in [0, 1]: 0 linearises at the prediction (tangent), ω > 0 on the way to the label (secant).
        forgetting: λ in (0, 1]; below one the covariance grows by 1/λ a step.
        scale_adaptation: μ in [0, 1]: the scale of P follows the online loss, by about a factor exp(μ) a step at most
            (``loko.scale``), so that p₀ need not be right and a drift is met with larger steps. 0 leaves P alone. Takes
            one float a parameter.
        drift_adaptation: α in [0, 1]. Above 0, a step that follows innovations larger than usual starts from
            ``(1 − a) P + a P₀`` with ``a = α · min(1, max(0, surprise − 1))``: P goes back towards the start, and never
            beyond it. 0 leaves P alone.
        drift_detector: ``adwin`` (``loko.detection``; needs the library river) looks for a drift in the losses of the
            steps, and says so in the log and in ``diagnostics``. With ``drift_adaptation`` above 0, a = α in the step
            after its alarm and 0 in every other. None: no detector.
        process_noise: q ≥ 0, added to every variance a step.
        prediction: what ``step`` returns. ``expected``: outputs that say what the filter expects, with its uncertainty
            allowed for as far as that has proved right (``loko.trust``; with ``gaussian`` observations the model's
            own). ``plug_in``: the model's own outputs.
        observation: ``categorical``, ``bernoulli``, ``gaussian``, or an ``ObservationModel``.
        max_skipped: how many batches in a row may be skipped for not being finite before :class:`NonFiniteError`.
        seed: of the ``uniform`` start.
        group: a ``torch.distributed`` process group; its ranks then share one filter (``loko.distributed``), each
            stepping on its own rows of the global batch.

    Raises:
        ValueError: a setting outside its range (the message names it), nothing trainable, groups that overlap.
    """

    def __init__(
        self,
        model: nn.Module,
        params: Iterable[Parameter] | Sequence[dict[str, Any]] | None = None,
        *,
        covariance: str = "low_rank",
        rank: int = 16,
        direction_decay: float = 0.95,
        initial_covariance: float | Literal["auto"] = "auto",
        prior_variance: float = 6.0,
        adapter_variance: float = 50.0,
        initial_distribution: str = "constant",
        scales: dict[str, float] | None = None,
        noise: str = "ema",
        noise_decay: float = 0.98,
        initial_noise: float | None = None,
        noise_excess: float = 0.3,
        linearization: float = 0.25,
        output_tolerance: float = 0.01,
        max_outputs: int | None = None,
        jacobian_megabytes: float = 1024.0,
        backward_dtype: Literal["bfloat16"] | None = None,
        forgetting: float = 1.0,
        scale_adaptation: float = 0.2,
        drift_adaptation: float = 0.0,
        drift_detector: Literal["adwin"] | None = None,
        process_noise: float = 0.0,
        prediction: Literal["expected", "plug_in"] = "expected",
        observation: str | ObservationModel = "categorical",
        max_skipped: int = 10,
        seed: int = 0,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        _one_of("covariance", covariance, COVARIANCES)
        _one_of("noise", noise, NOISES)
        _one_of("prediction", prediction, ("expected", "plug_in"))
        _one_of("initial_distribution", initial_distribution, ("constant", "uniform"))
        _in_range("rank", rank, isinstance(rank, int) and rank >= 0, "an integer >= 0")
        _in_range("direction_decay", direction_decay, 0 <= direction_decay <= 1, "in [0, 1]")
        _in_range("prior_variance", prior_variance, 0 < prior_variance < math.inf, "finite and > 0")
        _in_range("adapter_variance", adapter_variance, 0 <= adapter_variance < math.inf, "finite and >= 0")
        _in_range("noise_decay", noise_decay, 0 <= noise_decay < 1, "in [0, 1)")
        _in_range("initial_noise", initial_noise, initial_noise is None or 0 < initial_noise < math.inf, "> 0, or None")
        _in_range("noise_excess", noise_excess, 0 <= noise_excess < math.inf, "finite and >= 0")
        _in_range("linearization", linearization, 0 <= linearization <= 1, "in [0, 1]")
        _in_range("output_tolerance", output_tolerance, 0 <= output_tolerance < 1, "in [0, 1)")
        _in_range("scale_adaptation", scale_adaptation, 0 <= scale_adaptation <= 1, "in [0, 1]")
        _in_range("drift_adaptation", drift_adaptation, 0 <= drift_adaptation <= 1, "in [0, 1]")
        _in_range("max_outputs", max_outputs, max_outputs is None or max_outputs >= 1, ">= 1, or None")
        _in_range("jacobian_megabytes", jacobian_megabytes, jacobian_megabytes > 0, "> 0")
        if backward_dtype is not None:
            _one_of("backward_dtype", backward_dtype, ("bfloat16",))
        if drift_detector is not None:
            _one_of("drift_detector", drift_detector, DETECTORS)
        if isinstance(observation, str):
            _one_of("observation", observation, OBSERVATIONS)
        _in_range("max_skipped", max_skipped, max_skipped >= 0, ">= 0")
        if max_outputs is not None and not _narrows(noise, observation):
            raise ValueError(
                f"max_outputs = {max_outputs} does not go with noise = {noise!r} and observation = {observation!r}: "
                "it needs probabilities, and a noise that does not average over fixed logits; leave it out"
            )
        groups: list[Any] = list(parameter_groups(model) if params is None else params)
        if not groups:
            raise ValueError(
                "the model has no trainable parameter: wrap it with peft.get_peft_model, or set requires_grad=True on "
                "the parameters that are to learn"
            )
        given = [isinstance(g, dict) and "initial_covariance" in g for g in groups]
        auto = initial_covariance == "auto" and not all(given)
        if auto and any(given):
            raise ValueError(
                "some groups set initial_covariance and some leave it to 'auto', which sets one scale for all: set it "
                "in every group, or give groups factors on it through scales"
            )
        super().__init__(
            groups,
            {
                "name": "parameters",
                "initial_covariance": 1.0 if auto else initial_covariance,
                "forgetting": forgetting,
                "process_noise": process_noise,
            },
        )
        self._settings: dict[str, Any] = {
            "covariance": covariance,
            "rank": rank,
            "direction_decay": direction_decay,
            **(
                {"initial_covariance": "auto", "prior_variance": prior_variance, "adapter_variance": adapter_variance}
                if auto
                else {}
            ),
            "initial_distribution": initial_distribution,
            "noise": noise,
            "noise_decay": noise_decay,
            "initial_noise": initial_noise,
            "noise_excess": noise_excess,
            "linearization": linearization,
            "output_tolerance": output_tolerance,
            "max_outputs": max_outputs,
            "jacobian_megabytes": jacobian_megabytes,
            "backward_dtype": backward_dtype,
            "scale_adaptation": scale_adaptation,
            "drift_adaptation": drift_adaptation,
            "drift_detector": drift_detector,
            "prediction": prediction,
            "observation": observation,
            "max_skipped": max_skipped,
        }
        self._apply_scales(scales or {})
        self._params = [p for g in self.param_groups for p in g["params"]]
        self._engine = JacobianEngine(model, _named(model, self._params), _BACKWARD[backward_dtype])
        wanted = {id(p) for p in self._params} if auto and adapter_variance > 0 else set()
        self._units = Units(model, wanted)
        self._observation = OBSERVATIONS[observation]() if isinstance(observation, str) else observation
        self._noise = _build_noise(noise, noise_decay, noise_excess)
        device = self._params[0].device
        self._world = Exact(self._engine.size, group, device)
        variance = self._initial_variance(seed).to(device, self._engine.dtype)
        if covariance == "block_diagonal" and self._world.world_size > 1:
            raise ValueError(
                "covariance = 'block_diagonal' does not go with several workers, whose slices would cut its blocks; "
                "take 'low_rank' or 'diagonal'"
            )
        kind = COVARIANCES[covariance]
        self._covariance: Covariance = kind.start(variance[self._world.own].clone(), rank, self._engine.sizes)
        self._scale = Scale(torch.zeros_like(variance[self._world.own])) if scale_adaptation > 0 else None
        self._trust = Trust.start(device) if prediction == "expected" and knows(self._observation) else None
        self._detector = Detector() if drift_detector is not None else None
        self._factors = torch.ones(len(self._params), dtype=torch.float64, device=device)
        self._noise_state: Tensor | None = None
        self._contrast: Tensor | None = None
        self._counters = _Counters()
        self._memory_logged = False

    def _apply_scales(self, scales: dict[str, float]) -> None:
        names = [g["name"] for g in self.param_groups]
        for name, scale in scales.items():
            _one_of("scales", name, names)
            _in_range(f"scales[{name!r}]", scale, 0 < scale < math.inf, "finite and > 0")
        for g in self.param_groups:
            g["initial_covariance"] *= scales.get(g["name"], 1.0)
            _check_group(g)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Only during construction: the filter's covariance is laid out once."""
        if hasattr(self, "_covariance"):
            raise RuntimeError("LoKO's covariance is laid out once; build a new optimizer to add parameters")
        super().add_param_group(param_group)
        _check_group(self.param_groups[-1])

    def _initial_variance(self, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.cat(
            [
                initial_variance(p.numel(), g["initial_covariance"], self._settings["initial_distribution"], generator)
                for g in self.param_groups
                for p in g["params"]
            ]
        )

    @torch.no_grad()
    def step(self, closure: Closure) -> Tensor:  # type: ignore[override]
        """Predict the batch, then learn it.

        Args:
            closure: runs the model and returns ``(outputs, labels)``: outputs (B, C), labels as the observation wants
                them. Called once (twice with ``noise="ema_residual"``).

        Returns:
            The prediction to score (prequential), (B, C), detached: outputs from before the update. With
            ``prediction="expected"`` their softmax (sigmoid) is the probability of each label with what is uncertain
            allowed for; else they are the model's own.

        Raises:
            ValueError: labels the observation cannot mean. Nothing has been learned from the batch then.
            JacobianError: see ``loko.jacobian``.
            NonFiniteError: ``max_skipped`` batches in a row were not finite. θ, P and R are as they were.
        """
        kept: list[Tensor] = []

        def recorded() -> tuple[Tensor, Tensor]:
            with self._engine.record():
                outputs, labels = closure()
            kept.append(outputs)
            return outputs, labels

        pending = self.observe(recorded)
        seen = kept[0].detach()
        if pending is None:
            return seen
        with self._world.together() as jacobians:
            own_jacobian = self._engine.jacobian(kept.pop(), pending.seeds)  # and the recorded forward is gone
            jacobians.rows = len(own_jacobian)
        jacobian = self._world.exchange(own_jacobian, jacobians.counts)
        del own_jacobian
        return self.assimilate(pending, jacobian, closure)

    @torch.no_grad()
    def observe(self, closure: Closure) -> Pending | None:
        """The first half of a step: what the rows say, and what J is needed of. None without a row; nothing is learned.

        Raises:
            ValueError: labels the observation cannot mean.
        """
        with self._world.together() as share:
            with self._units.measured() if self._units and not self.started else nullcontext():
                outputs, labels = closure()
            if outputs.dim() != 2:
                raise ValueError(
                    f"the closure must return outputs of shape (rows, outputs), got {tuple(outputs.shape)}"
                )
            seen = outputs.detach()
            self._observation.check(seen, labels)
            self._prepare(seen)
            share.rows = len(seen)
        all_outputs = self._world.gather_rows(seen, share.counts)
        all_labels = self._world.gather_rows(labels, share.counts)
        if len(all_outputs) == 0:
            return None
        observed, directions, free = self._linearize(all_outputs, all_labels)
        own = self._world.own_rows(share.counts)
        seeds = directions if directions.dim() == 2 else directions[own]
        return Pending(observed, directions, free, seeds, all_outputs, all_labels, own)

    @torch.no_grad()
    def assimilate(self, pending: Pending, jacobian: Jacobian, closure: Closure) -> Tensor:
        """The second half of a step: learn the rows that ``observe`` looked at.

        Args:
            pending: what ``observe`` gave.
            jacobian: J of ``pending.seeds`` of every worker's rows, (N, n) or this worker's columns of it.
            closure: as in ``step``; called again with ``noise="ema_residual"`` only.

        Returns:
            The prediction of this worker's rows, (B, C), as ``step`` returns it.

        Raises:
            NonFiniteError: see ``step``.
        """
        rows = len(pending.observed.residual)
        predicted = self._learn(jacobian, pending)
        if predicted is None:
            self._skip(rows)
            return pending.outputs[pending.own]
        self._counters.steps += 1
        self._counters.rows += rows
        self._counters.skipped_in_a_row = 0
        if isinstance(self._noise, EmaResidual):
            self._relearn_noise(closure, jacobian, pending.observed)
        return predicted

    @torch.no_grad()
    def predict(self, closure: Callable[[], Tensor], *, calibrated: bool = True) -> Prediction:
        """Predict rows with the uncertainty that P gives their outputs; nothing is learned. A collective call.

        Costs what a step does: one backward pass for each observed output (C − 1 of C classes, whatever
        ``output_tolerance``), and memory for J of all rows at once.

        Args:
            closure: runs the model and returns its outputs (B, C), such as ``lambda: model(**inputs).logits``.
            calibrated: allow for P as far as the stream so far bears out. ``mean`` is then the mixture that ``step``
                predicts with (with ``prediction="plug_in"`` and ``gaussian`` observations: the expectation under
                c P), and ``factor`` is c, the running mean of eᵀS⁻¹e / N: where innovations are c times what S says,
                the covariance that agrees with them is c times as large (the a posteriori variance factor of
                adjustment theory). ``ema`` noise keeps c below one, on MNIST below 0.03. False takes P as it is, which
                is exact for a linear model whose noise is known.

        Raises:
            RuntimeError: ``initial_covariance="auto"`` and no step yet: P has no scale before the first batch.
            JacobianError: see ``loko.jacobian``.
        """
        if not self.started and self._settings.get("initial_covariance") == "auto":
            raise RuntimeError("initial_covariance = 'auto' takes its scale from the first batch; make a step first")
        with self._world.together() as share:
            with self._engine.record():
                outputs = closure()
            if outputs.dim() != 2:
                raise ValueError(
                    f"the closure must return outputs of shape (rows, outputs), got {tuple(outputs.shape)}"
                )
            seen = outputs.detach()
            contrast = self._observation.contrast(seen.shape[1]).to(seen.device)
            own_jacobian = self._engine.jacobian(outputs, contrast)
            share.rows = len(seen)
        jacobian = self._world.exchange(own_jacobian, [rows * len(contrast) for rows in share.counts])
        del outputs, own_jacobian
        spread = self._covariance.project(jacobian, self._world.reduce).outputs
        own = self._world.own_rows(share.counts)
        lift = torch.linalg.pinv(contrast)  # from observed combinations back to the outputs, centred where they are
        observed = diagonal_blocks(spread, len(contrast))[own]
        covariance = lift @ observed @ lift.mT
        calibrated = calibrated and self._counters.steps > 0
        factor = self._counters.consistency if calibrated else 1.0
        if calibrated and self._trust is not None:
            mean = self._trust.mix(
                expected(self._observation, seen, lift, observed, self._trust.usual(self._observation))
            )
            return Prediction(seen, covariance, factor, mean, self._observation.link(mean))
        noise = self._noise_state if self._noise.on_outputs else None
        found = self._observation.expect(seen, factor * covariance, None if noise is None else factor * noise)
        return Prediction(seen, covariance, factor, *found)

    def _linearize(self, outputs: Tensor, labels: Tensor) -> tuple[Linearization, Tensor, int]:
        """The linearisation of the global batch, the directions of the outputs that J needs rows for, and how many of
        them owe nothing to the labels."""
        weight, tolerance, limit = (self._settings[key] for key in ("linearization", "output_tolerance", "max_outputs"))
        assert self._contrast is not None
        every = len(self._contrast)
        if not _narrows(self._settings["noise"], self._settings["observation"]):
            return linearize(self._observation, outputs, labels, weight), self._contrast, every
        limit, free = self._output_limit(limit, outputs), self._needed(outputs, tolerance)
        if min(limit, free) >= every:
            return linearize(self._observation, outputs, labels, weight), self._contrast, every
        noise = self._noise_state if self._noise.on_outputs else None
        observed, directions, free = narrow(
            self._observation, outputs, labels, weight, free=free, tolerance=tolerance, limit=limit, noise=noise
        )
        # What is left out, and the basis of what is not, are choices.
        residual, link, along, directions, first = self._world.same_of(
            [observed.residual, observed.link, observed.score, directions, directions.new_tensor(free)], resize=True
        )
        return Linearization(residual, link, along), directions, int(first)

    def _needed(self, outputs: Tensor, tolerance: float) -> int:
        """How many outputs the predictions alone, without the labels, call important; the same on every rank."""
        assert self._contrast is not None
        if len(self._contrast) == 1 or tolerance == 0:
            return len(self._contrast)
        needed = outputs_needed(self._observation, outputs, tolerance)
        return int(self._world.same(outputs.new_tensor(needed, dtype=torch.float64)))

    def _output_limit(self, limit: int | None, outputs: Tensor) -> int:
        """Most outputs that the settings and the memory for J allow."""
        assert self._contrast is not None
        wanted = min(limit or outputs.shape[1], outputs.shape[1])
        rows = math.ceil(len(outputs) / self._world.world_size)
        bytes_an_output = rows * self._engine.size * torch.promote_types(outputs.dtype, torch.float32).itemsize
        fits = max(1, int(self._settings["jacobian_megabytes"] * 2**20 / bytes_an_output))
        if fits < min(wanted, len(self._contrast)) and not self._memory_logged:
            self._memory_logged = True
            log.warning(
                "J of %d outputs would take %.0f MiB; at most %d outputs are observed a step (jacobian_megabytes = %g)",
                wanted, wanted * bytes_an_output / 2**20, fits, self._settings["jacobian_megabytes"],
            )  # fmt: skip
        return min(wanted, fits)

    def _prepare(self, outputs: Tensor) -> None:
        if self._contrast is None:
            self._contrast = self._observation.contrast(outputs.shape[1]).to(outputs.device)
        elif self._contrast.shape[1] != outputs.shape[1]:
            raise ValueError(f"the model gave {outputs.shape[1]} outputs, and {self._contrast.shape[1]} before")
        if self._noise_state is None:
            initial = self._observation.initial_noise(outputs.shape[1], self._settings["initial_noise"])
            self._noise_state = self._noise.initial(initial).to(outputs.device)
        if len(self._noise_state) != len(self._contrast):
            raise ValueError(
                f"the noise loaded is of {len(self._noise_state)} observed outputs, the model gives "
                f"{len(self._contrast)}: the state is of another model"
            )

    def _learn(self, jacobian: Jacobian, pending: Pending) -> Tensor | None:
        """One predict and update: the prediction. None, and nothing changed, when a number in it is not finite."""
        assert self._noise_state is not None
        observed = pending.observed
        if not bool(torch.isfinite(observed.residual).all()):
            return None
        start, found = self._start(jacobian, pending)
        if self._scale is not None and self._scale.step != 0.0:
            start = start.predict(1.0 / self._scale.factor, 0.0)
        predicted = self.predicted(start)
        prior = predicted.project(jacobian, self._world.reduce, self._world.same)
        moved = self._moved(jacobian)
        outputs = prior.outputs
        if moved is not None:
            outputs = outputs + Scale.spread(self._settings["scale_adaptation"], moved)
        innovation, noise = self._innovate(self._noise_state, outputs, observed)
        # A non-finite Jacobian shows in K, and so in w; what overflows in between shows in the sums.
        if not bool(torch.isfinite(innovation.weights).all()):
            return None
        delta, adapted = self._moves(moved, prior, observed, innovation)
        posterior = prior.condition(innovation, self._settings["direction_decay"])
        changed = [delta, *posterior.state().values(), *([] if adapted is None else [adapted.trace])]
        total = torch.stack([value.sum().double() for value in changed])
        if not bool(torch.isfinite(self._world.reduce(total)).all()):
            return None
        self._covariance, self._scale = posterior, adapted
        if found is not None:
            scale, self._factors = found
            for g in self.param_groups:
                g["initial_covariance"] *= scale
        self._noise_state = noise
        consistency = float(innovation.consistency) / observed.residual.numel()
        self._counters.innovated(consistency, float(innovation.gain))
        if self._detector is not None:
            self._detect(self._detector, pending, consistency)
        self._counters.jitters += innovation.jitters
        delta = self._world.gather_columns(delta)
        parts = [part.view_as(p) for part, p in zip(delta.split(self._engine.sizes), self._params, strict=True)]
        torch._foreach_add_(self._params, [part.to(p.dtype) for part, p in zip(parts, self._params, strict=True)])
        return self._expect(pending, outputs)

    def _expect(self, pending: Pending, prior: Tensor) -> Tensor:
        """The prediction of this worker's rows, from K; in float32 at least where it is not the model's own."""
        if self._trust is None or pending.free == 0:
            return pending.outputs[pending.own]
        lift = torch.linalg.pinv(pending.known.to(prior))
        known = diagonal_blocks(prior, pending.directions.shape[-2])[:, : pending.free, : pending.free]
        each = expected(self._observation, pending.outputs, lift, known, self._trust.usual(self._observation))
        mean = self._trust.mix(each)
        learned = self._trust.learned(each, self._observation, pending.labels)
        weights = self._world.same(learned.weights)  # K numbers, where ``each`` is K for every label
        self._trust = replace(learned, weights=weights)
        dtype = torch.promote_types(pending.outputs.dtype, torch.float32)
        return outputs_of(self._observation, mean)[pending.own].to(dtype)

    def _detect(self, detector: Detector, pending: Pending, consistency: float) -> None:
        """Show a batch that is learned to the detector."""
        seen = loss(self._observation, pending.outputs, pending.labels, consistency)
        heard = torch.tensor(float(detector.update(seen)), device=pending.outputs.device)
        if bool(self._world.same(heard)):
            counters = self._counters
            counters.drifts += 1
            counters.drift_step = counters.steps + 1
            counters.drift_row = counters.rows + counters.skipped_rows + len(pending.outputs)
            log.warning("drift: the loss has risen beyond chance; seen at row %d", counters.drift_row)

    def _moved(self, jacobian: Jacobian) -> Tensor | None:
        """J h, (N,) float64: how a larger P so far would have moved the outputs. None without ``scale_adaptation``."""
        if self._scale is None:
            return None
        return self._world.same(self._world.reduce(outward(jacobian, self._scale.trace))).double()

    def _moves(
        self, moved: Tensor | None, prior: Projection, observed: Linearization, innovation: Innovation
    ) -> tuple[Tensor, Scale | None]:
        """The step of the mean, (n,), and the scale of P after a batch (None without ``scale_adaptation``)."""
        if self._scale is None or moved is None:
            return prior.mean_step(innovation.weights), None
        rate = self._settings["scale_adaptation"]
        change = self._scale.change(prior.outputs, innovation, moved)
        delta, step = prior.mean_step(torch.stack([innovation.weights, change]))  # both in one walk of J
        delta = delta.add(self._scale.trace, alpha=Scale.shift(rate, moved, innovation))
        return delta, self._scale.update(rate, observed, moved, step)

    def _innovate(self, state: Tensor, prior: Tensor, observed: Linearization) -> tuple[Innovation, Tensor]:
        """The innovation and the next noise, the same to the last bit on every rank: what follows branches on them."""
        found, noise = self._noise.innovate(state, prior, observed)
        jitters = found.consistency.new_tensor(found.jitters)
        weights, root, consistency, jitters, noise = self._world.same_of(
            [found.weights, found.root, found.consistency, jitters, noise]
        )
        alone = self._world.world_size == 1  # else cheaper to find again than to send
        factor = found.factor if alone else cholesky(whitened_innovation(prior, root))[0]
        return Innovation(weights, root, factor, consistency, int(jitters)), noise

    def _start(self, jacobian: Jacobian, pending: Pending) -> tuple[Covariance, tuple[float, Tensor] | None]:
        """P before the first rows, the p₀ that ``auto`` found, and by tensor what it was multiplied by beside it.

        The latter two are None but on the first step.

        K is that of the global batch, so the split over workers does not matter, and of directions that do not depend
        on the labels.

        Raises:
            ValueError: the outputs of the first batch depend on no parameter.
        """
        if self.started or "initial_covariance" not in self._settings:
            return self._covariance, None
        prior = self._covariance.project(jacobian, self._world.reduce).outputs
        found = spread(prior, pending.directions, pending.free or None)  # none: no prediction looks at this P
        if not math.isfinite(found.total):
            return self._covariance, None  # the batch is skipped, and the next one sets the scale
        if found.total <= 0:
            raise ValueError(
                "initial_covariance = 'auto' finds outputs that no parameter moves on the first batch; give a number"
            )
        if isinstance(self._observation, Gaussian):
            scale = (self._settings["initial_noise"] or 1.0) / found.total
        else:
            scale = self._settings["prior_variance"] / found.between
        start = self._covariance.predict(1.0 / scale, 0.0)
        factors = self._of_adapters(scale)
        if bool((factors != 1.0).any()):
            start = start.rescale(self._expanded(factors))
        if found.mean is not None and not isinstance(self._observation, Gaussian):
            start = know_the_mean(start, jacobian, found.mean, self._world.reduce, self._world.same)
        return start, (scale, factors)

    def predicted(self, covariance: Covariance) -> Covariance:
        """A covariance one step later: forgetting and process noise of every group, no rows."""
        share = self._drift_share()
        if share > 0:
            start = self._per_parameter("initial_covariance") * self._expanded(self._factors)
            covariance = covariance.predict(1.0 / max(1.0 - share, 1e-6), share * start, self._world.reduce)
        if all(g["forgetting"] == 1.0 and g["process_noise"] == 0.0 for g in self.param_groups):
            return covariance
        return covariance.predict(
            self._per_parameter("forgetting"), self._per_parameter("process_noise"), self._world.reduce
        )

    def _drift_share(self) -> float:
        """How far P goes back towards its start before the next rows."""
        most: float = self._settings["drift_adaptation"]
        if self._detector is not None:
            return most if self._counters.alarmed else 0.0
        if most == 0 or self._counters.steps < _SETTLED:
            return 0.0
        return most * min(1.0, max(0.0, self._counters.surprise - 1.0))

    def _of_adapters(self, scale: float) -> Tensor:
        """What takes p₀ to the variance that each tensor starts with, √(ξ unit / p₀) where it has a unit, float64."""
        device, variance = self._params[0].device, self._settings["adapter_variance"]
        units = self._units.found(self._world.reduce, device) if self._units else {}
        factors = [math.sqrt(variance * units[id(p)] / scale) if id(p) in units else 1.0 for p in self._params]
        return self._world.same(torch.tensor(factors, dtype=torch.float64, device=device))

    def _expanded(self, values: Tensor) -> Tensor:
        """One number a tensor as this rank's slice of (n,)."""
        sizes = torch.tensor(self._engine.sizes, device=values.device)
        return values.to(self._engine.dtype).repeat_interleave(sizes)[self._world.own]

    def _per_parameter(self, key: str) -> Tensor | float:
        """A group setting as one number where all groups agree, else as this rank's slice of (n,)."""
        if len({g[key] for g in self.param_groups}) == 1:
            return float(self.param_groups[0][key])
        like = self._covariance.state()
        some = next(iter(like.values()))
        values = [some.new_full((p.numel(),), g[key]) for g in self.param_groups for p in g["params"]]
        return torch.cat(values)[self._world.own]

    @property
    def engine(self) -> JacobianEngine:
        """What makes J."""
        return self._engine

    @property
    def started(self) -> bool:
        """Whether a batch was learned, and so what the first one sets is set."""
        return self._counters.steps > 0

    @property
    def settings(self) -> dict[str, Any]:
        """The settings the filter was built with, as in ``repr``."""
        return dict(self._settings)

    @property
    def parameters(self) -> list[Parameter]:
        """The parameters that are filtered, in the order of the covariance."""
        return list(self._params)

    @property
    def covariance(self) -> Covariance:
        """Covariance of this rank's slice of the parameters."""
        return self._covariance

    @covariance.setter
    def covariance(self, value: Covariance) -> None:
        self._covariance = value

    def average_noise(self, ranks: Ranks) -> None:
        """Give every rank the mean of the noise estimates of all; a collective call, after the first step."""
        assert self._noise_state is not None
        self._noise_state = ranks.reduce(self._noise_state) / ranks.world_size

    def _relearn_noise(self, closure: Closure, jacobian: Jacobian, before: Linearization) -> None:
        assert isinstance(self._noise, EmaResidual)
        assert self._noise_state is not None
        with self._world.together() as share:
            outputs, labels = closure()
            share.rows = len(outputs)
        outputs, labels = (self._world.gather_rows(rows, share.counts) for rows in (outputs, labels))
        after = linearize(self._observation, outputs, labels, 0.0)
        posterior = self._covariance.project(jacobian, self._world.reduce).outputs
        state = self._noise.relearn(self._noise_state, posterior, Linearization(after.residual, before.link))
        if bool(torch.isfinite(state).all()):
            self._noise_state = state

    def _skip(self, rows: int) -> None:
        self._counters.skipped_rows += rows
        self._counters.skipped_in_a_row += 1
        if self._counters.skipped_in_a_row > self._settings["max_skipped"]:
            raise NonFiniteError(
                f"{self._counters.skipped_in_a_row} batches in a row gave non-finite outputs, Jacobians or "
                f"innovations (max_skipped = {self._settings['max_skipped']}); what was learned before them is kept. "
                "Look at the inputs, or lower initial_covariance or noise_excess if the filter has diverged"
            )

    def diagnostics(self) -> dict[str, float]:
        """State of the filter in numbers, for logs: traces of P and R, consistency, counters. A collective call.

        ``scale`` is the product of all factors that ``scale_adaptation`` has put on P. ``trust`` is the share of P that
        predictions allow for, and ``confidence`` the factor on the outputs that they have instead: it falls below one
        after a drift. ``consistency`` is the running mean of the normalised innovation squared, eᵀS⁻¹e / N: about one
        when the filter is consistent, below where R is estimated too large (``ema`` counts H P Hᵀ twice). ``surprise``
        is that of the last few steps over it: an alarm for drift. With a ``drift_detector``, ``drifts`` counts its
        alarms and ``drift_row`` is how many rows had come at the last one.
        """
        marginal = self._covariance.marginal(self._world.reduce)
        result = {
            "trace_p": float(self._world.reduce(marginal.double().sum())),
            **self._initial_covariances(),
            "floored": float(self._world.reduce(self._covariance.at_floor().double())),
            "skipped_rows": float(self._counters.skipped_rows),
            "jitters": float(self._counters.jitters),
            **self._world.traffic(self._counters.steps),
        }
        if self._noise_state is not None:
            noise = self._noise_state
            if self._noise.on_outputs:
                size = len(noise)
                outputs = next(c for c in (size, size + 1) if len(self._observation.kept(c)) == size)
                contrast = self._observation.contrast(outputs).to(noise)
                noise = contrast.mT @ noise @ contrast  # of all outputs, whichever was dropped
            result["trace_r"] = float(noise.trace())
        if self._scale is not None:
            result["scale"] = math.exp(self._scale.log)
        if self._trust is not None:
            result |= {"trust": self._trust.share, "confidence": self._trust.confidence}
        if self._detector is not None:
            result |= {"drifts": float(self._counters.drifts), "drift_row": float(self._counters.drift_row)}
        if self._counters.steps > 0:
            counters = self._counters
            result |= {"consistency": counters.consistency, "surprise": counters.surprise, "gain": counters.gain}
        return result

    def _starts(self) -> dict[str, float]:
        """The mean variance that each group starts from."""
        factors, starts = iter(self._factors.tolist()), {}
        for g in self.param_groups:
            sizes = [p.numel() for p in g["params"]]
            mean = sum(size * next(factors) for size in sizes) / sum(sizes)
            starts[g["name"]] = g["initial_covariance"] * mean
        return starts

    def _initial_covariances(self) -> dict[str, float]:
        """The same under one name where the groups agree."""
        starts = self._starts()
        if len(set(starts.values())) == 1:
            return {"initial_covariance": next(iter(starts.values()))}
        return {f"initial_covariance_{name}": value for name, value in starts.items()}

    def state_dict(self) -> dict[str, Any]:
        """Everything the filter needs to go on, whole whatever the number of ranks; a collective call.

        Survives ``torch.save`` and ``torch.load(weights_only=True)`` bit for bit.
        """
        state = super().state_dict()
        covariance = {key: self._world.gather_columns(value).clone() for key, value in self._covariance.state().items()}
        state["filter"] = {
            "parameters": self._layout(),
            "covariance": covariance,
            "noise": None if self._noise_state is None else self._noise_state.clone(),
            "counters": {f.name: getattr(self._counters, f.name) for f in fields(_Counters)},
            "scale": None if self._scale is None else self._scale_state(self._scale),
            "trust": None if self._trust is None else self._trust.state(),
            "factors": self._factors.clone(),
            "detector": None if self._detector is None else self._detector.state(),
        }
        return state

    def _scale_state(self, scale: Scale) -> dict[str, Any]:
        values = {f.name: getattr(scale, f.name) for f in fields(Scale)}
        return {**values, "trace": self._world.gather_columns(scale.trace).clone()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` gave, of the same model and the same kind of covariance.

        Raises:
            ValueError: a state of another model, covariance or precision, with missing keys, or with values not finite;
                the optimizer is as it was.
        """
        saved = dict(state_dict)
        loaded = saved.pop("filter", None)
        counters = {f.name for f in fields(_Counters)}
        if loaded is None or set(loaded) != set(_STATE_KEYS) or set(loaded["counters"]) != counters:
            raise ValueError(
                "this is not a state of LoKO, or one that another version of loko saved: its 'filter' entry is missing "
                "or not complete"
            )
        if loaded["parameters"] != self._layout():
            differing = [
                f"{ours} here, {theirs} there"
                for ours, theirs in zip(self._layout(), loaded["parameters"], strict=False)
                if ours != theirs
            ]
            raise ValueError(
                f"this is the state of another model: {len(loaded['parameters'])} trainable parameters there, "
                f"{len(self._layout())} here" + (f"; the first that differs: {differing[0]}" if differing else "")
            )
        own = self._covariance.state()
        given = loaded["covariance"]
        whole = {key: (*value.shape[:-1], self._engine.size) for key, value in own.items()}
        shapes = {key: tuple(value.shape) for key, value in given.items()}
        if shapes != whole:
            raise ValueError(
                f"this is the state of another covariance: {shapes} there, "
                f"{whole} here; build LoKO with the settings the state was saved with"
            )
        dtypes = {str(value.dtype) for value in given.values()}
        if dtypes != {str(self._engine.dtype)}:
            raise ValueError(
                f"the covariance of this state is in {', '.join(sorted(dtypes))} and here in {self._engine.dtype}; "
                "load the model in the precision it was saved in"
            )
        scale = loaded["scale"]
        if (scale is None) is not (self._scale is None):
            raise ValueError(
                f"this state was saved {'without' if scale is None else 'with'} scale_adaptation and LoKO was built "
                f"{'with' if scale is None else 'without'}; build it with the settings the state was saved with"
            )
        trust = loaded["trust"]
        if (trust is None) is not (self._trust is None):
            ours, theirs = ("plug_in", "expected") if self._trust is None else ("expected", "plug_in")
            raise ValueError(
                f"this state was saved with prediction = {theirs!r} and LoKO was built with {ours!r}; build it with "
                "the settings the state was saved with"
            )
        if trust is not None and self._trust is not None and trust["weights"].shape != self._trust.weights.shape:
            raise ValueError("this state was saved by another version of loko, which mixed predictions in another way")
        detector = loaded["detector"]
        if (detector is None) is not (self._detector is None):
            raise ValueError(
                f"this state was saved {'without' if detector is None else 'with'} a drift_detector and LoKO was built "
                f"{'with' if detector is None else 'without'}; build it with the settings the state was saved with"
            )
        noise = loaded["noise"]
        tensors = [*given.values(), loaded["factors"], *([] if noise is None else [noise])]
        tensors += [] if trust is None else [trust["weights"], trust["labels"]]
        tensors += [] if scale is None else [scale["trace"]]
        tensors += [] if detector is None else [detector]
        if not all(bool(torch.isfinite(value).all()) for value in tensors):
            raise ValueError("the state holds values that are not finite; take an earlier checkpoint")
        listening = None if detector is None else Detector(detector.tolist())
        super().load_state_dict(saved)
        some = next(iter(own.values()))
        self._covariance = type(self._covariance).from_state(
            {key: value[..., self._world.own].to(some, copy=True).contiguous() for key, value in given.items()}
        )
        self._noise_state = None if noise is None else noise.to(some.device, copy=True)
        if scale is not None:
            self._scale = Scale(**{**scale, "trace": scale["trace"][self._world.own].to(some, copy=True)})
        if trust is not None:
            self._trust = Trust.from_state(trust, some.device)
        self._detector = listening
        self._factors = loaded["factors"].to(some.device, copy=True)
        self._counters = _Counters(**loaded["counters"])

    def _layout(self) -> list[str]:
        return [f"{name}{list(p.shape)}" for name, p in zip(self._engine.names, self._engine.parameters, strict=True)]

    def __repr__(self) -> str:
        settings = ", ".join(f"{key}={value!r}" for key, value in self._settings.items())
        starts = self._starts()
        lines = [f"LoKO({self._engine.size} parameters, {settings})"]
        for g in self.param_groups:
            count = sum(p.numel() for p in g["params"])
            shown = {**g, "initial_covariance": starts[g["name"]]}
            values = ", ".join(f"{key}={shown[key]:g}" for key in _GROUP_SETTINGS)
            lines.append(f"  {g['name']}: {count} parameters, {values}")
        return "\n".join(lines)


def _narrows(noise: str, observation: str | ObservationModel) -> bool:
    """Whether outputs can be left out: they have probabilities, and the noise's state does not depend on which."""
    return noise != "categorical_ema" and observation != "gaussian" and not isinstance(observation, Gaussian)


def _build_noise(name: str, decay: float, excess: float) -> Any:
    given = {"decay": decay, "excess": excess}
    kind = NOISES[name]
    return kind(**{f.name: given[f.name] for f in fields(kind)})


def _named(model: nn.Module, parameters: list[Parameter]) -> list[tuple[str, Parameter]]:
    names = {id(p): name for name, p in model.named_parameters()}
    unknown = sum(id(p) not in names for p in parameters)
    if unknown:
        raise ValueError(f"{unknown} of the parameters given are not parameters of the model")
    frozen = [names[id(p)] for p in parameters if not p.requires_grad]
    if frozen:
        raise ValueError(
            f"{len(frozen)} of the parameters given are frozen (first: {frozen[0]}); set requires_grad=True"
        )
    return [(names[id(p)], p) for p in parameters]


def _check_group(group: dict[str, Any]) -> None:
    p0, decay, q = (group[key] for key in _GROUP_SETTINGS)
    _in_range("initial_covariance", p0, FLOOR <= p0 <= CEILING, f"in [{FLOOR:g}, {CEILING:g}]")
    _in_range("forgetting", decay, 0 < decay <= 1, "in (0, 1]")
    _in_range("process_noise", q, 0 <= q <= CEILING, f"in [0, {CEILING:g}]")


def _in_range(key: str, value: object, ok: bool, allowed: str) -> None:
    if not ok:
        raise ValueError(f"{key} = {value!r}; allowed: {allowed}")


def _one_of(key: str, value: str, allowed: Iterable[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{key} = {value!r}; allowed: {', '.join(repr(name) for name in allowed)}")
