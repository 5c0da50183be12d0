"""Storage that fails: the newest whole checkpoint is found, a disk or database that is away is waited for."""

import json
import sqlite3
from pathlib import Path

import optuna
import pytest
import ray.train
import torch
from optuna.exceptions import StorageInternalError
from optuna.trial import TrialState
from sqlalchemy.exc import OperationalError

from loko import checkpoint
from ray_jobs import storage
from ray_jobs.storage import (
    StorageError,
    before,
    mend,
    newest_whole,
    of_run,
    patiently,
    stand_in,
    study_storage,
    wait_for_room,
)
from tests.test_checkpoint import BELONGS, FILES, STATE, model

SNAPSHOT = "checkpoint_manager_snapshot.json"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder with three checkpoints, and things that are none."""
    for number in range(3):
        folder = tmp_path / f"checkpoint_00000{number}"
        folder.mkdir()
        checkpoint.save(folder, model(seed=number), {**STATE, "cursor": number}, BELONGS)
    (tmp_path / "other").mkdir()
    (tmp_path / "checkpoint_file").write_text("")
    return tmp_path


def names(candidates: list[ray.train.Checkpoint]) -> list[str]:
    return [Path(one.path).name for one in candidates]


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Pauses take no time; the clock goes on by what they would have taken."""
    now: list[float] = [0.0]
    pauses: list[float] = []

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        now[0] += seconds

    monkeypatch.setattr(storage.time, "sleep", sleep)
    monkeypatch.setattr(storage.time, "monotonic", lambda: now[0])
    return pauses


def test_a_checkpoint_that_is_gone_is_not_whole(run: Path) -> None:
    """Tune may go on from a name of nothing; the trial then takes the checkpoint before it, or starts again."""
    there, gone = (ray.train.Checkpoint(str(run / f"checkpoint_00000{n}")) for n in (2, 5))
    stand_in([there, gone])
    assert names([newest_whole(before(gone))]) == ["checkpoint_000002"]  # type: ignore[list-item]
    first = ray.train.Checkpoint(str(run / "away" / "checkpoint_000000"))
    stand_in([first])
    assert newest_whole(before(first)) is None


def test_checkpoints_are_listed_newest_first(run: Path) -> None:
    assert names(of_run(str(run))) == ["checkpoint_000002", "checkpoint_000001", "checkpoint_000000"]
    middle = ray.train.Checkpoint.from_directory(run / "checkpoint_000001")
    assert names(before(middle)) == ["checkpoint_000001", "checkpoint_000000"]
    assert of_run(str(run / "nowhere")) == []


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", ["changed", "gone"])
def test_a_damaged_newest_falls_back_to_the_one_before(run: Path, name: str, how: str) -> None:
    path = run / "checkpoint_000002" / name
    damage(path) if how == "changed" else path.unlink()
    found = newest_whole(of_run(str(run)))
    assert found is not None
    assert Path(found.path).name == "checkpoint_000001"


def test_with_no_whole_one_a_run_starts_again(run: Path) -> None:
    assert newest_whole([]) is None
    for number in range(3):
        (run / f"checkpoint_00000{number}" / "checkpoint.json").write_text("")
    assert newest_whole(of_run(str(run))) is None


def test_one_of_another_run_is_not_damage(run: Path) -> None:
    found = newest_whole(of_run(str(run)))
    assert found is not None
    with found.as_directory() as folder, pytest.raises(checkpoint.CheckpointError, match="another stream"):
        checkpoint.load(Path(folder), model(), {**BELONGS, "stream": "other"})


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        (json.dumps({"checkpoint_results": [{"checkpoint_dir_name": "/checkpoint_000001"}]}), True),
        (json.dumps({"checkpoint_results": [{"checkpoint_dir_name": "checkpoint_000009"}]}), False),
        ('{"checkpoint_results": [{"chec', False),
        ("", False),
        ("[]", False),
    ],
)
def test_a_list_of_checkpoints_that_cannot_be_used_goes(run: Path, text: str, kept: bool) -> None:
    (run / SNAPSHOT).write_text(text)
    mend(str(run))
    assert (run / SNAPSHOT).exists() == kept
    assert len(of_run(str(run))) == 3


def test_what_passes_is_waited_for(no_waiting: list[float]) -> None:
    tries = iter([OSError("full"), OSError("full"), 7])

    def action() -> int:
        found = next(tries)
        if isinstance(found, OSError):
            raise found
        return found

    assert patiently(action, "writing", (OSError,)) == 7
    assert no_waiting == [0.2, 0.4]


def test_what_does_not_pass_says_what_to_do(no_waiting: list[float]) -> None:
    def action() -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(StorageError, match=r"writing failed for 30 s: .*No space left.*run the same command again"):
        patiently(action, "writing", (OSError,), seconds=30)
    assert sum(no_waiting) <= 30
    assert max(no_waiting) == 5.0


def test_other_errors_are_not_waited_for(no_waiting: list[float]) -> None:
    with pytest.raises(ZeroDivisionError):
        patiently(lambda: 1 / 0, "writing", (OSError,))
    assert no_waiting == []


def test_room_is_asked_for_and_given_back(tmp_path: Path, no_waiting: list[float]) -> None:
    wait_for_room(str(tmp_path / "new"), 1000)
    assert list((tmp_path / "new").iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="writing 10 bytes"):
        wait_for_room(str(tmp_path / "file"), 10)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_checkpoint_on_a_full_disk_is_an_os_error(tmp_path: Path) -> None:
    (tmp_path / "state.pt").symlink_to("/dev/full")
    big = {"x": torch.zeros(1 << 20)}
    with pytest.raises(OSError, match=r"cannot be written|No space left"):
        checkpoint.save(tmp_path, model(), big, BELONGS)
    with pytest.raises(checkpoint.DamagedCheckpointError):
        checkpoint.verify(tmp_path)


def test_a_locked_study_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call that meets the lock comes through once it is gone, once."""
    path = tmp_path / "study.db"
    study = optuna.create_study(storage=study_storage(f"sqlite:///{path}?timeout=0"), study_name="one")
    other = sqlite3.connect(path, isolation_level=None)
    waited: list[float] = []

    def release(seconds: float) -> None:
        waited.append(seconds)
        other.execute("ROLLBACK")

    monkeypatch.setattr(storage.time, "sleep", release)

    def locked() -> None:
        other.execute("BEGIN EXCLUSIVE")

    locked()
    trial = study.ask({"x": optuna.distributions.FloatDistribution(0, 1)})
    locked()
    trial.report(0.5, 1)
    locked()
    study.tell(trial, 0.25)
    assert len(waited) == 3
    (found,) = optuna.load_study(storage=f"sqlite:///{path}", study_name="one").trials
    assert (found.state, found.value, found.intermediate_values) == (TrialState.COMPLETE, 0.25, {1: 0.5})
    assert list(found.params) == ["x"]


def test_a_study_that_stays_away_says_so(tmp_path: Path, no_waiting: list[float]) -> None:
    with pytest.raises(StorageError, match=r"opening the study's storage .*mend the storage") as raised:
        study_storage(f"sqlite:///{tmp_path / 'nowhere' / 'study.db'}")
    assert isinstance(raised.value.__cause__, StorageInternalError | OperationalError)
