"""Verbs of closed-loop evaluation: eval runs episodes, report tells what a results file says."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from tokenprune.cli.options import (
    BackboneName,
    Checkpoint,
    Device,
    Dtype,
    Execution,
    Json,
    Options,
    Plugins,
    Preset,
    Seed,
    Sets,
    charts,
    key_values,
    print_json,
    registry,
    source,
)
from tokenprune.errors import ConfigError

if TYPE_CHECKING:
    from tokenprune.evaluation.environment import Suite
    from tokenprune.evaluation.local_engine import LocalEngine
    from tokenprune.evaluation.ray_engine import RayEngine
    from tokenprune.evaluation.records import EpisodeRecord
    from tokenprune.evaluation.results_file import Results
    from tokenprune.evaluation.starts import Start
    from tokenprune.evaluation.summary import Summary
    from tokenprune.registry.discovery import Registry


EPISODES = 50


class EngineName(StrEnum):
    """Where episodes run."""

    local = "local"
    ray = "ray"


Environments = Annotated[
    list[str] | None, typer.Option("--env", help="A registered environment; may be repeated. Not with --starts.")
]
Tasks = Annotated[
    list[str] | None, typer.Option("--tasks", help="Indices or names, 1,4,8; one per --env, all tasks when left out.")
]
Chart = Annotated[Path | None, typer.Option(help="Draw success against latency into this .png or .svg.")]
Csv = Annotated[Path | None, typer.Option(help="Write the rows, also those per task, into this file.")]
Baseline = Annotated[str | None, typer.Option(help="Compare with this variant; `dense` where it was evaluated.")]


def add_to(app: typer.Typer) -> None:
    """Register the verbs."""
    app.command("eval")(evaluate)
    app.command()(report)


def evaluate(
    variants: Annotated[
        list[str],
        typer.Argument(help="Pipelines as in compare; PIPELINE+no-wrist, +blind or +other-instruction take away."),
    ],
    environments: Environments = None,
    tasks: Tasks = None,
    episodes: Annotated[
        int | None, typer.Option(help=f"Of each task and variant; {EPISODES}, or all of --starts, when left out.")
    ] = None,
    init_states: Annotated[
        str | None, typer.Option(help="Initial states to begin in, 25:50 or 0,3,7; all when left out.")
    ] = None,
    start_seed: Annotated[int, typer.Option(help="Seed of the first round through the initial states.")] = 0,
    starts: Annotated[
        Path | None, typer.Option(help="A JSON list of exact starts, instead of the options above.")
    ] = None,
    env_options: Annotated[
        list[str] | None, typer.Option("--env-option", help="The environment's own: size=224, spread=0.05, …")
    ] = None,
    execute: Annotated[int | None, typer.Option(help="Actions of each chunk to execute; all when left out.")] = None,
    replan: Annotated[bool, typer.Option(help="Whether a controller that asks for a new query gets it.")] = True,
    backbone: BackboneName = "openvla-oft",
    preset: Preset = None,
    checkpoint: Checkpoint = None,
    options: Options = None,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    execution: Execution = "eager",
    seed: Seed = 0,
    sets: Sets = None,
    plugins: Plugins = None,
    engine: Annotated[EngineName, typer.Option(help="Processes of this machine, or a Ray cluster.")] = EngineName.local,
    workers: Annotated[int, typer.Option(help="Episodes at the same time.")] = 1,
    threads: Annotated[int, typer.Option(help="torch threads, and with Ray CPUs, of each worker.")] = 1,
    limit: Annotated[
        float, typer.Option("--episode-limit", help="Seconds; a longer episode has hung, which counts as a crash.")
    ] = 3600.0,
    gpus: Annotated[float, typer.Option("--gpus-per-worker", help="With Ray; 0.5 lets two workers share one.")] = 0.0,
    address: Annotated[
        str | None, typer.Option(help="HOST:PORT of a Ray cluster; one is started when left out.")
    ] = None,
    videos: Annotated[
        Path | None, typer.Option(help="Folder for a video of each variant's first episode of each task.")
    ] = None,
    out: Annotated[
        Path, typer.Option(help="Results, a line per episode; with the same command an evaluation goes on.")
    ] = Path("results/eval.jsonl"),
    baseline: Baseline = None,
    csv: Csv = None,
    chart: Chart = None,
    as_json: Json = False,
) -> None:
    """Evaluate pipelines in simulated environments, every one from the same starts."""
    import torch

    from tokenprune.cli.explain import describe_backbone
    from tokenprune.evaluation.jobs import Job, plan_jobs
    from tokenprune.evaluation.results_file import ResultsFile
    from tokenprune.evaluation.starts import check_starts, first_of_each_task
    from tokenprune.evaluation.variant import black_views, parse_variant
    from tokenprune.evaluation.worker import WorkerSpec
    from tokenprune.report.provenance import provenance

    found = registry(plugins)
    parsed = [parse_variant(text, found, sets or ()) for text in variants]
    chosen = key_values("--env-option", env_options)
    begin = _read_starts(starts, environments, tasks, init_states, episodes)
    suites = _suites(found, list(dict.fromkeys(s.environment for s in begin)) or environments or [], chosen)
    planned = begin or _planned(suites, tasks, EPISODES if episodes is None else episodes, init_states, start_seed)
    check_starts(planned, suites)
    preset, checkpoint = source(found, backbone, preset, checkpoint)
    spec = WorkerSpec(
        backbone=backbone,
        checkpoint=checkpoint,
        preset=preset,
        options=key_values("--option", options),
        device=device,
        dtype=dtype,
        seed=seed,
        variants=tuple(parsed),
        environments={name: chosen for name in suites},
        tasks={name: _tasks_of(planned, name) for name in suites},
        execute=execute,
        replan=replan,
        execution=execution,
        plugins=tuple(str(path) for path in plugins or ()),
        videos=None if videos is None else str(videos),
        filmed=() if videos is None else first_of_each_task(planned, 1),
    )
    if videos is not None:
        from tokenprune.evaluation.video import imageio

        imageio()
    running = _engine(engine, workers, threads, limit, gpus, address)
    policy = describe_backbone(found, backbone, preset, checkpoint, spec.options)
    settings = {**spec.settings(suites, policy.weights), "untrained": policy.info.untrained}
    described = {variant.label: spec.describe(variant, suites) for variant in parsed}
    for variant in parsed:
        black_views(variant, policy.info.views)
    with ResultsFile(out, settings, provenance(torch.device(device))) as results:
        for label, what in described.items():
            results.declare(label, what)
        jobs = plan_jobs(planned, [variant.label for variant in parsed])
        finished = {Job(record.start, record.variant): record for record in results.results.records}
        with _progress(len(jobs), [finished[job] for job in jobs if job in finished]) as show:
            for record in running.run(spec, [job for job in jobs if job not in finished]):
                results.append(record)
                show(record)
        _tell(out, results.results, baseline, [v.label for v in parsed], planned, csv, chart, as_json)


def report(
    results: Annotated[Path, typer.Argument(help="A file that `eval` wrote, or is writing.")],
    variants: Annotated[list[str] | None, typer.Argument(help="Only these; all when left out.")] = None,
    baseline: Baseline = None,
    csv: Csv = None,
    chart: Chart = None,
    as_json: Json = False,
) -> None:
    """Say what a results file of `eval` says: success, intervals, paired differences, latency."""
    from tokenprune.errors import ResultError, nearest
    from tokenprune.evaluation.results_file import read_results

    read = read_results(results)
    labels = variants or list(read.variants)
    for label in labels:
        if label not in read.variants:
            raise ResultError(f"{results}: variant '{label}' was not evaluated{nearest(label, read.variants)}")
    _tell(results, read, baseline, labels, (), csv, chart, as_json)


def _read_starts(
    path: Path | None,
    environments: Sequence[str] | None,
    tasks: Sequence[str] | None,
    init_states: str | None,
    episodes: int | None,
) -> tuple[Start, ...]:
    from tokenprune.evaluation.starts import first_of_each_task, read_starts

    if path is None:
        if not environments:
            raise ConfigError("name an environment with --env, or a file of starts with --starts")
        return ()
    if environments or tasks or init_states:
        raise ConfigError("--starts says where every episode begins; leave out --env, --tasks and --init-states")
    read = read_starts(path)
    return read if episodes is None else first_of_each_task(read, episodes)


def _suites(found: Registry, names: Sequence[str], options: Mapping[str, Any]) -> dict[str, Suite]:
    return {name: found.environment_factory(name).describe(name, options) for name in names}


def _planned(
    suites: Mapping[str, Suite], tasks: Sequence[str] | None, episodes: int, init_states: str | None, seed: int
) -> tuple[Start, ...]:
    from tokenprune.evaluation.starts import plan_starts

    if tasks and len(tasks) != len(suites):
        raise ConfigError(f"--tasks was given {len(tasks)} times for {len(suites)} environments; give it once for each")
    named = [None] * len(suites) if not tasks else [[word.strip() for word in words.split(",")] for words in tasks]
    states = None if init_states is None else initial_states(init_states)
    plans = [plan_starts(s, names, episodes, states, seed) for s, names in zip(suites.values(), named, strict=True)]
    return tuple(start for plan in plans for start in plan)


def initial_states(text: str) -> list[int]:
    """Read `25:50`, whose end is left out, or `0,3,7`.

    Raises:
        ConfigError: If it is neither.
    """
    try:
        first, colon, end = text.partition(":")
        return list(range(int(first), int(end))) if colon else [int(word) for word in text.split(",")]
    except ValueError:
        raise ConfigError(f"--init-states {text}: write 25:50, which leaves out 50, or 0,3,7") from None


def _tasks_of(planned: Iterable[Start], name: str) -> list[int]:
    return list(dict.fromkeys(start.task for start in planned if start.environment == name))


def _engine(
    name: EngineName, workers: int, threads: int, limit: float, gpus: float, address: str | None
) -> LocalEngine | RayEngine:
    if name == EngineName.ray:
        from tokenprune.evaluation.ray_engine import RayEngine

        return RayEngine(workers, address, threads, gpus, limit)
    if gpus or address is not None:
        raise ConfigError("--gpus-per-worker and --address belong to --engine ray")
    from tokenprune.evaluation.local_engine import LocalEngine

    return LocalEngine(workers, threads, limit)


def _tell(
    path: Path,
    results: Results,
    baseline: str | None,
    labels: Sequence[str],
    planned: Iterable[Start],
    csv: Path | None,
    chart: Path | None,
    as_json: bool,
) -> None:
    """Print tables or data, and write what was asked for."""
    from tokenprune.evaluation.summary import summarise

    wanted = [record for record in results.records if record.variant in labels]
    summary = summarise(wanted, baseline, labels, planned)
    if csv is not None:
        summary.write_csv(csv)
    if chart is not None:
        _draw(summary, chart)
    if as_json:
        print_json({"settings": results.settings, "provenance": results.provenance, **summary.to_json()})
        return
    _print(summary)
    if results.settings.get("untrained"):
        print("The weights are untrained random numbers: success says nothing about pruning.\n")
    for written in filter(None, (csv, chart)):
        print(f"wrote {written}")
    print(f"results: {path}")


def _print(summary: Summary) -> None:
    from tokenprune.evaluation.table import WIDTH, eval_legend, eval_table, success_tables, verdict_lines

    console = Console(width=WIDTH, highlight=False)
    console.print(eval_table(summary))
    for table in success_tables(summary):
        console.print()
        console.print(table)
    print(f"\n{verdict_lines(summary)}\n\n{eval_legend(summary)}\n")


def _draw(summary: Summary, chart: Path) -> None:
    with charts():
        from tokenprune.evaluation.chart import write_success
    write_success(summary, chart)


@contextmanager
def _progress(total: int, done: Sequence[EpisodeRecord]) -> Iterator[Callable[[EpisodeRecord], None]]:
    """A bar on standard error with the success so far; lines instead where that is no terminal."""
    console = Console(file=sys.stderr)
    columns = (
        TextColumn("episodes"), BarColumn(), MofNCompleteColumn(), TextColumn("success {task.fields[share]}"),
        TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    counts = Counter(record.success for record in done)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:

        def share() -> str:
            return f"{counts[True] / counts.total():.0%}" if counts else "-"

        task = bar.add_task("episodes", total=total, completed=len(done), share=share())

        def show(record: EpisodeRecord) -> None:
            counts[record.success] += 1
            bar.update(task, advance=1, share=share())
            if not console.is_terminal:
                outcome = "success" if record.success else "failure"
                print(f"{record.start}: {record.variant}: {outcome} after {record.steps} steps", file=sys.stderr)

        yield show
