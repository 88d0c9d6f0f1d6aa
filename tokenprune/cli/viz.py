"""`tokenprune viz`: pictures of what a pipeline kept and why; no model is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tokenprune.cli.options import Json, Plugins, bundled_episode, print_json, registry
from tokenprune.errors import ConfigError, EpisodeError

if TYPE_CHECKING:
    from tokenprune.compare.episode import Episode
    from tokenprune.registry.discovery import Registry
    from tokenprune.viz.result import Result


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
    import numpy as np

    try:
        from tokenprune.viz.film import write_pictures
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        raise ConfigError('viz draws with matplotlib, which is missing: pip install "tokenprune-vla[viz]"') from error
    from tokenprune.cli.explain import describe_backbone
    from tokenprune.viz.reading import read_result

    told = read_result(result, pipeline)
    found = registry(plugins)
    episode = _episode(told, found)
    crop = describe_backbone(found, told.backbone, told.preset, told.checkpoint, told.options).pixels
    views = [view.name for view in told.views]
    written = write_pictures(
        told,
        lambda step: {view: crop(episode.frame(step, view)).permute(1, 2, 0).numpy() for view in views},
        np.linalg.norm(episode.actions[:, list(told.translation)], axis=1) if told.translation else np.empty(0),
        out or result.parent / f"{result.stem}-viz",
        query,
    )
    if as_json:
        print_json({"pipeline": told.label, "files": [str(path) for path in written]})
        return
    for path in written:
        print(f"wrote {path}")


def _episode(told: Result, found: Registry) -> Episode:
    """The episode a result was made from.

    Raises:
        EpisodeError: If it is gone, damaged, or another one.
    """
    from tokenprune.compare.episode import load_episode

    path = told.episode_path
    if path is not None and not path.exists():
        raise EpisodeError(f"the episode this result was made from is gone: {path} (from the current folder)")
    episode = load_episode(path or bundled_episode(found, told.backbone))
    dims = episode.actions.shape[1]
    if episode.instruction != told.instruction or max(told.translation, default=0) >= dims:
        raise EpisodeError(
            f"episode '{episode.name}' is not the one this result was made from: it holds actions of {dims} numbers "
            f'for "{episode.instruction}", the result "{told.instruction}"'
        )
    return episode
