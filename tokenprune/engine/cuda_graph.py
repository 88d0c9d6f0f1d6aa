"""A query captured as a CUDA graph and replayed on other observations through fixed buffers."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tokenprune.engine.inputs import QueryInputs
from tokenprune.engine.query import DeviceOutcome, Query, QueryOutcome
from tokenprune.engine.rng import BufferedRng
from tokenprune.engine.tensor_tree import copy_tensors, map_tensors, structure
from tokenprune.engine.timing import Clock, GraphClock
from tokenprune.engine.trace import QueryTrace
from tokenprune.model.decoder import DecoderRunner
from tokenprune.model.phase import Phase
from tokenprune.pipelines.binding import BoundPipeline
from tokenprune.tokens.plan import Plan

if TYPE_CHECKING:
    from tokenprune.engine.adapter import Backbone

Capture = Callable[[Callable[[], DeviceOutcome]], tuple[DeviceOutcome, Callable[[], None]]]
"""Captures the device work of a function; returns its output tensors and a function that recomputes them."""


def cuda_graph(run: Callable[[], DeviceOutcome]) -> tuple[DeviceOutcome, Callable[[], None]]:
    """Capture a CUDA graph in a memory pool that all graphs share, because only one runs at a time."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=_shared_pool()):
        outcome = run()
    return outcome, graph.replay


@cache
def _shared_pool() -> Any:  # noqa: ANN401 - a handle of torch's own
    return torch.cuda.graph_pool_handle()


class QueryGraph:
    """One query of a pipeline in one mode, for observations of one structure.

    Stages are called during capture only. So a graph stands only for queries in which all stages read the same host
    values: see `Stage.host_state`.
    """

    def __init__(
        self,
        backbone: Backbone,
        pipeline: BoundPipeline,
        plan: Plan,
        inputs: QueryInputs,
        capture: Capture,
        runner: DecoderRunner,
    ) -> None:
        """Capture a query; one like it must have run before, so that capture creates no cached constants."""
        self._inputs = _buffers(inputs)
        self._trace = QueryTrace(pipeline.config.name, plan)
        self._clock = GraphClock(backbone.device)

        def run() -> DeviceOutcome:
            # Drafts, because a query must not write to the buffers that its replay reads.
            drafts = self._inputs.drafted()
            query = Query(pipeline, plan, drafts, self._clock, runner)
            self._clock.enter(Phase.REPLAY)
            actions = backbone.infer(drafts.model, query)
            self._clock.enter(Phase.HISTORY)
            outcome = query.outcome(actions)
            self._clock.enter(Phase.END)
            self._trace = outcome.trace
            return outcome.device

        self._outcome, self._replay = capture(run)

    def replay(self, inputs: QueryInputs, clock: Clock) -> QueryOutcome:
        """Run the query on inputs of the same structure."""
        clock.enter(Phase.REPLAY)
        clock.split(self._clock)
        copy_tensors(_tensors(self._inputs), _tensors(inputs))
        assert isinstance(self._inputs.rng, BufferedRng)
        self._inputs.rng.refill(inputs.rng)
        self._replay()
        # Copied, because the next replay writes to the same tensors.
        outcome = map_tensors(torch.empty_like, self._outcome)
        copy_tensors(outcome, self._outcome)
        reasons = {after: dict(named) for after, named in outcome.reasons.items()}
        return QueryOutcome(outcome, replace(self._trace, kept=dict(outcome.kept), reasons=reasons))


def graph_key(pipeline: BoundPipeline, plan: Plan, inputs: QueryInputs) -> Hashable:
    """Key of the queries that one captured graph can stand for."""
    host = tuple(stage.host_state(slot) for stage in pipeline.stages for slot in inputs.slots)
    missing_frames = tuple((index, tuple(step is None for step in past.steps)) for index, past in inputs.past.items())
    return id(pipeline), plan.layout, plan.mode, host, missing_frames, structure(_tensors(inputs))


def _tensors(inputs: QueryInputs) -> tuple[object, list[object], Mapping[int, Mapping[str, Tensor]]]:
    """Everything a query reads except its random numbers."""
    pixels = {index: past.pixels for index, past in inputs.past.items()}
    return inputs.model, [slot.memory for slot in inputs.slots], pixels


def _buffers(inputs: QueryInputs) -> QueryInputs:
    """Copy everything a query reads."""
    return QueryInputs(
        model=map_tensors(torch.clone, inputs.model),
        slots=[replace(slot, memory=map_tensors(torch.clone, slot.memory)) for slot in inputs.slots],
        past=map_tensors(torch.clone, inputs.past),
        rng=BufferedRng(inputs.rng),
        tables=inputs.tables,
    )
