"""`tokenprune verify`: whether a checkpoint fits a backbone, and whether the policy it makes looks at its images."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tokenprune.cli.options import BackboneName, Json, ModelOptions, Plugins, registry, takes_model
from tokenprune.cli.output import print_json
from tokenprune.report.text import WIDTH

if TYPE_CHECKING:
    from tokenprune.engine.adapter import Findings

_LABEL = 13
_SHOWN = 10


def add_to(app: typer.Typer) -> None:
    """Register the verb."""
    app.command()(verify)


@takes_model("options", "device", "dtype")
def verify(
    checkpoint: Annotated[str, typer.Argument(help="Folder in the release's format, or a hub id.")],
    backbone: BackboneName,
    *,
    model: ModelOptions,
    instruction: Annotated[str, typer.Option(help="What the policy is told.")] = "put the bowl on the plate",
    plugins: Plugins = None,
    as_json: Json = False,
) -> None:
    """Check a checkpoint tensor by tensor, then load it and see whether its actions depend on the images.

    Exit 1 if a tensor is unmapped, missing or misshapen, or if a view changes nothing.
    """
    from tokenprune.compare.view_check import view_changes
    from tokenprune.loading import verify_checkpoint

    found = registry(plugins)
    findings = verify_checkpoint(backbone, found, Path(checkpoint), model.own())
    if not as_json:
        print(textwrap.fill(f"{checkpoint} as {backbone}", WIDTH, break_on_hyphens=False))
        _print_findings(findings)
    changes: dict[str, float] | None = None
    if findings.clean:
        loaded = replace(model, backbone=backbone, checkpoint=checkpoint).load(found)
        changes = view_changes(loaded, found, instruction, findings.state_size)
    blind = [view for view, change in (changes or {}).items() if not change]
    if as_json:
        facts = {"checkpoint": checkpoint, "backbone": backbone, **asdict(findings), "clean": findings.clean}
        print_json({**facts, "image_changes": changes, "views_ignored": blind})
    elif changes is None:
        print("\nThe checkpoint does not fit the model and was not loaded.")
    else:
        _print_changes(changes, blind)
    if blind or not findings.clean:
        raise typer.Exit(1)


def _print_findings(findings: Findings) -> None:
    _line("files", findings.files)
    _line("keys", [f"{count} {dtype}" for dtype, count in findings.dtypes.items()])
    _line("statistics", findings.statistics)
    _line("unused", [f"{count} {group}" for group, count in _grouped(findings.unused).items()])
    for name in ("unmapped", "missing", "misshapen"):
        entries: tuple[str, ...] = getattr(findings, name)
        rest = len(entries) - _SHOWN
        _line(name, [*entries[:_SHOWN], *([f"and {rest} more, which --json lists"] if rest > 0 else [])])


def _print_changes(changes: Mapping[str, float], blind: list[str]) -> None:
    _line("image", [f"{change:.3g} {view}" for view, change in changes.items()])
    print()
    meaning = "image: greatest change of a normalised action when that view is all white instead of all black."
    verdict = f"The policy ignores {', '.join(blind)}." if blind else "The policy looks at every view."
    print(textwrap.fill(f"{meaning} {verdict}", WIDTH))


def _grouped(entries: Iterable[str]) -> dict[str, int]:
    """How many keys there are per module, the first two parts of a key."""
    groups = Counter(".".join(entry.rpartition(": ")[2].split(".")[:2]) for entry in entries)
    return dict(groups.most_common())


def _line(label: str, entries: Iterable[Any]) -> None:
    """A label, and beside it one entry a line."""
    for at, entry in enumerate(list(entries) or ["none"]):
        start = (label if at == 0 else "").ljust(_LABEL)
        indent = " " * (_LABEL + 2)
        print(textwrap.fill(str(entry), WIDTH, initial_indent=start, subsequent_indent=indent, break_on_hyphens=False))
