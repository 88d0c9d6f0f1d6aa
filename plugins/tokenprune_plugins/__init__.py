"""The strategies that ship with tokenprune, registered as any other plugin. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable

from tokenprune.hookspecs import hookimpl
from tokenprune.specs import PipelineSpec, Spec, StageSpec

_STAGES = (
    StageSpec(
        "none",
        "control",
        "asked at every cut, drops nothing: what the framework itself costs",
        f"{__name__}.controls:Nothing",
    ),
    StageSpec("random", "control", "keeps tokens at random", f"{__name__}.controls:Random"),
    StageSpec(
        "uniform_grid",
        "control",
        "keeps an evenly spread grid of each view's patches",
        f"{__name__}.controls:UniformGrid",
    ),
    StageSpec(
        "fastv",
        "scorer",
        "keeps the patches an early layer attends to",
        f"{__name__}.fastv:FastV",
        paper="FastV, arXiv 2403.06764 (ECCV 2024)",
    ),
)


@hookimpl
def tokenprune_register() -> Iterable[Spec]:
    """Stages, and one pipeline file of the same name for each."""
    pipelines = (PipelineSpec(s.name, s.summary, __name__, f"pipelines/{s.name}.yaml") for s in _STAGES)
    return (*_STAGES, *pipelines)
