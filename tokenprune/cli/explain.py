"""`tokenprune explain`: what a pipeline would do on a backbone; no weights are made or read."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated, Any

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
    from tokenprune.pipelines.binding import BoundPipeline
    from tokenprune.pipelines.loader import LoadedPipeline
    from tokenprune.registry.discovery import Registry
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
    from tokenprune.pipelines.binding import bind
    from tokenprune.pipelines.loader import load_pipeline

    found = registry(plugins)
    if (pipeline is None) == (not every):
        raise ConfigError("name a pipeline, or give --all")
    described = model.describe(found)
    info = described.info
    if depth is not None:
        info = replace(info, decoder=replace(info.decoder, depth=depth))
    instruction = instruction or open_episode(None, found, model.backbone).instruction
    layout = described.layout(instruction)
    if pipeline is None:
        _explain_all([load_pipeline(name, found) for name in sorted(found.pipelines)], info, layout, found, as_json)
        return
    loaded = load_pipeline(pipeline, found, sets or ())
    bound = bind(loaded.config, info, found)
    facts = {
        "pipeline": loaded.resolved,
        "backbone": f"{info.name} {info.source}"
        + (", untrained" if info.untrained else "")
        + (f", as if of {depth} layers" if depth is not None else ""),
        "instruction": instruction,
        "tokens": layout.n_tokens,
        "segments": [
            {"role": s.role.value, "view": s.view, "start": s.start, "length": s.length, "prunable": s.prunable}
            for s in layout.segments
        ],
        "hooks": [
            {"hook": hook, "stage": bound.names[call.stage], "from": _owner(found, bound.names[call.stage])}
            for hook, calls in bound.hooks.items()
            for call in calls
        ],
        "notes": [
            f"{name}: {note}"
            for name, stage in zip(bound.names, bound.stages, strict=True)
            if (note := stage.caveats(info))
        ],
        "modes": {mode: _mode(bound, info, layout, mode) for mode in loaded.config.modes},
        **_limits(info, layout),
    }
    if as_json:
        print_json(facts)
    else:
        _print(facts)


def _explain_all(
    pipelines: Sequence[LoadedPipeline], info: BackboneInfo, layout: TokenLayout, found: Registry, as_json: bool
) -> None:
    from tokenprune.pipelines.costs import costs

    rows, refused = costs(pipelines, info, layout, found)
    if as_json:
        print_json({"pipelines": [asdict(row) for row in rows], "refused": refused})
        return
    print(f"{info.name} {info.source}: {len(layout.prunable)} visual tokens of {layout.n_tokens}\n")
    table = _table("pipeline", "mode", "tokens", "last", "FLOP\nratio", "choosing\nGFLOP", "% of\ndense")
    for row in rows:
        bound = "<= " if row.at_most else ""
        numbers = (f"{row.flop_ratio:.2f}", f"{row.choosing / 1e9:.3g}", f"{100 * row.share:.2g}")
        mode = "" if row.mode == "default" else row.mode
        table.add_row(row.pipeline, mode, f"{bound}{row.tokens_mean:.0f}", str(row.tokens_last), *numbers)
    Console(width=WIDTH, highlight=False).print(table)
    said = (
        "tokens: visual tokens held, mean over layers, and by the last. Choosing: attention computed for stages, "
        "merging, and what stages multiply themselves; sorting and comparing are no FLOPs, their time is in "
        "`compare` and `bench`. <=: counts depend on what is seen."
    )
    print("\n" + textwrap.fill(said, WIDTH))
    for why in refused.values():
        print(textwrap.fill(f"left out: {why}", WIDTH))


def _owner(found: Registry, stage: str) -> str:
    owner = found.stage(stage).owner
    return f"{owner.distribution} {owner.version}"


def _limits(info: BackboneInfo, layout: TokenLayout) -> dict[str, Any]:
    """What no pruning of visual tokens can go beyond on this backbone."""
    from tokenprune.model.flops import ceiling, layer_weights, query_flops
    from tokenprune.tokens.plan import Plan

    limits: dict[str, Any] = {"ceiling": {"embedding": ceiling(info, layout, -1), "1": ceiling(info, layout, 1)}}
    if info.follow_up is not None:
        dense = query_flops(info, Plan.dense(layout, info.decoder.depth))
        shape, passes = info.follow_up.decoder, info.follow_up.passes
        limits["unprunable"] = {
            "phase": info.follow_up.phase,
            "passes": len(passes),
            "most_tokens": max(rows for rows, _ in passes),
            "share_of_dense_flops": dense.follow_up / dense.total,
            "weights_read_each": shape.depth * layer_weights(shape),
        }
    return limits


def _mode(bound: BoundPipeline, info: BackboneInfo, layout: TokenLayout, mode: str) -> dict[str, Any]:
    from tokenprune.engine.trace import cut_name
    from tokenprune.model.flops import keys_probed, probe_flops, query_flops
    from tokenprune.pipelines.costs import planned_flops, rows_probed
    from tokenprune.stages.token_context import rows_name
    from tokenprune.tokens.plan import Plan

    plan = bound.plan(layout, mode)
    asked = {probe for stage in bound.stages for probe in stage.probes(info, layout, mode)}
    probes = sorted((p.layer, rows_name(p.rows), rows_probed(p, layout, plan.tokens), p.ahead) for p in asked)
    own = planned_flops(bound, layout, mode)
    dense = query_flops(info, Plan.dense(layout, info.decoder.depth, mode))
    return {
        "cuts": [
            {
                "after": cut_name(cut.after),
                "found": cut.found,
                "keep": cut.keep,
                "at_most": cut.union,
                "views": {"+".join(group.views): group.keep for group in cut.groups},
                "stages": [bound.names[i] for i in cut.stages],
            }
            for cut in plan.cuts
        ],
        "layers": [
            {"layer": layer, "tokens": tokens, "prunable": prunable, "gflops": own.layers[layer] / 1e9}
            for layer, (tokens, prunable) in enumerate(zip(plan.tokens, plan.prunable, strict=True))
        ],
        "probes": [
            {
                "layer": layer,
                "rows": rows,
                "count": count,
                "ahead": ahead,
                "gflops": probe_flops(info.decoder, count, keys_probed(plan, layer, ahead), ahead) / 1e9,
            }
            for layer, rows, count, ahead in probes
        ],
        "graph_safe": plan.graph_safe,
        "gflops": {
            **{part: n / 1e9 for part, n in own.other.items()},
            "decoder": own.decoder / 1e9,
            **({info.follow_up.phase: own.follow_up / 1e9} if info.follow_up is not None else {}),
            "probes": own.probe / 1e9,
            "total": own.total / 1e9,
            "dense": dense.total / 1e9,
        },
        "flop_ratio": dense.total / own.total,
    }


def _print(facts: dict[str, Any]) -> None:
    console = Console(highlight=False)
    asked = f'{facts["tokens"]} tokens for "{facts["instruction"]}"'
    print(textwrap.fill(f"{facts['pipeline']['name']} on {facts['backbone']}: {asked}", WIDTH))
    parts = [f"{s['view'] or s['role']} {s['length']}" for s in facts["segments"]]
    print(f"sequence: {' | '.join(parts)}\n")
    if facts["hooks"]:
        table = _table("hook", "stage", "from")
        for hook in facts["hooks"]:
            table.add_row(hook["hook"], hook["stage"], hook["from"])
        console.print(table)
    for note in facts["notes"]:
        print(note)
    _print_limits(facts)
    for mode, plan in facts["modes"].items():
        print(f"\nmode {mode}")
        _print_cuts(console, plan)
        _print_layers(console, plan)
        gflops = plan["gflops"]
        other = ", ".join(f"{part} {n:.4g}" for part, n in gflops.items() if part not in ("total", "dense"))
        print(textwrap.fill(f"GFLOP: {other}", WIDTH))
        print(f"total {gflops['total']:.4g} of dense {gflops['dense']:.4g}: {plan['flop_ratio']:.2f} times fewer")
        if not plan["graph_safe"]:
            print("counts depend on the input: not safe for CUDA graphs; numbers above are upper bounds")


def _print_limits(facts: dict[str, Any]) -> None:
    first, second = facts["ceiling"].values()
    said = f"ceiling: {first:.2f} times fewer FLOPs without any visual token, {second:.2f} if all leave after layer 1"
    print(textwrap.fill(said, WIDTH))
    if "unprunable" in facts:
        fixed = facts["unprunable"]
        said = (
            f"{fixed['phase']} cannot be pruned: {fixed['passes']} passes over {_tokens(fixed['most_tokens'])}, "
            f"{100 * fixed['share_of_dense_flops']:.1f} % of the dense FLOPs; each reads "
            f"{_count(fixed['weights_read_each'])} weights, and only its attention to the rest gets shorter"
        )
        print(textwrap.fill(said, WIDTH))


def _tokens(most: int) -> str:
    return "one token" if most == 1 else f"at most {most} tokens"


def _count(n: int) -> str:
    return f"{n / 1e9:.2f} billion" if n >= 1e8 else f"{n / 1e6:.1f} million"


def _print_cuts(console: Console, plan: dict[str, Any]) -> None:
    if not plan["cuts"]:
        print("no cuts")
        return
    table = _table("cut after", "finds", "keeps", "views", "asked")
    for cut in plan["cuts"]:
        views = ", ".join(f"{view} {keep}" for view, keep in cut["views"].items())
        table.add_row(
            str(cut["after"]),
            str(cut["found"]),
            ("<= " if cut["at_most"] else "") + str(cut["keep"]),
            views,
            ", ".join(cut["stages"]),
        )
    console.print(table)


def _print_layers(console: Console, plan: dict[str, Any]) -> None:
    table = _table("layers", "tokens", "visual", "GFLOP", "attention computed after layer")
    layers = plan["layers"]
    starts = [i for i, layer in enumerate(layers) if i == 0 or layer["tokens"] != layers[i - 1]["tokens"]]
    for start, stop in zip(starts, [*starts[1:], len(layers)], strict=True):
        run = layers[start:stop]
        probes = "; ".join(
            f"{p['layer'] - p['ahead']}: {p['count']} {p['rows']} rows{' of the next' if p['ahead'] else ''}, "
            f"{1e3 * p['gflops']:.3g} MFLOP"
            for p in plan["probes"]
            if start <= max(p["layer"] - p["ahead"], 0) < stop
        )
        name = str(start) if stop == start + 1 else f"{start}-{stop - 1}"
        table.add_row(
            name, str(run[0]["tokens"]), str(run[0]["prunable"]), f"{sum(layer['gflops'] for layer in run):.4g}", probes
        )
    console.print(table)


def _table(*headings: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for heading in headings:
        table.add_column(heading, overflow="fold")
    return table
