"""Answers in place of the model: the framework's side, and SP-VLA's scheduler, which extrapolates."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from tests.helpers.planting import REGISTRY, pipeline
from tests.helpers.tiny_oft import INSTRUCTION, observation, tiny_config, tiny_policy_parts
from tokenprune.compare.row import make_row
from tokenprune.errors import StageError
from tokenprune.pipelines.binding import HookCall
from tokenprune.pipelines.config import DENSE
from tokenprune.policy import ActionChunk, Policy
from tokenprune.report.describe import trace_flops
from tokenprune.stages.control_context import ControlContext, ControlDecision
from tokenprune.stages.memory import ExecutedAction
from tokenprune_plugins.sp_vla_scheduler import Scheduler, SchedulerConfig, extrapolate

BACKBONE = tiny_policy_parts(tiny_config())
INFO = BACKBONE.info
HORIZON, DIMS = INFO.action.horizon, INFO.action.dims
numbers = st.integers(-8, 8)


@given(
    st.lists(st.lists(numbers, min_size=2, max_size=2), min_size=2, max_size=7),
    st.integers(1, 9),
    st.integers(0, 3),
)
def test_the_line_is_ridge_regression_on_time(rows: list[list[int]], steps: int, ridge: int) -> None:
    """Against the normal equations of intercept and slope, the latter penalised, solved in fractions."""
    found = extrapolate(np.array(rows, dtype=np.float64), steps, ridge)
    n = len(rows)
    for dim in range(2):
        y = [Fraction(row[dim]) for row in rows]
        t = [Fraction(2 * i - n + 1, 2) for i in range(n)]
        # sum(t) is zero, so the two equations fall apart.
        intercept = sum(y) / n
        slope = sum(a * b for a, b in zip(t, y, strict=True)) / (sum(a * a for a in t) + ridge)
        for step in range(steps):
            assert found[step, dim] == pytest.approx(float(intercept + slope * (t[-1] + 1 + step)), abs=1e-9)


def drive(config: SchedulerConfig, actions: list[np.ndarray], executed: int) -> list[bool]:
    """Whether each query is answered, when `executed` of these actions lie between two queries."""
    stage, memory = Scheduler(config), {}
    stage.bind(INFO)
    done: list[ExecutedAction] = []
    answered = []
    for begin in range(0, len(actions) + 1, executed):
        ctx = ControlContext("query", 0, ("default",), 0, done, (), memory)
        decision = stage.control(ctx)
        answered.append(decision is not None)
        for action in actions[begin : begin + executed]:
            done.append(ExecutedAction(0, action))
            assert stage.control(ControlContext("executed", 0, ("default",), 0, done, (), memory)) is None
    return answered


@given(
    st.lists(st.sampled_from([0.1, 0.3, 0.9]), max_size=40),
    st.integers(2, 6),
    st.sampled_from([0.0, 0.3, 0.5, 0.75]),
    st.integers(1, 5),
)
def test_it_answers_while_the_arm_moves_steadily_and_the_model_made_enough(
    paces: list[float], window: int, share: float, executed: int
) -> None:
    actions = [np.full(DIMS, -pace) for pace in paces]
    config = SchedulerConfig(use="sp_vla.scheduler", v_min=0.2, v_max=0.5, window=window, share=share)
    owners: list[str] = []
    expected = []
    for begin in range(0, len(paces) + 1, executed):
        mine = owners[-window:]
        steady = len(owners) >= window and paces[begin - 1] == 0.3
        expected.append(steady and mine.count("model") > share * window)
        owners += ["line" if expected[-1] else "model"] * len(paces[begin : begin + executed])
    assert drive(config, actions, executed) == expected


def test_every_axis_counts() -> None:
    config = SchedulerConfig(use="sp_vla.scheduler", v_min=0.2, v_max=0.5, window=2)
    odd = np.full(DIMS, 0.3)
    odd[INFO.action.groups["translation"][1]] = 0.0
    assert drive(config, [np.full(DIMS, 0.3), odd], 2) == [False, False]
    assert drive(config, [odd, np.full(DIMS, 0.3)], 2) == [False, True]


def run(policy: Policy, queries: int) -> list[ActionChunk]:
    policy.reset(INSTRUCTION)
    chunks = []
    for query in range(queries):
        chunks.append(policy.act(observation(BACKBONE.config, query)))
        for step in range(HORIZON):
            policy.executed(np.linspace(0.1, 0.2, DIMS) + 0.01 * step)
    return chunks


def scheduled(**settings: object) -> Policy:
    return Policy(BACKBONE, pipeline(SchedulerConfig(use="sp_vla.scheduler", window=4, **settings)), REGISTRY)


def test_the_model_does_not_run_where_it_answers() -> None:
    policy = scheduled(share=0.0)
    chunks = run(policy, 3)
    assert [chunk.trace.answered for chunk in chunks] == [False, True, False]
    answer, gripper = chunks[1], INFO.action.gripper
    assert answer.actions.shape == (HORIZON, DIMS)
    assert answer.normalised is None
    assert trace_flops(INFO, answer.trace).total == 0
    assert set(answer.trace.to_json()["tokens_held"]) == {0}
    assert answer.trace.mode == "replayed"
    assert gripper is not None
    last = np.linspace(0.1, 0.2, DIMS) + 0.01 * (HORIZON - 1)
    assert (answer.actions[:, gripper[0]] == last[gripper[0]]).all()
    assert (np.diff(answer.actions[:, 0]) > 0).all()


def test_the_queries_that_remain_are_dense_and_remember_the_last_query() -> None:
    chunks = run(scheduled(share=0.0), 3)
    dense = run(Policy(BACKBONE, DENSE, REGISTRY), 3)
    for query in (0, 2):
        assert np.array_equal(chunks[query].normalised, dense[query].normalised)
    row = make_row("scheduled", chunks, dense, INFO)
    assert row.replayed == 1
    assert row.flop_ratio == pytest.approx(1.5)


class Answers(Scheduler):
    """A controller that answers with whatever the test wants."""

    answer: object = None
    event = "query"

    def control(self, ctx: ControlContext) -> ControlDecision | None:
        if ctx.event != self.event or ctx.queries == 0:
            return None
        return ControlDecision(ctx.modes[0], actions=self.answer)


@pytest.mark.parametrize(
    ("answer", "event", "words"),
    [
        (np.zeros((HORIZON, DIMS + 1)), "query", f"a chunk is [{HORIZON}, {DIMS}] finite numbers"),
        (np.full((HORIZON, DIMS), np.nan), "query", f"a chunk is [{HORIZON}, {DIMS}] finite numbers"),
        (np.zeros((HORIZON, DIMS)), "executed", "only a query can be answered"),
    ],
)
@pytest.mark.parametrize("on_error", ["raise", "dense"])
def test_a_wrong_answer_never_becomes_an_action(
    answer: np.ndarray, event: str, words: str, on_error: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Answers, "answer", answer)
    monkeypatch.setattr(Answers, "event", event)
    policy = Policy(BACKBONE, pipeline(SchedulerConfig(use="sp_vla.scheduler"), on_error=on_error), REGISTRY)
    stage = Answers(SchedulerConfig(use="sp_vla.scheduler"))
    object.__setattr__(
        policy.pipeline, "hooks", {**policy.pipeline.hooks, "control": (HookCall("control", 0, stage.control),)}
    )
    if on_error == "raise":
        with pytest.raises(StageError, match=r"sp_vla.scheduler"):
            run(policy, 2)
        return
    chunks = run(policy, 3)
    dense = run(Policy(BACKBONE, DENSE, REGISTRY), 3)
    assert words in chunks[1].trace.fallback
    assert not chunks[0].trace.fallback
    for own, other in zip(chunks, dense, strict=True):
        assert np.array_equal(own.normalised, other.normalised)


def test_bounds_in_the_wrong_order_are_refused() -> None:
    with pytest.raises(ValidationError, match="must lie below v_max"):
        SchedulerConfig(use="sp_vla.scheduler", v_min=0.5, v_max=0.2)
