"""`tokenprune explain`: what a pipeline would do on a backbone; no weights are made or read."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from tokenprune.cli.options import Json, ModelOptions, Plugins, Sets, registry, takes_model
from tokenprune.cli.output import print_json
from tokenprune.errors import ConfigError
from tokenprune.report.text import WIDTH

if TYPE_CHECKING:
    from tokenprune.model.info import BackboneInfo
    from tokenprune.pipelines.costs import Cost
    from tokenprune.pipelines.explain import ExplainedMode, Explanation
    from tokenprune.tokens.layout import TokenLayout


def add_to(app: typer.Typer) -> None:
    """Register the verb."""
    app.command()(explain)


@takes_model("backbone", "preset", "checkpoint", "options")
def explain(
    pipeline: Annotated[str | None, typer.Argument(help="A pipeline file or name.")] = None,
    *,
    model: ModelOptions,
    instruction: Annotated[str | None, typer.Option(help="The bundled episode's when left out.")] = None,
    depth: Annotated[int | None, typer.Option(min=2, help="Explain it as if the decoder had this many layers.")] = None,
    every: Annotated[bool, typer.Option("--all", help="Every shipped pipeline instead, a line each.")] = False,
    sets: Sets = None,
    plugins: Plugins = None,
    as_json: Json = False,
) -> None:
    """Show tokens and FLOPs per layer, every cut, who is asked in which order, and what asking costs.

    With `--all`, what choosing costs each shipped pipeline.
    """
    from tokenprune.compare.episode_source import open_episode
    from tokenprune.pipelines.costs import costs
    from tokenprune.pipelines.explain import explain as explain_pipeline
    from tokenprune.pipelines.explain import with_depth
    from tokenprune.pipelines.loader import load_pipeline, load_pipelines

    found = registry(plugins)
    if (pipeline is None) == (not every):
        raise ConfigError("name a pipeline, or give --all")
    described = model.describe(found)
    info = described.info if depth is None else with_depth(described.info, depth)
    instruction = instruction or open_episode(None, found, model.backbone).instruction
    layout = described.layout(instruction)
    if pipeline is None:
        rows, refused = costs(load_pipelines(sorted(found.pipelines), found), info, layout, found)
        if as_json:
            print_json({"pipelines": [asdict(row) for row in rows], "refused": refused})
        else:
            _print_costs(rows, refused, info, layout)
        return
    explanation = explain_pipeline(load_pipeline(pipeline, found, sets or ()), info, layout, instruction, found)
    if as_json:
        print_json(explanation.to_json())
    else:
        _print(explanation)


def _print_costs(rows: Sequence[Cost], refused: Mapping[str, str], info: BackboneInfo, layout: TokenLayout) -> None:
    print(f"{info.name} {info.source}: {len(layout.prunable)} visual tokens of {layout.n_tokens}\n")
    table = _table("pipeline", "mode", "tokens", "last", "FLOP\nratio", "choosing\nGFLOP", "% of\ndense")
    for row in rows:
        bound = "<= " if row.at_most else ""
        numbers = (f"{row.flop_ratio:.2f}", f"{row.choosing / 1e9:.3g}", f"{100 * row.share:.2g}")
        mode = "" if row.mode == "default" else row.mode
        table.add_row(row.pipeline, mode, f"{bound}{row.tokens_mean:.0f}", str(row.tokens_last), *numbers)
    Console(width=WIDTH, highlight=False).print(table)
    legend = (
        "tokens: visual tokens held, mean over layers, and by the last. Choosing: attention computed for stages, "
        "merging, and what stages multiply themselves; sorting and comparing are no FLOPs, their time is in "
        "`compare` and `bench`. <=: counts depend on what is seen."
    )
    print("\n" + textwrap.fill(legend, WIDTH))
    for reason in refused.values():
        print(textwrap.fill(f"left out: {reason}", WIDTH))


def _print(explanation: Explanation) -> None:
    console = Console(highlight=False)
    layout = explanation.layout
    tokens = f'{layout.n_tokens} tokens for "{explanation.instruction}"'
    print(textwrap.fill(f"{explanation.pipeline['name']} on {explanation.backbone}: {tokens}", WIDTH))
    print(f"sequence: {' | '.join(f'{s.view or s.role.value} {s.length}' for s in layout.segments)}\n")
    if explanation.hooks:
        table = _table("hook", "stage", "after layer", "from")
        for call in explanation.hooks:
            table.add_row(call.hook, call.stage, _ranges(call.layers), call.owner)
        console.print(table)
    for caveat in explanation.caveats:
        print(caveat)
    _print_limits(explanation)
    for name, mode in explanation.modes.items():
        print(f"\nmode {name}")
        _print_cuts(console, mode)
        _print_layers(console, mode)
        other = ", ".join(f"{part} {n:.4g}" for part, n in mode.gflops.items() if part not in ("total", "dense"))
        print(textwrap.fill(f"GFLOP: {other}", WIDTH))
        total, dense = mode.gflops["total"], mode.gflops["dense"]
        print(f"total {total:.4g} of dense {dense:.4g}: {mode.flop_ratio:.2f} times fewer")
        if not mode.graph_safe:
            print("counts depend on the input: not safe for CUDA graphs; numbers above are upper bounds")


def _print_limits(explanation: Explanation) -> None:
    first, second = explanation.ceiling.values()
    limit = f"ceiling: {first:.2f} times fewer FLOPs without any visual token, {second:.2f} if all leave after layer 1"
    print(textwrap.fill(limit, WIDTH))
    if (fixed := explanation.unprunable) is not None:
        limit = (
            f"{fixed.phase} cannot be pruned: {fixed.passes} passes over {_tokens(fixed.most_tokens)}, "
            f"{100 * fixed.share_of_dense_flops:.1f} % of the dense FLOPs; each reads "
            f"{_count(fixed.weights_read_each)} weights, and only its attention to the rest gets shorter"
        )
        print(textwrap.fill(limit, WIDTH))


def _tokens(most: int) -> str:
    return "one token" if most == 1 else f"at most {most} tokens"


def _count(n: int) -> str:
    return f"{n / 1e9:.2f} billion" if n >= 1e8 else f"{n / 1e6:.1f} million"


def _print_cuts(console: Console, mode: ExplainedMode) -> None:
    if not mode.cuts:
        print("no cuts")
        return
    table = _table("cut after", "finds", "keeps", "views", "asked")
    for cut in mode.cuts:
        views = ", ".join(f"{view} {keep}" for view, keep in cut.views.items())
        keeps = f"{'<= ' if cut.at_most else ''}{cut.keep}"
        table.add_row(cut.after, str(cut.found), keeps, views, ", ".join(cut.stages))
    console.print(table)


def _print_layers(console: Console, mode: ExplainedMode) -> None:
    table = _table("layers", "tokens", "visual", "GFLOP", "attention computed after layer")
    layers = mode.layers
    starts = [i for i, layer in enumerate(layers) if i == 0 or layer.tokens != layers[i - 1].tokens]
    for start, stop in zip(starts, [*starts[1:], len(layers)], strict=True):
        run = layers[start:stop]
        probes = "; ".join(
            f"{p.layer - p.ahead}: {p.count} {p.rows} rows{' of the next' if p.ahead else ''}, "
            f"{1e3 * p.gflops:.3g} MFLOP"
            for p in mode.probes
            if start <= max(p.layer - p.ahead, 0) < stop
        )
        gflops = f"{sum(layer.gflops for layer in run):.4g}"
        table.add_row(_range(start, stop - 1), str(run[0].tokens), str(run[0].prunable), gflops, probes)
    console.print(table)


def _ranges(layers: Sequence[int]) -> str:
    """Ascending layers with runs joined: `0-2, 5`."""
    starts = [i for i, layer in enumerate(layers) if i == 0 or layer != layers[i - 1] + 1]
    stops = [*starts[1:], len(layers)][: len(starts)]
    return ", ".join(_range(layers[start], layers[stop - 1]) for start, stop in zip(starts, stops, strict=True))


def _range(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"


def _table(*headings: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for heading in headings:
        table.add_column(heading, overflow="fold")
    return table
