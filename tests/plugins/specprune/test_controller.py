"""SpecPrune's controller: when it turns fine, when it may end, and what it tells the host."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.naive_specprune import Controller as Reference
from tests.helpers.naive_specprune import Thresholds
from tests.helpers.planting import REGISTRY
from tests.helpers.tiny_oft import INSTRUCTION, observation, tiny_config, tiny_policy_parts
from tokenprune.errors import ConfigError
from tokenprune.model.info import ActionSpec, BackboneInfo
from tokenprune.pipelines.binding import bind
from tokenprune.pipelines.loader import parse_pipeline
from tokenprune.policy import Policy
from tokenprune.stages.control_context import ControlContext
from tokenprune.stages.memory import ExecutedAction
from tokenprune_plugins.specprune.controller import Controller

BACKBONE = tiny_policy_parts(tiny_config(("primary",)))
SEEN = observation(BACKBONE.config)
HORIZON = BACKBONE.info.action.horizon

ENTER, LEAVE = (
    [{"translation": 0.35, "rotation": 0.2, "rise": 1e-6}],
    {"translation": 0.5, "rotation": 0.3, "rise": 0.2},
)


def file(**settings: Any) -> dict[str, Any]:
    """A pipeline in which a controller chooses between two sizes of a grid."""
    controller = {"use": "specprune.controller", "enter": ENTER, "leave": LEAVE, **settings}
    cut = {"use": "uniform_grid", "keep": {"coarse": 4, "fine": 9}}
    return {"version": 1, "name": "controlled", "modes": ["coarse", "fine"], "stages": [controller, cut]}


def started(**settings: Any) -> Policy:
    policy = Policy(BACKBONE, parse_pipeline(file(**settings), REGISTRY, "test").config, REGISTRY)
    policy.reset(INSTRUCTION)
    return policy


def move(x: float = 0, y: float = 0, z: float = 0, turn: Sequence[float] = (0, 0, 0), grip: float = 0) -> np.ndarray:
    return np.array([x, y, z, *turn, grip], dtype=np.float64)


SLOW, BETWEEN, FAST = move(), move(x=0.4), move(x=0.6)


def execute(policy: Policy, *actions: np.ndarray, slot: int = 0) -> list[bool]:
    """Whether each of them made the controller ask for a new query."""
    return [policy.executed(action, slot=slot) for action in actions]


def mode(policy: Policy, slot: int = 0) -> str:
    """Mode of a query."""
    return policy.act(SEEN, slot).trace.mode


def after(policy: Policy, *actions: np.ndarray) -> str:
    """Mode of a query after these."""
    execute(policy, *actions)
    return mode(policy)


def test_an_episode_begins_coarse_and_stays_so_while_the_arm_travels() -> None:
    policy = started()
    assert mode(policy) == "coarse"
    assert after(policy, *[FAST] * 8) == "coarse"


@pytest.mark.parametrize("place", range(HORIZON))
def test_one_slow_action_turns_it_fine(place: int) -> None:
    policy = started()
    assert mode(policy) == "coarse"
    chunk = [BETWEEN] * HORIZON
    chunk[place] = SLOW
    assert after(policy, *chunk) == "fine"


def test_modes_may_have_other_names() -> None:
    config = file(coarse="far", fine="near") | {"modes": ["far", "near"]}
    config["stages"][1]["keep"] = {"far": 4, "near": 9}
    policy = Policy(BACKBONE, parse_pipeline(config, REGISTRY, "test").config, REGISTRY)
    policy.reset(INSTRUCTION)
    chunk = policy.act(SEEN)
    assert (chunk.trace.mode, chunk.trace.plan.prunable[-1]) == ("far", 4)
    execute(policy, SLOW)
    chunk = policy.act(SEEN)
    assert (chunk.trace.mode, chunk.trace.plan.prunable[-1]) == ("near", 9)


@pytest.mark.parametrize(
    ("at", "bound"),
    [
        (lambda value: move(x=value), 0.35),
        (lambda value: move(y=-value), 0.35),
        (lambda value: move(turn=(0, value, 0)), 0.2),
        (lambda value: move(turn=(0, 0, -value)), 0.2),
        (lambda value: move(z=value), 1e-6),
    ],
)
def test_it_turns_fine_strictly_below_a_bound(at: Any, bound: float) -> None:
    assert after(started(), at(bound)) == "coarse"
    assert after(started(), at(np.nextafter(bound, 0))) == "fine"


@pytest.mark.parametrize(
    ("at", "bound"),
    [
        (lambda value: move(x=-value), 0.5),
        (lambda value: move(z=-value), 0.5),
        (lambda value: move(turn=(value, 0, 0)), 0.3),
        (lambda value: move(z=value), 0.2),
    ],
)
def test_it_may_end_strictly_above_a_bound(at: Any, bound: float) -> None:
    assert after(started(), SLOW, at(bound)) == "fine"
    assert after(started(), SLOW, at(np.nextafter(bound, 1))) == "coarse"


def test_lengths_are_of_all_three_numbers_and_the_rise_is_signed() -> None:
    assert after(started(), move(x=0.3, y=0.3)) == "coarse"
    assert after(started(), move(turn=(0.15, 0.15, 0))) == "coarse"
    assert after(started(), move(z=-0.34)) == "fine"
    assert after(started(leave={"rise": 0.2}), SLOW, move(z=-0.9)) == "fine"
    assert after(started(enter=[{"planar": 0.3}]), move(x=0.1, y=0.2, z=0.9)) == "fine"
    assert after(started(enter=[{"planar": 0.3}]), move(x=0.25, y=0.25)) == "coarse"


def test_a_chunk_begun_in_fine_is_finished_in_it() -> None:
    policy = started(replan=True)
    mode(policy)
    # Left in mid-chunk, it would turn fine again at the second slow action and ask again.
    assert execute(policy, SLOW, FAST, FAST, SLOW, FAST) == [True, False, False, False, False]
    assert mode(policy) == "coarse"
    assert execute(policy, SLOW) == [True]


def test_it_ends_at_a_query_by_the_last_action_alone() -> None:
    policy = started()
    assert after(policy, SLOW, FAST, FAST, BETWEEN) == "fine"
    assert after(policy, SLOW, SLOW, FAST) == "coarse"
    assert mode(policy) == "coarse"


def test_it_does_not_end_on_the_action_it_began_on() -> None:
    turning = move(turn=(0.9, 0, 0))
    policy = started(enter=[{"translation": 0.1}])
    assert after(policy, turning) == "fine"
    assert mode(policy) == "fine"
    assert after(policy, turning) == "coarse"
    assert after(policy, turning, turning) == "coarse"


def test_between_the_bounds_it_stays_what_it_is() -> None:
    policy = started()
    assert after(policy, *[BETWEEN] * 3) == "coarse"
    assert after(policy, SLOW, BETWEEN) == "fine"
    for _ in range(3):
        assert after(policy, *[BETWEEN] * 3) == "fine"
    assert after(policy, BETWEEN, FAST) == "coarse"
    assert after(policy, BETWEEN) == "coarse"


@pytest.mark.parametrize("first", [0, 1, 5])
def test_actions_before_the_first_step_are_not_looked_at(first: int) -> None:
    policy = started(first_step=first)
    assert after(policy, *[SLOW] * first) == "coarse"
    assert after(policy, SLOW) == "fine"


@pytest.mark.parametrize(
    ("action", "wanted"),
    [
        (move(x=0.05, z=0.01, turn=(0.9, 0, 0)), "fine"),
        (move(x=0.9, z=-0.5, turn=(0.05, 0, 0)), "fine"),
        (move(x=0.9, z=0.1, turn=(0.05, 0, 0)), "coarse"),
        (move(x=0.9, z=-0.5, turn=(0.5, 0, 0)), "coarse"),
    ],
)
def test_any_clause_of_several_will_do(action: np.ndarray, wanted: str) -> None:
    assert after(started(enter=[{"translation": 0.1}, {"rotation": 0.1, "rise": 0.0}]), action) == wanted


@pytest.mark.parametrize("grip", [-1.0, 0.0, 50.0])
def test_the_gripper_is_not_looked_at(grip: float) -> None:
    policy = started()
    assert after(policy, move(x=0.4, grip=grip)) == "coarse"
    assert after(policy, move(grip=grip)) == "fine"
    assert after(policy, move(x=0.4, grip=grip)) == "fine"
    assert after(policy, move(x=0.6, grip=grip)) == "coarse"


class Robot:
    """A controller without a model: the mode after each query, a query after so many actions."""

    def __init__(self, info: BackboneInfo = BACKBONE.info, **settings: Any) -> None:
        (config, _) = parse_pipeline(file(**settings), REGISTRY, "test").config.stages
        self.stage, self.memory = Controller(config), {}
        self.stage.bind(info)
        self.done: list[ExecutedAction] = []
        self.asked = self.queries = 0

    def control(self, event: Any) -> Any:
        since, modes = self.done[self.asked :], ("coarse", "fine")
        return self.stage.control(ControlContext(event, 0, modes, self.queries, self.done, since, self.memory))

    def executed(self, action: Sequence[float]) -> bool:
        self.done.append(ExecutedAction(0, np.asarray(action, dtype=np.float64)))
        return self.control("executed").replan

    def query(self) -> str:
        decision = self.control("query")
        self.asked, self.queries = len(self.done), self.queries + 1
        assert not decision.replan
        return decision.mode


def scaled(bounds: Mapping[str, float], metric: Mapping[str, float]) -> dict[str, float]:
    return {n: bound * metric["rotation" if n == "rotation" else "translation"] for n, bound in bounds.items()}


motions = st.lists(st.floats(-1, 1).map(lambda value: value**3), min_size=7, max_size=7)
episodes = st.lists(st.lists(motions, max_size=HORIZON), min_size=1, max_size=6)


@given(chunks=episodes, planar=st.floats(0.05, 0.5), rise=st.floats(-0.2, 0.5))
def test_metric_bounds_decide_like_the_same_bounds_in_action_units(
    chunks: list[list[list[float]]], planar: float, rise: float
) -> None:
    metric = BACKBONE.info.action.metric
    enter = [*ENTER, {"planar": planar, "rise": rise}]
    own = Robot(enter=enter, leave=LEAVE, replan=True)
    metres = Robot(enter=[scaled(m, metric) for m in enter], leave=scaled(LEAVE, metric), units="metric", replan=True)
    for chunk in chunks:
        assert metres.query() == own.query()
        for action in chunk:
            assert metres.executed(action) == own.executed(action)


def test_metric_bounds_are_in_metres_and_radians() -> None:
    assert BACKBONE.info.action.metric == {"translation": 0.05, "rotation": 0.5}
    bounds = {"units": "metric", "enter": [{"translation": 0.0175, "rotation": 0.1}], "leave": {"rise": 0.01}}
    assert after(started(**bounds), move(x=0.34, turn=(0.19, 0, 0))) == "fine"
    assert after(started(**bounds), move(x=0.36)) == "coarse"
    assert after(started(**bounds), move(turn=(0.21, 0, 0))) == "coarse"
    assert after(started(**bounds), SLOW, move(z=0.19)) == "fine"
    assert after(started(**bounds), SLOW, move(z=0.21)) == "coarse"


def with_actions(**changes: Any) -> BackboneInfo:
    return replace(BACKBONE.info, action=replace(BACKBONE.info.action, **changes))


@pytest.mark.parametrize(("metric", "missing"), [({}, "translation"), ({"translation": 0.05}, "rotation")])
def test_metric_bounds_need_a_backbone_that_knows_its_units(metric: dict[str, float], missing: str) -> None:
    config = parse_pipeline(file(units="metric"), REGISTRY, "test").config
    with pytest.raises(ConfigError, match=rf"stages\.0 .*units: metric.*'openvla-oft'.*its {missing}.*units: action"):
        bind(config, with_actions(metric=metric), REGISTRY)
    bind(parse_pipeline(file(), REGISTRY, "test").config, with_actions(metric=metric), REGISTRY)


@pytest.mark.parametrize(
    ("groups", "missing"),
    [
        ({"joints": (0, 1, 2, 3, 4, 5), "gripper": (6,)}, "translation"),
        ({"translation": (0, 1, 2), "gripper": (3,)}, "rotation"),
        ({"translation": (0, 1), "rotation": (2, 3, 4)}, "translation"),
        ({"translation": (0, 1, 2), "rotation": (3, 4, 5, 6)}, "rotation"),
    ],
)
def test_it_needs_actions_that_move_and_turn(groups: dict[str, tuple[int, ...]], missing: str) -> None:
    config = parse_pipeline(file(), REGISTRY, "test").config
    with pytest.raises(ConfigError, match=rf"stages\.0 .*a {missing} of three numbers; 'openvla-oft' moves"):
        bind(config, with_actions(groups=groups), REGISTRY)


def test_it_reads_the_dimensions_the_backbone_names() -> None:
    action = ActionSpec(4, {"gripper": (0,), "rotation": (1, 2, 3), "translation": (6, 4, 5)})
    robot = Robot(replace(BACKBONE.info, action=action), enter=[{"planar": 0.1, "rise": 0.0}], leave={"rotation": 0.5})
    robot.executed([9, 9, 9, 9, 0, 0, 0])
    assert robot.query() == "coarse"
    robot.executed([9, 9, 9, 9, 0.05, -0.5, 0.05])
    assert robot.query() == "fine"
    robot.executed([9, 0.1, 0.2, 0.3, 9, 9, 9])
    assert robot.query() == "fine"
    robot.executed([0, 0.3, 0.3, 0.3, 0, 0, 0])
    assert robot.query() == "coarse"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"fine": "fien"}, r"stages\.0: chooses mode 'fien', which the pipeline does not declare; did you mean 'fine'"),
        ({"coarse": "far"}, r"chooses mode 'far', which the pipeline does not declare; valid: coarse, fine"),
        ({"enter": [{"translaton": 0.3}]}, r"enter.*unknown key 'translaton'; did you mean 'translation'"),
        ({"leave": {"grip": 0.3}}, r"leave.*unknown key 'grip'.*valid: planar, rise, rotation, translation"),
        ({"enter": []}, r"enter.* at least 1 entries"),
        ({"enter": [{"rise": 0.1}, {}]}, r"enter\.1.*give at least one of translation, planar, rise, rotation"),
        ({"leave": {}}, r"leave.*give at least one of translation, planar, rise, rotation"),
        ({"units": "metres"}, r"units.*'action' or 'metric'"),
        ({"first_step": -1}, "first_step"),
    ],
)
def test_what_a_file_may_not_say(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_pipeline(file(**settings), REGISTRY, "test")


def test_the_host_is_not_asked_to_replan_unless_the_file_says_so() -> None:
    policy = started()
    mode(policy)
    assert execute(policy, FAST, SLOW, FAST) == [False, False, False]


@pytest.mark.parametrize("place", range(HORIZON))
def test_the_host_is_asked_while_actions_of_the_chunk_are_left(place: int) -> None:
    policy = started(replan=True)
    mode(policy)
    chunk = [FAST] * place + [SLOW] * (HORIZON - place)
    assert execute(policy, *chunk) == [step == place < HORIZON - 1 for step in range(HORIZON)]


def test_a_chunk_that_was_cut_short_does_not_count_towards_the_next() -> None:
    policy = started(replan=True)
    for _ in range(2):
        mode(policy)
        execute(policy, *[FAST] * 5)
    mode(policy)
    assert execute(policy, *[FAST] * 6, SLOW) == [False] * 6 + [True]


def test_there_is_nothing_to_replan_before_the_first_query() -> None:
    policy = started(replan=True)
    assert execute(policy, SLOW, FAST, SLOW) == [False] * 3
    assert mode(policy) == "fine"


def test_environments_do_not_share_a_mode() -> None:
    policy = started(replan=True)
    policy.reset(INSTRUCTION, 1)
    assert [mode(policy, slot) for slot in (0, 1)] == ["coarse", "coarse"]
    assert execute(policy, SLOW, slot=1) == [True]
    execute(policy, FAST)
    chunks = policy.act_batch({slot: SEEN for slot in (0, 1)})
    assert [chunks[slot].trace.mode for slot in (0, 1)] == ["coarse", "fine"]
    assert execute(policy, FAST, slot=1) + execute(policy, SLOW) == [False, True]
    assert [mode(policy, slot) for slot in (0, 1)] == ["fine", "coarse"]


def test_reset_forgets_the_mode_and_the_steps() -> None:
    policy = started(first_step=2)
    assert after(policy, SLOW, SLOW, SLOW) == "fine"
    policy.reset(INSTRUCTION)
    assert mode(policy) == "coarse"
    assert after(policy, SLOW, SLOW) == "coarse"
    assert after(policy, SLOW) == "fine"


# Lengths of these are exact, and several lie on a bound.
_SPEEDS = [(0, 0), (0.125, 0), (0.25, 0), (-0.375, 0), (0.5, 0), (0.375, 0.5), (-0.25, 0), (1, 0)]


@st.composite
def exact_actions(draw: st.DrawFn) -> list[float]:
    moving, turning = draw(st.sampled_from(_SPEEDS)), draw(st.sampled_from(_SPEEDS))
    return [
        *draw(st.permutations([*moving, 0.0])),
        *draw(st.permutations([*turning, 0.0])),
        draw(st.sampled_from([0, 1])),
    ]


def clauses(names: Sequence[str]) -> st.SearchStrategy[dict[str, float]]:
    return st.dictionaries(st.sampled_from(names), st.sampled_from([0.0, 0.125, 0.25, 0.375, 0.5, 0.625]), min_size=1)


@given(
    enter=st.lists(clauses(["translation", "planar", "rise", "rotation"]), min_size=1, max_size=3),
    leave=clauses(["translation", "planar", "rise", "rotation"]),
    first=st.integers(0, 12),
    chunks=st.lists(st.lists(exact_actions(), max_size=HORIZON + 2), min_size=1, max_size=6),
)
def test_it_is_the_references_state_machine(
    enter: list[dict[str, float]], leave: dict[str, float], first: int, chunks: list[list[list[float]]]
) -> None:
    reference = Reference(Thresholds(tuple(enter), leave, first), HORIZON)
    asking, quiet = (Robot(enter=enter, leave=leave, first_step=first, replan=replan) for replan in (True, False))
    for chunk in chunks:
        assert asking.query() == quiet.query() == reference.query()
        for action in chunk:
            assert asking.executed(action) == reference.executed(action)
            assert not quiet.executed(action)
