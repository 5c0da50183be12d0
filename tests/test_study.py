"""A candidate's study without Ray: what it gives, what it remembers, what it costs, wherever it is kept."""

import math
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState
from test_settings import search

from loko.config import ConfigError, validate
from ray_jobs import storage as storage_module
from ray_jobs import study as module
from ray_jobs.settings import SearchConfig
from ray_jobs.storage import StorageError, study_storage
from ray_jobs.study import Study

SPACE = {"optimizer.initial_covariance": {"log_uniform": [0.01, 10.0]}, "optimizer.rank": {"integer": [1, 8]}}
POINT = {"optimizer.initial_covariance": 1.0, "optimizer.rank": 4}
ABOUT = {"stream": "abc", "metrics": ["nll"]}


def config(candidate: dict[str, Any] | None = None, **settings: Any) -> SearchConfig:
    one = {"optimizer": {"name": "loko"}, "space": SPACE, "points": [POINT], **(candidate or {})}
    return validate(SearchConfig, search(candidates={"one": one}, search={"asha": None, **settings}))


def rung(rows: int, nll: float, finished: bool = False, **more: Any) -> dict[str, Any]:
    return {"rows": rows, "nll": nll, "finished": finished, **more}


@pytest.fixture(scope="module")
def postgresql(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server of its own on loopback, in a temporary folder."""
    programs = {name: shutil.which(name) for name in ("initdb", "pg_ctl")}
    pytest.importorskip("psycopg", reason="the package psycopg is not installed")
    if not all(programs.values()):
        pytest.skip("PostgreSQL's initdb and pg_ctl are not here")
    folder = tmp_path_factory.mktemp("postgresql")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    user: dict[str, Any] = {}
    if os.getuid() == 0:  # PostgreSQL refuses to run as root
        user = {"user": "nobody", "group": "nogroup", "extra_groups": []}
        for path in (folder, *folder.parents[:2]):
            path.chmod(0o755)
        shutil.chown(folder, "nobody", "nogroup")
    options = f"-p {port} -k '' -c listen_addresses=127.0.0.1 -c fsync=off"
    data, log = folder / "data", folder / "log"
    common: dict[str, Any] = {"check": True, "stdout": subprocess.DEVNULL, "cwd": folder, **user}
    subprocess.run([programs["initdb"], "-D", data, "-A", "trust", "-U", "loko"], **common)
    subprocess.run([programs["pg_ctl"], "-D", data, "-l", log, "-w", "-o", options, "start"], **common)
    try:
        yield f"postgresql://loko@127.0.0.1:{port}/postgres"
    finally:
        subprocess.run([programs["pg_ctl"], "-D", data, "-m", "immediate", "stop"], **common)


@pytest.fixture(params=["sqlite", "journal", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "postgresql":
        return str(request.getfixturevalue("postgresql"))
    return f"sqlite:///{tmp_path / 'study.db'}" if request.param == "sqlite" else f"journal:{tmp_path / 'study.log'}"


def test_a_search_is_remembered_wherever_it_is_kept(url: str, request: pytest.FixtureRequest) -> None:
    settings = validate(SearchConfig, config(storage=url).model_dump() | {"name": f"s{abs(hash(request.node.name))}"})
    first = Study(settings, "one", study_storage(url), "me", ABOUT)
    assert first.ask("a") == POINT
    values = {key: first.ask(key) for key in "bc"}
    assert first.running == 3
    first.report("a", rung(8, 0.9))
    first.tell("a", rung(16, 0.7, finished=True))
    first.tell("b", rung(8, 1.5))
    first.report("c", rung(8, 0.8))
    kept = first.keep()

    again = Study(settings, "one", study_storage(url), "me", ABOUT)
    again.restore(kept)
    assert again.running == 1
    assert again.ask("c") == values["c"]
    assert again.curves() == {0: {8: (0.9,), 16: (0.7,)}, 1: {8: (1.5,)}, 2: {8: (0.8,)}}
    assert (again.spent().trials, again.spent().rows) == (3, 32)
    again.tell("c", rung(16, math.nan, finished=True))
    states = [(t.state, t.value) for t in again.study.trials]
    assert states == [(TrialState.COMPLETE, 0.7), (TrialState.PRUNED, 1.5), (TrialState.FAIL, None)]


@pytest.fixture
def storage() -> optuna.storages.BaseStorage:
    return optuna.storages.InMemoryStorage()


def test_the_same_seed_gives_the_same_trials() -> None:
    def values(seed: int) -> list[dict[str, Any]]:
        mine = Study(config(seed=seed), "one", optuna.storages.InMemoryStorage())
        asked = []
        for key in map(str, range(8)):
            asked.append(mine.ask(key))
            mine.tell(key, rung(16, asked[-1]["optimizer.initial_covariance"], finished=True))
        return asked

    assert values(3) == values(3)
    assert values(4) != values(3)


def test_trials_that_the_caller_forgot_are_run_once(storage: optuna.storages.BaseStorage) -> None:
    """As after a kill: the study is ahead of what the caller kept."""
    first = Study(config(), "one", storage)
    values = [first.ask(key) for key in "abc"]
    kept = first.keep()
    values += [first.ask(key) for key in "de"]
    first.tell("c", rung(16, 0.5, finished=True))
    first.report("d", rung(8, 0.9))
    first.tell("d", rung(8, 0.9))  # stopped at row 8
    after = Study(config(), "one", storage)
    after.restore(kept)
    assert [after.ask(key) for key in "abc"] == values[:3]
    assert [after.ask(key) for key in "xy"] == values[3:]
    assert not after.was_stopped("x", 4)
    assert after.was_stopped("x", 8)
    assert not after.was_stopped("y", 80)
    after.report("c", rung(8, 0.6))
    after.tell("c", rung(16, 0.5, finished=True))  # again: changes nothing
    assert after.ask("new") not in values
    assert len(after.study.trials) == 6


def test_a_failed_trial_that_runs_again_is_a_new_one(storage: optuna.storages.BaseStorage) -> None:
    mine = Study(config(), "one", storage)
    values = mine.ask("a")
    mine.tell("a", rung(8, 0.9), failed=True)
    after = Study(config(), "one", storage)
    after.restore(mine.keep())
    after.report("a", rung(16, 0.8))
    after.tell("a", rung(24, 0.7, finished=True))
    assert [(t.state, t.params) for t in after.study.trials] == [
        (TrialState.FAIL, values),
        (TrialState.COMPLETE, values),
    ]


def test_searches_that_share_a_study_leave_each_other_alone(storage: optuna.storages.BaseStorage) -> None:
    shared = config(storage="postgresql://host/db", budget={"rows": 20})
    one, other = (Study(shared, "one", storage, owner) for owner in ("one", "other"))
    assert one.ask("a") == POINT
    assert other.ask("a") != POINT  # a given point is tried once
    other.tell("a", rung(24, 0.1, finished=True))
    assert (one.exhausted(), other.exhausted()) == (False, True)
    assert (one.has_complete(), other.has_complete()) == (False, True)
    assert one.spent().trials == other.spent().trials == 1
    assert len({trial.number for trial in one.study.trials}) == 2


def test_a_study_about_something_else_is_refused(storage: optuna.storages.BaseStorage) -> None:
    Study(config(), "one", storage, about=ABOUT)
    with pytest.raises(ConfigError, match=r"a study tiny/one about another search \(differs: stream\).*another name"):
        Study(config(), "one", storage, about={**ABOUT, "stream": "other"})
    two = config(metrics=["nll", "seconds_per_row"])
    with pytest.raises(ConfigError, match=r"differs: metrics"):
        Study(two, "one", storage, about={**ABOUT, "metrics": two.search.objectives})


@pytest.mark.parametrize("sampler", ["tpe", "nsga2"])
def test_several_metrics(storage: optuna.storages.BaseStorage, sampler: str) -> None:
    mine = Study(config(metrics=["nll", "seconds_per_row"], sampler=sampler), "one", storage)
    for number, key in enumerate("abcdefgh"):
        rank = mine.ask(key)["optimizer.rank"]
        mine.report(key, rung(8, 1 / rank, seconds_per_row=float(rank)))
        mine.tell(key, rung(16, 1 / rank, finished=number != 3, seconds_per_row=float(rank)))
    states = [t.state for t in mine.study.trials]
    assert states == [TrialState.PRUNED if n == 3 else TrialState.COMPLETE for n in range(8)]
    best = {trial.params["optimizer.rank"] for trial in mine.study.best_trials}
    assert best == {t.params["optimizer.rank"] for t in mine.study.trials if t.state == TrialState.COMPLETE}
    assert mine.curves()[0] == {8: (0.25, 4.0), 16: (0.25, 4.0)}


def test_a_budget_counts_over_restarts(storage: optuna.storages.BaseStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    limited = config(budget={"hours": 1, "rows": 1000})
    first = Study(limited, "one", storage)
    now[0] += 1e6  # other candidates were searched meanwhile
    first.start_clock()
    first.ask("a")
    now[0] += 1800
    first.report("a", rung(999, 0.5))
    now[0] += 7200  # the process is gone
    again = Study(limited, "one", storage)
    again.restore(first.keep())
    again.start_clock()
    assert again.seconds == 1800
    assert not again.exhausted()
    now[0] += 1799
    assert not again.exhausted()
    now[0] += 1
    assert again.exhausted()
    again.report("a", rung(1000, 0.5))
    assert Study(config(budget={"rows": 1000}), "one", storage).exhausted()


def test_there_is_always_enough_for_one_trial(storage: optuna.storages.BaseStorage) -> None:
    study = Study(config(budget={"hours": 1e-9}), "one", storage)
    study.start_clock()
    assert not study.exhausted()
    study.ask("a")
    assert study.exhausted()


def test_a_driver_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(StorageError, match=r"needs the package psycopg: pip install \"loko\[postgresql\]\""):
        study_storage("postgresql://host/db")
