"""`tokenprune bench`: how fast pipelines are at real size, and how near to what the device allows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tokenprune.cli.options import EpisodePath, Json, ModelOptions, Plugins, Sets, registry, takes_model
from tokenprune.cli.output import needs_matplotlib, print_json, progress

if TYPE_CHECKING:
    from tokenprune.bench.result import BenchResult


def add_to(app: typer.Typer) -> None:
    """Register the verb."""
    app.command()(bench)


@takes_model("device", "seed", "options")
def bench(
    pipelines: Annotated[
        list[str] | None, typer.Argument(help="Names or files; NAME@keep=0.25 varies one. A selection when left out.")
    ] = None,
    backbones: Annotated[
        list[str] | None, typer.Option("--backbone", help="A registered backbone; may be repeated. [openvla-oft]")
    ] = None,
    presets: Annotated[
        list[str] | None,
        typer.Option("--preset", help="For all backbones, or one for each in their order; their first when left out."),
    ] = None,
    modes: Annotated[
        list[str] | None,
        typer.Option("--mode", help="How plans are executed, as --execution elsewhere; may be repeated. [eager]"),
    ] = None,
    dtypes: Annotated[
        list[str] | None,
        typer.Option("--dtype", help="bfloat16, float32, float16, float64 or auto; may be repeated. [auto]"),
    ] = None,
    *,
    model: ModelOptions,
    pairs: Annotated[int, typer.Option(help="Queries per pipeline, each with a dense one beside it.")] = 10,
    warmup: Annotated[int, typer.Option(help="Such pairs that come before and are not counted.")] = 2,
    queries: Annotated[
        int | None, typer.Option(help="Queries of the episode that are asked over and over; all when left out.")
    ] = None,
    episode: EpisodePath = None,
    reference: Annotated[
        str | None, typer.Option(help="`upstream`: also the dense policy as repositories of the field run it.")
    ] = None,
    profile: Annotated[Path | None, typer.Option(help="Folder for torch profiler traces.")] = None,
    chart: Annotated[Path | None, typer.Option(help="Draw latency against kept tokens: a .png or .svg.")] = None,
    sets: Sets = None,
    plugins: Plugins = None,
    out: Annotated[Path, typer.Option(help="Folder for the result file, or its name ending in .json.")] = Path(
        "results"
    ),
    as_json: Json = False,
) -> None:
    """Measure pipelines at real size: latency, FLOPs, memory, and the least time that the device allows."""
    if chart is not None:
        _check_chart(chart)
    from tokenprune.bench.settings import BenchSettings
    from tokenprune.bench.speed import bench as measure
    from tokenprune.bench.subjects import DEFAULT_PIPELINES, choose_subjects
    from tokenprune.bench.table import bench_text
    from tokenprune.engine.executor import Execution
    from tokenprune.pipelines.loader import load_pipelines
    from tokenprune.report.files import write_json

    settings = BenchSettings(
        dtypes=tuple(dict.fromkeys(dtypes or ("auto",))),
        modes=tuple(dict.fromkeys(modes or (Execution.EAGER,))),
        device=model.device,
        pairs=pairs,
        warmup=warmup,
        queries=queries,
        reference=reference,
        profile=profile,
        seed=model.seed,
        options=model.own(),
    )
    settings.check()
    found = registry(plugins)
    subjects = choose_subjects(found, backbones or [model.backbone], presets or [], episode)
    loaded = load_pipelines(pipelines or DEFAULT_PIPELINES, found, sets or ())
    path = _result_path(out, [subject.backbone for subject in subjects])

    def save(result: BenchResult) -> None:
        write_json(path, result.to_json())

    with progress() as begin:
        result = measure(subjects, loaded, settings, found, save, begin)
    if chart is not None:
        from tokenprune.bench.chart import write_speed

        write_speed(result, chart)
    if as_json:
        print_json(result.to_json())
        return
    print(bench_text(result))
    for written in filter(None, (chart, path)):
        print(f"\nwrote {written}")


def _check_chart(chart: Path) -> None:
    """Refuse a chart that cannot be drawn before the run, not after it."""
    with needs_matplotlib("--chart"):
        from tokenprune.viz.frame import check_format
    check_format(chart)


def _result_path(out: Path, backbones: Sequence[str]) -> Path:
    if out.suffix == ".json":
        out.parent.mkdir(parents=True, exist_ok=True)
        return out
    from tokenprune.report.files import free_path

    return free_path(out, "-".join(["bench", *dict.fromkeys(backbones)]))
