"""`ray_jobs.prepare`: every source ends as the same shards, all of them or none."""

import io
import json
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from loko.stream import ArrowStream, StreamError
from ray_jobs import prepare as job
from ray_jobs.prepare import Options, PrepareError, parse_options, prepare

SHARED = Path(__file__).parents[2] / "shared" / "data"
ROWS = [{"sentence": f"sentence {i}", "label": i % 2, "extra": i / 2} for i in range(25)]


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets.disable_progress_bars()


def source(folder: Path, kind: str) -> Path:
    """ROWS as a file of a kind, or a folder."""
    rows, path = datasets.Dataset.from_list(ROWS), folder / f"rows.{kind}"
    if kind == "csv":
        rows.to_csv(path)
    elif kind == "tsv":
        rows.to_csv(path, sep="\t")
    elif kind == "jsonl":
        path.write_text("\n".join(json.dumps(row) for row in ROWS))
    elif kind == "parquet":
        rows.to_parquet(path)
    elif kind == "saved":
        rows.save_to_disk(path)
    else:
        prepare(str(source(folder, "csv")), path, Options())
    return path


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet", "saved", "arrow"])
def test_every_source_gives_the_same_rows(tmp_path: Path, kind: str) -> None:
    given = source(tmp_path, kind)
    for format in ("arrow", "parquet"):
        options = Options(format=format, rows_per_shard=10, row_group_size=4)
        stream = prepare(str(given), tmp_path / "out" / format, options)
        assert len(list((tmp_path / "out" / format).glob(f"part-*.{format}"))) == 3
        (batch,) = stream.batches(25)
        assert batch.texts("sentence") == [row["sentence"] for row in ROWS]
        assert batch.labels("label").tolist() == [row["label"] for row in ROWS]
        np.testing.assert_array_equal(batch.table(["extra"])[:, 0], [row["extra"] for row in ROWS])


def test_columns_rows_and_shuffle(tmp_path: Path) -> None:
    given = str(source(tmp_path, "jsonl"))
    stream = prepare(given, tmp_path / "a", Options(columns={"sentence": "text", "label": "y"}, rows=7, shuffle_seed=1))
    assert (stream.schema.names, len(stream)) == (["text", "y"], 7)
    again = prepare(given, tmp_path / "b", Options(columns=["sentence"], rows=7, shuffle_seed=1, split="train[:100%]"))
    (first,), (second,) = stream.batches(7), again.batches(7)
    assert first.texts("text") == second.texts("sentence") != [row["sentence"] for row in ROWS[:7]]
    assert len(prepare(given, tmp_path / "c", Options(split="train[:5]", rows=9))) == 5


def test_names_of_labels_become_integers(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("text,kind\na,spam\nb,ham\nc,spam\n")
    stream = prepare(str(path), tmp_path / "out", Options(label="kind"))
    (batch,) = stream.batches(3)
    assert batch.labels("kind").tolist() == [1, 0, 1]
    assert stream.schema.field("kind").metadata[b"names"] == b"ham\nspam"


def images(folder: Path, mode: str = "RGB") -> Path:
    rng = np.random.default_rng(0)
    for number in range(6):
        path = folder / ("cat" if number % 2 else "dog") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        shape = (8, 12 + number) if mode == "L" else (8, 12 + number, 3)
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(path)
    return folder


def test_a_folder_of_images_keeps_its_bytes(tmp_path: Path) -> None:
    folder = images(tmp_path / "photos")
    stream = prepare(str(folder), tmp_path / "out", Options())
    stream.require({"image": "image", "label": "label"})
    (batch,) = stream.batches(6)
    assert batch.labels("label").tolist() == [0, 0, 0, 1, 1, 1]
    paths = [folder / "cat" / f"{i}.png" for i in (1, 3, 5)] + [folder / "dog" / f"{i}.png" for i in (0, 2, 4)]
    for image, path in zip(batch.images("image"), paths, strict=True):
        np.testing.assert_array_equal(image, np.asarray(Image.open(path)))


@pytest.mark.parametrize(
    ("mode", "asked", "shape"), [("RGB", None, (5, 5, 3)), ("RGB", "L", (5, 5)), ("L", None, (5, 5))]
)
def test_images_as_raw_pixels(tmp_path: Path, mode: str, asked: str | None, shape: tuple[int, ...]) -> None:
    folder = images(tmp_path / "photos", mode)
    for format in ("arrow", "parquet"):
        stream = prepare(str(folder), tmp_path / format, Options(image_size=5, image_mode=asked, format=format))
        (batch,) = stream.batches(6)
        assert batch.pixels("image").shape == (6, *shape)
        resized = Image.open(folder / "cat" / "1.png").convert(asked or mode).resize((5, 5), Image.Resampling.BICUBIC)
        np.testing.assert_array_equal(batch.pixels("image")[0], np.asarray(resized))


def test_arrays_become_tensors(tmp_path: Path) -> None:
    values = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    features = datasets.Features({"x": datasets.Array2D((3, 4), "uint8")})
    datasets.Dataset.from_dict({"x": values}, features=features).save_to_disk(tmp_path / "saved")
    stream = prepare(str(tmp_path / "saved"), tmp_path / "out", Options())
    (batch,) = stream.batches(2)
    np.testing.assert_array_equal(batch.pixels("x"), values)


def test_nothing_half_is_left_when_it_breaks_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given, out = str(source(tmp_path, "csv")), tmp_path / "out"
    before = set(tmp_path.iterdir())

    def interrupted(*args: object, **kwargs: object) -> None:
        write_shards(*args, **kwargs)
        raise KeyboardInterrupt

    write_shards = job.write_shards
    monkeypatch.setattr(job, "write_shards", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(given, out, Options())
    assert set(tmp_path.iterdir()) == before
    monkeypatch.undo()
    first = prepare(given, out, Options(rows=3)).fingerprint
    (tmp_path / "bad.csv").write_text("label\n1\n\nx\n")
    (tmp_path / "bad.jsonl").write_text('{"label": 1}\n{"label": null}\n')
    with pytest.raises(StreamError, match="row group 0, row 1 of it: null"):
        prepare(str(tmp_path / "bad.jsonl"), out, Options(), overwrite=True)
    assert ArrowStream(out).fingerprint == first


def test_a_destination_in_use_is_only_replaced_when_told_so(tmp_path: Path) -> None:
    given, out = str(source(tmp_path, "csv")), tmp_path / "out"
    out.mkdir()
    prepare(given, out, Options(rows=5))
    with pytest.raises(PrepareError, match="is not empty: choose another folder, or pass --overwrite"):
        prepare(given, out, Options())
    assert len(ArrowStream(out)) == 5
    assert len(prepare(given, out, Options(rows=6), overwrite=True)) == 6
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rowz=3"], "unknown key 'rowz' .value 3.; keys: split, config, columns"),
        (["rows=0"], "rows is 0: .*greater than 0; it is: keep only the first"),
        (["format=orc"], "format is 'orc': .*'arrow' or 'parquet'"),
        (["--rows", "3"], "'--rows': options are written key=value"),
        (["columns=[a"], "cannot be parsed"),
    ],
)
def test_options_are_refused_by_key_value_and_what_is_allowed(arguments: list[str], message: str) -> None:
    with pytest.raises(PrepareError, match=message):
        parse_options(arguments)


def test_options_are_read() -> None:
    options = parse_options(["columns={a: b}", "rows=3", "format=parquet", "split=train[:10]", "image_size=8"])
    assert options == Options(columns={"a": "b"}, rows=3, format="parquet", split="train[:10]", image_size=8)


def test_sources_that_cannot_be_read(tmp_path: Path) -> None:
    given = str(source(tmp_path, "csv"))
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("a")
    (tmp_path / "empty.jsonl").write_text("")
    for path, options, message in (
        (given, {"columns": ["nope"]}, "columns: 'nope' is not there; columns are: sentence, label, extra"),
        (given, {"label": "nope"}, "label: 'nope' is not there"),
        (given, {"split": "test"}, "cannot be read with split=test"),
        (str(tmp_path / "text"), {}, "one kind of file is needed, found .txt"),
        (str(tmp_path / "nope.csv"), {}, "no such file or folder, so it was looked up on the hub"),
    ):
        with pytest.raises(PrepareError, match=message):
            prepare(path, tmp_path / "out", Options(**options))
    assert not (tmp_path / "out").exists()


def test_the_command_line(tmp_path: Path) -> None:
    run = CliRunner()
    given, out = str(source(tmp_path, "csv")), tmp_path / "out"
    text = run.invoke(job.app, ["--help"]).output
    assert all(key in text for key in Options.model_fields)
    done = run.invoke(job.app, [given, str(out), "rows=9", "rows_per_shard=4"])
    assert done.exit_code == 0, done.output
    for part in ("rows", "9", "shards", "3", "column sentence", "0: 5, 1: 4"):
        assert part in done.output
    refused = run.invoke(job.app, [given, str(out)])
    assert (refused.exit_code, "--overwrite" in refused.output + refused.stderr) == (2, True)
    assert run.invoke(job.app, [given, str(out), "--overwrite"]).exit_code == 0
    assert len(ArrowStream(out)) == 25


@pytest.mark.parametrize("name", ["sst2_validation.parquet", "cifar10_test_2k.parquet"])
def test_real_rows(tmp_path: Path, name: str) -> None:
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"{name} is not here")
    stream = prepare(str(path), tmp_path / "out", Options(rows=200, image_size=32))
    original = ArrowStream(path, stop=200)
    (ours,), (theirs,) = stream.batches(200), original.batches(200)
    np.testing.assert_array_equal(ours.labels("label"), theirs.labels("label"))
    if "image" in stream.schema.names:
        np.testing.assert_array_equal(ours.pixels("image"), theirs.pixels("image"))
    else:
        assert ours.texts("sentence") == theirs.texts("sentence")


def test_png_bytes_are_kept_as_they_are(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((2, 2), np.uint8)).save(buffer, "PNG")
    rows = datasets.Dataset.from_dict({"image": [{"bytes": buffer.getvalue(), "path": None}]})
    rows.cast_column("image", datasets.Image()).to_parquet(tmp_path / "rows.parquet")
    (batch,) = prepare(str(tmp_path / "rows.parquet"), tmp_path / "out", Options()).batches(1)
    assert batch.rows.column("image")[0]["bytes"].as_py() == buffer.getvalue()
