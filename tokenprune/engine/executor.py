"""How a query runs on the device: call by call, through compiled layers, or as one recorded graph."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import replace
from typing import TYPE_CHECKING, Literal, Protocol, get_args

import torch

from tokenprune.engine.cuda_graph import Recorder, Recording, cuda_graph, recording_key
from tokenprune.engine.inputs import Given
from tokenprune.engine.query import Outcome, Query
from tokenprune.engine.timing import Clock
from tokenprune.engine.trace import QueryTrace
from tokenprune.errors import ConfigError, nearest
from tokenprune.pipelines.binding import BoundPipeline
from tokenprune.tokens.plan import Plan

if TYPE_CHECKING:
    from tokenprune.engine.adapter import Backbone

Execution = Literal["eager", "compile", "cuda_graph", "compiled_cuda_graph"]


EXECUTIONS: tuple[str, ...] = get_args(Execution)


RECORDINGS = 16
"""Recordings that are kept, the last used ones: a pipeline with two modes needs four to eight of them."""


class Executor(Protocol):
    """Runs queries."""

    name: str

    def check(self, pipeline: BoundPipeline, plan: Plan) -> None:
        """Refuse a plan that cannot run this way.

        Raises:
            ConfigError: Saying why.
        """
        ...

    def run(self, pipeline: BoundPipeline, plan: Plan, given: Given, clock: Clock) -> tuple[QueryTrace, Outcome]:
        """Run one query; the clock is in no phase of the model's before or after."""
        ...


class CallByCall:
    """Every operation is launched by itself; layers may be compiled."""

    def __init__(self, backbone: Backbone, compiled: bool = False) -> None:
        """Nothing is compiled before it runs."""
        self.name = "compile" if compiled else "eager"
        self._backbone = backbone
        self._compiled = compiled

    def check(self, pipeline: BoundPipeline, plan: Plan) -> None:
        """Every plan can."""

    def run(self, pipeline: BoundPipeline, plan: Plan, given: Given, clock: Clock) -> tuple[QueryTrace, Outcome]:
        """Run the model through its hook points."""
        query = Query(pipeline, plan, given, clock, compiled=self._compiled)
        actions = self._backbone.infer(given.inputs, query)
        clock.enter("history")
        outcome = query.outcome(actions)
        query.trace.execution = self.name
        return query.trace, outcome


class Recorded:
    """The first query of each kind runs call by call and is recorded; later ones are replays."""

    def __init__(self, backbone: Backbone, recorder: Recorder = cuda_graph, *, compiled: bool = False) -> None:
        """Nothing is recorded yet; layers may be compiled before they are.

        Raises:
            ConfigError: If graphs are to be CUDA's and the backbone is elsewhere.
        """
        self.name = "compiled_cuda_graph" if compiled else "cuda_graph"
        if recorder is cuda_graph and backbone.device.type != "cuda":
            raise ConfigError(f"execution: {self.name} needs a CUDA device; the policy is on '{backbone.device}'")
        self._first = CallByCall(backbone, compiled)
        self._compiled = compiled
        self._backbone = backbone
        self._recorder = recorder
        self._recordings: OrderedDict[Hashable, Recording | None] = OrderedDict()

    def check(self, pipeline: BoundPipeline, plan: Plan) -> None:
        """Only what is known before the query can be recorded."""
        check_plan(self.name, pipeline, plan)

    def run(self, pipeline: BoundPipeline, plan: Plan, given: Given, clock: Clock) -> tuple[QueryTrace, Outcome]:
        """Replay what is recorded for queries like this; record it where nothing is."""
        key = recording_key(pipeline, plan, given)
        recording = self._recordings.get(key)
        if recording is not None:
            self._recordings.move_to_end(key)
            trace, outcome = recording.replay(given, clock)
            clock.enter("history")
            trace.execution = self.name
            return trace, outcome
        # As it was before the query writes to its drafts.
        again = None if key in self._recordings else replace(given, slots=[slot.draft() for slot in given.slots])
        trace, outcome = self._first.run(pipeline, plan, given, clock)
        if again is not None:
            clock.enter("recording")
            self._recordings[key] = self._record(pipeline, plan, again, trace)
            clock.enter("history")
            if len(self._recordings) > RECORDINGS:
                self._recordings.popitem(last=False)
        return trace, outcome

    def _record(self, pipeline: BoundPipeline, plan: Plan, given: Given, trace: QueryTrace) -> Recording | None:
        try:
            return Recording(self._backbone, pipeline, plan, given, self._recorder, self._compiled)
        except RuntimeError as error:
            # An allocation that fails may leave a capture that fails to end, and then that is what is raised.
            if not any(isinstance(one, torch.OutOfMemoryError) for one in (error, error.__context__)):
                raise
            trace.execution = f"{self._first.name} (no memory for a graph)"
            warnings.warn(
                f"no memory to record pipeline '{pipeline.config.name}', mode '{plan.mode}', as a CUDA graph; "
                "queries like this one run call by call",
                stacklevel=2,
            )
            return None


def check_plan(execution: str, pipeline: BoundPipeline, plan: Plan) -> None:
    """Refuse a plan that cannot be executed so.

    Raises:
        ConfigError: If it is to be recorded, and a count depends on data or a stage says that it cannot be recorded.
    """
    if not execution.endswith("cuda_graph"):
        return
    where = f"pipeline '{pipeline.config.name}', mode '{plan.mode}': execution: {execution}"
    unsafe = [pipeline.names[index] for cut in plan.cuts if cut.union for index in cut.stages]
    if unsafe:
        raise ConfigError(
            f"{where} needs counts that are known before the query, and 'keep: union' of '{unsafe[0]}' depends on "
            "what is seen; give it a count or a ratio, or use execution: eager"
        )
    for stage, name in zip(pipeline.stages, pipeline.names, strict=True):
        if not stage.recordable():
            raise ConfigError(f"{where} cannot hold '{name}', which works on the host; use execution: eager")


def executor(name: str, backbone: Backbone) -> Executor:
    """The executor of a name.

    Raises:
        ConfigError: If there is none, or the backbone's device cannot do it.
    """
    if name not in EXECUTIONS:
        raise ConfigError(f"no execution '{name}'{nearest(name, EXECUTIONS)}")
    compiled = name.startswith("compile")
    return Recorded(backbone, compiled=compiled) if name.endswith("cuda_graph") else CallByCall(backbone, compiled)
