"""The `tokenprune` command. Exit codes: 0 fine, 1 something was found or went wrong, 2 the call itself is wrong."""

from __future__ import annotations

import sys

import typer

from tokenprune.cli import bench, catalog, check, eval, explain, new, run, verify, viz
from tokenprune.errors import (
    CheckpointError,
    ConfigError,
    EpisodeError,
    ObservationError,
    PluginError,
    ResultError,
    TokenPruneError,
)

_USAGE = (ConfigError, PluginError, EpisodeError, CheckpointError, ObservationError, ResultError)

app = typer.Typer(
    name="tokenprune",
    help="Visual-token pruning for vision-language-action policies: compare, explain and check pipelines.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for module in (run, bench, eval, explain, verify, viz, check, new, catalog):
    module.add_to(app)


def main() -> None:
    """Run the command; an error made on purpose prints its message and no traceback."""
    try:
        app()
    except TokenPruneError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, _USAGE) else 1)
