"""Traces: proof that the plan was carried out, and where the time went."""

from __future__ import annotations

import json
from typing import ClassVar

import pytest
import torch

from tests.helpers.drawing import random
from tokenprune.engine.timing import Clock, GraphClock
from tokenprune.engine.trace import ProbeRecord, QueryTrace, attention_kernel
from tokenprune.errors import TraceError
from tokenprune.model.phase import Phase
from tokenprune.pipelines.planning import make_plan
from tokenprune.stages.config import CutConfig, cut_layer
from tokenprune.stages.needs import StageNeeds
from tokenprune.stages.stage import Stage
from tokenprune.tokens.layout import Role, Segment, TokenLayout
from tokenprune.tokens.plan import Plan


@pytest.fixture
def plan() -> Plan:
    layout = TokenLayout.build(
        [
            Segment(Role.VISION, 0, 8, "primary", (2, 4), prunable=True),
            Segment(Role.VISION, 0, 4, "wrist", (2, 2), prunable=True),
            Segment(Role.TEXT, 0, 3),
        ]
    )
    configs = [
        CutConfig.model_validate({"use": "x", "keep": keep, "after": after})
        for keep, after in ((9, "embedding"), (4, 1))
    ]
    needs = [StageNeeds((cut_layer(c.after[0], 4),)) for c in configs]
    return make_plan([Stage(c) for c in configs], needs, ["x", "y"], layout, "default", 4)


def test_a_query_that_ran_to_plan_passes(plan: Plan) -> None:
    QueryTrace("p", plan, held=(12, 12, 7, 7)).check()


@pytest.mark.parametrize(
    ("held", "layer"),
    [
        ((15, 15, 7, 7), 0),
        ((12, 12, 12, 12), 2),
        ((12, 12, 7, 6), 3),
        ((12, 12, 7), 3),
        ((12, 12, 7, 7, 7), 4),
        ((12, 13, 7, 7, 7), 1),
        ((), 0),
    ],
)
def test_a_query_that_did_not_names_the_first_layer(plan: Plan, held: tuple[int, ...], layer: int) -> None:
    with pytest.raises(TraceError, match=f"'mine', mode 'default': layer {layer} differs") as caught:
        QueryTrace("mine", plan, held=held).check()
    assert str(list(held)) in str(caught.value)
    assert "[12, 12, 7, 7]" in str(caught.value)


class Watch:
    """A clock that is set by hand, in seconds."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    by_hand = Watch()
    monkeypatch.setattr("tokenprune.engine.timing.time", by_hand)
    return by_hand


def test_a_phase_inside_another_takes_its_time_away_from_it(watch: Watch) -> None:
    clock = Clock(torch.device("cpu"))
    assert clock.enter(Phase.DECODER) is None
    watch.now = 1.0
    outer = clock.enter(Phase.SELECTION)
    watch.now = 1.5
    inner = clock.enter(Phase.HISTORY)
    watch.now = 1.75
    assert clock.enter(inner) == "history"
    watch.now = 2.0
    clock.enter(outer)
    watch.now = 4.0
    clock.enter(Phase.END)
    watch.now = 9.0
    assert (outer, inner) == ("decoder", "selection")
    assert clock.milliseconds() == {"decoder": 3000.0, "selection": 750.0, "history": 250.0}


def test_a_clock_inside_splits_the_phase_it_ran_in(watch: Watch) -> None:
    clock, inner = (Clock(torch.device("cpu")) for _ in range(2))
    clock.enter(Phase.PREPROCESS)
    watch.now = 1.0
    clock.enter(Phase.REPLAY)
    clock.split(inner)
    watch.now = 1.5
    inner.enter(Phase.REPLAY)
    watch.now = 1.75
    with inner.phase(Phase.DECODER):
        watch.now = 4.0
    inner.enter(Phase.HISTORY)
    watch.now = 4.5
    inner.enter(Phase.END)
    watch.now = 5.0
    clock.enter(Phase.HISTORY)
    watch.now = 5.25
    clock.enter(Phase.END)
    spent = clock.milliseconds()
    assert spent == {"preprocess": 1000.0, "replay": 1250.0, "decoder": 2250.0, "history": 750.0}
    assert sum(spent.values()) == 5250.0


class Node:
    """A CUDA event of a graph: each run of what recorded it gives it another time."""

    made: ClassVar[list[Node]] = []

    def __init__(self, enable_timing: bool = False, external: bool = False) -> None:
        assert enable_timing
        self.external = external
        self.at = 0.0

    def record(self) -> None:
        self.made.append(self)

    def elapsed_time(self, other: Node) -> float:
        return other.at - self.at


def test_marks_in_a_graph_are_external_and_read_after_each_replay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.Event", Node)
    monkeypatch.setattr(Node, "made", [])
    clock = GraphClock(torch.device("cuda"))
    for phase in ("vision", "decoder", "end"):
        clock.enter(phase)
    assert [node.external for node in Node.made] == [True] * 3
    for pace in (1.0, 3.0):
        for place, node in enumerate(Node.made):
            node.at = pace * (place + 1) ** 2
        assert clock.milliseconds() == {"vision": 3 * pace, "decoder": 5 * pace}
    Clock(torch.device("cuda")).enter(Phase.VISION)
    assert not Node.made[-1].external


def test_nothing_is_timed_in_a_graph_that_is_none() -> None:
    clock = GraphClock(torch.device("cpu"))
    with clock.phase(Phase.VISION):
        assert clock.enter(Phase.DECODER) is None
    assert clock.milliseconds() == {}


def test_nothing_is_timed_before_the_first_phase_or_in_the_last(watch: Watch) -> None:
    clock = Clock(torch.device("cpu"))
    assert clock.milliseconds() == {}
    watch.now = 3.0
    clock.enter(Phase.VISION)
    assert clock.milliseconds() == {}
    watch.now = 3.5
    clock.enter(Phase.END)
    assert clock.milliseconds() == {"vision": 500.0}


@pytest.fixture
def trace(plan: Plan) -> QueryTrace:
    return QueryTrace(
        "p",
        plan,
        held=(12, 12, 7, 7),
        kept={
            -1: torch.tensor([[0, 1, 2, 3, 4, 5, 7, 8, 10], [1, 2, 3, 4, 5, 8, 9, 10, 11]]),
            1: torch.tensor([[0, 7, 8, 10], [1, 2, 9, 10]]),
        },
        milliseconds=12.345678,
        phases={"decoder": 10.0, "selection": 1.23456789},
        kernel="sdpa/flash (cpu)",
        probes=[ProbeRecord("x", 1, "last", 1)],
        overfull={1: 0, -1: 2},
    )


def test_view_counts_are_one_number_per_batch_row(trace: QueryTrace) -> None:
    assert trace.view_counts() == {
        "embedding": {"primary": [7, 5], "wrist": [2, 4]},
        "1": {"primary": [2, 2], "wrist": [2, 2]},
    }


@pytest.mark.parametrize("with_ids", [False, True])
def test_to_json_is_plain_data(trace: QueryTrace, with_ids: bool) -> None:
    plain = trace.to_json(with_ids)
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert plain["pipeline"] == "p"
    assert plain["mode"] == "default"
    assert plain["tokens_held"] == plain["tokens_planned"] == [12, 12, 7, 7]
    assert plain["kept_per_view"]["embedding"] == {"primary": [7, 5], "wrist": [2, 4]}
    assert plain["probes"] == [{"stage": "x", "layer": 1, "rows": "last", "count": 1, "ahead": False, "behind": 0}]
    assert plain["phases_ms"] == {"decoder": 10.0, "selection": 1.2346}
    assert sorted(plain["protected_over_budget"].values()) == [0, 2]
    if with_ids:
        assert plain["kept_ids"]["1"] == [[0, 7, 8, 10], [1, 2, 9, 10]]
    else:
        assert "kept_ids" not in plain


@pytest.mark.parametrize("heads", [2, 4])
def test_the_attention_kernel_has_a_name(heads: int) -> None:
    q, k = random(0, 1, heads, 5, 8, dtype=torch.float32), random(1, 1, 2, 5, 8, dtype=torch.float32)
    assert attention_kernel(q, k, k, causal=True) in {"sdpa/math (cpu)", "sdpa/flash (cpu)"}
