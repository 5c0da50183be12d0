"""The host of packed trials, driven as trials drive it, in one process and without Ray."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
import ray.train
import tiny

from loko import NonFiniteError, online
from loko.config import ExperimentConfig, validate
from loko.packing import Pack
from ray_jobs.pack_host import Host
from ray_jobs.settings import with_values

VALUES: list[dict[str, Any]] = [{"optimizer.initial_covariance": p0} for p0 in (0.1, 0.3, 1.0)]
ROWS = 40


@pytest.fixture
def plain(tmp_path: Path) -> dict[str, Any]:
    return tiny.experiment(tiny.shards(tmp_path / "rows", ROWS))


@pytest.fixture
def packs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(row, number of runs) of every pack that learned a rung."""
    seen: list[tuple[int, int]] = []
    advance = Pack.advance

    def noted(self: Pack, runs: Any) -> Any:
        seen.append((runs[0].cursor, len(runs)))
        return advance(self, runs)

    monkeypatch.setattr(Pack, "advance", noted)
    return seen


def alone(plain: dict[str, Any], values: dict[str, Any]) -> list[online.Report]:
    return list(online.advance(online.start(validate(ExperimentConfig, with_values(plain, values)))))


async def trial(host: Host, name: str, plain: dict[str, Any], values: dict[str, Any], **how: Any) -> list[Any]:
    """A trial as its Tune function runs it; ``until`` is the row that the scheduler stops it at."""
    assert await host.join(name, plain, values, how.get("checkpoint"))
    rungs = []
    try:
        while True:
            rungs.append(await host.rung(name, not rungs))
            report = rungs[-1][0]
            if report["finished"] or report["rows"] >= how.get("until", ROWS):
                return rungs
    finally:
        await host.leave(name)


def same(rungs: list[Any], expected: list[online.Report]) -> None:
    assert [report["rows"] for report, _ in rungs] == [report["rows"] for report in expected]
    for (report, _), other in zip(rungs, expected, strict=True):
        assert report["nll"] == pytest.approx(other["nll"], abs=1e-5)
        assert report["rows_digest"] == other["rows_digest"]


def test_trials_learn_together_and_a_stopped_one_leaves_the_others(
    plain: dict[str, Any], packs: list[tuple[int, int]], tmp_path: Path
) -> None:
    async def search() -> list[list[Any]]:
        host = Host(plain, 3, str(tmp_path))
        untils = (ROWS, 16, ROWS)
        return await asyncio.gather(
            *(trial(host, f"t{i}", plain, values, until=untils[i]) for i, values in enumerate(VALUES))
        )

    first, stopped, last = asyncio.run(search())
    same(first, alone(plain, VALUES[0]))
    same(stopped, alone(plain, VALUES[1])[:2])
    same(last, alone(plain, VALUES[2]))
    assert packs == [(0, 3), (8, 3), (16, 2), (24, 2), (32, 2)]


def test_a_late_trial_catches_up(plain: dict[str, Any], packs: list[tuple[int, int]], tmp_path: Path) -> None:
    async def search() -> list[list[Any]]:
        host = Host(plain, 2, str(tmp_path), patience=0.01)
        assert await host.join("early", plain, VALUES[0], None)
        early = [await host.rung("early", False), await host.rung("early", False)]
        late = asyncio.create_task(trial(host, "late", plain, VALUES[1]))
        while len(packs) < 3:
            await asyncio.sleep(0)
        while not early[-1][0]["finished"]:
            early.append(await host.rung("early", False))
        await host.leave("early")
        return [early, await late]

    early, late = asyncio.run(search())
    same(early, alone(plain, VALUES[0]))
    same(late, alone(plain, VALUES[1]))
    assert packs[:2] == [(0, 1), (8, 1)]
    assert packs[-1] == (32, 2)


def test_a_trial_that_fails_fails_alone(plain: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from loko.optimizer import LoKO

    assimilate = LoKO.assimilate

    def failing(self: LoKO, *args: Any) -> Any:
        if self.param_groups[0]["initial_covariance"] == 0.3 and self._counters.rows >= 12:
            raise NonFiniteError("it has diverged")
        return assimilate(self, *args)

    monkeypatch.setattr(LoKO, "assimilate", failing)

    async def search() -> list[Any]:
        host = Host(plain, 3, str(tmp_path))
        runs = (trial(host, f"t{i}", plain, values) for i, values in enumerate(VALUES))
        return await asyncio.gather(*runs, return_exceptions=True)

    async def patient() -> list[Any]:
        return await asyncio.wait_for(search(), 60)

    first, failed, last = asyncio.run(patient())
    assert isinstance(failed, NonFiniteError)
    same(first, alone(plain, VALUES[0]))
    same(last, alone(plain, VALUES[2]))


def test_a_trial_goes_on_from_its_checkpoint_in_another_host(plain: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "trial" / "checkpoint_000000"
    folder.mkdir(parents=True)

    async def search() -> tuple[list[Any], list[Any], list[Any]]:
        before = await trial(Host(plain, 1, str(tmp_path)), "t0", plain, VALUES[0], until=16)
        for name, content in before[-1][1].items():
            (folder / name).write_bytes(content)
        checkpoint = ray.train.Checkpoint.from_directory(folder)
        host = Host(plain, 2, str(tmp_path))
        resumed, fresh = await asyncio.gather(
            trial(host, "t0", plain, VALUES[0], checkpoint=checkpoint), trial(host, "t1", plain, VALUES[1])
        )
        return before, resumed, fresh

    before, resumed, fresh = asyncio.run(search())
    expected = alone(plain, VALUES[0])
    same(before, expected[:2])
    same(resumed, expected[1:])  # the rung it stands at is reported again
    same(fresh, alone(plain, VALUES[1]))


def test_a_full_host_takes_nobody(plain: dict[str, Any], tmp_path: Path) -> None:
    async def search() -> None:
        host = Host(plain, 1, str(tmp_path))
        assert await host.join("one", plain, VALUES[0], None)
        assert not await host.join("other", plain, VALUES[1], None)
        await host.leave("one")
        assert await host.join("other", plain, VALUES[1], None)
        assert await host.load() == 1
        with pytest.raises(RuntimeError, match="trial one is not known here"):
            await host.rung("one", False)

    asyncio.run(search())
