"""A folder of results on this machine, on a shared file system, or behind a URL (s3://, gs://, any fsspec protocol).

The files of a search are few and small but for its checkpoints, which Ray writes to the place itself. So a search works
on a local folder, and what it writes there is copied to the place when that is elsewhere.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from pyarrow import fs

from loko.config import ConfigError

__all__ = ["Place", "below", "file_system", "is_url"]

_LARGE = ("tune", "train")  # what Ray writes to the place itself


def is_url(location: str) -> bool:
    """Whether a location is a URL rather than a path."""
    return "://" in location


def below(location: str, *names: str) -> str:
    """The path or URL of something below another, as it was written; what stands behind a URL's ? stays behind."""
    base, mark, query = location.partition("?") if is_url(location) else (location, "", "")
    return "/".join([base.rstrip("/"), *names]) + mark + query


class Place:
    """Where the results are.

    Args:
        location: a path, or a URL.

    Raises:
        ConfigError: a URL whose protocol nothing here reads.
    """

    def __init__(self, location: str) -> None:
        self.remote = is_url(location) and not location.startswith("file://")
        self.location = location if is_url(location) else str(Path(location).absolute())
        if not self.remote:
            self._local = Path(urlsplit(location).path if is_url(location) else self.location)
            self._files, self._path = fs.LocalFileSystem(), str(self._local)
        else:
            self._files, self._path = file_system(location)

    def at(self, *names: str) -> str:
        """The path or URL of something below it."""
        return below(self.location, *names) if self.remote else str(self._local.joinpath(*names))

    @contextmanager
    def working_folder(self) -> Iterator[Path]:
        """A local folder with the files of the place; what is written into it is copied back, also after an error."""
        if not self.remote:
            self._local.mkdir(parents=True, exist_ok=True)
            yield self._local
            return
        with tempfile.TemporaryDirectory(prefix="loko-") as folder:
            self._download(Path(folder))
            try:
                yield Path(folder)
            finally:
                self.upload(Path(folder))

    def upload(self, folder: Path) -> None:
        """Copy what a working folder holds to the place."""
        if not self.remote:
            return
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                target = f"{self._path}/{path.relative_to(folder)}"
                self._files.create_dir(target.rpartition("/")[0], recursive=True)
                with self._files.open_output_stream(target) as out:
                    out.write(path.read_bytes())

    def _download(self, folder: Path) -> None:
        for info in self._list(self._path, recursive=False):
            if info.base_name in _LARGE:
                continue
            for one in [info] if info.is_file else self._list(info.path, recursive=True):
                if one.is_file:
                    target = folder / one.path.removeprefix(self._path).lstrip("/")
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(self._read(one.path))

    def read(self, *names: str) -> bytes | None:
        """The bytes of a file below it, or None where there is none."""
        path = "/".join([self._path, *names])
        return self._read(path) if self._files.get_file_info(path).is_file else None

    def names(self, *names: str) -> list[str]:
        """Names of what a folder below it holds."""
        return [info.base_name for info in self._list("/".join([self._path, *names]), recursive=False)]

    def remove(self, *names: str) -> None:
        """Remove a file below it."""
        self._files.delete_file("/".join([self._path, *names]))

    def _read(self, path: str) -> bytes:
        with self._files.open_input_stream(path) as stream:
            return bytes(stream.read())

    def _list(self, path: str, recursive: bool) -> list[fs.FileInfo]:
        return list(self._files.get_file_info(fs.FileSelector(path, recursive=recursive, allow_not_found=True)))


def file_system(url: str) -> tuple[fs.FileSystem, str]:
    """The file system and the path of an absolute folder or a URL.

    Arrow's file systems come first (s3, gs, hdfs), as for Ray, then fsspec's, which need a package for the protocol.

    Raises:
        ConfigError: there is none for the protocol.
    """
    try:
        files, path = fs.FileSystem.from_uri(url)
        return files, path.rstrip("/")
    except (ValueError, OSError) as unknown:
        import fsspec

        protocol = url.split("://")[0]
        try:
            other, path = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise ConfigError(f"{url}: no file system for {protocol}:// here ({error}; {unknown})") from None
        return fs.PyFileSystem(fs.FSSpecHandler(other)), str(path).rstrip("/")
