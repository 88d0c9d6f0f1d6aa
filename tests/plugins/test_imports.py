"""Strategies are written against the face of the package, as anybody's are."""

from __future__ import annotations

import ast

from tests.helpers.paths import ROOT

SOURCES = sorted((ROOT / "plugins" / "tokenprune_plugins").rglob("*.py")) + sorted(
    (ROOT / "examples" / "frame_change").rglob("*.py")
)


def test_a_strategy_imports_from_tokenprune_and_its_own_package_only() -> None:
    assert len(SOURCES) > 30
    deep = [
        f"{path.relative_to(ROOT)}:{node.lineno} {module}"
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        for module in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
        if module.startswith(("tokenprune.", "tokenprune_adapters")) and not module.startswith("tokenprune.testing")
    ]
    assert not deep
