"""Runs one episode: a policy acts in an environment until the task is done or the horizon is reached."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from time import perf_counter

import numpy as np

from tokenprune.engine.adapter import Observation
from tokenprune.errors import ConfigError
from tokenprune.evaluation.environment import Environment, Frames, Suite
from tokenprune.evaluation.records import EpisodeRecord
from tokenprune.evaluation.starts import Start, check_starts
from tokenprune.evaluation.variant import Variant, black_views, instruction_of
from tokenprune.model.info import ActionSpec
from tokenprune.policy import ActionChunk, Policy
from tokenprune.report.describe import trace_flops

OnStep = Callable[[Frames, ActionChunk], None]
"""Called before each action and once at the end, with a renderer of that moment and the chunk in execution."""


def run_episode(
    policy: Policy,
    environment: Environment,
    start: Start,
    variant: Variant,
    tasks: Sequence[int],
    execute: int | None = None,
    replan: bool = True,
    on_step: OnStep | None = None,
) -> EpisodeRecord:
    """Run one episode from a start.

    Args:
        policy: Acts; it is reset.
        environment: The simulator; it is reset.
        start: Where the episode begins.
        variant: Label of the policy's pipeline, and the condition under which it acts.
        tasks: Indices of all tasks evaluated in this environment, in order.
        execute: Actions of each chunk that are executed; all when left out.
        replan: Whether a controller may request a new query within a chunk.
        on_step: Called at each step; it gets the images without the condition applied.

    Raises:
        ConfigError: If the environment has no such start or lacks a view, or `execute` or the condition does not fit.
        SimulatorError: If the simulator fails.
        StageError: If a stage fails and the pipeline does not fall back.
    """
    suite, info = environment.suite, policy.backbone.info
    check_starts([start], {suite.name: suite})
    check_fit(policy, suite, variant, execute)
    instruction = instruction_of(variant, suite, tasks, start.task)
    black = black_views(variant, info.views)
    clock = _Clock()

    def visible(images: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {view: np.zeros_like(images[view]) if view in black else images[view] for view in info.views}

    def observe() -> Observation:
        with clock.simulator():
            observation = environment.observe()
        return {**observation, "images": visible(observation["images"])}

    def capture() -> Callable[[], Mapping[str, np.ndarray]]:
        with clock.simulator():
            frames = environment.frames()

        def render() -> Mapping[str, np.ndarray]:
            # Called within a query, but rendering is the simulator's time.
            with clock.simulator():
                images = frames()
            return visible(images)

        return render

    chunks: list[ActionChunk] = []
    actions: list[np.ndarray] = []
    begins: list[int] = []
    replans, success, requested = 0, False, False
    begun = perf_counter()
    with clock.simulator():
        environment.reset(start.task, start.init_state, start.seed)
    with clock.policy():
        policy.reset(instruction)
    while not success and len(actions) < suite.horizon:
        replans += requested
        observation = observe()
        with clock.policy():
            chunk = policy.act(observation)
        chunks.append(chunk)
        begins.append(len(actions))
        planned = chunk.actions[:execute]
        for index, action in enumerate(planned):
            if on_step is not None:
                on_step(environment.frames(), chunk)
            with clock.simulator():
                step = environment.step(action)
            actions.append(np.array(action))
            success = bool(step.success)
            with clock.policy():
                frames = capture() if policy.looks_back else None
                replan_requested = policy.executed(action, step.pose, len(actions) / suite.control_hz, frames=frames)
            requested = replan and replan_requested and index + 1 < len(planned)
            if success or requested or len(actions) == suite.horizon:
                break
    if on_step is not None:
        on_step(environment.frames(), chunks[-1])
    episode_s = perf_counter() - begun
    traces = [chunk.trace for chunk in chunks]
    action_change, seam_change, switches = _motion(actions, begins, info.action)
    phases = dict.fromkeys(name for trace in traces for name in trace.phases)
    return EpisodeRecord(
        variant=variant.label,
        environment=start.environment,
        task=start.task,
        init_state=start.init_state,
        seed=start.seed,
        success=success,
        steps=len(actions),
        queries=len(chunks),
        replans=replans,
        fallbacks=sum(bool(trace.fallback) for trace in traces),
        modes=dict(sorted(Counter(trace.mode for trace in traces).items())),
        tokens_mean=_mean([float(np.mean(trace.plan.prunable)) for trace in traces]),
        tokens_last=_mean([trace.plan.prunable[-1] for trace in traces]),
        gflops=_mean([trace_flops(info, trace).total / 1e9 for trace in traces]),
        action_change=action_change,
        seam_change=seam_change,
        gripper_switches=switches,
        crashes=0,
        query_ms=[trace.milliseconds for trace in traces],
        phases_ms={name: _mean([trace.phases.get(name, 0.0) for trace in traces]) for name in phases},
        simulator_s=clock.simulator_s,
        policy_s=clock.policy_s,
        episode_s=episode_s,
    )


def check_fit(policy: Policy, suite: Suite, variant: Variant, execute: int | None) -> None:
    """Refuse a policy that could not run in an environment.

    Raises:
        ConfigError: If the environment or the policy lacks a view, or `execute` is outside the chunk.
    """
    info = policy.backbone.info
    missing = [view for view in info.views if view not in suite.views]
    if missing:
        raise ConfigError(
            f"environment '{suite.name}' has the views {', '.join(suite.views)}; "
            f"the policy also looks at {', '.join(missing)}"
        )
    if execute is not None and not 1 <= execute <= info.action.horizon:
        raise ConfigError(f"execute: 1 to {info.action.horizon} actions of each chunk, not {execute}")
    black_views(variant, info.views)


class _Clock:
    """Seconds spent in the simulator and in the policy; rendering within a query counts for the simulator."""

    def __init__(self) -> None:
        self.simulator_s = 0.0
        self.policy_s = 0.0

    @contextmanager
    def simulator(self) -> Iterator[None]:
        began = perf_counter()
        yield
        self.simulator_s += perf_counter() - began

    @contextmanager
    def policy(self) -> Iterator[None]:
        began, simulated = perf_counter(), self.simulator_s
        yield
        self.policy_s += perf_counter() - began - (self.simulator_s - simulated)


def _motion(
    actions: Sequence[np.ndarray], begins: Sequence[int], spec: ActionSpec
) -> tuple[float | None, float | None, int]:
    """Return the mean change from step to step, the mean change at seams of chunks, and gripper switches."""
    executed = np.stack(actions).astype(np.float64)
    switches = 0
    if spec.gripper is not None:
        dim, threshold = spec.gripper
        above = executed[:, dim] > threshold
        switches = int((above[1:] != above[:-1]).sum())
        executed = np.delete(executed, dim, axis=1)
    changes = np.abs(np.diff(executed, axis=0)).sum(axis=1)
    seams = changes[[begin - 1 for begin in begins[1:]]]
    return _mean(changes) if len(changes) else None, _mean(seams) if len(seams) else None, switches


def _mean(values: Sequence[float] | np.ndarray) -> float:
    return float(np.mean(values))
