"""Shipped pipelines whose counts are known before a query."""

from __future__ import annotations

GRAPH_SAFE = (
    "none", "random", "uniform_grid", "fastv", "divprune", "efficientvla_tokens", "sparsevlm", "pyramiddrop", "dart",
    "vla_adp", "vla_pruner", "fastervlm", "visionzip", "tome", "pool2x2", "keep_view",
    "specprune", "specprune.static", "specprune.dynamic",
)  # fmt: skip
