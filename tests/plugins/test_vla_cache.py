"""What VLA-Cache reuses, against its rule written out with NumPy."""

from __future__ import annotations

from contextlib import ExitStack

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.attention_map import full_map
from tests.helpers.drawing import random
from tests.helpers.naive_oft import attention_map, entering
from tests.helpers.planting import REGISTRY, pipeline
from tests.helpers.tiny_oft import INSTRUCTION, observation, tiny_config, tiny_policy_parts
from tokenprune.errors import ConfigError
from tokenprune.model.attention import row_entropy
from tokenprune.policy import Policy
from tokenprune.tokens.selection import CurrentIds
from tokenprune_plugins.vla_cache import VLACacheConfig, reuse_shares


@given(st.integers(0, 10_000), st.integers(1, 40), st.sampled_from([1, 2]), st.booleans(), st.integers(1, 9))
def test_row_entropy_is_that_of_the_whole_map(seed: int, n: int, share: int, causal: bool, block: int) -> None:
    q, k = random(seed, 2, 2 * share, n, 4), random(seed + 1, 2, 2, n, 4)
    rows = full_map(q, k, causal).mean(1).numpy()
    expected = [[-sum(p * np.log(p) for p in row if p > 0) for row in one] for one in rows]
    at = CurrentIds(torch.arange(n).expand(2, n)) if causal else None
    np.testing.assert_allclose(row_entropy(q, k, at, block), np.mean(expected, 1), atol=1e-12)


@given(st.lists(st.floats(0, 5), min_size=1, max_size=32), st.floats(0, 1))
def test_shares_grow_as_layers_focus(entropies: list[float], damping: float) -> None:
    found = reuse_shares(torch.tensor(entropies, dtype=torch.float64)[:, None], damping)[:, 0]
    spread = max(max(entropies) - min(entropies), 1e-12)
    expected: list[float] = []
    for entropy in entropies:
        raw = 1 - (entropy - min(entropies)) / spread
        up = bool(expected) and raw > expected[-1]
        expected.append(expected[-1] + damping * (raw - expected[-1]) if up else raw)
    np.testing.assert_allclose(found, expected, atol=1e-12)


@pytest.mark.parametrize(("measured", "cuts"), [(True, (1, 3)), (True, (3, 4)), (False, (1, 3))])
def test_static_patches_are_reused_most_similar_first_unless_text_attends_to_them(
    measured: bool, cuts: tuple[int, int]
) -> None:
    config = tiny_config(depth=6)
    backbone = tiny_policy_parts(config)
    layout, layers = backbone.layout(INSTRUCTION), backbone.decoder.layers
    stage = VLACacheConfig(
        use="vla_cache", after=cuts, unchanged=0.9, top=7, relevant_top=5, relevant_layer=2,
        shares=None if measured else (0.8, 0.6),
    )  # fmt: skip
    policy = Policy(backbone, pipeline(stage), REGISTRY)
    policy.reset(INSTRUCTION)
    before, after = observation(config, 0), observation(config, 0)
    rng = np.random.default_rng(5)
    for image in after["images"].values():
        # The lower half changes beyond recognition, the rest by different amounts.
        half = len(image) // 2
        image[half:] = rng.integers(0, 256, image[half:].shape)
        noise = rng.normal(size=image[:half].shape) * np.linspace(0, 40, image.shape[1])[None, :, None]
        image[:half] = np.clip(image[:half] + noise, 0, 255)
    with ExitStack() as stack:
        seen = [stack.enter_context(entering(layer)) for layer in layers[:5]]
        policy.act(before)
    trace = policy.act(after).trace

    patches = list(layout.prunable)
    given_ = attention_map(backbone, 2, seen[2][0])[:, list(layout.span("text"))].mean((0, 1))[patches].numpy()
    wanted = set(np.argsort(-given_, kind="stable")[:5])
    crop = config.transform.cropped
    chosen: list[tuple[float, int]] = []
    place = 0
    for view, segment in layout.views.items():
        now, then = (crop(one["images"][view]).double().numpy() for one in (after, before))
        rows, cols = segment.grid
        side = now.shape[1] // rows
        ranked = []
        for row in range(rows):
            for col in range(cols):
                here = np.s_[:, row * side : row * side + side, col * side : col * side + side]
                a, b = now[here].ravel(), then[here].ravel()
                ranked.append((-(a @ b) / np.sqrt((a @ a) * (b @ b)), place))
                place += 1
        static = sorted(one for one in ranked if -one[0] >= 0.9)[:7]
        chosen += [one for one in static if one[1] not in wanted]
    order = [number for _, number in sorted(chosen)]
    assert len(order) > 4
    if measured:
        entropies = []
        for layer, inputs in enumerate(seen):
            rows_ = attention_map(backbone, layer, inputs[0]).mean(0).numpy()
            entropies.append(-np.sum(rows_ * np.log(rows_), 1).mean())
        every = reuse_shares(torch.tensor(entropies)[:, None], 0.55)[:, 0].tolist()
        first, second = every[cuts[0]], max(every[cuts[0]], every[cuts[1]])
    else:
        first, second = 0.8, 0.8
    for cut, share in zip(cuts, (first, second), strict=True):
        gone = [patches[i] for i in order[: int(np.floor(share * len(order)))]]
        assert trace.kept[cut][0].tolist() == sorted(set(patches) - set(gone))


def test_there_is_a_share_for_every_cut() -> None:
    stage = VLACacheConfig(use="vla_cache", after=(1, 3), shares=(0.5,))
    with pytest.raises(ConfigError, match="shares: give one from 0 to 1 for each of the 2 cuts"):
        Policy(tiny_policy_parts(tiny_config(depth=6)), pipeline(stage), REGISTRY)
