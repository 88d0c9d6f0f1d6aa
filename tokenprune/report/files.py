"""Result files: a name that is free, JSON that nobody reads half written, and one way to read it back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from tokenprune.errors import ResultError, nearest
from tokenprune.report.result import ResultFile

File = TypeVar("File", bound=ResultFile)


def free_path(folder: Path, stem: str) -> Path:
    """Return a path `STEM-DATE-TIME.json` that does not exist yet; makes the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    path = folder / f"{stem}-{stamp}.json"
    number = 1
    while path.exists():
        path, number = folder / f"{stem}-{stamp}-{number}.json", number + 1
    return path


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write plain data; the file is replaced at once, so a reader never finds half of it."""
    beside = path.with_name(f".{path.name}.new")
    beside.write_text(json.dumps(data, indent=1, default=str) + "\n", encoding="utf-8")
    beside.replace(path)


def read_result(path: Path, *kinds: type[File]) -> File:
    """Read a result file.

    Args:
        path: The file.
        *kinds: Models of the kinds that it may be of.

    Raises:
        ResultError: If the file is missing, is not a result of these kinds, has another format version, or has a key
            that is missing, unknown or wrong.
    """
    models = {kind.model_fields["kind"].default: kind for kind in kinds}
    data = _load(path, " or ".join(f"`{kind.command}`" for kind in kinds))
    if data["kind"] not in models:
        raise ResultError(f"{path} is a result of kind '{data['kind']}'{nearest(data['kind'], models)}")
    model = models[data["kind"]]
    valid = model.model_fields["format_version"].default
    if (version := data.get("format_version", valid)) != valid:
        raise ResultError(f"{path} has format version {version!r}; valid: {valid}")
    try:
        return model.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        if first["type"] == "missing":
            raise ResultError(f"{path} lacks '{place}'; make the result again with `{model.command}`") from error
        raise ResultError(f"{path}: '{place}' is {first['input']!r:.60}: {first['msg']}") from error


def _load(path: Path, writer: str) -> dict[str, Any]:
    try:
        data = json.loads(path.read_bytes())
    except OSError as error:
        raise ResultError(f"cannot open result {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ResultError(f"{path} is not a result file, which {writer} writes: not JSON: {error}") from error
    if not isinstance(data, dict) or not isinstance(data.get("kind"), str):
        raise ResultError(f"{path} is not a result file, which {writer} writes: it has no 'kind'")
    return data
