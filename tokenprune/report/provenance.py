"""Where a number comes from: versions, machine, source state and command."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import torch

from tokenprune._version import __version__
from tokenprune.report.record import GitState, Provenance

_PACKAGES = ("torch", "transformers", "pluggy", "pydantic", "numpy", "pillow", "tokenizers", "safetensors")


def provenance(device: torch.device) -> Provenance:
    """Return the provenance of what this process measures on a device."""
    on_gpu = device.type == "cuda"
    return Provenance(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        command=[Path(sys.argv[0]).name, *sys.argv[1:]],
        tokenprune=__version__,
        git=git_state(Path(__file__).parents[1]),
        python=platform.python_version(),
        packages={name: _version(name) for name in _PACKAGES},
        platform=platform.platform(),
        cpu=cpu_name(),
        cpus=os.cpu_count(),
        torch_threads=torch.get_num_threads(),
        device=str(device),
        gpu=torch.cuda.get_device_name(device) if on_gpu else None,
        cuda=torch.version.cuda if on_gpu else None,
    )


def git_state(folder: Path) -> GitState | None:
    """Return the commit of the checkout a folder belongs to; None for an installed package."""

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=10, check=True
            )
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip()

    if "site-packages" in folder.parts:
        return None
    commit = git("rev-parse", "HEAD")
    if commit is None:
        return None
    return GitState(commit=commit, changed=bool(git("status", "--porcelain", "--untracked-files=no")))


def cpu_name() -> str:
    """Return the model name of the processor."""
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
