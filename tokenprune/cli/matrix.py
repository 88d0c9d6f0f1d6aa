"""`tokenprune list --matrix`: stages and pipelines against backbones, as they ran."""

from __future__ import annotations

import fnmatch
import textwrap
from dataclasses import asdict

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from tokenprune.cli.output import print_json
from tokenprune.registry.discovery import Registry
from tokenprune.report.text import WIDTH


def show_matrix(found: Registry, pattern: str, as_json: bool) -> None:
    """Print it; exit 1 if anything fails in a query."""
    from tokenprune.testing.matrix import PRESET, QUERIES, matrix

    cells = [cell for cell in matrix(found) if fnmatch.fnmatch(cell.name, pattern)]
    if as_json:
        print_json([asdict(cell) for cell in cells])
    else:
        backbones = list(dict.fromkeys(cell.backbone for cell in cells))
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
        for heading in ("", "name", *backbones):
            table.add_column(heading, overflow="fold")
        verdicts = {(cell.kind, cell.name, cell.backbone): cell.verdict for cell in cells}
        for kind, name in dict.fromkeys((cell.kind, cell.name) for cell in cells):
            table.add_row(kind, name, *(verdicts[kind, name, backbone] for backbone in backbones))
        Console(width=WIDTH, highlight=False).print(table)
        print(f"Found by running {QUERIES} queries of noise on each untrained preset '{PRESET}'.")
        reasons: dict[str, list[str]] = {}
        for cell in cells:
            for text in (*([cell.why] if cell.why else []), *(cell.notes if cell.kind == "stage" else ())):
                reasons.setdefault(text, []).append(f"{cell.name} on {cell.backbone}")
        for text, where in reasons.items():
            print(textwrap.fill(f"{', '.join(dict.fromkeys(where))}: {text}", WIDTH, subsequent_indent="  "))
    if any(cell.verdict == "fails" for cell in cells):
        raise typer.Exit(1)
