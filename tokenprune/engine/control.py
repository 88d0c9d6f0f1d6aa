"""Calls controllers before a query and after each executed action; the first decision counts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import numpy as np

from tokenprune.errors import StageError, nearest
from tokenprune.pipelines.binding import BoundPipeline
from tokenprune.stages.control_context import ControlContext, ControlDecision
from tokenprune.stages.memory import Slot

Event = Literal["query", "executed"]


def control_context(pipeline: BoundPipeline, slot: Slot, stage: int, event: Event) -> ControlContext:
    """Build the context of a stage's host hooks."""
    since = slot.executed[slot.asked_at :]
    memory = slot.host.setdefault(stage, {})
    return ControlContext(event, slot.index, pipeline.config.modes, slot.queries, slot.executed, since, memory)


def decide(pipeline: BoundPipeline, slot: Slot, event: Event) -> ControlDecision:
    """Return the first controller's decision; the pipeline's first mode if all abstain.

    Raises:
        StageError: If a controller fails or its decision is invalid, and the pipeline does not fall back.
    """
    with failing_later(pipeline, slot):
        for call in pipeline.hooks["control"]:
            decision = pipeline.call(call, control_context(pipeline, slot, call.stage, event))
            if decision is not None:
                return _checked(pipeline, decision, f"stage '{pipeline.names[call.stage]}'", event)
    return ControlDecision(pipeline.config.modes[0])


@contextmanager
def failing_later(pipeline: BoundPipeline, slot: Slot) -> Iterator[None]:
    """In a pipeline that falls back, keep a stage's error outside a query and raise it in the next query."""
    try:
        yield
    except StageError as error:
        if pipeline.config.on_error == "raise":
            raise
        slot.failed = error


def _checked(pipeline: BoundPipeline, decision: object, stage: str, event: Event) -> ControlDecision:
    if not isinstance(decision, ControlDecision):
        raise StageError(f"{stage}: control returned {type(decision).__name__}, not a ControlDecision or None")
    modes, actions = pipeline.config.modes, decision.actions
    if decision.mode not in modes:
        raise StageError(f"{stage} chose mode '{decision.mode}'{nearest(decision.mode, modes)}")
    if actions is not None:
        wanted = (pipeline.info.action.horizon, pipeline.info.action.dims)
        if event != "query":
            raise StageError(f"{stage} gave actions after an executed one; only a query can be answered")
        if actions.shape != wanted or not np.isfinite(actions).all():
            raise StageError(f"{stage} answered with {actions!r}; a chunk is {list(wanted)} finite numbers")
    return decision
