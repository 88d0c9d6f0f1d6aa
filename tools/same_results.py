"""Record the results of every shipped pipeline, and compare two recordings bit for bit.

    python tools/same_results.py record FOLDER [--with-mini]
    python tools/same_results.py compare FOLDER FOLDER

For changes that must not change results: record before, record after, compare. Kept ids, actions, FLOPs and plans are
compared; times, memory and versions are not. It calls the command line, so it works across revisions whose Python names
differ.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TINY = ("openvla", "openvla-oft", "pi0", "pi05")
QUERIES = "3"
CLOCK_AND_MACHINE = {
    "provenance", "created", "command", "out", "milliseconds", "query_ms", "phases_ms", "median_ms", "p95_ms",
    "speedup",
    "efficiency", "selection", "phases", "prefill", "floor", "roof", "peak_mb", "latency", "wall_s", "seconds",
    "memory",
}  # fmt: skip


def record(folder: Path, with_mini: bool) -> None:
    """Run and explain every shipped pipeline on the tiny backbones and, with `with_mini`, on `mini`."""
    pipelines = sorted(item["name"] for item in json.loads(_call("list", "--json")) if item["kind"] == "pipeline")
    where = [(name, "tiny") for name in TINY] + ([("openvla-oft", "mini")] if with_mini else [])
    for backbone, preset in where:
        own = folder / f"{backbone}-{preset}"
        own.mkdir(parents=True, exist_ok=True)
        model = ("--backbone", backbone, "--preset", preset)
        for pipeline in pipelines:
            for verb, extra in (
                ("run", ("--queries", QUERIES, "--dtype", "float32", "--out", str(own / "raw"))),
                ("explain", ()),
            ):
                path = own / f"{verb}-{pipeline}.json"
                if not path.exists():
                    path.write_text(_call(verb, pipeline, *model, *extra, "--json"), encoding="utf-8")
            print(f"{own.name}: {pipeline}", file=sys.stderr)


def _call(*words: str) -> str:
    """Standard output of a command, or its error as JSON."""
    from typer.testing import CliRunner

    from tokenprune.cli import app

    with contextlib.redirect_stderr(io.StringIO()):
        result = CliRunner().invoke(app, list(words))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        return json.dumps({"refused": f"{type(result.exception).__name__}: {result.exception}"})
    return result.stdout


def compare(before: Path, after: Path) -> int:
    """Print the differences and return the number of files that differ."""
    wrong = 0
    names = sorted({str(path.relative_to(folder)) for folder in (before, after) for path in folder.glob("*/*.json")})
    for name in names:
        pair = [folder / name for folder in (before, after)]
        if not all(path.exists() for path in pair):
            print(f"{name}: only in one of the recordings")
            wrong += 1
            continue
        values = [dict(_leaves(json.loads(path.read_text(encoding="utf-8")))) for path in pair]
        differing = [
            key for key in sorted(values[0].keys() | values[1].keys()) if values[0].get(key) != values[1].get(key)
        ]
        for key in differing[:5]:
            print(f"{name}: {key}: {values[0].get(key)!s:.120} -> {values[1].get(key)!s:.120}")
        if len(differing) > 5:
            print(f"{name}: and {len(differing) - 5} more")
        wrong += bool(differing)
    print(f"{len(names)} files compared, {wrong} differ")
    return wrong


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, object]]:  # noqa: ANN401
    if isinstance(value, dict):
        for key, inner in value.items():
            if key not in CLOCK_AND_MACHINE:
                yield from _leaves(inner, f"{path}.{key}")
    elif isinstance(value, list):
        yield f"{path}.length", len(value)
        for index, inner in enumerate(value):
            yield from _leaves(inner, f"{path}[{index}]")
    else:
        yield path, value


def main(arguments: list[str]) -> int:
    """Run the command line."""
    match arguments:
        case ["record", folder, *rest] if set(rest) <= {"--with-mini"}:
            record(Path(folder), bool(rest))
            return 0
        case ["compare", before, after]:
            return min(compare(Path(before), Path(after)), 1)
    print(__doc__, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
