"""Write the page that lists every strategy, from the registry and the strategies' docstrings.

    python tools/strategies_page.py docs/strategies/all.md

A test fails if the page is out of date.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from pathlib import Path
from typing import Any

from tokenprune.pipelines.costs import costs
from tokenprune.pipelines.loader import load_pipeline
from tokenprune.registry.discovery import Registry
from tokenprune.registry.specs import CAPABILITIES
from tokenprune.stages.config import CutConfig

ROOT = Path(__file__).resolve().parents[1]
HEAD = """# All strategies

Made from the code by `tools/strategies_page.py`. Each strategy is one file and says below what it does, in its own
words, and where it differs from its paper or from the code released with it. `tokenprune show NAME` prints the same
keys, `tokenprune explain NAME` what a pipeline costs, `tokenprune check NAME` that it keeps every promise.
"""
CAPABILITY_HEAD = "Some need what not every backbone offers, and are refused by the others before the first query:"
RELEASES = {"openvla": "7b", "openvla-oft": "7b", "pi0": "base", "pi05": "base"}
INSTRUCTION = "put the bowl on the plate"
COST_HEAD = """## What runs where, and what it saves

FLOPs of the dense query over the pipeline's own, at the releases' dimensions, counted from the plan
(`tokenprune explain --all` does it for one backbone; `tokenprune list --matrix` runs everything everywhere). Where a
pipeline has several modes there is a number for each; "from 1.00" means that counts depend on what is seen. The last
column is what choosing costs on openvla-oft, in % of the dense query's FLOPs: attention computed for stages, merging,
and what stages multiply themselves. How much of this becomes time is measured, not counted."""
KEYS = "`after`, `keep`, `views`, `of`, `floor`, `bucket` and `weight` are the same in every stage that cuts."


def page(registry: Registry) -> str:
    """Return the page as Markdown; only strategies that ship with tokenprune."""
    stages = {
        name: registered
        for name, registered in registry.stages.items()
        if registered.spec.target.startswith("tokenprune_plugins")
    }
    backbones = {
        name: registry.backbone_factory(name).describe("tiny", None, {}).info for name in sorted(registry.backbones)
    }
    rows = ["| stage | what it does | kind | paper |", "| --- | --- | --- | --- |"]
    rows += [
        f"| [`{name}`](#{name.replace('.', '')}) | {r.spec.summary} | {r.spec.kind} | {r.spec.paper} |"
        for name, r in stages.items()
    ]
    parts = [HEAD, "\n".join(rows)]
    parts.append(
        CAPABILITY_HEAD + "\n\n| | stages | " + " | ".join(backbones) + " |\n" + "| --- " * (2 + len(backbones)) + "|"
    )
    for capability, meaning in CAPABILITIES.items():
        needing = [f"`{name}`" for name, r in stages.items() if capability in r.spec.requires]
        if needing:
            offered = ("yes" if capability in info.capabilities else "no" for info in backbones.values())
            parts[-1] += f"\n| {meaning} | {', '.join(needing)} | {' | '.join(offered)} |"
    parts += [_saved(registry), "## The strategies\n\n" + KEYS]
    parts += [_section(name, registry.stage_class(name)) for name in stages]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def _saved(registry: Registry) -> str:
    """The table of FLOP ratios of every shipped pipeline on every backbone."""
    shipped = [
        load_pipeline(name, registry)
        for name, registered in sorted(registry.pipelines.items())
        if registered.spec.package == "tokenprune_plugins"
    ]
    cells: dict[str, dict[str, str]] = {loaded.label: {} for loaded in shipped}
    choosing: dict[str, str] = {}
    for backbone, preset in RELEASES.items():
        described = registry.backbone_factory(backbone).describe(preset, None, {})
        rows, refused = costs(shipped, described.info, described.layout(INSTRUCTION), registry)
        for label in cells:
            mine = [row for row in rows if row.pipeline == label]
            ratios = [("from " if row.at_most else "") + f"{row.flop_ratio:.2f}" for row in mine]
            needs = "weights of yours" if "give its weights" in refused.get(label, "") else "no"
            cells[label][backbone] = ", ".join(dict.fromkeys(ratios)) or needs
            if backbone == "openvla-oft":
                choosing[label] = ", ".join(dict.fromkeys(f"{100 * row.share:.2g}" for row in mine))
    lines = ["| pipeline | " + " | ".join(RELEASES) + " | choosing, % |", "| --- " * (2 + len(RELEASES)) + "|"]
    lines += [f"| `{label}` | {' | '.join(cells[label].values())} | {choosing[label]} |" for label in cells]
    return COST_HEAD + "\n\n" + "\n".join(lines)


def _section(name: str, stage: type[Any]) -> str:
    module = importlib.import_module(stage.__module__)
    words = inspect.cleandoc(module.__doc__ or "")
    own = inspect.cleandoc(stage.__doc__ or "").split("\n\n")[0]
    lines = [f"## {name}", "", own.replace("\n", " "), "", words]
    fields = {key: field for key, field in stage.Config.model_fields.items() if key not in {*CutConfig.model_fields}}
    if fields:
        lines += ["", "| key | default | |", "| --- | --- | --- |"]
    for key, field in fields.items():
        default = "required" if field.is_required() else f"`{_shown(field.get_default(call_default_factory=True))}`"
        about = " ".join((field.description or "").split()).replace("|", "\\|")
        lines.append(f"| `{key}` | {default} | {about} |")
    return "\n".join(lines)


def _shown(value: Any) -> str:  # noqa: ANN401
    return str(list(value)) if isinstance(value, tuple) else str(value)


def main() -> None:
    """Write the page."""
    Path(sys.argv[1]).write_text(page(Registry.discover()), encoding="utf-8")


if __name__ == "__main__":
    main()
