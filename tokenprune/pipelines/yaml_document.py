"""A YAML file as plain data, with the line and column of every part."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from ruamel.yaml.reader import ReaderError

from tokenprune.errors import ConfigError, nearest

Location = tuple[str | int, ...]
"""Path to a part of a file: keys and list indices from the top."""

_TAG = "tag:yaml.org,2002:"


@dataclass(frozen=True, order=True)
class Problem:
    """An error in a pipeline.

    Attributes:
        source: File or command-line option.
        line: 1-based; 0 for an option.
        column: 1-based; 0 for an option.
        text: What is wrong and what would be valid.
    """

    source: str
    line: int
    column: int
    text: str

    def __str__(self) -> str:
        """One line; characters that cannot be printed are escaped."""
        message = f"{self.source}:{self.line}:{self.column} {self.text}" if self.line else f"{self.source}: {self.text}"
        return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in message)


@dataclass
class Document:
    """A parsed file.

    Attributes:
        source: Name in error messages.
        data: Mappings, lists, text, finite numbers, booleans and None.
        problems: Parts that could not be read; they are missing in `data`.
    """

    source: str
    data: Any = None
    problems: list[Problem] = field(default_factory=list)
    _keys: dict[Location, tuple[int, int]] = field(default_factory=dict)
    _values: dict[Location, tuple[int, int]] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path, source: str) -> Document:
        """Read a file.

        Raises:
            ConfigError: If it does not exist, cannot be read, or is not UTF-8.
        """
        try:
            raw = path.read_bytes()
        except FileNotFoundError as error:
            beside = [p.name for p in path.parent.glob("*.y*ml")]
            raise ConfigError(f"{source}:1:1 no such file{nearest(path.name, beside)}") from error
        except OSError as error:
            raise ConfigError(f"{source}:1:1 cannot be read: {error.strerror}") from error
        try:
            return cls.parse(raw.decode("utf-8"), source)
        except UnicodeDecodeError as error:
            line, column = _line_column(raw[: error.start].decode("utf-8"))
            raise ConfigError(f"{source}:{line}:{column} byte 0x{raw[error.start]:02x} is not UTF-8") from error

    @classmethod
    def plain(cls, data: object, source: str) -> Document:
        """Wrap data that comes from no file, and so has no lines.

        Raises:
            ConfigError: If JSON cannot hold it.
        """
        try:
            return cls(source, json.loads(json.dumps(data, allow_nan=False)), _values={(): (0, 0)})
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{source}: not plain data: {error}") from error

    @classmethod
    def parse(cls, text: str, source: str) -> Document:
        """Parse text; errors are added to `problems`."""
        document = cls(source)
        try:
            node = YAML(typ="rt").compose(text)
            document.data = None if node is None else document._plain(node, (), ())
        except MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            message = ", ".join(part for part in (error.context, error.problem) if part)
            document._add((mark.line + 1, mark.column + 1) if mark else (1, 1), f"not YAML: {message}")
        except ReaderError as error:
            at = _line_column(text[: error.position])
            document._add(at, f"not YAML: character U+{error.character:04X}: {error.reason}")
        except YAMLError as error:
            document._add((1, 1), f"not YAML: {' '.join(str(error).split())}")
        except RecursionError:
            document._add((1, 1), "nested too deeply")
        return document

    def has(self, location: Location) -> bool:
        """Whether the file has a value there."""
        return location in self._values

    def at(self, location: Location, key: bool = False) -> tuple[int, int]:
        """1-based line and column of a value, or of its key; of the nearest parent if the file lacks it."""
        while location and location not in self._values:
            location = location[:-1]
        return (self._keys if key and location in self._keys else self._values).get(location, (1, 1))

    def _add(self, at: tuple[int, int], text: str) -> None:
        self.problems.append(Problem(self.source, *at, text))

    def _plain(self, node: Node, location: Location, above: tuple[Node, ...]) -> Any:  # noqa: ANN401
        tag = str(node.tag).replace(_TAG, "!!")
        self._values[location] = _mark(node)
        if node in above:
            self._add(_mark(node), "an alias cannot contain itself")
        elif isinstance(node, SequenceNode) and tag == "!!seq":
            return [self._plain(item, (*location, index), (*above, node)) for index, item in enumerate(node.value)]
        elif isinstance(node, MappingNode) and tag == "!!map":
            return self._mapping(node, location, above)
        elif isinstance(node, ScalarNode) and tag in _SCALARS:
            try:
                return _SCALARS[tag](node.value)
            except ValueError:
                self._add(_mark(node), f"{node.value!r} is no valid {tag.removeprefix('!!')}; put text in quotes")
        else:
            self._add(_mark(node), f"tag '{tag}' is not used here")
        return None

    def _mapping(self, node: MappingNode, location: Location, above: tuple[Node, ...]) -> dict[str, Any]:
        data: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = key_node.value
            if key_node.tag == f"{_TAG}merge":
                self._add(_mark(key_node), "'<<' is not supported; write the keys out, or use 'extends'")
            elif not isinstance(key_node, ScalarNode) or key_node.tag != f"{_TAG}str":
                self._add(_mark(key_node), "a key is text; put it in quotes")
            elif key in data:
                line, _ = self._keys[(*location, key)]
                self._add(_mark(key_node), f"key '{key}' is given twice, first in line {line}")
            else:
                place = (*location, key)
                self._keys[place] = _mark(key_node)
                data[key] = self._plain(value_node, place, (*above, node))
                if isinstance(value_node, ScalarNode) and not value_node.value:
                    # YAML places an empty value at the next token; report the key instead.
                    self._values[place] = self._keys[place]
        return data


def _mark(node: Node) -> tuple[int, int]:
    return node.start_mark.line + 1, node.start_mark.column + 1


def _line_column(before: str) -> tuple[int, int]:
    return before.count("\n") + 1, len(before) - before.rfind("\n")


def _text(value: str) -> str:
    # JSON escapes characters beyond 16 bits as surrogate pairs, which YAML does not join.
    return value.encode("utf-16", "surrogatepass").decode("utf-16")


def _number(value: str) -> float:
    number = float(value.replace("_", ""))
    if not math.isfinite(number):
        raise ValueError(value)
    return number


def _boolean(value: str) -> bool:
    if value.lower() not in ("true", "false"):
        raise ValueError(value)
    return value.lower() == "true"


def _integer(value: str) -> int:
    # A leading zero means octal in YAML 1.1 but not in YAML 1.2; base 0 refuses it.
    return int(value, 0)


def _nothing(_: str) -> None:
    return None


_SCALARS: Mapping[str, Callable[[str], Any]] = {
    "!!str": _text,
    "!!timestamp": _text,
    "!!int": _integer,
    "!!float": _number,
    "!!bool": _boolean,
    "!!null": _nothing,
}
