"""Verbs of closed-loop evaluation: eval runs episodes, report prints what a results file holds."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from tokenprune.cli.options import Json, ModelOptions, Plugins, Sets, key_values, registry, takes_model
from tokenprune.cli.output import needs_matplotlib, print_json
from tokenprune.errors import ConfigError
from tokenprune.evaluation.engines import EngineName

if TYPE_CHECKING:
    from tokenprune.evaluation.records import EpisodeRecord
    from tokenprune.evaluation.results_file import Results
    from tokenprune.evaluation.session import Begin, OnRecord
    from tokenprune.evaluation.starts import Start
    from tokenprune.evaluation.summary import Summary

EPISODES = 50

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


@takes_model()
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
    *,
    model: ModelOptions,
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
    from tokenprune.evaluation.engines import make_engine
    from tokenprune.evaluation.planning import initial_states, plan_episodes, plan_exact_episodes
    from tokenprune.evaluation.session import open_session
    from tokenprune.evaluation.starts import first_of_each_task
    from tokenprune.evaluation.variant import parse_variant
    from tokenprune.evaluation.worker import WorkerSpec

    found = registry(plugins)
    parsed = tuple(parse_variant(text, found, sets or ()) for text in variants)
    own = key_values("--env-option", env_options)
    if starts is not None:
        if environments or tasks or init_states:
            raise ConfigError("--starts says where every episode begins; leave out --env, --tasks and --init-states")
        plan = plan_exact_episodes(found, starts, own, episodes)
    elif environments:
        chosen = [[word.strip() for word in words.split(",")] for words in tasks or ()]
        states = None if init_states is None else initial_states(init_states)
        count = EPISODES if episodes is None else episodes
        plan = plan_episodes(found, environments, own, count, chosen, states, start_seed)
    else:
        raise ConfigError("name an environment with --env, or a file of starts with --starts")
    spec = WorkerSpec(
        backbone=model.backbone,
        checkpoint=model.checkpoint,
        preset=model.chosen_preset(found),
        options=model.own(),
        device=model.device,
        dtype=model.dtype,
        seed=model.seed,
        variants=parsed,
        environments=dict.fromkeys(plan.suites, plan.options),
        tasks=plan.tasks,
        execute=execute,
        replan=replan,
        execution=model.execution,
        plugins=tuple(str(path) for path in plugins or ()),
        videos=None if videos is None else str(videos),
        filmed=() if videos is None else first_of_each_task(plan.starts, 1),
    )
    running = make_engine(engine, workers, threads, limit, gpus, address)
    session = open_session(spec, plan, found)
    with _progress() as begin:
        results = session.run(running, out, begin)
    _show(out, results, baseline, list(session.variants), plan.starts, csv, chart, as_json)


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
    _show(results, read, baseline, labels, (), csv, chart, as_json)


def _show(
    path: Path,
    results: Results,
    baseline: str | None,
    labels: Sequence[str],
    planned: Iterable[Start],
    csv: Path | None,
    chart: Path | None,
    as_json: bool,
) -> None:
    """Print tables or data of these variants, and write the files asked for."""
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
    with needs_matplotlib("--chart"):
        from tokenprune.evaluation.chart import write_success
    write_success(summary, chart)


@contextmanager
def _progress() -> Iterator[Begin]:
    """Show a bar on standard error with the success so far, or a line per episode where that is no terminal."""
    console = Console(file=sys.stderr)
    columns = (
        TextColumn("episodes"), BarColumn(), MofNCompleteColumn(), TextColumn("success {task.fields[share]}"),
        TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:

        def begin(total: int, finished: Sequence[EpisodeRecord]) -> OnRecord:
            counts = Counter(record.success for record in finished)

            def share() -> str:
                return f"{counts[True] / counts.total():.0%}" if counts else "-"

            task = bar.add_task("episodes", total=total, completed=len(finished), share=share())

            def show(record: EpisodeRecord) -> None:
                counts[record.success] += 1
                bar.update(task, advance=1, share=share())
                if not console.is_terminal:
                    outcome = "success" if record.success else "failure"
                    print(f"{record.start}: {record.variant}: {outcome} after {record.steps} steps", file=sys.stderr)

            return show

        yield begin
