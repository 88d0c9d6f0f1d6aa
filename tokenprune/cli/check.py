"""`tokenprune check`: whether a stage or a backbone keeps every promise of the framework."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from tokenprune.cli.options import Json, ModelOptions, Plugins, key_values, registry, takes_model
from tokenprune.cli.output import print_json
from tokenprune.errors import ConfigError
from tokenprune.report.text import WIDTH

if TYPE_CHECKING:
    from tokenprune.testing import Verdict

_INDENT = " " * 7


def add_to(app: typer.Typer) -> None:
    """Register the verb."""
    app.command()(check)


@takes_model("preset", "options")
def check(
    name: Annotated[str | None, typer.Argument(help="A stage, as `tokenprune list` shows it.")] = None,
    backbone: Annotated[str | None, typer.Option("--backbone", help="A backbone instead.")] = None,
    *,
    model: ModelOptions,
    sets: Annotated[
        list[str] | None, typer.Option("--set", help="keep=0.5 and the like: a key of the stage; may be repeated.")
    ] = None,
    plugins: Plugins = None,
    as_json: Json = False,
) -> None:
    """Run a stage or a backbone through every check of `tokenprune.testing`.

    Exit 1 if it breaks one, or none could be checked.
    """
    if name is None and backbone is None:
        raise ConfigError("name a stage, or a backbone with --backbone")
    if name is not None and backbone is not None:
        raise ConfigError("name a stage, or a backbone with --backbone, not both")
    for option, given in (("--preset", model.preset), ("--option", model.options)):
        if given and backbone is None:
            raise ConfigError(f"{option} belongs to --backbone, not to a stage")
    if sets and backbone is not None:
        raise ConfigError("--set belongs to a stage, not to --backbone")
    from tokenprune.testing import check_backbone, check_stage
    from tokenprune.testing.backbone_subject import backbone_subject

    found = registry(plugins)
    if backbone is None:
        assert name is not None
        verdicts = list(check_stage(name, found, key_values("--set", sets)))
    else:
        verdicts = list(check_backbone(backbone, found, model.preset, model.own()))
    broken = any(verdict.outcome == "fails" for verdict in verdicts)
    on = dict.fromkeys(verdict.backbone for verdict in verdicts if verdict.outcome != "refused")
    if as_json:
        print_json([asdict(verdict) for verdict in verdicts])
        raise typer.Exit(0 if on and not broken else 1)
    _print(verdicts, named=backbone is None)
    if not on:
        print(f"\n{name}: nothing could be checked; --set KEY=VALUE configures it")
        raise typer.Exit(1)
    where = f"on {', '.join(on)}"
    if backbone is not None:
        where = f"with preset {backbone_subject(backbone, found, model.preset).preset}"
    print(f"\n{backbone or name}: {'breaks a promise' if broken else 'keeps every promise'}; run {where}")
    if broken:
        raise typer.Exit(1)


def _print(verdicts: Sequence[Verdict], named: bool) -> None:
    """A promise a paragraph, with what was found; backbones are named where there are several."""
    for promise in dict.fromkeys(verdict.promise for verdict in verdicts):
        mine = [verdict for verdict in verdicts if verdict.promise == promise]
        outcomes = {verdict.outcome for verdict in mine}
        mark = "FAILS" if "fails" in outcomes else "holds" if "holds" in outcomes else "  -  "
        print(textwrap.fill(f"{mark}  {promise}", WIDTH, subsequent_indent=_INDENT))
        for why, backbones in _reasons(mine, "fails", "does not apply").items():
            text = f"{', '.join(backbones)}: {why}" if named else why
            print(textwrap.fill(text, WIDTH, initial_indent=_INDENT, subsequent_indent=_INDENT))
    for why, backbones in _reasons(verdicts, "refused").items():
        print(textwrap.fill(f"not on {', '.join(backbones)}: {why}", WIDTH))


def _reasons(verdicts: Sequence[Verdict], *outcomes: str) -> dict[str, list[str]]:
    """Each reason of verdicts with these outcomes, and the backbones it was given on."""
    reasons: dict[str, dict[str, None]] = {}
    for verdict in verdicts:
        if verdict.outcome in outcomes:
            reasons.setdefault(verdict.why, {})[verdict.backbone] = None
    return {why: list(backbones) for why, backbones in reasons.items()}
