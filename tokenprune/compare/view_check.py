"""Whether a policy looks at its cameras: its actions for a white image beside those for a black one."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from tokenprune.engine.adapter import Backbone
from tokenprune.pipelines.config import DENSE
from tokenprune.policy import Policy
from tokenprune.registry.discovery import Registry

_SIDE = 256


def view_changes(backbone: Backbone, registry: Registry, instruction: str, state_size: int | None) -> dict[str, float]:
    """Measure how much each view changes the actions: its image all white instead of all black, the others black.

    The black query is asked twice first: a difference between equal queries is noise of the policy and does not count.

    Args:
        backbone: The policy's backbone; it runs dense.
        registry: Discovered plugins.
        instruction: The task.
        state_size: Length of the robot state, which is all zeros; None where the policy reads none.

    Returns:
        Per view, the largest absolute change of a normalised action; 0 where it is no larger than the noise.
    """
    black, white = (np.full((_SIDE, _SIDE, 3), value, dtype=np.uint8) for value in (0, 255))
    dark = dict.fromkeys(backbone.info.views, black)

    def actions(images: Mapping[str, np.ndarray]) -> np.ndarray:
        return _first_actions(backbone, registry, instruction, images, state_size)

    reference = actions(dark)

    def change(images: Mapping[str, np.ndarray]) -> float:
        return float(np.abs(actions(images) - reference).max())

    noise = change(dark)
    changes = {view: change({**dark, view: white}) for view in dark}
    return {view: size if size > noise else 0.0 for view, size in changes.items()}


def _first_actions(
    backbone: Backbone, registry: Registry, instruction: str, images: Mapping[str, np.ndarray], state_size: int | None
) -> np.ndarray:
    """Normalised actions `[T, D]` of the first query of a new policy, so that every call draws the same noise."""
    policy = Policy(backbone, DENSE, registry)
    policy.reset(instruction)
    state = {} if state_size is None else {"state": np.zeros(state_size)}
    actions = policy.act({"images": images, **state}).normalised
    assert actions is not None  # only a controller's answer has none
    return actions
