"""`tokenprune new`: a plugin or backbone package, or a pipeline file, to begin with."""

from __future__ import annotations

import importlib.resources
import re
from collections.abc import Mapping
from pathlib import Path
from string import Template
from typing import Annotated, Any

import typer

from tokenprune.cli.options import registry
from tokenprune.errors import ConfigError
from tokenprune.registry.plugin_checks import Registered

app = typer.Typer(help="Begin a plugin package, a backbone package or a pipeline file.", no_args_is_help=True)
Folder = Annotated[Path, typer.Option("--in", help="Folder to write it in.")]
TEMPLATES: Mapping[str, Mapping[str, str]] = {
    "stage": {
        "plugin/pyproject.toml.tmpl": "pyproject.toml",
        "plugin/README.md.tmpl": "README.md",
        "plugin/package/__init__.py.tmpl": "$module/__init__.py",
        "plugin/package/stage.py.tmpl": "$module/stage.py",
        "plugin/package/pipelines/pipeline.yaml.tmpl": "$module/pipelines/$name.yaml",
        "plugin/tests/test_plugin.py.tmpl": "tests/test_$name.py",
    },
    "backbone": {
        "backbone/pyproject.toml.tmpl": "pyproject.toml",
        "backbone/README.md.tmpl": "README.md",
        "backbone/package/__init__.py.tmpl": "$module/__init__.py",
        "backbone/package/config.py.tmpl": "$module/config.py",
        "backbone/package/model.py.tmpl": "$module/model.py",
        "backbone/package/backbone.py.tmpl": "$module/backbone.py",
        "backbone/tests/test_backbone.py.tmpl": "tests/test_$name.py",
    },
}
"""Templates of a package that offers one thing, and where each goes in it."""


def add_to(parent: typer.Typer) -> None:
    """Register the verb and its nouns."""
    parent.add_typer(app, name="new")


@app.command()
def plugin(
    name: Annotated[str, typer.Argument(help="Name of its stage: lower-case letters, digits and underscores.")],
    folder: Folder = Path(),
) -> None:
    """Write a package with one stage that installs, passes `tokenprune check` and its own tests as it is."""
    root = _package(name, "stage", registry(None).stages.get(name), folder)
    print(f"wrote {root}; next:\n")
    print(f'  pip install -e "{root}[dev]"\n  tokenprune check {name}\n  pytest {root}')


@app.command()
def backbone(
    name: Annotated[str, typer.Argument(help="Its name: lower-case letters, digits and underscores.")],
    folder: Folder = Path(),
) -> None:
    """Write a package with a small policy of its own that passes `tokenprune check --backbone` and its own tests."""
    root = _package(name, "backbone", registry(None).backbones.get(name), folder)
    print(f"wrote {root}; next:\n")
    print(f'  pip install -e "{root}[dev]"\n  tokenprune check --backbone {name}\n  pytest {root}')


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


def _package(name: str, kind: str, taken: Registered[Any] | None, folder: Path) -> Path:
    """Write the template of a package that offers a stage or a backbone; returns the package's folder."""
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise ConfigError(f"'{name}' is no name for a {kind}; write lower-case letters, digits and underscores")
    if taken is not None:
        raise ConfigError(f"a {kind} called '{name}' exists already, from {taken.owner}; choose another name")
    class_name = "".join(part.capitalize() for part in name.split("_"))
    values = {
        "name": name, "dashed": name.replace("_", "-"), "module": f"tokenprune_{name}", "class_name": class_name,
    }  # fmt: skip
    root = folder / f"tokenprune-{values['dashed']}"
    if root.exists():
        raise ConfigError(f"{root} exists already; nothing was written")
    for template, path in TEMPLATES[kind].items():
        target = root / Template(path).substitute(values)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(Template(_read(template)).substitute(values), encoding="utf-8")
    (root / values["module"] / "py.typed").touch()
    return root


def _read(path: str) -> str:
    return importlib.resources.files("tokenprune.cli").joinpath("templates", path).read_text(encoding="utf-8")
