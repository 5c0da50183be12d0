"""One filter over several workers is one worker's filter on the whole batch, however rows and parameters are split."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from loko import LoKO
from loko.config import MERGED
from loko.consensus import Consensus
from loko.detection import Detector
from loko.distributed import Exact
from loko.stream import slice_of
from tests.oracle import covariance_of
from tests.test_filter import Tiny, rows

X, Y = rows("categorical", 3, 24)
# Rows a rank takes of each batch: unequal, ranks with none, and a batch of which nobody has a row.
SPLITS: dict[int, list[tuple[int, ...]]] = {
    1: [(6,), (6,), (0,), (6,), (6,)],
    2: [(3, 3), (0, 6), (0, 0), (5, 1), (2, 4)],
    3: [(3, 1, 2), (0, 6, 0), (0, 0, 0), (0, 4, 2), (1, 1, 4)],
}
CASES: list[dict[str, Any]] = [
    {"covariance": "diagonal", "noise": "ema", "forgetting": 0.95},
    {"covariance": "diagonal", "noise": "categorical_ema", "initial_distribution": "uniform"},
    {"rank": 4, "noise": "ema", "forgetting": 0.95, "process_noise": 1e-3, "scales": {"head": 2.0}},
    {"rank": 4, "noise": "ema_residual", "process_noise": 1e-3},
    {"rank": 0, "noise": "categorical", "forgetting": 0.95},
    {"rank": 40, "noise": "fixed"},
    {"rank": 4, "drift_detector": "adwin", "drift_adaptation": 0.5},
    {"rank": 4, "initial_covariance": "auto"},
    {"rank": 4, "initial_covariance": "auto", "adapter_variance": 50.0},
]


def model_of(settings: dict[str, Any]) -> Any:
    """The model of a case: with an adapter where it says how that starts."""
    model = Tiny(3)
    if "adapter_variance" not in settings:
        return model
    return get_peft_model(model, LoraConfig(r=2, target_modules=["body"], modules_to_save=["head"])).double().eval()


def run(rank: int, world_size: int, group: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """Four batches and one with a NaN on the last rank, with a resume through a state in the middle."""
    model = model_of(settings)
    optimizer = LoKO(model, group=group, **settings)
    states, predicted, start = [], [], 0
    for number, split in enumerate(SPLITS[world_size]):
        own = slice(start + sum(split[:rank]), start + sum(split[: rank + 1]))
        start += sum(split)
        predicted.append(optimizer.step(lambda own=own: (model(X[own]), Y[own])))
        if number == 1:
            bad = X[own.start : own.stop] * (torch.nan if rank == world_size - 1 else 1.0)
            bad = bad if len(bad) or rank < world_size - 1 else torch.full((1, 3), torch.nan).double()
            optimizer.step(lambda bad=bad: (model(bad), Y[: len(bad)]))
            states.append(optimizer.state_dict())
            optimizer = LoKO(model, group=group, **settings)
            optimizer.load_state_dict(states[0])
    states.append(optimizer.state_dict())
    return {
        "theta": torch.cat([p.detach().flatten() for p in model.parameters()]),
        "P": covariance_of(optimizer),
        "R": states[-1]["filter"]["noise"],
        "counters": states[-1]["filter"]["counters"],
        "middle": states[0],
        "predicted": predicted,
        "diagnostics": optimizer.diagnostics(),
    }


def few_parameters(rank: int, group: Any) -> Tensor:
    """Two parameters over three ranks: one of them owns nothing."""
    torch.manual_seed(0)
    model = nn.Linear(1, 1, dtype=torch.float64)
    optimizer = LoKO(model, group=group, observation="gaussian", rank=2)
    for i in range(3):
        own = slice(i, i + 1) if rank in (0, None) else slice(0, 0)
        optimizer.step(lambda own=own: (model(X[own, :1]), X[own, 1:2]))
    return torch.cat([p.detach().flatten() for p in model.parameters()])


UNLIKE: list[dict[str, Any]] = [
    {"rank": 2, "noise": "ema", "process_noise": 1e-3},  # cuts: which directions and with which sign matters
    {"rank": 2, "output_tolerance": 0.3},
]


def unlike(rank: int, group: Any, settings: dict[str, Any]) -> Tensor:
    """The same filter where each machine's LAPACK chooses other signs, as it is free to."""
    eigh, qr = torch.linalg.eigh, torch.linalg.qr

    def other_eigh(matrix: Tensor) -> Any:
        values, vectors = eigh(matrix)
        return values, vectors * (-1.0) ** (rank * torch.arange(vectors.shape[-1]))

    def other_qr(matrix: Tensor) -> Any:
        found = qr(matrix)
        return type(found)((found.Q * (-1.0) ** rank, found.R * (-1.0) ** rank))

    torch.linalg.eigh, torch.linalg.qr = other_eigh, other_qr
    try:
        model = Tiny(3)
        optimizer = LoKO(model, group=group, **settings)
        for start in range(0, 24, 6):
            own = slice(start + 3 * rank, start + 3 * rank + 3) if group is not None else slice(start, start + 6)
            optimizer.step(lambda own=own: (model(X[own]), Y[own]))
        state = optimizer.state_dict()["filter"]["covariance"]
        precision = state["precision"].diag() + state["factor"].mT @ state["factor"]
        return torch.cat([torch.cat([p.detach().flatten() for p in model.parameters()]), precision.flatten()])
    finally:
        torch.linalg.eigh, torch.linalg.qr = eigh, qr


def failing(rank: int, group: Any, where: str) -> str:
    """What each rank says when rank 1 alone has rows that cannot be learned."""
    model = Tiny(3)
    optimizer = LoKO(model, group=group)
    labels = torch.tensor([0, 99 if rank == 1 and where == "labels" else 0])
    if where == "jacobian" and rank == 1:
        optimizer._engine.jacobian = None  # type: ignore[assignment]
    before = [p.detach().clone() for p in model.parameters()]
    try:
        if where == "consensus":
            merged = Consensus(LoKO(model, **MERGED), group, 1)
            merged.step(lambda: (model(X[: 2 if rank == 0 else 3]), labels))
        else:
            optimizer.step(lambda: (model(X[:2]), labels))
    except Exception as error:
        if where != "consensus":  # whose ranks learn each for itself
            assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
        return f"{type(error).__name__}: {error}"
    return "learned"


def refused(group: Any) -> str:
    try:
        LoKO(Tiny(3), covariance="block_diagonal", group=group)
    except ValueError as error:
        return str(error)
    return "built"


def listening(rank: int, group: Any) -> Tensor:
    """θ, P and alarms of a filter whose detector sounds in the second step, and on other ranks than the first never."""

    class Odd(Detector):
        def update(self, value: float) -> bool:
            super().update(value)
            return rank == 0 and len(self.state()) == 2

    model = Tiny(3)
    optimizer = LoKO(model, rank=4, drift_detector="adwin", drift_adaptation=0.5, group=group)
    optimizer._detector = Odd()
    for start in range(0, 24, 6):
        own = slice(start + 3 * rank, start + 3 * rank + 3) if group is not None else slice(start, start + 6)
        optimizer.step(lambda own=own: (model(X[own]), Y[own]))
    state = optimizer.state_dict()["filter"]
    learned = [p.detach().flatten() for p in model.parameters()]
    alarms = torch.tensor([optimizer.diagnostics()[key] for key in ("drifts", "drift_row")], dtype=torch.float64)
    return torch.cat([*learned, covariance_of(optimizer).flatten(), state["detector"], alarms])


FAILURES = ("labels", "jacobian", "consensus")


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=3)
    pair = dist.new_group([0, 1])
    results = {3: [run(rank, 3, dist.group.WORLD, case) for case in CASES]}
    if rank < 2:
        results[2] = [run(rank, 2, pair, case) for case in CASES]
        results["unlike"] = [unlike(rank, pair, case) for case in UNLIKE]
        results["listening"] = listening(rank, pair)
        results["blocks"] = refused(pair)
        results["failing"] = {where: failing(rank, pair, where) for where in FAILURES}
    results["few"] = few_parameters(rank, dist.group.WORLD)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10 * float(want.norm()))


@pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
def test_two_and_three_workers_are_one(tmp_path: Path) -> None:
    multiprocessing.get_context("forkserver").set_forkserver_preload([__name__])  # torch is imported once, not thrice
    torch.multiprocessing.start_processes(worker, (str(tmp_path),), nprocs=3, start_method="forkserver")
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(3)]
    for index, case in enumerate(CASES):
        alone = run(0, 1, None, case)
        for world in (2, 3):
            results = [ranks[rank][world][index] for rank in range(world)]
            for result in results:
                for key in ("theta", "P", "R"):
                    close(result[key], alone[key])
                    assert torch.equal(result[key], results[0][key])
                assert result["counters"]["rows"] == alone["counters"]["rows"] == 24
                assert result["counters"]["steps"] == alone["counters"]["steps"] == 4
                assert result["counters"]["skipped_in_a_row"] == 0
                assert result["counters"]["skipped_rows"] > 0
                for key in ("trace_p", "trace_r", "consistency"):
                    assert result["diagnostics"][key] == pytest.approx(alone["diagnostics"][key], rel=1e-9)
                assert result["diagnostics"]["bytes_sent"] > 0
            for batch, whole in enumerate(alone["predicted"]):
                close(torch.cat([result["predicted"][batch] for result in results]), whole)
        # A state is whole, whatever the world: one worker goes on where three stopped.
        covariances = []
        for state in (ranks[2][3][index]["middle"], alone["middle"]):
            single = LoKO(model_of(case), **case)
            single.load_state_dict(state)
            covariances.append(covariance_of(single))
        close(*covariances)
    for index, case in enumerate(UNLIKE):
        whole = unlike(0, None, case)
        for rank in range(2):
            close(ranks[rank]["unlike"][index], whole)
    for where, kind in zip(FAILURES, ("ValueError", "TypeError", "ValueError"), strict=True):
        own, heard = ranks[1]["failing"][where], ranks[0]["failing"][where]
        assert own.startswith(kind)
        assert heard == f"PeerError: rank 1 of 2 failed, and with it all: {own}"
    heard = listening(0, None)
    assert heard[-2:].tolist() == [1.0, 12.0]
    for rank in range(2):
        close(ranks[rank]["listening"], heard)
    assert all("'block_diagonal' does not go with several workers" in ranks[rank]["blocks"] for rank in range(2))
    want = few_parameters(0, None)
    for results in ranks:
        close(results["few"], want)


@pytest.mark.parametrize("size", [0, 1, 7, 9])
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_slices_cover_everything_once(size: int, world_size: int) -> None:
    bounds = [slice_of(0, size, rank, world_size) for rank in range(world_size)]
    assert [i for start, stop in bounds for i in range(start, stop)] == list(range(size))
    lengths = [stop - start for start, stop in bounds]
    assert max(lengths) - min(lengths) <= 1


def test_one_worker_communicates_nothing() -> None:
    alone, rows = Exact(4, None), torch.randn(2, 4)
    assert alone.own == slice(0, 4)
    assert all(same is rows for same in (alone.gather_rows(rows, [2]), alone.exchange(rows, [2]), alone.reduce(rows)))
    assert alone.gather_columns(rows) is rows
    assert alone.same(rows) is rows
    with alone.together() as share:
        share.rows = 2
    assert share.counts == [2]
    assert (alone.bytes_sent, alone.collectives) == (0, 0)


def consensus_worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found = {every: linear(rank, every) for every in (1, 3)}
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def linear(rank: int | None, every: int) -> dict[str, Tensor]:
    """Regression on one-hot rows, whose information is diagonal; rank None learns both ranks' rows."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Linear(4, 1, bias=False, dtype=torch.float64)
    nn.init.zeros_(model.weight)
    optimizer = LoKO(model, noise="fixed", observation="gaussian", **MERGED)
    learner = optimizer if rank is None else Consensus(optimizer, dist.group.WORLD, every)
    for step in range(7):
        x = nn.functional.one_hot(torch.randint(0, 4, (6,), generator=generator), 4).double()
        y = torch.randn(6, 1, generator=generator, dtype=torch.float64)
        # The second rank has no row at all in one step.
        if step == 2:
            own = slice(0, 0) if rank == 1 else slice(0, 6)
        else:
            own = slice(0, 6) if rank is None else slice(rank * 3, rank * 3 + 3)
        learner.step(lambda x=x[own], y=y[own]: (model(x), y))
    learner.state_dict()
    return {"theta": model.weight.detach().clone(), "P": optimizer.covariance.marginal()}


@pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
def test_consensus_is_exact_where_the_information_is_diagonal(tmp_path: Path) -> None:
    torch.multiprocessing.start_processes(consensus_worker, (str(tmp_path),), nprocs=2, start_method="forkserver")
    alone = linear(None, 1)
    for rank in range(2):
        for found in torch.load(tmp_path / f"{rank}.pt").values():
            close(found["theta"], alone["theta"])
            close(found["P"], alone["P"])


def test_consensus_refuses_what_it_cannot_merge() -> None:
    for settings, every, message in (
        ({**MERGED, "covariance": "low_rank", "rank": 4}, 2, "merges diagonal covariances only"),
        (MERGED, 0, "sync_every = 0"),
        ({**MERGED, "initial_covariance": "auto"}, 2, "does not go with initial_covariance"),
        ({**MERGED, "scale_adaptation": 0.2}, 2, "does not go with scale_adaptation"),
        ({**MERGED, "drift_adaptation": 0.2}, 2, "does not go with drift_adaptation"),
        ({**MERGED, "drift_detector": "adwin"}, 2, "does not go with drift_detector"),
        ({**MERGED, "prediction": "expected"}, 2, "does not go with prediction"),
    ):
        with pytest.raises(ValueError, match=message):
            Consensus(LoKO(nn.Linear(2, 2), **settings), None, every)  # type: ignore[arg-type]
