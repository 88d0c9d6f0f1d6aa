"""Options that several verbs share."""

from __future__ import annotations

import importlib.resources
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tokenprune.errors import ConfigError
from tokenprune.registry.discovery import Registry

Plugins = Annotated[list[Path] | None, typer.Option("--plugin", help="A python file with stages; may be repeated.")]
Json = Annotated[bool, typer.Option("--json", help="Print plain data instead of tables.")]
Sets = Annotated[
    list[str] | None, typer.Option("--set", help="stages.1.keep=0.5 and the like, for every pipeline named.")
]
BackboneName = Annotated[str, typer.Option("--backbone", help="A registered backbone.")]
Preset = Annotated[
    str | None, typer.Option(help="What the backbone offers without a checkpoint; its first when neither is given.")
]
Checkpoint = Annotated[str | None, typer.Option(help="Folder in the release's format, or a hub id.")]
Options = Annotated[
    list[str] | None, typer.Option("--option", help="The backbone's own: views=[primary], proprio=false, unnorm_key=…")
]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:0.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16, float16 or float64; auto: bfloat16 where it is native.")]
Execution = Annotated[str, typer.Option(help="eager, compile, or on a CUDA device cuda_graph and compiled_cuda_graph.")]
Seed = Annotated[int, typer.Option(help="Seed of an untrained preset's random weights.")]
EpisodePath = Annotated[
    Path | None, typer.Option("--episode", help="A recorded episode; the bundled one when left out.")
]


def registry(plugins: Sequence[Path] | None) -> Registry:
    """Everything installed, and the files given."""
    return Registry.discover(plugin_files=tuple(plugins or ()))


def print_json(data: object) -> None:
    """Plain data on standard output."""
    json.dump(data, sys.stdout, indent=1, default=str)
    sys.stdout.write("\n")


def key_values(option: str, given: Sequence[str] | None) -> dict[str, Any]:
    """`key=value` pairs of an option that may be repeated, values read as YAML.

    Raises:
        ConfigError: If a pair has no `=` or its value is not YAML.
    """
    from tokenprune.pipelines.yaml_document import Document

    parsed = {}
    for pair in given or ():
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise ConfigError(f"{option} {pair}: write key=value, such as views=[primary]")
        document = Document.parse(value, f"{option} {pair}")
        if document.problems:
            raise ConfigError(f"{option} {pair}: {'; '.join(problem.text for problem in document.problems)}")
        parsed[key.strip()] = document.data
    return parsed


def source(found: Registry, backbone: str, preset: str | None, checkpoint: str | None) -> tuple[str | None, str | None]:
    """Preset and checkpoint; the backbone's first preset when neither is given."""
    return (preset, checkpoint) if preset or checkpoint else (found.backbone(backbone).spec.default_preset, None)


def bundled_episode(found: Registry, backbone: str) -> Path:
    """Path of the episode that ships with a backbone.

    Raises:
        ConfigError: If none does.
    """
    name = found.backbone(backbone).spec.episode
    if not name:
        raise ConfigError(f"no episode ships with backbone '{backbone}'; give one with --episode PATH")
    package, _, resource = name.partition(":")
    return Path(str(importlib.resources.files(package).joinpath(resource)))


@contextmanager
def charts() -> Iterator[None]:
    """Import inside what draws charts.

    Raises:
        ConfigError: If matplotlib is not installed, naming the extra.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        raise ConfigError(
            '--chart draws with matplotlib, which is missing: pip install "tokenprune-vla[viz]"'
        ) from error


@contextmanager
def progress() -> Iterator[Callable[[int], Callable[[], None]]]:
    """A bar of queries on standard error, absent where that is no terminal."""
    console = Console(file=sys.stderr)
    columns = (TextColumn("queries"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:

        def begin(total: int) -> Callable[[], None]:
            task = bar.add_task("queries", total=total)
            return lambda: bar.advance(task)

        yield begin
