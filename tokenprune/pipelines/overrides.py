"""Merges pipeline files and options into one mapping that knows the source of each part."""

from __future__ import annotations

import importlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from tokenprune.errors import ConfigError, PluginError, TokenPruneError
from tokenprune.pipelines.config import DENSE
from tokenprune.pipelines.yaml_document import Document, Location, Problem
from tokenprune.registry.discovery import Registry

SUFFIXES = (".yaml", ".yml")


@dataclass
class Draft:
    """A pipeline before it is checked.

    Attributes:
        data: The pipeline with `extends` and options applied so far.
        origin: Path of the file, or `built in` for `dense`.
        problems: Errors found so far.
    """

    data: dict[str, Any] = field(default_factory=dict)
    origin: str = ""
    problems: list[Problem] = field(default_factory=list)
    _files: list[Document] = field(default_factory=list)
    _sources: dict[str, Document] = field(default_factory=dict)
    _options: list[tuple[Location, str]] = field(default_factory=list)

    @classmethod
    def open(cls, source: str, registry: Registry) -> Draft:
        """Read a file, or a shipped pipeline by name, and everything it extends.

        Raises:
            ConfigError: If a file, or one that it extends, cannot be read.
            PluginError: If no pipeline has the name.
        """
        draft = cls()
        document, path = _open(source, Path(), registry)
        draft.origin = "built in" if source == DENSE.name else str(path)
        draft._include(document, path, registry, ())
        return draft

    @classmethod
    def of(cls, data: object, origin: str) -> Draft:
        """Take plain data, such as the pipeline stored in a result file.

        Raises:
            ConfigError: If it is not a mapping of JSON values.
        """
        document = Document.plain(data, origin)
        draft = cls(origin=origin, _files=[document])
        if not isinstance(document.data, dict):
            draft._fail(document, (), "a pipeline is a mapping")
        draft.data = document.data
        return draft

    def stop_on_problems(self) -> None:
        """Raise the problems found so far, in the order of the files.

        Raises:
            ConfigError: If there is a problem; one line for each.
        """
        if self.problems:
            raise ConfigError("\n".join(dict.fromkeys(str(problem) for problem in sorted(self.problems))))

    def report(self, location: Location, text: str, key: bool = False, field: str = "") -> None:
        """Add a problem with a part of the pipeline, unless reading that part failed already.

        Args:
            location: The part.
            text: What is wrong.
            key: Whether the key is wrong, not its value.
            field: Prefix of the text, unless the option's name ends with it.
        """
        place = self._place(location, key)
        if field and (place[1] or not place[0].endswith(field)):
            text = f"{field}: {text}"
        if place not in {(p.source, p.line, p.column) for file in self._files for p in file.problems}:
            self.problems.append(Problem(*place, text))

    def assign(self, key: str, value: str, option: str) -> None:
        """Set a part to a YAML value; errors are added to `problems`.

        Args:
            key: Dotted path, such as `stages.1.keep`.
            value: YAML.
            option: Name in error messages.
        """
        parsed = Document.parse(value, option)
        try:
            if parsed.problems:
                raise ValueError("; ".join(problem.text for problem in parsed.problems))
            self._options.append((_put(self.data, key.split("."), parsed.data), option))
        except ValueError as error:
            self.problems.append(Problem(option, 0, 0, str(error)))

    def _include(self, document: Document, path: Path, registry: Registry, above: tuple[Path, ...]) -> None:
        """Merge a file over what it extends; `above` are the files that led to it."""
        self._files.append(document)
        self.problems += document.problems
        if not isinstance(document.data, dict):
            wrong = "the file is empty" if document.data is None else "this is no mapping"
            self._fail(document, (), f"{wrong}; a pipeline begins with 'version: 1' and 'name: ...'")
        if "extends" in document.data:
            parent = document.data.pop("extends")
            if not isinstance(parent, str):
                self._fail(document, ("extends",), f"extends: name a file or a shipped pipeline, got {parent!r}")
            try:
                parent_document, parent_path = _open(parent, path.parent, registry)
            except TokenPruneError as error:
                self._fail(document, ("extends",), f"extends: {error}")
            chain = (*above, path.resolve())
            if parent_path.resolve() in chain:
                circle = " -> ".join(file.name for file in (*chain, parent_path))
                self._fail(document, ("extends",), f"extends: files cannot extend each other in a circle: {circle}")
            self._include(parent_document, parent_path, registry, chain)
        self.data |= document.data
        self._sources |= dict.fromkeys(document.data, document)

    def _fail(self, document: Document, location: Location, text: str) -> NoReturn:
        if not document.problems:
            self.problems.append(Problem(document.source, *document.at(location), text))
        self.stop_on_problems()
        raise AssertionError("there is a problem")

    def _place(self, location: Location, key: bool) -> tuple[str, int, int]:
        document = self._sources.get(str(location[0]), self._files[0]) if location else self._files[0]
        for put, option in reversed(self._options):
            above = put[: len(location)] == location and not document.has(location)
            if location[: len(put)] == put or above:
                return option, 0, 0
        line, column = document.at(location, key)
        path = "" if line or not location else f": {'.'.join(map(str, location))}"
        return document.source + path, line, column


def _open(reference: str, folder: Path, registry: Registry) -> tuple[Document, Path]:
    if reference == DENSE.name:
        text = json.dumps(DENSE.model_dump(mode="json", exclude_unset=True))
        return Document.parse(text, reference), folder / reference
    if reference.endswith(SUFFIXES):
        path = folder / reference
    elif "/" in reference or (folder / reference).is_file():
        raise ConfigError(f"{reference}: the name of a pipeline file ends in {' or '.join(SUFFIXES)}")
    else:
        path = _shipped(reference, registry)
    return Document.read(path, str(path)), path


def _shipped(name: str, registry: Registry) -> Path:
    registered = registry.pipeline(name)
    spec, where = registered.spec, f"pipeline '{name}' of {registered.owner}"
    try:
        module = importlib.import_module(spec.package)
    except (Exception, SystemExit) as error:
        raise PluginError(f"{where}: '{spec.package}' cannot be imported: {type(error).__name__}: {error}") from error
    # A package has a path; for a plugin file, use its folder.
    folder = Path(module.__path__[0]) if hasattr(module, "__path__") else Path(str(module.__file__)).parent
    if not (folder / spec.resource).is_file():
        raise PluginError(f"{where}: '{spec.package}' holds no file '{spec.resource}'")
    return folder / spec.resource


def _put(data: dict[str, Any], steps: list[str], value: object) -> Location:
    """Set a part, creating missing mappings on the way.

    Raises:
        ValueError: If the path does not exist and cannot be created.
    """
    node: Any = data
    location: Location = ()
    for depth, name in enumerate(steps):
        step: str | int = name
        if isinstance(node, list):
            if not name.isdecimal() or int(name) >= len(node):
                held = f"{'.'.join(steps[:depth])} has {len(node)} entries, counted from 0"
                raise ValueError(f"there is no '{'.'.join(steps[: depth + 1])}'; {held}")
            step = int(name)
        elif not isinstance(node, dict):
            raise ValueError(f"{'.'.join(steps[:depth])} is {node!r}, which has no '{name}'")
        location = (*location, step)
        if depth == len(steps) - 1:
            node[step] = value
        elif isinstance(node, dict) and node.get(name) is None:
            made: dict[str, Any] = {}
            node[name] = made
            node = made
        else:
            node = node[step]
    return location
