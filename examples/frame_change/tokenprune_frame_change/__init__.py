"""Registers the stage `frame_change` and a pipeline of the same name. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable

from tokenprune import PipelineSpec, Spec, StageSpec, hookimpl

_SUMMARY = "keeps the patches whose pixels changed most since the previous query"


@hookimpl
def tokenprune_register() -> Iterable[Spec]:
    """The stage and its pipeline."""
    return (
        StageSpec("frame_change", "selector", _SUMMARY, f"{__name__}.stage:FrameChange"),
        PipelineSpec("frame_change", _SUMMARY, __name__, "pipelines/frame_change.yaml"),
    )
