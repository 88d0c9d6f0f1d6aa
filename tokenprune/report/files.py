"""Result files: a name that is free, and JSON that nobody reads half written."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any


def free_path(folder: Path, stem: str) -> Path:
    """Return a path `STEM-DATE-TIME.json` that does not exist yet; makes the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    path = folder / f"{stem}-{stamp}.json"
    number = 1
    while path.exists():
        path, number = folder / f"{stem}-{stamp}-{number}.json", number + 1
    return path


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Write plain data; the file is replaced at once, so a reader never finds half of it."""
    beside = path.with_name(f".{path.name}.new")
    beside.write_text(json.dumps(data, indent=1, default=str) + "\n", encoding="utf-8")
    beside.replace(path)
