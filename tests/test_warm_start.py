"""An earlier search as a start: its trials are added once, what does not fit is said, other rows are not mixed in."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from optuna.storages import BaseStorage, InMemoryStorage
from optuna.trial import TrialState
from test_study import ABOUT, POINT, SPACE, config, rung

from loko.config import ConfigError
from ray_jobs.storage import study_storage
from ray_jobs.study import Study
from ray_jobs.warm_start import warm_start

NARROW = {**SPACE, "optimizer.initial_covariance": {"log_uniform": [0.5, 100.0]}}


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A results folder with four trials: two in the narrow range, one outside it, one failed."""
    folder = tmp_path_factory.mktemp("earlier")
    points = [{**POINT, "optimizer.initial_covariance": p0} for p0 in (1.0, 2.0, 0.1, 3.0)]
    plain = config({"points": points})
    (folder / "search.yaml").write_text(yaml.safe_dump(plain.model_dump(mode="json")))
    study = Study(plain, "one", study_storage(f"sqlite:///{folder / 'study.db'}"), about=ABOUT)
    for key, nll in zip("abcd", (0.5, 0.4, 0.3, float("nan")), strict=True):
        study.ask(key)
        study.report(key, rung(8, nll + 1))
        study.tell(key, rung(16, nll, finished=key != "b"))
    return folder


def begin(
    source: object, about: dict[str, Any] = ABOUT, storage: BaseStorage | None = None, **candidate: Any
) -> tuple[Study, str]:
    plain = config({"space": NARROW, **candidate}, warm_start=str(source))
    study = Study(plain, "one", storage or InMemoryStorage(), about=about)
    return study, str(warm_start(study, plain, "one"))


def test_trials_of_the_same_rows_are_added_once(earlier: Path) -> None:
    storage = InMemoryStorage()
    for _ in range(2):  # started again, it adds nothing
        study, said = begin(earlier, storage=storage)
        outside = "1 left out: optimizer.initial_covariance is outside its present range"
        assert said == f"2 earlier trials of {earlier} added; {outside}"
        known = [t for t in study.study.trials if t.state.is_finished()]
        assert [(t.state, t.params["optimizer.initial_covariance"], t.value) for t in known] == [
            (TrialState.COMPLETE, 1.0, 0.5),
            (TrialState.PRUNED, 2.0, 0.4),
        ]
        assert known[0].intermediate_values == {8: 1.5, 16: 0.5}
    assert study.spent().trials == study.spent().rows == 0  # they cost this search nothing
    assert study.curves() == {}  # and no new trial is stopped by them
    assert study.ask("a") == POINT


def test_the_ranges_are_those_of_today(earlier: Path) -> None:
    study, _ = begin(earlier)
    added = next(t for t in study.study.trials if t.state == TrialState.COMPLETE)
    assert added.distributions == study.space


def test_of_other_rows_the_best_settings_are_tried_first(earlier: Path) -> None:
    study, said = begin(earlier, {**ABOUT, "stream": "another"}, points=[])
    assert "the 1 best settings of" in said
    assert "of other rows" in said
    assert not [t for t in study.study.trials if t.state.is_finished()]
    assert study.ask("a")["optimizer.initial_covariance"] == 1.0


def test_the_sampler_does_not_repeat_the_earlier_search(tmp_path: Path) -> None:
    """Two searches of one seed draw the same values; one that starts from the other has those already."""
    plain = config({"points": []}, sampler="random")
    (tmp_path / "search.yaml").write_text(yaml.safe_dump(plain.model_dump(mode="json")))
    earlier = Study(plain, "one", study_storage(f"sqlite:///{tmp_path / 'study.db'}"), about=ABOUT)
    drawn = [earlier.ask(key) for key in "abc"]
    other = {**ABOUT, "stream": "another"}
    again = config({"points": []}, sampler="random", warm_start=str(tmp_path))
    study = Study(again, "one", InMemoryStorage(), about=other)
    warm_start(study, again, "one")
    assert not [values for values in (study.ask(key) for key in "abc") if values in drawn]


def test_other_keys_are_said(earlier: Path) -> None:
    space = {"optimizer.initial_covariance": SPACE["optimizer.initial_covariance"]}
    _, said = begin(earlier, space=space, points=[])
    assert said == "3 left out: other keys were searched (optimizer.rank)"


def test_a_storage_can_be_named(earlier: Path) -> None:
    for source in (f"sqlite:///{earlier / 'study.db'}", f"sqlite:///{earlier / 'study.db'}#tiny"):
        assert "2 earlier trials" in begin(source)[1]
    with pytest.raises(ConfigError, match=r"no study of candidate 'one' there; it holds tiny/one. Name the search"):
        begin(f"sqlite:///{earlier / 'study.db'}#other")


def test_nothing_to_start_from(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no search \(search.yaml is missing\)"):
        begin(tmp_path / "nowhere")


def test_without_it_nothing_happens() -> None:
    study = Study(config(), "one", InMemoryStorage())
    assert warm_start(study, config(), "one") is None
