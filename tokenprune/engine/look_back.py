"""Past frames that stages compare with the current ones: found by control step, cropped and uploaded once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tokenprune.engine.adapter import Backbone, Observation
from tokenprune.engine.control import control_context
from tokenprune.engine.timing import Clock
from tokenprune.model.phase import Phase
from tokenprune.pipelines.binding import BoundPipeline
from tokenprune.stages.memory import Slot
from tokenprune.stages.token_context import PastFrames


def look_back(
    pipeline: BoundPipeline,
    backbone: Backbone,
    slots: Sequence[Slot],
    observations: Sequence[Observation],
    images: Mapping[str, Tensor],
    clock: Clock,
) -> dict[int, PastFrames]:
    """Return the frames that each stage's `look_back` asks for, by the stage's index.

    Args:
        pipeline: The bound pipeline.
        backbone: Crops frames.
        slots: Environment of each batch row.
        observations: The current observation of each.
        images: Their cropped frames by view, uint8 `[B, 3, S, S]`.
        clock: Times rendering by the host in a phase of its own.
    """
    past = {}
    # Several stages, and consecutive queries, may look back at the same step.
    crops: list[dict[int, Mapping[str, Tensor]]] = [{} for _ in slots]
    for call in pipeline.hooks["look_back"]:
        steps: list[int | None] = []
        rows: dict[str, list[Tensor]] = {view: [] for view in images}
        for row, slot in enumerate(slots):
            back = pipeline.call(call, control_context(pipeline, slot, call.stage, "query"))
            now = len(slot.executed)
            step = None if back is None else now if back == 0 else slot.past.find(now, back)
            steps.append(None if step is None else now - step)
            frame: Mapping[str, Tensor] = {}
            if step == now:
                frame = {view: pixels[row] for view, pixels in images.items()}
            elif step is not None:
                cached = crops[row].get(step) or slot.crops.get(step)
                frame = crops[row][step] = cached or _crop(backbone, slot, step, observations[row], clock)
            for view, pixels in images.items():
                rows[view].append(frame.get(view, torch.zeros_like(pixels[row])))
        past[call.stage] = PastFrames(tuple(steps), {view: torch.stack(frames) for view, frames in rows.items()})
    for slot, cropped in zip(slots, crops, strict=True):
        slot.crops = cropped
    return past


def _crop(backbone: Backbone, slot: Slot, step: int, observation: Observation, clock: Clock) -> Mapping[str, Tensor]:
    if step == slot.asked_at:
        return slot.memory.frames
    phase = clock.enter(Phase.DRAWING)
    # Past images come with the current state, which is checked already.
    rendered = slot.past.images(step, lambda images: backbone.check({**observation, "images": images}))
    clock.enter(phase)
    return {view: pixels[0] for view, pixels in backbone.pixels([rendered]).items()}
