"""What verbs print besides tables: plain data, a progress bar, and which extra a chart needs."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tokenprune.errors import ConfigError


def print_json(data: object) -> None:
    """Print plain data on standard output."""
    json.dump(data, sys.stdout, indent=1, default=str)
    sys.stdout.write("\n")


@contextmanager
def needs_matplotlib(what: str) -> Iterator[None]:
    """Import modules that draw inside this context.

    Args:
        what: What draws, to begin the message: `viz` or `--chart`.

    Raises:
        ConfigError: If matplotlib is not installed, naming the extra.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        raise ConfigError(
            f'{what} draws with matplotlib, which is missing: pip install "tokenprune-vla[viz]"'
        ) from error


@contextmanager
def progress() -> Iterator[Callable[[int], Callable[[], None]]]:
    """Show a bar of queries on standard error, or nothing where that is no terminal.

    Yields:
        Call it with the number of queries to come; what it returns is called after each.
    """
    console = Console(file=sys.stderr)
    columns = (TextColumn("queries"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:

        def begin(total: int) -> Callable[[], None]:
            task = bar.add_task("queries", total=total)
            return lambda: bar.advance(task)

        yield begin
