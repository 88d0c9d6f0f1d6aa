"""Verbs that run a policy over a recorded episode: run and compare."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from tokenprune.cli.options import EpisodePath, Json, ModelOptions, Plugins, Sets, registry, takes_model
from tokenprune.cli.output import print_json, progress
from tokenprune.errors import ConfigError
from tokenprune.report.text import WIDTH

if TYPE_CHECKING:
    from tokenprune.report.record import TraceRecord
    from tokenprune.report.result import CompareResult

Queries = Annotated[int | None, typer.Option(help="Queries from the start of the episode; all when left out.")]
Out = Annotated[Path, typer.Option(help="Folder for the result file.")]


def add_to(app: typer.Typer) -> None:
    """Register the verbs."""
    for verb in (compare, run):
        app.command()(verb)


@takes_model()
def compare(
    pipelines: Annotated[
        list[str] | None, typer.Argument(help="Names or files; NAME@keep=0.25 varies one. Dense is always there.")
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Every shipped pipeline that the backbone can run.")] = False,
    *,
    model: ModelOptions,
    episode: EpisodePath = None,
    queries: Queries = None,
    sets: Sets = None,
    plugins: Plugins = None,
    out: Out = Path("results"),
    as_json: Json = False,
) -> None:
    """Compare pipelines with the dense policy on one recorded episode: tokens, FLOPs, time, action error."""
    from tokenprune.compare.comparison import compare as measure
    from tokenprune.compare.episode_source import open_episode
    from tokenprune.compare.refusals import refusals
    from tokenprune.pipelines.loader import load_pipelines
    from tokenprune.report.files import free_path, write_json

    found = registry(plugins)
    if not pipelines and not every:
        raise ConfigError("name at least one pipeline, or give --all")
    named = load_pipelines(pipelines or (), found, sets or ())
    others = sorted(found.pipelines.keys() - set(pipelines or ())) if every else ()
    shipped = load_pipelines(others, found, sets or ())
    recorded, opened = open_episode(episode, found, model.backbone), model.load(found)
    # What --all adds may be left out; what was named must run.
    refused = refusals(shipped, opened.info, found)
    with progress() as begin:
        result = measure(
            opened,
            [*named, *(one for one in shipped if one.label not in refused)],
            recorded,
            found,
            queries,
            model.run_settings(found, episode),
            begin,
            model.execution,
        )
    path = free_path(out, f"compare-{model.backbone}")
    write_json(path, result.to_json())
    if as_json:
        print_json(result.to_json())
        return
    follow_up = opened.info.follow_up
    _print_comparison(result, None if follow_up is None else follow_up.phase)
    for reason in refused.values():
        print(textwrap.fill(f"left out: {reason}", WIDTH))
    print(f"\nwrote {path}")


def _print_comparison(result: CompareResult, follow_up: str | None) -> None:
    """Print the machine, the tables and their legend; `follow_up` is the phase behind the prefill, if there is one."""
    from tokenprune.compare.table import compare_legend, compare_table, phase_table

    backbone, episode = result.backbone, result.episode
    kernel = result.queries["dense"][0].attention_kernel
    print(f"{backbone.name} {backbone.source}, {backbone.dtype}, attention {kernel}")
    print(result.provenance.machine)
    print(textwrap.fill(f'{len(episode.steps)} queries of "{episode.instruction}"', WIDTH) + "\n")
    console = Console(width=WIDTH, highlight=False)
    console.print(compare_table(result.rows))
    console.print()
    console.print(phase_table(result.rows, follow_up))
    print()
    print(compare_legend(result.rows, result.note))
    for label, notes in result.notes.items():
        for note in notes:
            print(f"{label}: {note}")


@takes_model()
def run(
    pipeline: Annotated[str, typer.Argument(help="A name or file.")],
    *,
    model: ModelOptions,
    episode: EpisodePath = None,
    queries: Queries = None,
    sets: Sets = None,
    plugins: Plugins = None,
    out: Out = Path("results"),
    as_json: Json = False,
) -> None:
    """Run one pipeline over a recorded episode and print what each query did."""
    from tokenprune.compare.episode_source import open_episode
    from tokenprune.compare.run import run as run_pipeline
    from tokenprune.pipelines.loader import load_pipeline
    from tokenprune.report.files import free_path, write_json

    found = registry(plugins)
    loaded = load_pipeline(pipeline, found, sets or ())
    recorded, opened = open_episode(episode, found, model.backbone), model.load(found)
    settings = model.run_settings(found, episode)
    with progress() as begin:
        result = run_pipeline(opened, loaded, recorded, found, queries, settings, begin, model.execution)
    path = free_path(out, f"run-{model.backbone}")
    write_json(path, result.to_json())
    if as_json:
        print_json(result.to_json())
        return
    print(f'{loaded.label} on {result.backbone.name} {result.backbone.source}: "{recorded.instruction}"')
    for step, query in zip(result.episode.steps, result.queries, strict=True):
        print(f"step {step:3d}  {_query_line(query)}")
    for name, findings in result.findings.items():
        print(f"{name}:")
        for what, value in findings.items():
            print(textwrap.fill(f"{what}: {value}", WIDTH, initial_indent="  ", subsequent_indent="    "))
    if result.backbone.untrained:
        print("The weights are untrained random numbers: the actions mean nothing.")
    print(f"\nwrote {path}")


def _query_line(query: TraceRecord) -> str:
    """Return what one query did, on one line."""
    if query.replayed:
        return f"{query.query_ms:.2g} ms  the controller answered, the model did not run"
    cuts = [f"{cut}: {' '.join(f'{v} {n[0]}' for v, n in views.items())}" for cut, views in query.kept_per_view.items()]
    phases = ", ".join(f"{name} {ms:.0f}" for name, ms in query.phases_ms.items() if ms >= 0.5)
    kept = f"kept after {'; '.join(cuts)}" if cuts else "kept everything"
    if query.layers_skipped:
        kept += f", without layers {', '.join(map(str, query.layers_skipped))}"
    if query.head_passes.spared:
        kept += f", {query.head_passes.ran} of {query.head_passes.ran + query.head_passes.spared} flow steps"
    fallback = f"  FELL BACK: {query.fallback}" if query.fallback else ""
    return f"{query.mode}  {query.query_ms:.0f} ms ({phases})  {kept}{fallback}"
