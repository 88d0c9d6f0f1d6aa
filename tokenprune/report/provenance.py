"""Where a number comes from: versions, machine, source state and command."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from tokenprune._version import __version__

_PACKAGES = ("torch", "transformers", "pluggy", "pydantic", "numpy", "pillow", "tokenizers", "safetensors")


def provenance(device: torch.device) -> dict[str, Any]:
    """Plain data about this process."""
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "tokenprune": __version__,
        "git": git_state(Path(__file__).parents[1]),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cpus": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "device": str(device),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
    }


def git_state(folder: Path) -> dict[str, Any] | None:
    """Commit of the checkout a folder belongs to and whether it has changes; None for an installed package."""

    def ask(*words: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=10, check=True
            )
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip()

    if "site-packages" in folder.parts:
        return None
    commit = ask("rev-parse", "HEAD")
    return (
        None
        if commit is None
        else {"commit": commit, "changed": bool(ask("status", "--porcelain", "--untracked-files=no"))}
    )


def cpu_name() -> str:
    """Model name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
