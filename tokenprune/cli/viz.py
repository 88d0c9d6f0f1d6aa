"""`tokenprune viz`: pictures of what a pipeline kept and why; no model is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tokenprune.cli.options import Json, Plugins, registry
from tokenprune.cli.output import needs_matplotlib, print_json


def add_to(app: typer.Typer) -> None:
    """Register the verb."""
    app.command()(viz)


def viz(
    result: Annotated[Path, typer.Argument(help="A file that `run` or `compare` wrote.")],
    pipeline: Annotated[
        str | None, typer.Option(help="Which one of a comparison; the first that is not dense when left out.")
    ] = None,
    query: Annotated[int | None, typer.Option(help="Draw this query only, counted from 0; no GIF then.")] = None,
    plugins: Plugins = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the pictures; beside the result, named after it, when left out.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Draw what a pipeline kept and why: a PNG per query and a GIF of all."""
    with needs_matplotlib("viz"):
        from tokenprune.compare.pictures import draw_result
    from tokenprune.viz.reading import read_result

    read = read_result(result, pipeline)
    written = draw_result(read, registry(plugins), out or result.parent / f"{result.stem}-viz", query)
    if as_json:
        print_json({"pipeline": read.label, "files": [str(path) for path in written]})
        return
    for path in written:
        print(f"wrote {path}")
