"""The policy: observations in, actions out, with one memory per environment and a trace of every query."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from tokenprune.engine.adapter import Backbone, Observation
from tokenprune.engine.control import decide, failing_later
from tokenprune.engine.executor import Execution, Executor, executor
from tokenprune.engine.inputs import ModelInputs, QueryInputs
from tokenprune.engine.look_back import look_back
from tokenprune.engine.query import QueryOutcome
from tokenprune.engine.rng import QueryRng
from tokenprune.engine.timing import Clock
from tokenprune.engine.trace import QueryTrace
from tokenprune.errors import ObservationError, StageError, TokenPruneError
from tokenprune.model.phase import Phase
from tokenprune.pipelines.binding import BoundPipeline, bind
from tokenprune.pipelines.config import DENSE, PipelineConfig
from tokenprune.registry.discovery import Registry
from tokenprune.stages.frames import FrameBuffer
from tokenprune.stages.memory import EpisodeStart, ExecutedAction, Slot
from tokenprune.stages.token_context import PastFrames
from tokenprune.tokens.layout import TokenLayout
from tokenprune.tokens.plan import Plan
from tokenprune.tokens.prompt import EncodedPrompt


@dataclass(frozen=True)
class ActionChunk:
    """What a query returns.

    Attributes:
        actions: Actions `[T, D]` in the environment's units.
        normalised: The same before un-normalisation; None if a controller answered the query.
        trace: What the query did.
    """

    actions: np.ndarray
    normalised: np.ndarray | None
    trace: QueryTrace


class Policy:
    """A backbone with a pipeline bound to it.

    Several policies may share one backbone; each has its own memory.
    """

    def __init__(
        self, backbone: Backbone, config: PipelineConfig, registry: Registry, execution: str = "eager"
    ) -> None:
        """Bind the pipeline to the backbone.

        Raises:
            ConfigError: If the pipeline does not fit the backbone, or the device has no such execution.
        """
        self.backbone = backbone
        self.executor: Executor = executor(Execution.of(execution), backbone)
        self.pipeline = bind(config, backbone.info, registry)
        self._dense = bind(DENSE, backbone.info, registry)
        self._slots: dict[int, Slot] = {}

    @property
    def looks_back(self) -> bool:
        """Whether any stage compares frames with past ones; if not, the host need not pass frames to `executed`."""
        return self.pipeline.look_back_frames > 0

    def reset(self, instruction: str, slot: int = 0) -> None:
        """Begin an episode or a new task in one environment, and clear its memory.

        Every mode is planned here, so that a plan that cannot run is refused before the first query.

        Raises:
            ObservationError: If the policy cannot use the instruction.
            ConfigError: If a budget of the pipeline does not fit the tokens of this policy, or the execution
                cannot run one of the modes.
        """
        prompt = self.backbone.encode(instruction)
        for mode in self.pipeline.config.modes:
            self.executor.check(self.pipeline, self.pipeline.plan(prompt.layout, mode))
        number = self._slots[slot].number + 1 if slot in self._slots else 0
        self._slots[slot] = Slot(slot, instruction, FrameBuffer(self.pipeline.look_back_frames), prompt, number)
        start = EpisodeStart(slot, instruction, number)
        for call in self.pipeline.hooks["reset"]:
            self.pipeline.call(call, start)

    def act(self, observation: Observation, slot: int = 0) -> ActionChunk:
        """Query the policy for one environment.

        Raises:
            ObservationError: If the observation does not fit the policy.
            StageError: If a stage fails and the pipeline does not fall back.
            TraceError: If the query did not run as planned.
        """
        return self.act_batch({slot: observation})[slot]

    @torch.inference_mode()
    def act_batch(self, observations: Mapping[int, Observation]) -> dict[int, ActionChunk]:
        """Query the policy for several environments; those with the same layout and mode run as one batch.

        With a `keep: union` cut each environment runs by itself, because its token count depends on its observation.
        """
        started = time.perf_counter()
        groups: dict[tuple[TokenLayout, str, int | None], tuple[Plan, list[int]]] = {}
        chunks: dict[int, ActionChunk] = {}
        for slot, observation in observations.items():
            self._episode(slot)
            self.backbone.check(observation)
        for slot in observations:
            layout = self._prompt(self._slots[slot], observations[slot]).layout
            decision = decide(self.pipeline, self._slots[slot], "query")
            plan = self.pipeline.plan(layout, decision.mode)
            if decision.actions is not None:
                chunks[slot] = self._answer(self._slots[slot], plan, decision.actions, observations[slot], started)
                continue
            own_pass = None if plan.graph_safe else slot
            groups.setdefault((layout, plan.mode, own_pass), (plan, []))[1].append(slot)
        for plan, members in groups.values():
            slots = [self._slots[slot] for slot in members]
            chunks |= self._query(plan, slots, [observations[slot] for slot in members], started)
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
            observation: What the robot sees after it, for stages that compare frames; without it, they can look back
                only at the frames of queries.
            slot: The environment.
            frames: Instead of the observation, a function that renders its images, because rendering is slower than a
                simulation step; called at most once, in a later query in which a stage looks back at this step.

        Returns:
            Whether a controller asks for a new query before the rest of the chunk is executed. The host may ignore it.

        Raises:
            ObservationError: If the slot has no episode, the action has the wrong shape or is not finite, the
                observation does not fit the policy, or both it and `frames` are given.
        """
        episode = self._episode(slot)
        if observation is not None and frames is not None:
            raise ObservationError("an executed action comes with an observation or with frames to draw, not with both")
        # Copied, because hosts reuse the array.
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
        with failing_later(self.pipeline, episode):
            for call in self.pipeline.hooks["observe"]:
                self.pipeline.call(call, record)
        return decide(self.pipeline, episode, "executed").replan

    def _episode(self, slot: int) -> Slot:
        if slot not in self._slots:
            raise ObservationError(f"slot {slot} has no episode; call reset(instruction, slot={slot}) first")
        return self._slots[slot]

    def _prompt(self, slot: Slot, observation: Observation) -> EncodedPrompt:
        """The encoded prompt of the slot's next query."""
        if slot.prompt is None or self.backbone.info.state_in_prompt:
            slot.prompt = self.backbone.encode(slot.instruction, observation.get("state"))
        return slot.prompt

    def _answer(
        self, slot: Slot, plan: Plan, actions: np.ndarray, observation: Observation, started: float
    ) -> ActionChunk:
        """The chunk of a query that a controller answered."""
        slot.past.add(len(slot.executed), observation["images"])
        every = frozenset(range(plan.depth))
        trace = QueryTrace(self.pipeline.config.name, replace(plan, cuts=(), skipped=every))
        trace.answered, trace.held = True, trace.plan.tokens
        trace.milliseconds = (time.perf_counter() - started) * 1e3
        return ActionChunk(np.array(actions, dtype=np.float64), None, trace)

    def _query(
        self, plan: Plan, slots: list[Slot], observations: Sequence[Observation], started: float
    ) -> dict[int, ActionChunk]:
        clock = Clock(self.backbone.device)
        clock.enter(Phase.PREPROCESS)
        inputs = self.backbone.prepare(observations, [slot.prompt for slot in slots if slot.prompt is not None])
        try:
            for slot in slots:
                if slot.failed is not None:
                    raise slot.failed
            clock.enter(Phase.SELECTION)
            past = look_back(self.pipeline, self.backbone, slots, observations, inputs.images, clock)
            clock.enter(Phase.PREPROCESS)
            outcome, normalised = self._run(self.pipeline, plan, inputs, slots, past, clock)
            trace = outcome.trace
        except StageError as error:
            if self.pipeline.config.on_error == "raise":
                raise
            outcome, normalised = self._run(self._dense, self._dense.plan(plan.layout), inputs, slots, {}, clock)
            trace = replace(outcome.trace, pipeline=self.pipeline.config.name, fallback=str(error))
        actions = self.backbone.unnormalise(normalised, observations)
        clock.enter(Phase.HISTORY)
        for row, slot in enumerate(slots):
            slot.queries += 1
            slot.asked_at = len(slot.executed)
            slot.failed = None
            slot.memory = outcome.device.memories[row]
            slot.memory.frames = {view: pixels[row] for view, pixels in inputs.images.items()}
            slot.past.add(slot.asked_at, observations[row]["images"])
        clock.enter(Phase.END)
        if self.backbone.device.type == "cuda":
            torch.cuda.synchronize(self.backbone.device)
        trace.phases = clock.milliseconds()
        # A real camera would have delivered these frames already; only a simulator renders them now.
        trace.milliseconds = (time.perf_counter() - started) * 1e3 - trace.phases.pop(Phase.DRAWING, 0.0)
        return {slot.index: ActionChunk(actions[row], normalised[row], trace) for row, slot in enumerate(slots)}

    def _run(
        self,
        pipeline: BoundPipeline,
        plan: Plan,
        inputs: ModelInputs,
        slots: list[Slot],
        past: Mapping[int, PastFrames],
        clock: Clock,
    ) -> tuple[QueryOutcome, np.ndarray]:
        """One pass of the model on drafts of the slots, so that a failing pass changes nothing."""
        device = self.backbone.device
        rng = QueryRng(slots, pipeline.config.seed, device)
        query_inputs = QueryInputs(
            inputs, [slot.draft() for slot in slots], past, rng, pipeline.tables(plan.layout, device)
        )
        outcome = self.executor.run(pipeline, plan, query_inputs, clock)
        outcome.trace.looked_back = {pipeline.names[index]: frames.steps for index, frames in past.items()}
        clock.enter(Phase.HEAD)
        normalised = outcome.device.actions.double().cpu().numpy()
        outcome.finish()
        if not np.isfinite(normalised).all():
            raise TokenPruneError(
                f"backbone '{self.backbone.info.name}' returned actions that are not finite; "
                "its weights or dtype cannot be used (float16 overflows where bfloat16 does not)"
            )
        return outcome, normalised
