"""A policy: observations in, actions out, with one memory per environment and a trace of every query."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from tokenprune.adapter import Backbone, Inputs, Observation
from tokenprune.backbones import load_backbone
from tokenprune.config import DENSE, PipelineConfig
from tokenprune.context import ControlContext, ControlDecision, PastFrames
from tokenprune.errors import ObservationError, PluginError, StageError, TokenPruneError, nearest
from tokenprune.frames import FrameBuffer
from tokenprune.history import EpisodeStart, ExecutedAction, Slot
from tokenprune.layout import TokenLayout
from tokenprune.loader import load_pipeline, parse_pipeline
from tokenprune.pipeline import BoundPipeline, bind
from tokenprune.plan import Plan
from tokenprune.record import QueryRecord
from tokenprune.registry import Registry
from tokenprune.runtime import Query
from tokenprune.trace import Clock, QueryTrace

_DRAWING = "drawing"
"""Phase of a query in which the host draws past frames; no part of the query's time."""


@dataclass(frozen=True)
class ActionChunk:
    """What a query returns.

    Attributes:
        actions: Actions `[T, D]` in the environment's units.
        normalised: The same before un-normalisation.
        trace: What the query did.
    """

    actions: np.ndarray
    normalised: np.ndarray
    trace: QueryTrace


class Policy:
    """A backbone with a pipeline.

    Several policies may share one backbone; each has a memory of its own.
    """

    def __init__(self, backbone: Backbone, config: PipelineConfig, registry: Registry) -> None:
        """Bind the pipeline to the backbone.

        Raises:
            ConfigError: If the pipeline does not fit the backbone.
        """
        self.backbone = backbone
        self.pipeline = bind(config, backbone.info, registry)
        self._dense = bind(DENSE, backbone.info, registry)
        self._slots: dict[int, Slot] = {}

    @property
    def looks_back(self) -> bool:
        """Whether any stage compares frames with past ones; a host need not give frames where none does."""
        return self.pipeline.frames > 0

    def reset(self, instruction: str, slot: int = 0) -> None:
        """Begin an episode or a new task in one environment; everything remembered there is forgotten.

        Every mode is planned here, so that what cannot run is refused before the first query.

        Raises:
            ObservationError: If the instruction cannot be given to the policy.
            ConfigError: If a budget of the pipeline does not fit the tokens of this policy.
        """
        layout = self.backbone.layout(instruction)
        for mode in self.pipeline.config.modes:
            self.pipeline.plan(layout, mode)
        number = self._slots[slot].number + 1 if slot in self._slots else 0
        self._slots[slot] = Slot(slot, instruction, FrameBuffer(self.pipeline.frames), number)
        start = EpisodeStart(slot, instruction, number)
        for index, hook in self.pipeline.hooks["reset"]:
            self.pipeline.call(index, "reset", hook, start)

    def act(self, observation: Observation, slot: int = 0) -> ActionChunk:
        """Query the policy for one environment.

        Raises:
            ObservationError: If the observation is not what the policy was made for.
            StageError: If a stage fails and the pipeline does not fall back.
            TraceError: If the query did not run to plan.
        """
        return self.act_batch({slot: observation})[slot]

    @torch.inference_mode()
    def act_batch(self, observations: Mapping[int, Observation]) -> dict[int, ActionChunk]:
        """Query the policy for several environments; those with the same layout and mode share a pass.

        Unless a cut keeps a union: its count depends on what each environment sees, so each has a pass of its own.
        """
        started = time.perf_counter()
        groups: dict[tuple[TokenLayout, str, int | None], list[int]] = {}
        for slot, observation in observations.items():
            self._begun(slot)
            self.backbone.check(observation)
        for slot in observations:
            layout = self.backbone.layout(self._slots[slot].instruction, observations[slot].get("state"))
            decision = self._decide(self._slots[slot], "query")
            mode = decision.mode if decision else self.pipeline.config.modes[0]
            alone = None if self.pipeline.plan(layout, mode).graph_safe else slot
            groups.setdefault((layout, mode, alone), []).append(slot)
        chunks: dict[int, ActionChunk] = {}
        for (layout, mode, _), members in groups.items():
            slots = [self._slots[slot] for slot in members]
            chunks |= self._query(layout, mode, slots, [observations[slot] for slot in members], started)
            started = time.perf_counter()
        return {slot: chunks[slot] for slot in observations}

    def executed(
        self,
        action: np.ndarray,
        pose: np.ndarray | None = None,
        time: float | None = None,
        observation: Observation | None = None,
        slot: int = 0,
        frames: Callable[[], Mapping[str, np.ndarray]] | None = None,
    ) -> bool:
        """Tell the policy that the robot executed an action; controllers and observers read it.

        Args:
            action: Commanded action `[D]` in the environment's units.
            pose: Achieved end-effector pose, where the host knows it.
            time: Seconds since the start of the episode.
            observation: What the robot sees after it. Stages that compare frames look back at these; without them,
                only the frames of queries are there to look back at.
            slot: The environment.
            frames: Instead of the observation, a function that draws its images, as simulators do more slowly than they
                step; called at most once, in a later query in which a stage looks back at this step.

        Returns:
            Whether a controller asks for a new query before the rest of the chunk is executed. The host may ignore it.

        Raises:
            ObservationError: If the slot has no episode, the action has the wrong shape or is not finite, the
                observation is not what the policy was made for, or both it and `frames` are given.
        """
        episode = self._begun(slot)
        if observation is not None and frames is not None:
            raise ObservationError("an executed action comes with an observation or with frames to draw, not with both")
        # Copied, because hosts fill the same array again.
        action = np.array(action, dtype=np.float64)
        if action.shape != (self.backbone.info.action.dims,) or not np.isfinite(action).all():
            raise ObservationError(
                f"an executed action is {self.backbone.info.action.dims} finite numbers, got {action!r}"
            )
        if observation is not None:
            self.backbone.check(observation)
        record = ExecutedAction(slot, action, None if pose is None else np.array(pose), time)
        episode.executed.append(record)
        images = frames if observation is None else observation["images"]
        if images is not None:
            episode.past.add(len(episode.executed), images)
        for index, hook in self.pipeline.hooks["observe"]:
            self.pipeline.call(index, "observe", hook, record)
        decision = self._decide(episode, "executed")
        return decision is not None and decision.replan

    def _begun(self, slot: int) -> Slot:
        if slot not in self._slots:
            raise ObservationError(f"slot {slot} has no episode; call reset(instruction, slot={slot}) first")
        return self._slots[slot]

    def _control(self, slot: Slot, stage: int, event: Literal["query", "executed"]) -> ControlContext:
        since = slot.executed[slot.asked_at :]
        memory = slot.host.setdefault(stage, {})
        modes = self.pipeline.config.modes
        return ControlContext(event, slot.index, modes, slot.queries, slot.executed, since, memory)

    def _decide(self, slot: Slot, event: Literal["query", "executed"]) -> ControlDecision | None:
        modes = self.pipeline.config.modes
        for index, hook in self.pipeline.hooks["control"]:
            decision = self.pipeline.call(index, "control", hook, self._control(slot, index, event))
            if decision is None:
                continue
            name = self.pipeline.names[index]
            if not isinstance(decision, ControlDecision):
                raise StageError(
                    f"stage '{name}': control returned {type(decision).__name__}, not a ControlDecision or None"
                )
            if decision.mode not in modes:
                raise StageError(f"stage '{name}' chose mode '{decision.mode}'{nearest(decision.mode, modes)}")
            return decision
        return None

    def _look_back(
        self, slots: list[Slot], observations: Sequence[Observation], images: Mapping[str, Tensor], clock: Clock
    ) -> dict[int, PastFrames]:
        """What each stage compares the current frames `images` with, cropped and uploaded."""
        past = {}
        for index, hook in self.pipeline.hooks["look_back"]:
            steps: list[int | None] = []
            rows: dict[str, list[Tensor]] = {view: [] for view in images}
            for row, slot in enumerate(slots):
                back = self.pipeline.call(index, "look_back", hook, self._control(slot, index, "query"))
                now = len(slot.executed)
                found = None if back is None else now if back == 0 else slot.past.find(now, back)
                steps.append(None if found is None else now - found)
                seen: Mapping[str, Tensor] = {view: pixels[row] for view, pixels in images.items()}
                if found != now:
                    seen = self._pixels(slot, found, observations[row], clock)
                for view, pixels in images.items():
                    rows[view].append(seen.get(view, torch.zeros_like(pixels[row])))
            past[index] = PastFrames(tuple(steps), {view: torch.stack(found) for view, found in rows.items()})
        return past

    def _pixels(self, slot: Slot, step: int | None, observation: Observation, clock: Clock) -> Mapping[str, Tensor]:
        if step is None:
            return {}
        if step == slot.asked_at:
            return slot.frames
        phase = clock.enter(_DRAWING)
        # The current state was checked before; only the images can be wrong.
        drawn = slot.past.images(step, lambda images: self.backbone.check({**observation, "images": images}))
        clock.enter(phase)
        return {view: pixels[0] for view, pixels in self.backbone.pixels([drawn]).items()}

    def _query(
        self, layout: TokenLayout, mode: str, slots: list[Slot], observations: Sequence[Observation], started: float
    ) -> dict[int, ActionChunk]:
        clock = Clock(self.backbone.device)
        clock.enter("preprocess")
        inputs = self.backbone.prepare(observations, [slot.instruction for slot in slots])
        try:
            clock.enter("selection")
            past = self._look_back(slots, observations, inputs.images, clock)
            clock.enter("preprocess")
            plan = self.pipeline.plan(layout, mode)
            query, normalised = self._run(self.pipeline, plan, inputs, slots, past, clock)
            query.keep()
        except StageError as error:
            if self.pipeline.config.on_error == "raise":
                raise
            for slot in slots:
                slot.kv, slot.features = None, {}
            query, normalised = self._run(self._dense, self._dense.plan(layout), inputs, slots, {}, clock)
            query.trace = replace(query.trace, pipeline=self.pipeline.config.name, fallback=str(error))
        actions = self.backbone.unnormalise(normalised, observations)
        clock.enter("history")
        for row, slot in enumerate(slots):
            slot.queries += 1
            slot.asked_at = len(slot.executed)
            slot.frames = {view: pixels[row] for view, pixels in inputs.images.items()}
            slot.past.add(slot.asked_at, observations[row]["images"])
        clock.enter("end")
        if self.backbone.device.type == "cuda":
            torch.cuda.synchronize(self.backbone.device)
        trace = query.trace
        trace.phases = clock.milliseconds()
        # A camera would have delivered by then what a simulator draws only when it is asked.
        trace.milliseconds = (time.perf_counter() - started) * 1e3 - trace.phases.pop(_DRAWING, 0.0)
        return {slot.index: ActionChunk(actions[row], normalised[row], trace) for row, slot in enumerate(slots)}

    def _run(
        self,
        pipeline: BoundPipeline,
        plan: Plan,
        inputs: Inputs,
        slots: list[Slot],
        past: Mapping[int, PastFrames],
        clock: Clock,
    ) -> tuple[Query, np.ndarray]:
        tables = pipeline.tables(plan.layout, self.backbone.device)
        query = Query(pipeline, plan, tables, slots, inputs.images, past, clock)
        query.trace.looked_back = {pipeline.names[index]: frames.steps for index, frames in past.items()}
        result = self.backbone.infer(inputs, query)
        clock.enter("head")
        normalised = result.double().cpu().numpy()
        query.finish()
        if not np.isfinite(normalised).all():
            raise TokenPruneError(
                f"backbone '{self.backbone.info.name}' returned actions that are not finite; "
                "its weights or dtype cannot be used (float16 overflows where bfloat16 does not)"
            )
        if pipeline.hooks["observe"]:
            clock.enter("history")
            record = QueryRecord(
                slots=tuple(slot.index for slot in slots),
                mode=plan.mode,
                layout=plan.layout,
                tokens=query.tokens,
                actions=result,
                attention=query.attention,
                memories=slots,
                tables=tables,
            )
            for index, hook in pipeline.hooks["observe"]:
                pipeline.call(index, "observe", hook, replace(record, scope=f"{index}."))
        return query, normalised


def load(
    backbone: str,
    *,
    checkpoint: str | Path | None = None,
    preset: str | None = None,
    pipeline: str | Path | Mapping[str, Any] = "dense",
    device: str = "cpu",
    dtype: str = "auto",
    seed: int = 0,
    overrides: Sequence[str] = (),
    registry: Registry | None = None,
    **options: Any,  # noqa: ANN401 - the backbone's own options, checked by it
) -> Policy:
    """Load a backbone and bind a pipeline to it.

    Args:
        backbone: Registered name, such as `openvla-oft`.
        checkpoint: Folder in the release's format, or a hub id.
        preset: What the backbone offers instead of a checkpoint: a trained policy of its own, or a size to fill with
            untrained random weights.
        pipeline: Name of a shipped pipeline, path of a file, or what a file would say as plain data.
        device: torch device.
        dtype: One of `float32`, `bfloat16`, `float16`, `float64`; `auto` is bfloat16, the releases' own, where the
            device computes it natively, and float32 elsewhere.
        seed: Seed of an untrained preset's random weights.
        overrides: `stages.1.keep=0.5` and the like, applied to a named pipeline or file.
        registry: Discovered plugins; discovered now when left out.
        **options: What the backbone accepts besides, such as `unnorm_key`.

    Raises:
        PluginError: If the backbone or a stage is unknown.
        ConfigError: If the pipeline or an option is wrong.
        CheckpointError: If the checkpoint cannot be used.
    """
    registry = registry or Registry.discover()
    config = _configured(pipeline, registry, overrides)
    return Policy(load_backbone(backbone, registry, checkpoint, preset, device, dtype, seed, options), config, registry)


def from_module(
    module: torch.nn.Module,
    backbone: str,
    *,
    pipeline: str | Path | Mapping[str, Any] = "dense",
    overrides: Sequence[str] = (),
    registry: Registry | None = None,
    **options: Any,  # noqa: ANN401 - the adapter's own options, checked by it
) -> Policy:
    """Adopt a live upstream model and bind a pipeline to it; its weights are shared, none is copied.

    Args:
        module: The upstream model, on its device and in its dtype.
        backbone: Registered name of its family, such as `openvla`.
        pipeline: As in `load`.
        overrides: As in `load`.
        registry: As in `load`.
        **options: The adapter's options, and what the model itself does not hold, such as `tokenizer="PATH"`.

    Raises:
        PluginError: If the backbone or a stage is unknown, or the backbone cannot adopt models.
        ConfigError: If the pipeline or an option is wrong.
        CheckpointError: If the model is not of this family.
    """
    registry = registry or Registry.discover()
    config = _configured(pipeline, registry, overrides)
    factory = registry.backbone_factory(backbone)
    if not callable(getattr(factory, "adopt", None)):
        raise PluginError(f"backbone '{backbone}' of {registry.backbone(backbone).owner} cannot adopt a live model")
    return Policy(factory.adopt(module, options), config, registry)


def _configured(
    pipeline: str | Path | Mapping[str, Any], registry: Registry, overrides: Sequence[str]
) -> PipelineConfig:
    if isinstance(pipeline, Mapping):
        return parse_pipeline(pipeline, registry, "pipeline").config
    return load_pipeline(pipeline, registry, overrides).config
