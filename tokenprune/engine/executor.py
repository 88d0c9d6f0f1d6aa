"""How a query runs on the device: eagerly, through compiled layers, or as one CUDA graph."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Hashable
from enum import StrEnum
from functools import partial
from typing import TYPE_CHECKING, Protocol

import torch

from tokenprune.engine.cuda_graph import Capture, QueryGraph, cuda_graph, graph_key
from tokenprune.engine.inputs import QueryInputs
from tokenprune.engine.query import Query, QueryOutcome
from tokenprune.engine.timing import Clock
from tokenprune.engine.trace import QueryTrace
from tokenprune.errors import ConfigError, nearest
from tokenprune.model.decoder import DecoderRunner, run_decoder
from tokenprune.model.phase import Phase
from tokenprune.pipelines.binding import BoundPipeline
from tokenprune.tokens.plan import Plan

if TYPE_CHECKING:
    from tokenprune.engine.adapter import Backbone

MAX_GRAPHS = 16
"""Graphs kept in an LRU cache: a pipeline with two modes needs four to eight."""


class Execution(StrEnum):
    """How the operations of a query are launched."""

    EAGER = "eager"
    COMPILE = "compile"
    CUDA_GRAPH = "cuda_graph"
    COMPILED_CUDA_GRAPH = "compiled_cuda_graph"

    @property
    def compiled(self) -> bool:
        """Whether layers run under torch.compile."""
        return self in (Execution.COMPILE, Execution.COMPILED_CUDA_GRAPH)

    @property
    def graph(self) -> bool:
        """Whether a query runs as one CUDA graph."""
        return self in (Execution.CUDA_GRAPH, Execution.COMPILED_CUDA_GRAPH)

    @property
    def runner(self) -> DecoderRunner:
        """The function that runs the decoder's layers."""
        return partial(run_decoder, compiled=True) if self.compiled else run_decoder

    @classmethod
    def of(cls, name: str) -> Execution:
        """Return the execution of this name.

        Raises:
            ConfigError: If there is none.
        """
        try:
            return cls(name)
        except ValueError as error:
            raise ConfigError(f"no execution '{name}'{nearest(name, cls)}") from error


class Executor(Protocol):
    """Runs queries."""

    execution: Execution

    def check(self, pipeline: BoundPipeline, plan: Plan) -> None:
        """Check that a plan can run this way.

        Raises:
            ConfigError: If it cannot.
        """
        ...

    def run(self, pipeline: BoundPipeline, plan: Plan, inputs: QueryInputs, clock: Clock) -> QueryOutcome:
        """Run one query, in the clock's phases of the model."""
        ...


class EagerExecutor:
    """Launches every operation from Python; layers may be compiled."""

    def __init__(self, backbone: Backbone, execution: Execution = Execution.EAGER) -> None:
        """Compiled layers are compiled in their first query."""
        self.execution = execution
        self._backbone = backbone

    def check(self, pipeline: BoundPipeline, plan: Plan) -> None:
        """Accept every plan."""

    def run(self, pipeline: BoundPipeline, plan: Plan, inputs: QueryInputs, clock: Clock) -> QueryOutcome:
        """Run the model once."""
        query = Query(pipeline, plan, inputs, clock, self.execution.runner)
        actions = self._backbone.infer(inputs.model, query)
        clock.enter(Phase.HISTORY)
        query.trace.execution = self.execution
        return query.outcome(actions)


class GraphExecutor:
    """Runs the first query of each kind eagerly and captures it; later queries replay the graph.

    Args:
        backbone: On a CUDA device, unless `capture` is not CUDA's.
        capture: Captures a query.
        execution: An execution with a graph.

    Raises:
        ConfigError: If CUDA graphs are asked for and the backbone is on another device.
    """

    def __init__(
        self, backbone: Backbone, capture: Capture = cuda_graph, execution: Execution = Execution.CUDA_GRAPH
    ) -> None:
        if capture is cuda_graph and backbone.device.type != "cuda":
            raise ConfigError(f"execution: {execution} needs a CUDA device; the policy is on '{backbone.device}'")
        self.execution = execution
        self._first = EagerExecutor(backbone, Execution.COMPILE if execution.compiled else Execution.EAGER)
        self._backbone = backbone
        self._capture = capture
        self._graphs: OrderedDict[Hashable, QueryGraph | None] = OrderedDict()

    def check(self, pipeline: BoundPipeline, plan: Plan) -> None:
        """Refuse a plan whose counts are not known before the query, or whose stages work on the host."""
        check_plan(self.execution, pipeline, plan)

    def run(self, pipeline: BoundPipeline, plan: Plan, inputs: QueryInputs, clock: Clock) -> QueryOutcome:
        """Replay the graph of this kind of query, or run the query eagerly and capture it."""
        key = graph_key(pipeline, plan, inputs)
        graph = self._graphs.get(key)
        if graph is not None:
            self._graphs.move_to_end(key)
            outcome = graph.replay(inputs, clock)
            clock.enter(Phase.HISTORY)
            outcome.trace.execution = self.execution
            return outcome
        # A copy to capture from, because the query writes to its drafts.
        untouched = None if key in self._graphs else inputs.drafted()
        outcome = self._first.run(pipeline, plan, inputs, clock)
        if untouched is not None:
            clock.enter(Phase.CAPTURE)
            self._graphs[key] = self._captured(pipeline, plan, untouched, outcome.trace)
            clock.enter(Phase.HISTORY)
            if len(self._graphs) > MAX_GRAPHS:
                self._graphs.popitem(last=False)
        return outcome

    def _captured(
        self, pipeline: BoundPipeline, plan: Plan, inputs: QueryInputs, trace: QueryTrace
    ) -> QueryGraph | None:
        try:
            return QueryGraph(self._backbone, pipeline, plan, inputs, self._capture, self.execution.runner)
        except RuntimeError as error:
            # When memory runs out during capture, ending the capture may raise another error on top.
            if not any(isinstance(one, torch.OutOfMemoryError) for one in (error, error.__context__)):
                raise
            trace.execution = f"{self._first.execution} (no memory for a graph)"
            warnings.warn(
                f"no memory to capture pipeline '{pipeline.config.name}', mode '{plan.mode}', as a CUDA graph; "
                "queries like this one run eagerly",
                stacklevel=2,
            )
            return None


def check_plan(execution: Execution, pipeline: BoundPipeline, plan: Plan) -> None:
    """Check that a plan can run with this execution.

    Raises:
        ConfigError: If it needs a graph, and a count depends on data or a stage works on the host.
    """
    if not execution.graph:
        return
    where = f"pipeline '{pipeline.config.name}', mode '{plan.mode}': execution: {execution}"
    unsafe = [pipeline.names[index] for cut in plan.cuts if cut.union for index in cut.stages]
    if unsafe:
        raise ConfigError(
            f"{where} needs counts that are known before the query, and 'keep: union' of '{unsafe[0]}' depends on "
            "what is seen; give it a count or a ratio, or use execution: eager"
        )
    for needs, name in zip(pipeline.needs, pipeline.names, strict=True):
        if not needs.graph_safe:
            raise ConfigError(f"{where} cannot hold '{name}', which works on the host; use execution: eager")


def executor(execution: Execution, backbone: Backbone) -> Executor:
    """Return an executor for this execution.

    Raises:
        ConfigError: If the backbone's device does not support it.
    """
    if execution.graph:
        return GraphExecutor(backbone, execution=execution)
    return EagerExecutor(backbone, execution)
