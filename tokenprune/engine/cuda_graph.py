"""A query recorded once on the device and replayed with other observations in the same places."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tokenprune.engine.inputs import Given
from tokenprune.engine.query import Outcome, Query
from tokenprune.engine.rng import HeldChance
from tokenprune.engine.tensor_tree import copy_tensors, map_tensors, structure
from tokenprune.engine.timing import Clock, GraphClock
from tokenprune.engine.trace import QueryTrace
from tokenprune.pipelines.binding import BoundPipeline
from tokenprune.tokens.plan import Plan

if TYPE_CHECKING:
    from tokenprune.engine.adapter import Backbone

Recorder = Callable[[Callable[[], Outcome]], tuple[Outcome, Callable[[], None]]]
"""Records what a function does on the device; returns the tensors it leaves and what fills them anew."""


def cuda_graph(run: Callable[[], Outcome]) -> tuple[Outcome, Callable[[], None]]:
    """Record into a CUDA graph, whose memory other graphs share: only one of them runs at a time."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=_shared_pool()):
        outcome = run()
    return outcome, graph.replay


@cache
def _shared_pool() -> Any:  # noqa: ANN401 - a handle of torch's own
    return torch.cuda.graph_pool_handle()


class Recording:
    """One query of a pipeline in one mode, for observations of one structure.

    Every stage has been asked while it was recorded; a replay asks nobody. So whatever a stage reads on the host must
    be the same as it was then: see `Stage.host_state`.
    """

    def __init__(
        self,
        backbone: Backbone,
        pipeline: BoundPipeline,
        plan: Plan,
        given: Given,
        recorder: Recorder,
        compiled: bool = False,
    ) -> None:
        """Record a query like the one `given`, which has run before: nothing may be made for the first time here."""
        self._given = _buffers(given)
        self._trace = QueryTrace(pipeline.config.name, plan)
        self._clock = GraphClock(backbone.device)

        def run() -> Outcome:
            # Run on drafts of the buffers: what a query leaves must not be where it reads.
            own = replace(self._given, slots=[slot.draft() for slot in self._given.slots])
            query = Query(pipeline, plan, own, self._clock, compiled=compiled)
            self._clock.enter("replay")
            actions = backbone.infer(own.inputs, query)
            self._clock.enter("history")
            outcome = query.outcome(actions)
            self._clock.enter("end")
            self._trace = query.trace
            return outcome

        self._outcome, self._again = recorder(run)

    def replay(self, given: Given, clock: Clock) -> tuple[QueryTrace, Outcome]:
        """Run it on another observation of the same structure."""
        clock.enter("replay")
        clock.split(self._clock)
        copy_tensors(_read(self._given), _read(given))
        assert isinstance(self._given.chance, HeldChance)
        self._given.chance.refill(given.chance)
        self._again()
        # The next replay writes to the same places.
        outcome = map_tensors(torch.empty_like, self._outcome)
        copy_tensors(outcome, self._outcome)
        trace = replace(self._trace, kept=dict(outcome.kept), reasons={k: dict(v) for k, v in outcome.reasons.items()})
        return trace, outcome


def recording_key(pipeline: BoundPipeline, plan: Plan, given: Given) -> Hashable:
    """What must be alike for a recording to stand for a query."""
    host = tuple(stage.host_state(slot) for stage in pipeline.stages for slot in given.slots)
    backs = tuple((index, tuple(step is None for step in past.steps)) for index, past in given.past.items())
    return id(pipeline), plan.layout, plan.mode, host, backs, structure(_read(given))


def _read(given: Given) -> tuple[object, list[object], Mapping[int, Mapping[str, Tensor]]]:
    """Everything in it that differs from query to query, but its random numbers."""
    pixels = {index: past.pixels for index, past in given.past.items()}
    return given.inputs, [slot.memory for slot in given.slots], pixels


def _buffers(given: Given) -> Given:
    """Places of its own for everything a query reads."""
    return Given(
        inputs=map_tensors(torch.clone, given.inputs),
        slots=[replace(slot, memory=map_tensors(torch.clone, slot.memory)) for slot in given.slots],
        past=map_tensors(torch.clone, given.past),
        chance=HeldChance(given.chance),
        tables=given.tables,
    )
