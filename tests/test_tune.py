"""A search from its file to its results, as a user runs it: whole, again, killed, and with a config that changed."""

import json
import shutil
import subprocess
import zlib
from collections import Counter
from pathlib import Path

import jobs
import numpy as np
import optuna
import pandas as pd
import peft
import pytest
import tiny
import torch
import yaml
from optuna.trial import TrialState
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from loko import online
from loko.config import ConfigError, ExperimentConfig, validate
from loko.tasks.models import load_backbone
from ray_jobs import tune
from ray_jobs.results import chosen
from ray_jobs.settings import SearchConfig, read

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    folder = tmp_path_factory.mktemp("search")
    done = jobs.run("ray_jobs.tune", jobs.search(folder))
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done


def trials_of(folder: Path, config: SearchConfig) -> dict[str, list[optuna.trial.FrozenTrial]]:
    storage = f"sqlite:///{folder / 'results' / 'study.db'}"
    return {
        name: optuna.load_study(study_name=f"{config.name}/{name}", storage=storage).trials
        for name in config.candidates
    }


def check(folder: Path) -> pd.DataFrame:
    """What holds of every finished search, however it came to its end."""
    config = read(SearchConfig, folder / "search.yaml", [])
    rungs = pd.read_parquet(folder / "results" / "results.parquet")
    stream = online.open_stream(config.experiment.stream, config.experiment.task)
    every = config.experiment.report_every
    ids = np.concatenate([batch.row_ids for batch in stream.batches(64)])
    for trial, mine in rungs.groupby("trial"):
        # A row a rung, without a gap, and the digest of a pass that learned each row once and in order.
        reached = list(mine.rows)
        expected = [*range(every, len(ids), every), len(ids)][: len(reached)]
        assert reached == expected, trial
        for rows, digest in zip(mine.rows, mine.rows_digest, strict=True):
            assert digest == f"{zlib.crc32(ids[:rows].tobytes()):08x}", (trial, rows)
        assert (mine.status.iloc[0] == "complete") == (reached[-1] == len(ids))
        assert mine.status.nunique() == mine.candidate.nunique() == mine.params.nunique() == 1
    studies = trials_of(folder, config)
    for name, trials in studies.items():
        mine = rungs[rungs.candidate == name]
        assert mine.trial.nunique() == len(trials) == config.search.trials, name
        ends = {"complete": TrialState.COMPLETE, "stopped": TrialState.PRUNED}
        assert Counter(t.state for t in trials) == Counter(
            ends[status] for status in mine.drop_duplicates("trial").status
        )
        told = sorted(json.dumps(t.params, sort_keys=True) for t in trials)
        kept = sorted(json.dumps(json.loads(p), sort_keys=True) for p in mine.params.drop_duplicates())
        assert told == kept
        last = mine.sort_values("rows").groupby("trial").tail(1)
        np.testing.assert_allclose(sorted(t.value for t in trials), sorted(last.nll), rtol=1e-12)
    return rungs


def test_a_search_leaves_everything_it_found(searched: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, done = searched
    results = folder / "results"
    rungs = check(folder)
    assert {"nll", "accuracy", "window_nll", "label_only_nll", "trace_p", "trace_r", "learn_seconds"} <= set(rungs)
    assert (results / "report.html").stat().st_size > 10_000
    assert (results / "plots" / "online.png").exists()
    assert "is ahead with an online NLL of" in done.stdout
    assert "Traceback" not in done.stderr
    point = {"optimizer.initial_covariance": 0.3, "optimizer.noise_decay": 0.95}
    assert json.dumps(point) in set(rungs.params)


def test_tensorboard_opens_its_events(searched: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, _ = searched
    events = list((folder / "results" / "tune").glob("*/*/events.out.tfevents.*"))
    assert len(events) == 4
    for path in events:
        accumulator = EventAccumulator(str(path.parent))
        accumulator.Reload()
        assert "ray/tune/nll" in accumulator.Tags()["scalars"]


def winner(folder: Path) -> pd.Series:
    """Last rung of the trial that the search takes."""
    config = read(SearchConfig, folder / "search.yaml", [])
    rungs = pd.read_parquet(folder / "results" / "results.parquet")
    taken = [choice for name in config.candidates if (choice := chosen(config, rungs, name)) is not None]
    return min((choice.run.iloc[-1] for choice in taken), key=lambda last: float(last.nll))


def test_the_winner_is_the_best_that_came_to_the_end(searched: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, _ = searched
    results = folder / "results"
    config, best = read(SearchConfig, folder / "search.yaml", []), winner(folder)
    text = (results / "best.yaml").read_text()
    assert text.startswith(f"# The winner of the search tiny: {best.candidate}, nll {float(best.nll)!r}")
    assert "python -m ray_jobs.train" in text
    won = read(ExperimentConfig, results / "best.yaml", [])
    assert won == validate(ExperimentConfig, config.experiment_of(best.candidate, json.loads(best.params)))
    # The loop alone, without Ray, comes to the same.
    run = online.start(won)
    *_, last = online.advance(run)
    assert last["nll"] == pytest.approx(best.nll, abs=1e-12)
    # And what it learned is in the adapter, which plain PEFT loads.
    model = peft.PeftModel.from_pretrained(load_backbone(won.task), str(results / "adapter"))
    batch = run.task.collate(next(run.stream.batches(16)))
    with torch.no_grad():
        # The head of another seed is replaced by the saved one; the frozen body is that of the same seed.
        model.base_model.model.body.load_state_dict(run.task.model.base_model.model.body.state_dict(), strict=False)
        assert set(load_file(results / "adapter" / "adapter_model.safetensors"))
        torch.testing.assert_close(model.eval()(**batch.inputs).logits, run.task.logits(batch))


def test_another_config_on_the_same_folder_is_refused(
    searched: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, _ = searched
    before = (folder / "results" / "results.parquet").stat().st_mtime_ns
    with pytest.raises(ConfigError, match=r"holds the results of another config .*choose another folder"):
        tune.run(read(SearchConfig, folder / "search.yaml", ["search.trials=3"]))
    assert (folder / "results" / "results.parquet").stat().st_mtime_ns == before


def test_bad_rows_are_found_before_any_trial(tmp_path: Path) -> None:
    path = jobs.search(tmp_path)
    plain = yaml.safe_load(path.read_text())
    plain["experiment"]["stream"]["paths"] = str(tmp_path / "nowhere")
    path.write_text(yaml.safe_dump(plain))
    with pytest.raises(ValueError, match="nowhere"):
        tune.run(read(SearchConfig, path, []))
    assert not (tmp_path / "results" / "tune").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "tolerance"), [(1, 1e-6), (2, 1e-5)])
def test_the_winner_runs_again_as_it_is(
    searched: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path, workers: int, tolerance: float
) -> None:
    results = searched[0] / "results"
    best = winner(searched[0])
    given = [f"workers={workers}", "cpus_per_worker=0.5"] if workers > 1 else []
    done = jobs.run("ray_jobs.train", results / "best.yaml", *given, "--results", tmp_path, "--name", "again")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "again" / "report.json").read_text())
    assert report["nll"] == pytest.approx(best.nll, abs=tolerance)
    assert report["rows_digest"] == best.rows_digest


@pytest.mark.slow
def test_the_same_command_again_changes_nothing(searched: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, _ = searched
    before = pd.read_parquet(folder / "results" / "results.parquet")
    again = jobs.run("ray_jobs.tune", folder / "search.yaml")
    assert again.returncode == 0, again.stdout + again.stderr
    pd.testing.assert_frame_equal(check(folder), before)


def progressed(results: Path, candidate: str, checkpoints: int) -> bool:
    """Whether a trial of a candidate has written that many checkpoints; only the last ones are kept."""
    written = (results / "tune" / candidate).glob("*/checkpoint_*/checkpoint.json")
    return any(int(path.parent.name.removeprefix("checkpoint_")) + 1 >= checkpoints for path in written)


@pytest.mark.slow
@pytest.mark.parametrize(("first", "second"), [(1, 2), (6, 12)], ids=["early", "late"])
def test_a_search_that_is_killed_goes_on_where_it_stopped(tmp_path: Path, first: int, second: int) -> None:
    """SIGKILL of driver, Ray and workers at one stroke, in the first candidate and again in the second."""
    path = jobs.search(tmp_path, rows=600, search={"trials": 3, "asha": None})
    results = tmp_path / "results"
    for candidate, checkpoints in (("loko", first), ("adamw", second)):
        log = tmp_path / f"{candidate}.log"
        jobs.run_and_kill(
            "ray_jobs.tune", path, when=lambda c=candidate, n=checkpoints: progressed(results, c, n), log=log
        )
        assert not (results / "results.parquet").exists()
        if first > 1 and candidate == "loko":  # and what Tune would go on from was removed before it wrote down so
            for path_of_one in (results / "tune" / candidate).glob("*/checkpoint_*"):
                shutil.rmtree(path_of_one)
    done = jobs.run("ray_jobs.tune", path)
    assert done.returncode == 0, done.stdout + done.stderr
    rungs = check(tmp_path)
    # Undisturbed, by the loop alone, each trial gives the same figures.
    config = read(SearchConfig, path, [])
    for _, mine in rungs.groupby("trial"):
        plain = config.experiment_of(mine.candidate.iloc[0], json.loads(mine.params.iloc[0]))
        alone = list(online.advance(online.start(validate(ExperimentConfig, plain))))
        tiny.assert_same(list(mine.nll), [report["nll"] for report in alone])
