"""`tokenprune check`: whether a stage keeps every promise of the framework."""

from __future__ import annotations

import textwrap
from dataclasses import asdict
from typing import Annotated

import typer

from tokenprune.cli.options import Json, Plugins, key_values, registry
from tokenprune.cli.output import print_json
from tokenprune.report.text import WIDTH


def add_to(app: typer.Typer) -> None:
    """Register the verb."""
    app.command()(check)


def check(
    name: Annotated[str, typer.Argument(help="A stage, as `tokenprune list` shows it.")],
    sets: Annotated[
        list[str] | None, typer.Option("--set", help="keep=0.5 and the like: a key of the stage; may be repeated.")
    ] = None,
    plugins: Plugins = None,
    as_json: Json = False,
) -> None:
    """Run a stage through every check of `tokenprune.testing`; exit 1 if it breaks one, or none could be checked."""
    from tokenprune.testing import check_stage

    verdicts = list(check_stage(name, registry(plugins), key_values("--set", sets)))
    broken = [verdict for verdict in verdicts if verdict.outcome == "fails"]
    on = dict.fromkeys(verdict.backbone for verdict in verdicts if verdict.outcome != "refused")
    if as_json:
        print_json([asdict(verdict) for verdict in verdicts])
        raise typer.Exit(0 if on and not broken else 1)
    for promise in dict.fromkeys(verdict.promise for verdict in verdicts):
        mine = [verdict for verdict in verdicts if verdict.promise == promise]
        held = [verdict.backbone for verdict in mine if verdict.outcome == "holds"]
        failed = [verdict for verdict in mine if verdict.outcome == "fails"]
        mark = "FAILS" if failed else "holds" if held else "  -  "
        print(textwrap.fill(f"{mark}  {promise}", WIDTH, subsequent_indent=" " * 7))
        said: dict[str, list[str]] = {}
        for verdict in mine:
            if verdict.outcome in ("fails", "does not apply"):
                said.setdefault(verdict.why, []).append(verdict.backbone)
        for why, where in said.items():
            indent = " " * 7
            text = f"{', '.join(where)}: {why}"
            print(textwrap.fill(text, WIDTH, initial_indent=indent, subsequent_indent=indent))
    refused: dict[str, dict[str, None]] = {}
    for verdict in verdicts:
        if verdict.outcome == "refused":
            refused.setdefault(verdict.why, {})[verdict.backbone] = None
    for why, backbones in refused.items():
        print(textwrap.fill(f"not on {', '.join(backbones)}: {why}", WIDTH))
    if not on:
        print(f"\n{name}: nothing could be checked; --set KEY=VALUE configures it")
        raise typer.Exit(1)
    print(f"\n{name}: {'breaks a promise' if broken else 'keeps every promise'}; run on {', '.join(on)}")
    if broken:
        raise typer.Exit(1)
