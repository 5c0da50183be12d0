"""Results on a path, behind file:// and in an object store: the same files, wherever they are."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from loko.config import ConfigError
from ray_jobs.places import Place, is_url


@pytest.fixture(params=["path", "file", "memory"])
def location(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "memory":  # fsspec's object store of this process
        import fsspec

        yield f"memory://bucket/{tmp_path.name}"
        fsspec.filesystem("memory").store.clear()
    else:
        yield str(tmp_path / "results") if request.param == "path" else f"file://{tmp_path / 'results'}"


def test_what_is_written_is_there_again(location: str) -> None:
    place = Place(location)
    assert place.read("search.yaml") is None
    assert place.names("tune") == []
    with place.working_folder() as folder:
        assert list(folder.iterdir()) == []
        (folder / "search.yaml").write_text("a: 1")
        (folder / "plots").mkdir()
        (folder / "plots" / "online.png").write_bytes(b"\0\1")
        place.upload(folder)
        assert Place(location).read("search.yaml") == b"a: 1"
        (folder / "adapter").mkdir()
        (folder / "adapter" / "weights").write_bytes(b"\2")
    again = Place(location)
    assert sorted(again.names()) == ["adapter", "plots", "search.yaml"]
    with again.working_folder() as folder:
        assert (folder / "plots" / "online.png").read_bytes() == b"\0\1"
        assert (folder / "adapter" / "weights").read_bytes() == b"\2"
    again.remove("search.yaml")
    assert again.read("search.yaml") is None


def test_what_was_written_before_an_error_is_kept(location: str) -> None:
    def fail() -> None:
        with Place(location).working_folder() as folder:
            (folder / "search.yaml").write_text("a: 1")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert Place(location).read("search.yaml") == b"a: 1"


def test_checkpoints_are_not_copied_to_and_fro() -> None:
    place = Place("memory://bucket/checkpoints")
    with place.working_folder() as folder:
        (folder / "tune").mkdir()
        (folder / "tune" / "checkpoint").write_bytes(b"large")
        (folder / "search.yaml").write_text("a: 1")
    with place.working_folder() as folder:
        assert [path.name for path in folder.iterdir()] == ["search.yaml"]
    assert place.read("tune", "checkpoint") == b"large"


def test_names_below_a_place() -> None:
    assert Place("s3://bucket/x?region=eu-west-1").at("tune", "a") == "s3://bucket/x/tune/a?region=eu-west-1"
    assert Place("/shared/x").at("tune", "a") == "/shared/x/tune/a"
    assert Place("file:///shared/x").at("tune") == "/shared/x/tune"
    assert (is_url("s3://bucket"), is_url("results/x")) == (True, False)


def test_a_protocol_that_nothing_reads() -> None:
    with pytest.raises(ConfigError, match=r"nothing://x: no file system for nothing:// here"):
        Place("nothing://x")
