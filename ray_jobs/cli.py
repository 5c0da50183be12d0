"""What the command lines of the jobs share: overrides, errors for people, and help that lists every key."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from pydantic import BaseModel
from rich.console import Console

from loko.config import ConfigError
from ray_jobs.settings import describe

__all__ = ["Overrides", "fail", "help_for", "make_app"]

Overrides = Annotated[
    list[str] | None, typer.Argument(help="key=value …, dotted keys that replace those of the file", show_default=False)
]


def make_app() -> typer.Typer:
    """A command line with plain help: the list of keys keeps its lines."""
    # PEFT asks transformers by an old name; nothing that a user of the jobs could mend.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
    return typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


def help_for(kind: type[BaseModel]) -> str:
    """Every key of a config with its default and meaning, to stand below ``--help``."""
    rows = describe(kind)
    width = max(len(key) for key, _, _ in rows)
    lines = [f"{key:<{width}}  {text} [{default}]" for key, default, text in rows]
    return "\b\nKeys of the file, and of overrides [default]:\n" + "\n".join(lines)


@contextmanager
def fail() -> Iterator[None]:
    """Turn errors whose message says what to do into that message and exit status 2; others keep their traceback."""
    try:
        yield
    except (ConfigError, ValueError, OSError) as error:
        Console(stderr=True, soft_wrap=True).print(f"[bold red]error:[/] {type(error).__name__}", highlight=False)
        typer.echo(_LOST if _stands_nowhere() else str(error), err=True)
        raise typer.Exit(2) from error


_LOST = (
    "the folder that this job runs in was removed. Nodes of one machine that share a temporary folder unpack a job's "
    "working directory over each other: give each `ray start` its own --temp-dir, then run the same command again"
)


def _stands_nowhere() -> bool:
    """Whether the working directory is gone; Python's own error then names no file."""
    try:
        Path.cwd()
    except FileNotFoundError:
        return True
    return False
