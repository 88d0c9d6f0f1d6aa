"""`tokenprune new`: a plugin package or a pipeline file to begin with."""

from __future__ import annotations

import importlib.resources
import re
from pathlib import Path
from string import Template
from typing import Annotated

import typer

from tokenprune.cli.options import registry
from tokenprune.errors import ConfigError

app = typer.Typer(help="Begin a plugin package or a pipeline file.", no_args_is_help=True)
Folder = Annotated[Path, typer.Option("--in", help="Folder to write it in.")]


def add_to(parent: typer.Typer) -> None:
    """Register the verb and its two nouns."""
    parent.add_typer(app, name="new")


@app.command()
def plugin(
    name: Annotated[str, typer.Argument(help="Name of its stage: lower-case letters, digits and underscores.")],
    folder: Folder = Path(),
) -> None:
    """Write a package with one stage that installs, passes `tokenprune check` and its own tests as it is."""
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise ConfigError(f"'{name}' is no name for a stage; write lower-case letters, digits and underscores")
    taken = registry(None).stages.get(name)
    if taken is not None:
        raise ConfigError(f"a stage called '{name}' exists already, from {taken.owner}; choose another name")
    class_name = "".join(part.capitalize() for part in name.split("_"))
    values = {
        "name": name, "dashed": name.replace("_", "-"), "module": f"tokenprune_{name}", "class_name": class_name,
    }  # fmt: skip
    root = folder / f"tokenprune-{values['dashed']}"
    if root.exists():
        raise ConfigError(f"{root} exists already; nothing was written")
    for source, path in _files(values):
        target = root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(Template(source).substitute(values) if source else "", encoding="utf-8")
    print(f"wrote {root}; next:\n")
    print(f'  pip install -e "{root}[dev]"\n  tokenprune check {name}\n  pytest {root}')


@app.command()
def pipeline(
    name: Annotated[str, typer.Argument(help="Name of the pipeline.")],
    folder: Folder = Path(),
) -> None:
    """Write a pipeline file with one stage and a word on every key."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9_.\-]*", name):
        raise ConfigError(f"'{name}' is no name for a pipeline; write lower-case letters, digits, and any of _.-")
    path = folder / f"{name}.yaml"
    if path.exists():
        raise ConfigError(f"{path} exists already; nothing was written")
    path.write_text(Template(_read("pipeline.yaml.tmpl")).substitute(name=name), encoding="utf-8")
    print(f"wrote {path}; next:\n\n  tokenprune validate {path}\n  tokenprune explain {path}")


def _files(values: dict[str, str]) -> list[tuple[str, str]]:
    """Templates, and where in the package each goes; an empty one is an empty file."""
    module, name = values["module"], values["name"]
    return [
        (_read("plugin/pyproject.toml.tmpl"), "pyproject.toml"),
        (_read("plugin/README.md.tmpl"), "README.md"),
        (_read("plugin/package/__init__.py.tmpl"), f"{module}/__init__.py"),
        (_read("plugin/package/stage.py.tmpl"), f"{module}/stage.py"),
        ("", f"{module}/py.typed"),
        (_read("plugin/package/pipelines/pipeline.yaml.tmpl"), f"{module}/pipelines/{name}.yaml"),
        (_read("plugin/tests/test_plugin.py.tmpl"), f"tests/test_{name}.py"),
    ]


def _read(path: str) -> str:
    return importlib.resources.files("tokenprune.cli").joinpath("templates", path).read_text(encoding="utf-8")
