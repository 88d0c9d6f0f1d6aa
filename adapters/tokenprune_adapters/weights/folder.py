"""A checkpoint's folder: from disk or a hub id, and the JSON in it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenprune.errors import CheckpointError

JSON_FILES = ("*.json",)
"""Patterns of the files that describe a release, for a download from the hub."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def local_folder(checkpoint: Path, patterns: Sequence[str]) -> Path:
    """The folder itself, or the one a hub id is downloaded to.

    Args:
        checkpoint: A folder, or a hub id `owner/name`. A folder that exists takes precedence over the hub.
        patterns: The files to download from the hub; files in subfolders are not downloaded.

    Raises:
        CheckpointError: If there is no such folder and the hub does not give it.
    """
    if checkpoint.is_dir():
        return checkpoint
    name = checkpoint.as_posix()
    if checkpoint.exists() or _HUB_ID.fullmatch(name) is None:
        raise CheckpointError(f"{name}: no such folder; valid: one in the release's format, or a hub id 'owner/name'")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns), ignore_patterns=["*/*"]))
    except Exception as error:  # the hub's errors and those of its HTTP library have no narrower base
        raise CheckpointError(f"'{name}' is no folder here, and the hub did not give it: {error}") from error


def config_mapping(config: object) -> dict[str, Any]:
    """The fields of a loaded model's `config`, which is a mapping or has transformers' `to_dict`.

    Raises:
        CheckpointError: If it is neither.
    """
    to_dict = getattr(config, "to_dict", None)
    fields = to_dict() if callable(to_dict) else config
    if not isinstance(fields, Mapping):
        raise CheckpointError(f"a model's config is a {type(config).__name__}; valid: a mapping, or one with to_dict()")
    return dict(fields)
