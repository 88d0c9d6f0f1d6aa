"""Verbs that run a policy over a recorded episode: run and compare."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from tokenprune.cli.options import (
    BackboneName,
    Checkpoint,
    Device,
    Dtype,
    EpisodePath,
    Execution,
    Json,
    Options,
    Plugins,
    Preset,
    Seed,
    Sets,
    bundled_episode,
    key_values,
    print_json,
    progress,
    registry,
    source,
)
from tokenprune.errors import ConfigError
from tokenprune.report.files import free_path, write_json

if TYPE_CHECKING:
    from tokenprune.compare.episode import Episode
    from tokenprune.engine.adapter import Backbone
    from tokenprune.pipelines.loader import LoadedPipeline
    from tokenprune.registry.discovery import Registry
    from tokenprune.report.record import TraceRecord

Queries = Annotated[int | None, typer.Option(help="Queries from the start of the episode; all when left out.")]
Out = Annotated[Path, typer.Option(help="Folder for the result file.")]


def add_to(app: typer.Typer) -> None:
    """Register the verbs."""
    for verb in (compare, run):
        app.command()(verb)


def compare(
    pipelines: Annotated[
        list[str] | None, typer.Argument(help="Names or files; NAME@keep=0.25 varies one. Dense is always there.")
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Every shipped pipeline that the backbone can run.")] = False,
    backbone: BackboneName = "openvla-oft",
    preset: Preset = None,
    checkpoint: Checkpoint = None,
    episode: EpisodePath = None,
    queries: Queries = None,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    execution: Execution = "eager",
    seed: Seed = 0,
    options: Options = None,
    sets: Sets = None,
    plugins: Plugins = None,
    out: Out = Path("results"),
    as_json: Json = False,
) -> None:
    """Compare pipelines with the dense policy on one recorded episode: tokens, FLOPs, time, action error."""
    from tokenprune.compare.comparison import compare as measure
    from tokenprune.compare.table import compare_legend, compare_table, phase_table
    from tokenprune.pipelines.loader import load_pipeline
    from tokenprune.report.result import RunSettings
    from tokenprune.report.text import WIDTH

    found = registry(plugins)
    named = list(dict.fromkeys([*(pipelines or ()), *(sorted(found.pipelines) if every else ())]))
    if not named:
        raise ConfigError("name at least one pipeline, or give --all")
    loaded = [load_pipeline(name, found, () if name == "dense" else (sets or ())) for name in named]
    opened, recorded, settings = _open(found, backbone, preset, checkpoint, episode, device, dtype, seed, options)
    refused = {}
    if every:
        extra = [one for one in loaded if one.label not in (pipelines or ())]
        refused = {one.label: why for one in extra if (why := _refusal(one, opened, found))}
        loaded = [one for one in loaded if one.label not in refused]
    with progress() as begin:
        result = measure(
            opened, loaded, recorded, found, queries, RunSettings(**settings, execution=execution), begin, execution
        )
    path = free_path(out, f"compare-{backbone}")
    write_json(path, result.to_json())
    if as_json:
        print_json(result.to_json())
        return
    first, model, replayed = result.queries["dense"][0], result.backbone, result.episode
    print(f"{model.name} {model.source}, {model.dtype}, attention {first.attention_kernel}")
    print(result.provenance.machine)
    print(textwrap.fill(f'{len(replayed.steps)} queries of "{replayed.instruction}"', WIDTH) + "\n")
    console, follow_up = Console(width=WIDTH, highlight=False), opened.info.follow_up
    console.print(compare_table(result.rows))
    console.print()
    console.print(phase_table(result.rows, None if follow_up is None else follow_up.phase))
    print()
    print(compare_legend(result.rows, result.note))
    for label, said in result.notes.items():
        for line in said:
            print(f"{label}: {line}")
    for reason in refused.values():
        print(textwrap.fill(f"left out: {reason}", WIDTH))
    print(f"\nwrote {path}")


def _refusal(loaded: LoadedPipeline, backbone: Backbone, found: Registry) -> str:
    """Why a backbone cannot run a pipeline; empty if it can."""
    from tokenprune.errors import CapabilityError, LayoutError
    from tokenprune.pipelines.binding import bind

    try:
        bind(loaded.config, backbone.info, found)
    except (CapabilityError, ConfigError, LayoutError) as error:
        return str(error)
    return ""


def run(
    pipeline: Annotated[str, typer.Argument(help="A name or file.")],
    backbone: BackboneName = "openvla-oft",
    preset: Preset = None,
    checkpoint: Checkpoint = None,
    episode: EpisodePath = None,
    queries: Queries = None,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    execution: Execution = "eager",
    seed: Seed = 0,
    options: Options = None,
    sets: Sets = None,
    plugins: Plugins = None,
    out: Out = Path("results"),
    as_json: Json = False,
) -> None:
    """Run one pipeline over a recorded episode and print what each query did."""
    from tokenprune.compare.run import run as run_pipeline
    from tokenprune.pipelines.loader import load_pipeline
    from tokenprune.report.result import RunSettings
    from tokenprune.report.text import WIDTH

    found = registry(plugins)
    loaded = load_pipeline(pipeline, found, sets or ())
    opened, recorded, settings = _open(found, backbone, preset, checkpoint, episode, device, dtype, seed, options)
    with progress() as begin:
        result = run_pipeline(
            opened, loaded, recorded, found, queries, RunSettings(**settings, execution=execution), begin, execution
        )
    path = free_path(out, f"run-{backbone}")
    write_json(path, result.to_json())
    if as_json:
        print_json(result.to_json())
        return
    print(f'{loaded.label} on {result.backbone.name} {result.backbone.source}: "{recorded.instruction}"')
    for step, query in zip(result.episode.steps, result.queries, strict=True):
        print(f"step {step:3d}  {_query_line(query)}")
    for name, found_out in result.findings.items():
        print(f"{name}:")
        for what, value in found_out.items():
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


def _open(
    found: Registry,
    backbone: str,
    preset: str | None,
    checkpoint: str | None,
    episode: Path | None,
    device: str,
    dtype: str,
    seed: int,
    options: Sequence[str] | None,
) -> tuple[Backbone, Episode, dict[str, Any]]:
    """The model and the episode a verb runs on, and the settings that repeat them."""
    from tokenprune.compare.episode import load_episode
    from tokenprune.loading import load_backbone

    preset, checkpoint = source(found, backbone, preset, checkpoint)
    recorded = load_episode(episode or bundled_episode(found, backbone))
    chosen = key_values("--option", options)
    settings = {
        "preset": preset,
        "checkpoint": checkpoint,
        "device": device,
        "dtype": dtype,
        "seed": seed,
        "options": chosen,
        "episode": str(episode or "bundled"),
    }
    return load_backbone(backbone, found, checkpoint, preset, device, dtype, seed, chosen), recorded, settings
