"""A hash of the weights in a folder, because its path stays the same when they are trained further."""

from __future__ import annotations

import hashlib
from pathlib import Path

_SAMPLES, _LENGTH = 64, 65_536


def fingerprint(folder: Path) -> str:
    """Return a hash of names, sizes and samples of a checkpoint's files, without its cards (`.md`).

    Each file is sampled at 64 places, 64 KiB at each, so large checkpoints take little time and small files are read
    whole. Training changes every tensor and therefore the hash; a few numbers edited by hand may not change it.
    """
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith(".") and p.suffix != ".md"):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        step = max(_LENGTH, size // _SAMPLES)
        with path.open("rb") as file:
            for offset in range(0, size, step):
                file.seek(offset)
                digest.update(file.read(_LENGTH))
    return digest.hexdigest()[:16]
