"""TTF against its rule written out with NumPy, over the queries of two episodes side by side."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from tests.helpers.naive_oft import attention_map, entering
from tests.helpers.planting import REGISTRY, pipeline
from tests.helpers.tiny_oft import INSTRUCTION, observation, tiny_config, tiny_policy_parts
from tokenprune.pipelines.config import DENSE
from tokenprune.policy import Policy
from tokenprune_plugins.ttf import TTFConfig


def new_by_the_paper(now: np.ndarray, then: np.ndarray, grid: tuple[int, int], threshold: float) -> np.ndarray:
    """Which patches of pixels `[3, S, S]` changed."""
    grey = np.array([0.299, 0.587, 0.114])[:, None, None]
    change = np.abs((now * grey).sum(0) - (then * grey).sum(0)) / 255
    rows, cols = grid
    height, width = change.shape[0] // rows, change.shape[1] // cols
    return np.array(
        [
            change[row * height : (row + 1) * height, col * width : (col + 1) * width].mean() > threshold
            for row in range(rows)
            for col in range(cols)
        ]
    )


def seen_at(config: Any, query: int) -> dict[str, Any]:
    """Pictures of which the upper half stays, and the lower half changes with the query."""
    still, fresh = observation(config, 0), observation(config, query)
    for view, image in fresh["images"].items():
        half = len(image) // 2
        image[:half] = still["images"][view][:half]
    return fresh


def test_features_are_new_where_something_changed_or_matters() -> None:
    config = tiny_config(depth=4)
    backbone = tiny_policy_parts(config)
    layout, layers = backbone.layout(INSTRUCTION), backbone.decoder.layers
    stage = TTFConfig(use="ttf", attended_top=3, attended_layer=1, keyframe=4, threshold=0.1)
    policy = Policy(backbone, pipeline(stage), REGISTRY)
    policy.reset(INSTRUCTION)
    spans = [segment.span for segment in layout.views.values()]
    best: set[int] = set()
    before: dict[str, Any] = {}
    used: list[np.ndarray] = []
    reused = 0
    for query in range(6):
        made: list[Tensor] = []
        given: list[Tensor] = []
        with ExitStack() as stack:
            model = backbone.model
            handles = (
                model.vision_backbone.register_forward_hook(lambda _m, _a, out, to=made: to.append(out)),
                model.projector.register_forward_pre_hook(lambda _m, args, to=given: to.append(args[0])),
            )
            for handle in handles:
                stack.callback(handle.remove)
            inputs = stack.enter_context(entering(layers[1]))
            now = seen_at(config, query)
            policy.act(now)
        for number, (view, segment) in enumerate(layout.views.items()):
            fresh = made[0][number].numpy()
            if query % 4 == 0:
                expected = fresh
            else:
                crop = [config.transform.cropped(one["images"][view]).double().numpy() for one in (now, before)]
                new = new_by_the_paper(*crop, segment.grid, 0.1) | np.isin(list(segment.span), list(best))
                reused += int((~new).sum())
                expected = np.where(new[:, None], fresh, used[number])
            np.testing.assert_array_equal(given[0][number].numpy(), expected)
        used = [given[0][number].numpy().copy() for number in range(len(spans))]
        attention = attention_map(backbone, 1, inputs[0])[:, list(layout.span("text"))].mean((0, 1)).numpy()
        best = set(sorted(layout.prunable, key=lambda token: (-attention[token], token))[:3])
        before = now
    assert reused > 20


def test_after_a_fallback_no_older_features_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = tiny_policy_parts(tiny_config(depth=4))
    config = pipeline(TTFConfig(use="ttf", attended_top=0), on_error="dense")
    policy, dense = Policy(backbone, config, REGISTRY), Policy(backbone, DENSE, REGISTRY)
    for one in (policy, dense):
        one.reset(INSTRUCTION)
    seen, later = (observation(backbone.config, query) for query in (0, 1))
    policy.act(seen)
    with monkeypatch.context() as failing:
        failing.setattr("tokenprune_plugins.ttf.grey_change", lambda *_: 1 / 0)
        assert "ZeroDivisionError" in policy.act(later).trace.fallback
    own = policy.act(later)
    assert not own.trace.fallback
    assert np.array_equal(own.normalised, dense.act(later).normalised)
    assert np.array_equal(policy.act(later).normalised, own.normalised)
