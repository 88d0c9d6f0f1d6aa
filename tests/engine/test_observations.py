"""Observations: what is taken, and every refusal with what would be right."""

from __future__ import annotations

from types import MappingProxyType

import numpy as np
import pytest

from tokenprune.engine.observations import check_observation
from tokenprune.errors import ObservationError

IMAGE = np.zeros((64, 80, 3), dtype=np.uint8)
VIEWS = ("primary", "wrist")


def observation(**images):
    return {"images": {"primary": IMAGE, "wrist": IMAGE, **images}, "state": np.arange(8.0)}


def without(mapping, key):
    return {name: value for name, value in mapping.items() if name != key}


@pytest.mark.parametrize("state", [np.arange(8.0), list(range(8)), tuple(range(8)), np.arange(8, dtype=np.float32)])
def test_a_good_observation_passes(state):
    check_observation({"images": observation()["images"], "state": state}, VIEWS, 8)


def test_any_mapping_passes():
    given = observation()
    check_observation(MappingProxyType(given | {"images": MappingProxyType(given["images"])}), VIEWS, 8)


@pytest.mark.parametrize("given", [observation(), without(observation(), "state"), observation() | {"state": "left"}])
def test_a_state_nobody_reads_is_not_looked_at(given):
    check_observation(given, VIEWS, None)


@pytest.mark.parametrize("bad", [None, 3, [], {}, {"image": IMAGE}, {"images": IMAGE}, {"images": [IMAGE]}])
def test_what_is_no_observation_is_refused(bad):
    with pytest.raises(ObservationError, match=r"an observation is \{'images'"):
        check_observation(bad, VIEWS, 8)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (observation() | {"sate": 0}, "no 'sate'; did you mean 'state'"),
        ({"images": without(observation()["images"], "wrist")}, "'wrist' is missing; .* primary, wrist, got primary"),
        ({"images": {}}, "'primary' is missing; .*, got none"),
        (observation(wirst=IMAGE), "no view 'wirst'; did you mean 'wrist'"),
        (observation(wrist=IMAGE.astype(np.float32)), "image 'wrist' is float32"),
        (without(observation(), "state"), "the state is missing; this policy reads 8 numbers"),
        (observation() | {"state": None}, "the state is missing"),
        (observation() | {"state": np.zeros(7)}, r"8 numbers, got shape \[7\]"),
        (observation() | {"state": np.zeros((1, 8))}, r"8 numbers, got shape \[1, 8\]"),
        (observation() | {"state": "left"}, "8 numbers, got str"),
        (observation() | {"state": [0, 1, np.nan, 3, 4, np.inf, 6, 7]}, r"NaN or infinite numbers at \[2, 5\]"),
    ],
)
def test_bad_observations_are_refused(bad, message):
    with pytest.raises(ObservationError, match=message):
        check_observation(bad, VIEWS, 8)
