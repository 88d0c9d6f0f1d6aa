""""""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tokenprune.errors import ConfigError, SimulatorError
from tokenprune_adapters.environments.libero import conventions
from tokenprune_adapters.environments.libero.environment import LiberoOptions, read_options
from tokenprune_adapters.environments.libero.suites import LiberoSuite

pictures = hnp.arrays(np.uint8, st.tuples(st.integers(1, 5), st.integers(1, 5), st.just(3)))


@given(pictures)
def test_a_picture_is_opengls_rotated_by_half_a_turn(upright):
    opengl = upright[::-1]
    rotated = np.rot90(opengl, 2)
    assert np.array_equal(conventions.mirrored(upright), rotated)


def test_a_picture_keeps_its_top_and_swaps_left_and_right():
    upright = np.zeros((2, 2, 3), np.uint8)
    upright[0, 0] = 255
    seen = conventions.mirrored(upright)
    assert seen[0, 1].all()
    assert seen.sum() == upright.sum()


@pytest.mark.parametrize(
    ("given_", "wanted"), [(1.0, -1.0), (0.51, -1.0), (0.49, 1.0), (0.0, 1.0), (-0.3, 1.0), (1.4, -1.0)]
)
def test_a_policys_gripper_is_one_when_open_and_the_simulators_minus_one(given_, wanted):
    action = np.array([0.1, -0.2, 0.3, 0.4, -0.5, 0.6, given_])
    before = action.copy()
    assert conventions.command(action)[6] == wanted
    assert np.array_equal(conventions.command(action)[:6], before[:6])
    assert np.array_equal(action, before)


@given(
    hnp.arrays(np.float64, 3, elements=st.floats(-1, 1)).filter(lambda axis: np.linalg.norm(axis) > 0.1),
    st.floats(0.01, 2 * np.pi - 0.01),
)
def test_axis_angle_turns_as_the_quaternion_does(axis, angle):
    axis = axis / np.linalg.norm(axis)
    quaternion = np.append(np.sin(angle / 2) * axis, np.cos(angle / 2))
    turned = conventions.axis_angle(quaternion)
    assert np.allclose(turned, angle * axis, atol=1e-6)


def test_no_turn_is_zero():
    assert np.array_equal(conventions.axis_angle(np.array([0.0, 0.0, 0.0, 1.0])), np.zeros(3))


def test_state_is_position_then_orientation_then_gripper():
    state = conventions.robot_state(np.array([1.0, 2.0, 3.0]), np.array([1.0, 0.0, 0.0, 0.0]), np.array([0.03, -0.03]))
    assert np.allclose(state, [1, 2, 3, np.pi, 0, 0, 0.03, -0.03])


def test_options_default_to_stock_libero():
    assert read_options({}) == LiberoOptions(size=256, quality="full", spread=0.0)
    assert read_options({"spread": 0.05, "quality": "fast"}) == LiberoOptions(quality="fast", spread=0.05)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"sise": 224}, "did you mean 'size'"),
        ({"size": 2}, "32 to 1024"),
        ({"size": True}, "32 to 1024"),
        ({"size": 224.0}, "32 to 1024"),
        ({"quality": "best"}, "full or fast"),
        ({"spread": -0.1}, "0 to 0.2"),
        ({"spread": "5cm"}, "0 to 0.2"),
        ({"spread": float("nan")}, "0 to 0.2"),
    ],
)
def test_options_that_cannot_be_are_refused(options, said):
    with pytest.raises(ConfigError, match=said):
        read_options(options)


def test_an_unknown_suite_is_refused_with_the_nearest():
    with pytest.raises(SimulatorError, match="did you mean 'libero_goal'"):
        LiberoSuite("libero_goall")
