"""The LIBERO adapter against LIBERO itself; needs the extra `libero`."""

import importlib.util
import os
import subprocess
import sys

import numpy as np
import pytest

from tests.helpers.paths import MINI_POLICY
from tokenprune.errors import SimulatorError
from tokenprune_adapters.environments.libero.environment import LiberoFactory

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("libero") is None, reason="LIBERO is missing: pip install 'tokenprune-vla[libero]'"
    ),
    # robosuite 1.4 and what it builds on use what python and numpy will drop.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

GOAL_BOWL_ON_PLATE = 8
OPTIONS = {"size": 64, "quality": "fast"}


@pytest.fixture(scope="module")
def environment():
    made = LiberoFactory.build("libero_goal", OPTIONS)
    yield made
    made.close()


def wander(environment, steps, seed=0):
    draw = np.random.default_rng(seed)
    for _ in range(steps):
        environment.step(np.append(draw.uniform(-1, 1, 6), 1.0))
    return environment.simulator.configuration


def test_a_suite_is_described_without_a_simulator():
    suite = LiberoFactory.describe("libero_goal", {})
    assert [task.index for task in suite.tasks] == list(range(10))
    assert suite.tasks[8].instruction == "put the bowl on the plate"
    assert {task.init_states for task in suite.tasks} == {50}
    assert (suite.horizon, suite.control_hz, suite.views, suite.seeded) == (300, 20.0, ("primary", "wrist"), False)
    assert suite.settings["settle_steps"] == 10
    assert suite.settings["quality"] == "full"
    assert suite.settings["versions"]["mujoco"]


@pytest.mark.parametrize(("name", "horizon"), [("libero_spatial", 220), ("libero_object", 280), ("libero_10", 520)])
def test_horizons_are_those_of_openvla_oft(name, horizon):
    assert LiberoFactory.describe(name, {}).horizon == horizon


def test_with_a_spread_the_seed_matters():
    assert LiberoFactory.describe("libero_goal", {"spread": 0.05}).seeded


def test_an_observation_has_both_views_and_the_state(environment):
    environment.reset(GOAL_BOWL_ON_PLATE, 0, 0)
    observation = environment.observe()
    assert {v: (i.shape, i.dtype) for v, i in observation["images"].items()} == {
        view: ((64, 64, 3), np.uint8) for view in ("primary", "wrist")
    }
    assert observation["state"].shape == (8,)
    step = environment.step(np.array([0, 0, 1.0, 0, 0, 0, 1]))
    assert not step.success
    assert np.array_equal(step.pose[:3], environment.state[:3])
    assert step.pose[2] > observation["state"][2]


def test_the_same_start_is_the_same_episode_whatever_came_before(environment):
    environment.reset(GOAL_BOWL_ON_PLATE, 3, 0)
    first = wander(environment, 8)
    environment.reset(GOAL_BOWL_ON_PLATE, 4, 1)
    for _ in range(6):
        environment.step(np.array([0.5, 0, -1, 0, 0, 0, 0.0]))
    environment.reset(GOAL_BOWL_ON_PLATE, 3, 0)
    assert np.array_equal(wander(environment, 8), first)


def test_looking_changes_nothing_and_a_moment_can_be_drawn_later(environment):
    environment.reset(GOAL_BOWL_ON_PLATE, 0, 0)
    unseen = wander(environment, 6)
    environment.reset(GOAL_BOWL_ON_PLATE, 0, 0)
    now, later = environment.observe()["images"], environment.frames()
    draw = np.random.default_rng(0)
    for _ in range(6):
        environment.observe()
        environment.step(np.append(draw.uniform(-1, 1, 6), 1.0))
    assert np.array_equal(environment.simulator.configuration, unseen)
    assert all(np.array_equal(picture, later()[view]) for view, picture in now.items())
    assert not np.array_equal(environment.observe()["images"]["wrist"], now["wrist"])


def test_gripper_one_opens_and_zero_closes(environment):
    environment.reset(GOAL_BOWL_ON_PLATE, 0, 0)
    widths = []
    for gripper in (0.0, 1.0):
        for _ in range(12):
            environment.step(np.array([0, 0, 0.2, 0, 0, 0, gripper]))
        widths.append(environment.state[6] - environment.state[7])
    closed, opened = widths
    assert closed < 0.01 < 0.07 < opened


def test_physics_and_pictures_are_upstreams(environment):
    os.environ.setdefault("MUJOCO_GL", "egl")
    from libero.libero.benchmark import get_benchmark
    from libero.libero.envs import OffScreenRenderEnv

    suite = get_benchmark("libero_goal")()
    upstream = OffScreenRenderEnv(
        bddl_file_name=suite.get_task_bddl_file_path(GOAL_BOWL_ON_PLATE), camera_heights=64, camera_widths=64
    )
    upstream.seed(7)
    upstream.reset()
    upstream.set_init_state(suite.get_task_init_states(GOAL_BOWL_ON_PLATE)[2])
    for _ in range(10):
        upstream.step([0, 0, 0, 0, 0, 0, -1])
    plain = LiberoFactory.build("libero_goal", {"size": 64})
    plain.reset(GOAL_BOWL_ON_PLATE, 2, 7)
    assert np.array_equal(plain.simulator.configuration, upstream.sim.data.qpos)
    seen = upstream.set_init_state(upstream.get_sim_state())
    pictures = plain.observe()["images"]
    for view, camera in (("primary", "agentview_image"), ("wrist", "robot0_eye_in_hand_image")):
        assert np.array_equal(pictures[view], seen[camera][::-1, ::-1]), view
    plain.close()
    upstream.close()


def test_the_expert_succeeds_and_success_ends_the_episode(environment, monkeypatch):
    monkeypatch.syspath_prepend(str(MINI_POLICY))
    from expert import JOBS, Expert

    environment.reset(GOAL_BOWL_ON_PLATE, 0, 0)
    expert = Expert(JOBS["libero_goal", GOAL_BOWL_ON_PLATE])
    outcomes = []
    while len(outcomes) < environment.suite.horizon and True not in outcomes:
        outcomes.append(environment.step(expert.act(environment.simulator)).success)
    assert outcomes[-1]
    assert len(outcomes) > 40


def test_a_spread_moves_what_the_tasks_are_about_and_repeats_with_its_seed(environment):
    wide = LiberoFactory.build("libero_goal", OPTIONS | {"spread": 0.05})
    environment.reset(GOAL_BOWL_ON_PLATE, 0, 0)
    stock = environment.simulator.objects()
    found = []
    for seed in (1, 2, 1):
        wide.reset(GOAL_BOWL_ON_PLATE, 0, seed)
        found.append(wide.simulator.objects())
    assert all(np.array_equal(found[0][name], found[2][name]) for name in stock)
    moved = {name: np.abs(found[0][name] - stock[name])[:2] for name in stock}
    assert all((distance < 0.05 + 0.015).all() for distance in moved.values())
    assert all(distance.max() > 0.001 for distance in moved.values())
    assert any(not np.allclose(found[0][name], found[1][name], atol=1e-3) for name in stock)
    names = list(stock)
    for at in found:
        for one in names:
            for other in names[names.index(one) + 1 :]:
                apart = np.linalg.norm((at[one] - at[other])[:2])
                before = np.linalg.norm((stock[one] - stock[other])[:2])
                assert apart > min(0.125, before) - 0.03
    wide.close()


@pytest.mark.parametrize(("task", "state", "said"), [(10, 0, "no task 10"), (8, 50, "0 to 49"), (-1, 0, "no task -1")])
def test_what_is_not_there_is_refused(environment, task, state, said):
    with pytest.raises(SimulatorError, match=said):
        environment.reset(task, state, 0)


def test_nothing_can_be_seen_before_an_episode():
    with pytest.raises(SimulatorError, match="reset first"):
        LiberoFactory.build("libero_goal", OPTIONS).observe()


def test_missing_opengl_names_the_system_packages():
    code = (
        "from tokenprune_adapters.environments.libero.environment import LiberoFactory\n"
        "LiberoFactory.build('libero_goal', {}).reset(8, 0, 0)"
    )
    # PyOpenGL finds no library of this platform, as where none is installed.
    surroundings = {**os.environ, "MUJOCO_GL": "egl", "PYOPENGL_PLATFORM": "osmesa"}
    done = subprocess.run([sys.executable, "-c", code], env=surroundings, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "SimulatorError" in done.stderr
    assert "apt-get install -y --no-install-recommends libegl1" in done.stderr


def test_it_draws_without_a_screen_and_without_being_told_how():
    code = (
        "from tokenprune_adapters.environments.libero.environment import LiberoFactory\n"
        "made = LiberoFactory.build('libero_goal', {'size': 32, 'quality': 'fast', 'spread': 0.05})\n"
        "made.reset(8, 0, 0)\n"
        "made.observe()"
    )
    surroundings = {k: v for k, v in os.environ.items() if k not in ("MUJOCO_GL", "PYOPENGL_PLATFORM", "DISPLAY")}
    done = subprocess.run([sys.executable, "-c", code], env=surroundings, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
