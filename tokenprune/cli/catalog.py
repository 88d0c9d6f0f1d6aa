"""Verbs that say what is installed: list, show, schema, validate, doctor. `list` and `doctor` import no torch."""

from __future__ import annotations

import fnmatch
import platform
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from tokenprune.cli.options import Json, ModelOptions, Plugins, Sets, registry, takes_model
from tokenprune.cli.output import print_json
from tokenprune.errors import ConfigError, PluginError, TokenPruneError, nearest
from tokenprune.registry.discovery import Registry
from tokenprune.registry.specs import HOOK_API_VERSION


def add_to(app: typer.Typer) -> None:
    """Register the verbs."""
    app.command("list")(list_)
    for verb in (show, validate, schema, doctor):
        app.command()(verb)


def list_(
    pattern: Annotated[str, typer.Argument(help="Names to show, with * as wildcard.")] = "*",
    matrix: Annotated[bool, typer.Option("--matrix", help="Run each stage and pipeline on each backbone.")] = False,
    plugins: Plugins = None,
    as_json: Json = False,
) -> None:
    """List the stages, pipelines, backbones and environments that are installed, and whose they are."""
    found = registry(plugins)
    if matrix:
        from tokenprune.cli.matrix import show_matrix

        show_matrix(found, pattern, as_json)
        return
    entries = [entry for entry in _entries(found) if fnmatch.fnmatch(entry["name"], pattern)]
    if as_json:
        print_json(entries)
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for heading in ("kind", "name", "summary", "from"):
        table.add_column(heading, overflow="fold")
    for entry in entries:
        table.add_row(entry["kind"], entry["name"], entry["summary"], entry["from"])
    Console().print(table)
    if found.quarantined:
        Console(stderr=True).print(f"{len(found.quarantined)} plugin(s) could not be loaded; see `tokenprune doctor`")


def _entries(found: Registry) -> list[dict[str, str]]:
    def entry(kind: str, name: str, summary: str, owner: Any) -> dict[str, str]:  # noqa: ANN401
        return {"kind": kind, "name": name, "summary": summary, "from": f"{owner.distribution} {owner.version}"}

    stages = [entry(f"stage/{r.spec.kind}", n, r.spec.summary, r.owner) for n, r in sorted(found.stages.items())]
    pipelines = [entry("pipeline", n, r.spec.summary, r.owner) for n, r in sorted(found.pipelines.items())]
    backbones = [entry("backbone", n, r.spec.summary, r.owner) for n, r in sorted(found.backbones.items())]
    environments = [entry("environment", n, r.spec.summary, r.owner) for n, r in sorted(found.environments.items())]
    dense = {"kind": "pipeline", "name": "dense", "summary": "no stages: the baseline", "from": "tokenprune"}
    return [*stages, dense, *pipelines, *backbones, *environments]


def show(
    name: Annotated[str, typer.Argument(help="A stage, pipeline, backbone or environment.")],
    plugins: Plugins = None,
    as_json: Json = False,
) -> None:
    """Show a stage's configuration, a pipeline as resolved, a backbone's presets, or an environment's tasks."""
    found = registry(plugins)
    about: dict[str, Any] = {}
    if name in found.stages:
        registered = found.stages[name]
        config = found.stage_class(name).Config
        fields = {}
        for key, field in config.model_fields.items():
            default = "required" if field.is_required() else field.get_default(call_default_factory=True)
            fields[key] = {"default": default, "about": field.description or ""}
        about["stage"] = {
            **_owned(registered),
            "paper": registered.spec.paper,
            "requires": sorted(registered.spec.requires),
            "config": fields,
        }
    if name in found.pipelines or name == "dense":
        from tokenprune.pipelines.loader import load_pipeline

        about["pipeline"] = load_pipeline(name, found).resolved
    if name in found.backbones:
        about["backbone"] = {**_owned(found.backbones[name]), "presets": dict(found.backbones[name].spec.presets)}
    if name in found.environments:
        suite = found.environment_factory(name).describe(name, {})
        tasks = {str(task.index): f"{task.instruction} ({task.init_states} initial states)" for task in suite.tasks}
        about["environment"] = {
            **_owned(found.environments[name]),
            "views": list(suite.views),
            "horizon": suite.horizon,
            "control_hz": suite.control_hz,
            "settings": dict(suite.settings),
            "tasks": tasks,
        }
    if not about:
        names = [*found.stages, *found.pipelines, *found.backbones, *found.environments, "dense"]
        raise PluginError(f"nothing is called '{name}'{nearest(name, names)}")
    if as_json:
        print_json(about)
        return
    console = Console()
    for kind, facts in about.items():
        console.print(f"[bold]{kind} {name}[/bold]")
        _print_facts(console, facts, "  ")


def _owned(registered: Any) -> dict[str, Any]:  # noqa: ANN401
    owner = registered.owner
    return {
        "summary": registered.spec.summary,
        "from": f"{owner.distribution} {owner.version}",
        "module": registered.spec.target,
    }


def _print_facts(console: Console, facts: dict[str, Any], indent: str) -> None:
    for key, value in facts.items():
        if isinstance(value, dict) and "about" in value:
            console.print(f"{indent}{key} = {value['default']!r}  {value['about']}", highlight=False, markup=False)
        elif isinstance(value, dict):
            console.print(f"{indent}{key}:", highlight=False, markup=False)
            _print_facts(console, value, indent + "  ")
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            for number, item in enumerate(value):
                console.print(f"{indent}{key}.{number}:", highlight=False, markup=False)
                _print_facts(console, item, indent + "  ")
        else:
            console.print(f"{indent}{key}: {value}", highlight=False, markup=False)


@takes_model("preset", "checkpoint", "options")
def validate(
    files: Annotated[list[str], typer.Argument(help="Pipeline files or names.")],
    backbone: Annotated[str | None, typer.Option(help="Also check against this backbone.")] = None,
    *,
    model: ModelOptions,
    sets: Sets = None,
    plugins: Plugins = None,
    as_json: Json = False,
) -> None:
    """Check pipeline files; exit 1 if any is wrong. Nothing is run and no weight is read."""
    from tokenprune.pipelines.binding import bind
    from tokenprune.pipelines.loader import load_pipeline

    found = registry(plugins)
    findings: list[dict[str, str]] = []
    for file in files:
        try:
            config = load_pipeline(file, found, sets or ()).config
            if backbone is not None:
                described = replace(model, backbone=backbone).describe(found)
                bound = bind(config, described.info, found)
                for mode in config.modes:
                    bound.plan(described.layout("put the bowl on the plate"), mode)
        except ConfigError as error:
            findings += [{"file": file, "error": line} for line in str(error).splitlines()]
        except TokenPruneError as error:
            findings.append({"file": file, "error": str(error)})
    if as_json:
        print_json(findings)
    else:
        for finding in findings:
            print(finding["error"])
        if not findings:
            print(f"{len(files)} pipeline(s) are fine")
    if findings:
        raise typer.Exit(1)


def schema(
    out: Annotated[Path | None, typer.Option(help="File to write; standard output when left out.")] = None,
    plugins: Plugins = None,
) -> None:
    """Print the JSON schema of pipeline files, made from the installed stages, for your editor."""
    import json

    from tokenprune.pipelines.loader import pipeline_schema

    text = json.dumps(pipeline_schema(registry(plugins)), indent=1) + "\n"
    if out is None:
        print(text, end="")
    else:
        out.write_text(text, encoding="utf-8")
        print(f"wrote {out}; begin a pipeline file with\n# yaml-language-server: $schema={out.name}")


def doctor(plugins: Plugins = None, as_json: Json = False) -> None:
    """Say what is installed and which plugins are broken, with their tracebacks; exit 1 if any is."""
    import importlib.metadata

    found = registry(plugins)
    packages = {}
    for package in ("tokenprune-vla", "torch", "transformers", "pluggy", "pydantic", "numpy"):
        try:
            packages[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            packages[package] = "missing"
    facts = {
        "python": platform.python_version(),
        "hook_api": HOOK_API_VERSION,
        "packages": packages,
        "stages": len(found.stages),
        "pipelines": len(found.pipelines),
        "backbones": len(found.backbones),
        "broken": [
            {
                "plugin": q.name,
                "from": f"{q.owner.distribution} {q.owner.version}",
                "error": q.error,
                "traceback": q.traceback,
            }
            for q in found.quarantined
        ],
        "disabled_but_unknown": list(found.unknown_disabled),
    }
    if as_json:
        print_json(facts)
    else:
        _print_doctor(facts)
    if found.quarantined or found.unknown_disabled:
        raise typer.Exit(1)


def _print_doctor(facts: dict[str, Any]) -> None:
    print(f"python {facts['python']}, " + ", ".join(f"{name} {version}" for name, version in facts["packages"].items()))
    counts = ", ".join(f"{facts[kind]} {kind}" for kind in ("stages", "pipelines", "backbones"))
    print(f"hook API {facts['hook_api']}: {counts}")
    for broken in facts["broken"]:
        print(f"\nbroken plugin '{broken['plugin']}' from {broken['from']}: {broken['error']}\n{broken['traceback']}")
    for name in facts["disabled_but_unknown"]:
        print(f"\nTOKENPRUNE_DISABLE names '{name}', which is not installed")
    if not facts["broken"]:
        print("every plugin loads")
