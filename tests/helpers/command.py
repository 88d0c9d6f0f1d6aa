"""The command line as a process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PRELUDE = "import sys, tokenprune.cli as c; sys.argv = ['tokenprune', *sys.argv[1:]]; c.main()"


def call(*words: str, cwd: Path | None = None, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PRELUDE, *words],
        capture_output=True, text=True, check=False, cwd=cwd, env={**os.environ, "COLUMNS": "80", **(env or {})},
    )  # fmt: skip
