"""Write what `tokenprune report` prints of results files into a page, between the markers that name the files.

    python tools/evidence_page.py docs/evidence.md

A marker is a line `<!-- report FILE [--baseline VARIANT] [VARIANT …] -->`. What follows up to `<!-- end -->` is
replaced. A test compares the page with the files.
"""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

from tokenprune.cli.eval import report

ROOT = Path(__file__).resolve().parents[1]


def report_text(arguments: str) -> str:
    """Return what `tokenprune report` prints for a file and variants, without the last line, which names the file."""
    path, *variants = shlex.split(arguments)
    baseline = variants[1] if variants[:1] == ["--baseline"] else None
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        report(ROOT / path, variants[2:] if baseline else variants or None, baseline=baseline)
    lines = [line.rstrip() for line in printed.getvalue().splitlines()]
    return "\n".join(lines[: lines.index(f"results: {ROOT / path}")]).strip("\n")


def fill(page: str, marker: str, text_of: Callable[[str], str]) -> str:
    """Return the page with every block after `<!-- MARKER ARGUMENTS -->` replaced by `text_of(ARGUMENTS)`."""
    block = re.compile(rf"(<!-- {marker} (.+?) -->\n).*?(<!-- end -->)", re.DOTALL)
    return block.sub(lambda found: f"{found[1]}{text_of(found[2])}\n{found[3]}", page)


def filled(page: str) -> str:
    """Return the page with every marked block as its file has it now."""
    return fill(page, "report", lambda arguments: f"```text\n{report_text(arguments)}\n```")


def main() -> None:
    """Rewrite the page."""
    path = Path(sys.argv[1])
    path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
