"""Lint the hot files, where no code may wait for the device or make a shape depend on data.

Usage: `python tools/lint_hot.py [PATH ...]`; without paths, the hot files of this checkout. Exit 1 on findings.

`# cold: reason` exempts its line; on a `def` line, the whole function.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

HOT_FILES = (
    "tokenprune/model/decoder.py",
    "tokenprune/model/attention.py",
    "tokenprune/tokens/layout_tables.py",
    "tokenprune/tokens/proposal.py",
    "tokenprune/tokens/selection.py",
    "tokenprune/model/kv_cache.py",
    "tokenprune/engine/query.py",
    "tokenprune/engine/cuts.py",
    "tokenprune/engine/rng.py",
    "tokenprune/engine/cuda_graph.py",
    "tokenprune/engine/tensor_tree.py",
    "tokenprune/engine/combine.py",
    "tokenprune/stages/memory.py",
    "tokenprune/stages/token_context.py",
    "tokenprune/stages/feature_context.py",
    "tokenprune/model/device.py",
    "adapters/tokenprune_adapters/inputs/resample.py",
    "adapters/tokenprune_adapters/backbones/prismatic/image_transform.py",
    "adapters/tokenprune_adapters/backbones/pi0/image_transform.py",
    "plugins/tokenprune_plugins/**/*.py",
)
COLD_NAMES = {"__init__.py"}

TO_HOST = {"item", "cpu", "tolist", "numpy"}
DATA_SHAPED = {"nonzero", "argwhere", "masked_select"}
REDUCTIONS = {"all", "any", "amax", "amin", "argmax", "argmin", "count_nonzero", "max", "mean", "min"}
REDUCTIONS |= {"norm", "prod", "std", "sum", "var"}
HOST_MODULES = {"math", "np", "numpy"}
ADVICE = {
    "host-copy": "waits for the device; keep the value on the device, or take counts from the plan",
    "data-shape": "makes a shape depend on data, which waits for the device; use topk with a planned count",
    "mask-index": "indexing by a boolean mask makes a shape depend on data; use torch.where, masked_fill or topk",
    "tensor-upload": "copies from the host and waits; build it once when the plan is bound",
    "scalar": "turns a tensor into a Python value, which waits for the device; keep it a tensor, use torch.where",
    "print": "prints from a hot file; record it in the trace",
    "cold-reason": "an exemption says why: `# cold: reason`",
    "syntax": "cannot be parsed; correct it first",
}


@dataclass(frozen=True, order=True)
class Finding:
    """One violation at a 1-based line and column."""

    path: str
    line: int
    col: int
    rule: str

    def __str__(self) -> str:
        """Format as `file:line:col rule: why, and what to do instead`."""
        return f"{self.path}:{self.line}:{self.col} {self.rule}: {ADVICE[self.rule]}"


def lint(source: str, path: str) -> list[Finding]:
    """Return the findings in one file, in order, without exempt lines."""
    try:
        tree = ast.parse(source)
    except SyntaxError as error:
        return [Finding(path, error.lineno or 1, error.offset or 1, "syntax")]
    reasons = _cold_comments(source)
    exempt = {line for line, reason in reasons.items() if reason}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            header = range(node.lineno, max(node.lineno + 1, node.body[0].lineno))
            if exempt.intersection(header):
                exempt.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    found = {Finding(path, line, 1, "cold-reason") for line, reason in reasons.items() if not reason}
    for node, rule in _violations(tree):
        if not exempt.intersection((node.lineno, node.end_lineno or node.lineno)):
            found.add(Finding(path, node.lineno, node.col_offset + 1, rule))
    return sorted(found)


def _cold_comments(source: str) -> dict[int, str]:
    """The reason (possibly empty) of every `# cold` comment, by line."""
    comments = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        match = re.match(r"#\s*cold\b:?(.*)", token.string) if token.type == tokenize.COMMENT else None
        if match:
            comments[token.start[0]] = match.group(1).strip()
    return comments


def _violations(tree: ast.AST) -> Iterator[tuple[ast.expr, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            rule = _call_rule(node)
            if rule:
                yield node, rule
        elif isinstance(node, ast.Subscript) and _is_mask(node.slice):
            yield node, "mask-index"
        for test in _truth_tested(node):
            if _is_reduction(test):
                yield test, "scalar"


def _call_rule(call: ast.Call) -> str | None:
    name = _called(call)
    if isinstance(call.func, ast.Attribute):
        if name in TO_HOST or (name == "to" and any(_is_cpu(a) for a in _arguments(call))):
            return "host-copy"
        if name in DATA_SHAPED or (name == "where" and len(_arguments(call)) == 1):
            return "data-shape"
        if name in {"tensor", "as_tensor"} and any(k.arg == "device" for k in call.keywords):
            return "tensor-upload"
    elif name in {"bool", "int", "float"} and any(_is_reduction(a) for a in call.args):
        return "scalar"
    elif name == "print":
        return "print"
    return None


def _called(call: ast.Call) -> str:
    if isinstance(call.func, ast.Attribute):
        return call.func.attr
    return call.func.id if isinstance(call.func, ast.Name) else ""


def _arguments(call: ast.Call) -> list[ast.expr]:
    return [*call.args, *(k.value for k in call.keywords)]


def _is_cpu(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value == "cpu"


def _is_reduction(node: ast.expr) -> bool:
    """Whether an expression is a reduction of a tensor, or arithmetic or a comparison with one."""
    if isinstance(node, ast.BinOp):
        return _is_reduction(node.left) or _is_reduction(node.right)
    if isinstance(node, ast.Compare):
        return _is_reduction(node.left) or any(_is_reduction(other) for other in node.comparators)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in REDUCTIONS:
        return _root(node) not in HOST_MODULES
    return False


def _root(node: ast.expr) -> str:
    """The name a chain of attributes, calls and subscripts starts from."""
    while isinstance(node, ast.Attribute | ast.Call | ast.Subscript):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else ""


def _is_mask(index: ast.expr) -> bool:
    if isinstance(index, ast.Tuple):
        return any(_is_mask(part) for part in index.elts)
    if isinstance(index, ast.UnaryOp):
        return _is_mask(index.operand)
    if isinstance(index, ast.BinOp):
        return _is_mask(index.left) or _is_mask(index.right)
    name = index.id if isinstance(index, ast.Name) else index.attr if isinstance(index, ast.Attribute) else ""
    return isinstance(index, ast.Compare) or name.endswith("mask")


def _truth_tested(node: ast.AST) -> list[ast.expr]:
    """Expressions that Python converts to bool."""
    if isinstance(node, ast.If | ast.While | ast.IfExp | ast.Assert):
        return [node.test]
    if isinstance(node, ast.comprehension):
        return node.ifs
    if isinstance(node, ast.BoolOp):
        return node.values
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        return [node.operand]
    return []


def hot_files(root: Path) -> list[Path]:
    """The hot files under a checkout.

    Raises:
        FileNotFoundError: If a pattern of `HOT_FILES` matches nothing, because the list is then out of date.
    """
    files: set[Path] = set()
    for pattern in HOT_FILES:
        matches = [path for path in root.glob(pattern) if path.name not in COLD_NAMES]
        if not matches:
            raise FileNotFoundError(
                f"HOT_FILES names '{pattern}', which matches nothing under {root}; correct the list"
            )
        files.update(matches)
    return sorted(files)


def main(arguments: Iterable[str]) -> int:
    """Lint the given files and folders, or the hot files; return the exit code."""
    root = Path(__file__).resolve().parent.parent
    try:
        paths = [Path(argument) for argument in arguments]
        inside = [f for p in paths for f in (sorted(p.rglob("*.py")) if p.is_dir() else [p])]
        files = inside if paths else hot_files(root)
        sources = [(path, path.read_text(encoding="utf-8")) for path in files]
    except OSError as error:
        print(f"lint_hot: {error}", file=sys.stderr)
        return 2
    findings = [finding for path, source in sources for finding in lint(source, _shown(path, root))]
    for finding in findings:
        print(finding)
    return 1 if findings else 0


def _shown(path: Path, root: Path) -> str:
    return str(path.relative_to(root)) if path.is_relative_to(root) else str(path)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
