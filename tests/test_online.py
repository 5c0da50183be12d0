"""The prequential loop: rows predicted before they are learned, learned once; a run goes on as if never cut."""

import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
import torch

from loko import online
from loko.checkpoint import CheckpointError
from loko.config import ExperimentConfig
from loko.stream import StreamError, write_shards
from loko.tasks import build

ROWS = 42  # the last batch is short, and so is the last rung
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "diagonal": {"name": "loko", "covariance": "diagonal", "noise": "ema_residual", "linearization": 0.0},
    "low_rank": {"name": "loko", "covariance": "low_rank", "rank": 3, "forgetting": 0.99, "process_noise": 1e-4},
    "adamw": {"name": "adamw", "lr": 0.01, "head_lr_ratio": 2.0},
    "adagrad": {"name": "adagrad", "lr": 0.1},
    "muon": {"name": "muon", "lr": 0.01},
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.shards(tmp_path_factory.mktemp("rows"), ROWS)


@pytest.fixture(scope="module")
def other_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.shards(tmp_path_factory.mktemp("other"), 20, seed=1)


def saved(run: online.Run, folder: Path) -> Path:
    folder.mkdir(parents=True)
    online.save(run, folder)
    return folder


def timeless(report: online.Report) -> online.Report:
    return {key: value for key, value in report.items() if key not in ("learn_seconds", "seconds_per_row")}


def parameters(run: online.Run) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in run.task.model.named_parameters()}


def finish(config: ExperimentConfig) -> tuple[online.Run, list[online.Report]]:
    run = online.start(config)
    return run, [timeless(report) for report in online.advance(run)]


def state(run: online.Run) -> dict[str, Any]:
    return {
        "parameters": parameters(run),
        "learner": run.learner.state_dict(),
        "metrics": run.metrics.state_dict(),
        "cursor": run.cursor,
        "digest": run.digest,
        "random": torch.get_rng_state(),
    }


def digest(ids: Any) -> str:
    return f"{zlib.crc32(np.asarray(ids, np.int64).tobytes()):08x}"


# ---- a run that goes on


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_going_on_from_any_rung_changes_nothing(rows: Path, tmp_path: Path, name: str) -> None:
    config = tiny.config(rows, optimizer=OPTIMIZERS[name], heldout={"paths": str(rows), "stop": 9})
    run = online.start(config)
    reports, folders = [], []
    for number, report in enumerate(online.advance(run)):
        reports.append(timeless(report))
        folders.append(saved(run, tmp_path / str(number)))
    end = state(run)
    assert [report["rows"] for report in reports] == [8, 16, 24, 32, 40, 42]
    assert [report["finished"] for report in reports] == [False] * 5 + [True]
    for number, folder in enumerate(folders):
        again = online.start(config)
        online.resume(again, folder)
        assert again.resumed_from == reports[number]["rows"]
        later = [timeless(report) for report in online.advance(again)]
        # From the end on there is nothing to learn: the last report comes again.
        expected = reports[number + 1 :] or reports[-1:]
        tiny.assert_same(later, expected)
        tiny.assert_same(state(again), end)


def test_many_cuts_change_nothing(rows: Path, tmp_path: Path) -> None:
    config = tiny.config(rows)
    whole, reports = finish(config)
    folder, seen = None, []
    for number in range(len(reports)):
        run = online.start(config)
        if folder is not None:
            online.resume(run, folder)
        seen.append(timeless(next(online.advance(run))))
        folder = saved(run, tmp_path / str(number))
    tiny.assert_same(seen, reports)
    tiny.assert_same(state(run), state(whole))


def test_time_goes_on_too(rows: Path, tmp_path: Path) -> None:
    config = tiny.config(rows)
    run = online.start(config)
    first = next(online.advance(run))
    folder = saved(run, tmp_path / "rung")
    again = online.start(config)
    online.resume(again, folder)
    assert next(online.advance(again))["learn_seconds"] > first["learn_seconds"] > 0


# ---- prequential truth


@pytest.mark.parametrize("name", ["low_rank", "adamw"])
def test_each_row_is_scored_by_what_was_learned_before_it(rows: Path, name: str) -> None:
    """Brute force: for each batch a run of its own that has never been shown that batch or a later one."""
    optimizer = {**OPTIMIZERS[name], **({"prediction": "plug_in"} if name == "low_rank" else {})}
    config = tiny.config(rows, optimizer=optimizer, report_every=4)
    _, reports = finish(config)
    before = 0.0
    for report in reports:
        stop = report["rows"]
        start = (stop - 1) // 4 * 4
        fresh = online.start(tiny.config(rows, optimizer=optimizer, report_every=4))
        if start:
            short = {"paths": str(rows), "stop": start}
            fresh, _ = finish(tiny.config(rows, optimizer=optimizer, report_every=4, stream=short))
        whole = online.open_stream(config.stream, config.task)
        batch = fresh.task.collate(next(whole.batches(4, cursor=start)))
        with torch.no_grad():
            outputs = fresh.task.logits(batch).double()
        scored = float(torch.nn.functional.cross_entropy(outputs, batch.labels, reduction="sum"))
        assert report["nll"] * stop - before == pytest.approx(scored, abs=1e-9)
        before = report["nll"] * stop


def test_later_labels_change_no_earlier_score(rows: Path, tmp_path: Path) -> None:
    table = tiny.table(ROWS)
    labels = table["label"].to_numpy().copy()
    labels[24:] = (labels[24:] + 1) % tiny.CLASSES
    write_shards(table.set_column(4, "label", pa.array(labels)), tmp_path)
    _, reports = finish(tiny.config(rows, near_future=0))
    _, changed = finish(tiny.config(tmp_path, near_future=0))
    tiny.assert_same(changed[:3], reports[:3])
    assert changed[3]["nll"] != reports[3]["nll"]


def test_rows_are_learned_once_and_in_order(rows: Path) -> None:
    _, reports = finish(tiny.config(rows))
    assert [report["rows_digest"] for report in reports] == [digest(range(report["rows"])) for report in reports]


def test_the_digest_is_of_the_rows_in_the_order_they_came(rows: Path) -> None:
    config = tiny.config(rows, stream={"paths": str(rows), "shuffle_seed": 3, "start": 2, "stop": 30})
    run, reports = finish(config)
    ids = np.concatenate([batch.row_ids for batch in run.stream.batches(5)])
    assert sorted(ids) == list(range(2, 30))
    assert list(ids) != sorted(ids)
    assert reports[-1]["rows_digest"] == digest(ids)


def test_looking_ahead_changes_nothing_that_is_learned(rows: Path) -> None:
    blind, without = finish(tiny.config(rows, near_future=0))
    ahead, reports = finish(tiny.config(rows, near_future=2))
    tiny.assert_same(parameters(ahead), parameters(blind))
    tiny.assert_same(ahead.learner.state_dict(), blind.learner.state_dict())
    assert "near_future_nll" in reports[0]
    for report in reports:
        near = {key for key in report if key.startswith("near_future")}
        tiny.assert_same({k: v for k, v in report.items() if k not in near}, without[reports.index(report)])


def test_looking_ahead_is_by_steps_of_the_batch(rows: Path) -> None:
    config = tiny.config(rows, near_future=2, stream={"paths": str(rows), "stop": 20})
    run = online.start(config)
    report = next(online.advance(run))
    ahead = run.task.collate(next(run.stream.batches(4, cursor=8 + 2 * 4)))
    with torch.no_grad():
        outputs = run.task.logits(ahead).double()
    expected = float(torch.nn.functional.cross_entropy(outputs, ahead.labels))
    assert report["near_future_nll"] == pytest.approx(expected, abs=1e-9)


def test_heldout_rows_are_scored_and_never_learned(rows: Path, other_rows: Path) -> None:
    plain, without = finish(tiny.config(rows))
    run, reports = finish(tiny.config(rows, heldout={"paths": str(other_rows)}))
    tiny.assert_same(parameters(run), parameters(plain))
    tiny.assert_same(run.learner.state_dict(), plain.learner.state_dict())
    tiny.assert_same(reports[:-1], without[:-1])
    tiny.assert_same({k: v for k, v in reports[-1].items() if not k.startswith("heldout")}, without[-1])
    assert run.heldout is not None
    batch = run.task.collate(next(run.heldout.batches(20)))
    with torch.no_grad():
        outputs = run.task.logits(batch).double()
    expected = float(torch.nn.functional.cross_entropy(outputs, batch.labels))
    assert reports[-1]["heldout_nll"] == pytest.approx(expected, abs=1e-9)
    assert reports[-1]["heldout_rows"] == 20


def test_streams_that_follow_each_other(rows: Path, other_rows: Path) -> None:
    follows = {"paths": str(rows), "stop": 10, "then": [{"paths": str(other_rows)}, {"paths": str(rows), "start": 30}]}
    run, reports = finish(tiny.config(rows, stream=follows))
    assert [(point.row, point.kind) for point in run.stream.change_points] == [(10, "domain"), (30, "domain")]
    assert reports[-1]["rows"] == 10 + 20 + 12
    ids = [*range(10), *(ROWS + np.arange(20)), *(ROWS + 20 + np.arange(30, ROWS))]
    assert reports[-1]["rows_digest"] == digest(ids)
    alone, _ = finish(tiny.config(rows, stream={"paths": str(rows), "stop": 10}))
    assert alone.stream.fingerprint != run.stream.fingerprint


def test_the_same_config_gives_the_same_run(rows: Path) -> None:
    first, reports = finish(tiny.config(rows))
    torch.rand(7)  # what happened before a run is no part of it
    second, again = finish(tiny.config(rows))
    tiny.assert_same(again, reports)
    tiny.assert_same(state(second), state(first))


def test_learning_helps(rows: Path) -> None:
    for name in OPTIMIZERS:
        _, reports = finish(tiny.config(rows, optimizer=OPTIMIZERS[name]))
        assert reports[-1]["window_nll"] < reports[0]["nll"], name


# ---- what cannot be run


def test_a_row_that_is_no_number_is_found_before_training(tmp_path: Path) -> None:
    table = tiny.table(20)
    values = table["b"].to_numpy().copy()
    values[13] = np.nan
    write_shards(table.set_column(1, "b", pa.array(values)), tmp_path)
    with pytest.raises(StreamError, match=r"part-00000\.arrow.*'?b'?.*13"):
        online.start(tiny.config(tmp_path))


def test_a_heldout_row_that_is_no_number_is_found_before_training(rows: Path, tmp_path: Path) -> None:
    table = tiny.table(20)
    write_shards(table.set_column(1, "b", pa.array(np.full(20, np.inf, np.float32))), tmp_path)
    with pytest.raises(StreamError, match=r"part-00000\.arrow"):
        online.start(tiny.config(rows, heldout={"paths": str(tmp_path)}))


@pytest.mark.parametrize(
    "kind",
    [
        "parquet",
        "one empty batch",
        "no batch",
    ],
)
def test_an_empty_stream(tmp_path: Path, kind: str) -> None:
    table = tiny.table(4).slice(0, 0)
    if kind == "parquet":
        pq.write_table(table, tmp_path / "part.parquet")
    else:
        with pa.OSFile(str(tmp_path / "part.arrow"), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            if kind == "one empty batch":
                writer.write_batch(tiny.table(4).to_batches()[0].slice(0, 0))
    with pytest.raises(StreamError, match=r"no rows|no such range|empty"):
        online.start(tiny.config(tmp_path))


def test_no_stream_at_all(tmp_path: Path) -> None:
    with pytest.raises(StreamError, match="nowhere"):
        online.start(tiny.config(tmp_path / "nowhere"))


def test_a_range_outside_the_stream(rows: Path) -> None:
    with pytest.raises(StreamError, match=r"start 50, stop 60.*rows 0 to 42"):
        online.start(tiny.config(rows, stream={"paths": str(rows), "start": 50, "stop": 60}))


def test_a_column_that_is_missing(rows: Path) -> None:
    task = tiny.experiment(rows)["task"]
    task["columns"] = {"features": ["a", "z"], "label": "label"}
    with pytest.raises(StreamError, match="z"):
        online.start(tiny.config(rows, task=task))


def test_a_label_outside_the_classes(rows: Path) -> None:
    task = {**tiny.experiment(rows)["task"], "num_labels": 2}
    run = online.start(tiny.config(rows, task=task))
    before = parameters(run)
    with pytest.raises(ValueError, match=r"label 2; a class is an integer from 0 to 1"):
        list(online.advance(run))
    assert run.cursor == 0
    tiny.assert_same(parameters(run), before)


@pytest.mark.parametrize("name", ["low_rank", "adamw"])
def test_a_model_with_nothing_trainable(rows: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def frozen(config: Any) -> Any:
        task = build(config)
        task.model.requires_grad_(False)
        return task

    monkeypatch.setattr(online, "build", frozen)
    with pytest.raises(ValueError, match="no trainable parameter"):
        online.start(tiny.config(rows, optimizer=OPTIMIZERS[name]))


# ---- checkpoints of something else


def refused(run: online.Run, folder: Path, match: str) -> None:
    """Resuming raises, and leaves the run as it was."""
    before = state(run)
    with pytest.raises(CheckpointError, match=match):
        online.resume(run, folder)
    tiny.assert_same(state(run), before)


@pytest.fixture
def rung(rows: Path, tmp_path: Path) -> Path:
    run = online.start(tiny.config(rows))
    next(online.advance(run))
    return saved(run, tmp_path / "rung")


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"stream": {"stop": 40}}, "stream"),
        ({"stream": {"shuffle_seed": 1}}, "stream"),
        ({"optimizer": {"name": "loko", "rank": 4}}, "configuration"),
        ({"optimizer": {"name": "adamw"}}, "configuration"),
        ({"batch_size": 2}, "configuration"),
        ({"window": 13}, "configuration"),
        ({"task": {"hidden_sizes": [9]}}, "configuration"),
        ({"task": {"seed": 1}}, "configuration"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(rows: Path, rung: Path, changes: dict[str, Any], what: str) -> None:
    plain = tiny.experiment(rows)
    merged = {k: {**plain[k], **v} if k in ("stream", "task") else v for k, v in changes.items()}
    refused(online.start(tiny.config(rows, **merged)), rung, f"belongs to another {what} .*start under another name")


def test_other_rows_in_the_same_place_are_refused(rows: Path, rung: Path, tmp_path: Path) -> None:
    """The fingerprint is of shards and their sizes: more rows are another stream, wherever they are."""
    more = tiny.shards(tmp_path / "more", ROWS + 1)
    refused(online.start(tiny.config(more)), rung, "another stream")


def test_the_number_of_workers_and_the_report_interval_are_free(rows: Path, rung: Path) -> None:
    run = online.start(tiny.config(rows, report_every=4, workers=2, threads=1, cpus_per_worker=0.5))
    online.resume(run, rung)
    assert run.cursor == 8


@pytest.mark.parametrize("file", ["parameters.safetensors", "state.pt"])
@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_a_damaged_checkpoint_is_refused(rows: Path, rung: Path, file: str, damage: str) -> None:
    data = bytearray((rung / file).read_bytes())
    data[-40] ^= 4
    if damage == "gone":
        (rung / file).unlink()
    else:
        (rung / file).write_bytes(data if damage == "flip" else data[:-1])
    refused(online.start(tiny.config(rows)), rung, f"damaged: {file}")


def test_a_checkpoint_cut_short_while_it_was_written_is_refused(rows: Path, rung: Path) -> None:
    (rung / "checkpoint.json").unlink()
    refused(online.start(tiny.config(rows)), rung, "not a complete checkpoint")


def test_the_model_of_a_checkpoint(rows: Path, tmp_path: Path) -> None:
    config = tiny.config(rows)
    run, _ = finish(config)
    model = online.trained_model(config, saved(run, tmp_path / "end"))
    tiny.assert_same({name: p.detach() for name, p in model.named_parameters()}, parameters(run))
