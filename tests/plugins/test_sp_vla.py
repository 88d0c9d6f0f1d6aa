"""SP-VLA's pruning against its rule in NumPy, and Canny's detector against one that goes pixel by pixel."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.helpers.backbones import BACKBONES
from tests.helpers.naive_canny import naive_canny
from tests.helpers.planting import REGISTRY, pipeline
from tests.helpers.tiny_oft import INSTRUCTION, observation, tiny_config, tiny_policy_parts
from tests.helpers.tower_attention import ASKED, last_inputs, whole_map
from tokenprune.errors import ConfigError
from tokenprune.model.flops import query_flops
from tokenprune.pipelines.config import DENSE
from tokenprune.policy import Policy
from tokenprune.testing.waiting import no_waiting
from tokenprune_plugins.shared.canny import canny
from tokenprune_plugins.sp_vla import SPVLAConfig, kept_share, top_p


@st.composite
def pictures(draw: st.DrawFn) -> np.ndarray:
    """Bytes `[3, H, W]`: noise, steps in few values, and slopes with steps, whose edges are weak in parts."""
    height, width = draw(st.integers(1, 14)), draw(st.integers(1, 14))
    drawn = np.random.default_rng(draw(st.integers(0, 10_000)))
    kind = draw(st.sampled_from(["noise", "steps", "slopes"]))
    if kind == "noise":
        return drawn.integers(0, 256, (3, height, width), dtype=np.uint8)
    if kind == "steps":
        return np.repeat(drawn.choice([0, 30, 60, 120], size=(1, height, width)), 3, axis=0).astype(np.uint8)
    y, x = np.mgrid[:height, :width]
    slope = drawn.uniform(-20, 20, (2, 1, 1))
    ramp = slope[0] * y + slope[1] * x + drawn.integers(0, 90) * (x * drawn.uniform(-1, 1) + y > drawn.uniform(0, 14))
    return np.repeat(np.clip(128 + ramp, 0, 255)[None], 3, axis=0).astype(np.uint8)


@given(pictures(), st.sampled_from([(100, 200), (0, 0), (60, 400)]), st.sampled_from([0, 1, 3, 200]))
def test_canny_finds_the_edges_that_are_found_pixel_by_pixel(picture: np.ndarray, bounds: Any, reach: int) -> None:
    found = canny(torch.from_numpy(picture)[None], *bounds, reach=reach)[0].numpy()
    np.testing.assert_array_equal(found, naive_canny(picture, *bounds, reach=reach))
    if reach == 200:
        np.testing.assert_array_equal(found, naive_canny(picture, *bounds))


def test_a_weak_edge_is_followed_for_as_far_as_said() -> None:
    """A step down the middle, weak but for its top, is followed 64 pixels down."""
    picture = np.full((3, 100, 20), 100, dtype=np.uint8)
    picture[:, :, 10:] = 140
    picture[:, :2, 10:] = 250
    found = canny(torch.from_numpy(picture)[None], 100, 200)[0].numpy()
    every = naive_canny(picture, 100, 200)
    assert every.any(1).all()
    strong = naive_canny(picture, 100, 200, reach=0)
    last = int(np.flatnonzero(strong.any(1)).max())
    assert found.any(1).tolist() == [row <= last + 64 for row in range(100)]
    np.testing.assert_array_equal(found, naive_canny(picture, 100, 200, reach=64))


@pytest.mark.parametrize(("step", "above", "weak"), [(25, 51, False), (26, 51, True), (50, 50, False), (51, 51, True)])
def test_both_thresholds_are_to_be_passed(step: int, above: int, weak: bool) -> None:
    """Steps down the middle, whose strength is four times their height: what is just as strong is not enough."""
    picture = np.full((3, 12, 12), 100, dtype=np.uint8)
    picture[:, :, 6:] += step
    picture[:, :4, 6:] += above - step
    found = canny(torch.from_numpy(picture)[None], 100, 200)[0]
    assert bool(found[8:].any()) == weak
    np.testing.assert_array_equal(found.numpy(), naive_canny(picture, 100, 200))


def test_pictures_of_a_batch_do_not_meet() -> None:
    drawn = np.random.default_rng(0).integers(0, 256, (4, 3, 16, 16), dtype=np.uint8)
    together = canny(torch.from_numpy(drawn), 100, 600)
    assert 0 < together.float().mean() < 1
    for found, picture in zip(together, drawn, strict=True):
        np.testing.assert_array_equal(found.numpy(), naive_canny(picture, 100, 600))


@pytest.mark.parametrize(
    ("speed", "share"), [(0.0, 1.0), (0.4999, 1.0), (0.5, 1.0), (0.75, 0.55), (1.0, 0.1), (7.0, 0.1)]
)
def test_the_share_falls_with_speed(speed: float, share: float) -> None:
    assert kept_share(speed, 0.5, 0.9) == pytest.approx(share, abs=1e-12)


def share_by_the_paper(z: float, rise: float, given_up: float) -> float:
    if z < rise:
        return 1
    return 1 - (min(z, 1) - rise) * (given_up / (1 - rise))


def holding_by_the_paper(attention: np.ndarray, share: float) -> list[int]:
    """Patches of one view, the most attended first, until they hold the share."""
    kept, held = [], 0.0
    for i in sorted(range(len(attention)), key=lambda i: (-attention[i], i)):
        if share < 1 and kept and held >= share * attention.sum():
            break
        kept.append(i)
        held += attention[i]
    return sorted(kept)


@given(st.data())
def test_as_many_stay_as_hold_the_share_ties_included(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(0, 12), min_size=1, max_size=3))
    drawn = np.random.default_rng(data.draw(st.integers(0, 10_000)))
    views = np.repeat(np.arange(len(sizes)), sizes)
    attention = drawn.integers(1, 5, (2, len(views))).astype(float)
    shares = [data.draw(st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]) | st.floats(0, 1)) for _ in range(2)]
    for number in range(len(sizes)):
        member = torch.from_numpy(views == number).expand(2, -1)
        found = top_p(torch.from_numpy(attention), member, torch.tensor(shares, dtype=torch.float64))
        for row, share in enumerate(shares):
            places = np.flatnonzero(views == number)
            expected = [int(places[i]) for i in holding_by_the_paper(attention[row, places], share)]
            assert np.flatnonzero(found[row].numpy()).tolist() == expected


def test_at_a_share_of_one_all_stay_whatever_sums_are_rounded_to() -> None:
    attention = torch.tensor([[1.0, 1e-20, 1e-20]], dtype=torch.float64)
    member = torch.ones_like(attention, dtype=torch.bool)
    assert top_p(attention, member, torch.ones(1, dtype=torch.float64)).all()
    assert top_p(attention, member, torch.full((1,), 0.5, dtype=torch.float64)).sum() == 1


def plain(seen: dict[str, Any], seed: int = 0) -> dict[str, Any]:
    """The observation with flat pictures, and a bright corner in each, elsewhere every time."""
    drawn = np.random.default_rng(seed)
    images = {}
    for view, image in seen["images"].items():
        images[view] = np.full_like(image, 90)
        y, x = drawn.integers(10, 50, 2)
        images[view][y : y + 20, x : x + 20] = 200
    return {**seen, "images": images}


def moved(policy: Policy, z: float, slot: int = 0) -> None:
    action = np.full(policy.backbone.info.action.dims, 0.3)
    action[2] = z
    policy.executed(action, slot=slot)


def edges_by_patch(pixels: np.ndarray, side: int) -> np.ndarray:
    """Which of `side * side` patches of `[3, S, S]` contain an edge pixel."""
    found, size = naive_canny(pixels, 100, 200), pixels.shape[1] // side
    return np.array(
        [
            found[row * size : (row + 1) * size, col * size : (col + 1) * size].any()
            for row in range(side)
            for col in range(side)
        ]
    )


@pytest.mark.parametrize("name", BACKBONES)
def test_it_keeps_edges_and_what_speed_allows(name: str) -> None:
    backbone, seen, _ = BACKBONES[name]()
    seen = plain(seen)
    first, has_cls = ASKED[name]
    modules = dict(backbone.model.named_modules())
    tower = modules["vision_backbone.fused_featurizer" if has_cls else first]
    with ExitStack() as stack:
        inputs = last_inputs(tower, stack)
        policy = Policy(backbone, pipeline(SPVLAConfig(use="sp_vla")), REGISTRY)
        policy.reset(INSTRUCTION)
        chunks = [policy.act(seen)]
        for z in (0.3, 0.8, -0.8, 2.0):
            moved(policy, z)
            chunks.append(policy.act(seen))
    everything = list(chunks[0].trace.plan.layout.prunable)
    counts = [len(chunk.trace.kept[-1][0]) for chunk in chunks]
    assert counts[:2] == [len(everything)] * 2
    assert len(everything) > counts[2] == counts[3] > counts[4]
    prefix = tower.config.prefix_tokens
    views = chunks[0].trace.plan.layout.views.values()
    for z, chunk, x in zip((0.0, 0.3, 0.8, -0.8, 2.0), chunks, inputs, strict=True):
        attention = whole_map(tower.blocks[-1].attn, x).mean(1)[:, prefix:].numpy()
        expected = []
        for part, segment, (view, pixels) in zip(attention, views, policy._slots[0].memory.frames.items(), strict=True):
            assert view == segment.view
            edge = edges_by_patch(pixels.numpy(), segment.grid[0])
            assert 0 < edge.sum() < len(edge)
            attended = holding_by_the_paper(part, share_by_the_paper(abs(z), 0.5, 0.9))
            expected += [segment.start + i for i in range(len(part)) if edge[i] or i in attended]
        assert chunk.trace.kept[-1][0].tolist() == expected
    assert chunks[-1].trace.encoder == ("received",)
    assert set(chunks[-1].trace.reasons[-1]) == {"attended", "edge"}


@pytest.mark.parametrize("name", BACKBONES)
def test_keeping_everything_is_dense(name: str) -> None:
    backbone, seen, _ = BACKBONES[name]()
    slow = (pipeline(SPVLAConfig(use="sp_vla")), 0.1)
    told = (pipeline(SPVLAConfig(use="sp_vla", keep=1.0)), 1.0)
    chunks = []
    for config, z in (slow, told, (DENSE, 0.0)):
        policy = Policy(backbone, config, REGISTRY)
        policy.reset(INSTRUCTION)
        first = policy.act(plain(seen)).normalised
        moved(policy, z)
        chunks.append(np.stack([first, policy.act(plain(seen)).normalised]))
    assert np.array_equal(chunks[0], chunks[2])
    assert np.array_equal(chunks[1], chunks[2])


@pytest.mark.parametrize("name", BACKBONES)
def test_the_look_is_counted(name: str) -> None:
    backbone, seen, _ = BACKBONES[name]()
    policy = Policy(backbone, pipeline(SPVLAConfig(use="sp_vla", keep=6)), REGISTRY)
    policy.reset(INSTRUCTION)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        trace = policy.act(plain(seen)).trace
    assert query_flops(backbone.info, trace.plan, (), trace.encoder).total == counter.get_total_flops()


def test_the_count_is_rounded_up_to_a_bucket() -> None:
    backbone = tiny_policy_parts(tiny_config())
    seen, ids = plain(observation(backbone.config)), []
    for bucket in (1, 8):
        policy = Policy(backbone, pipeline(SPVLAConfig(use="sp_vla", bucket=bucket)), REGISTRY)
        policy.reset(INSTRUCTION)
        moved(policy, 1.0)
        ids.append(policy.act(seen).trace.kept[-1][0].tolist())
    assert len(ids[0]) % 8
    assert len(ids[1]) == -(-len(ids[0]) // 8) * 8
    assert set(ids[0]) < set(ids[1])


def test_a_reset_forgets_the_last_action() -> None:
    backbone = tiny_policy_parts(tiny_config())
    policy = Policy(backbone, pipeline(SPVLAConfig(use="sp_vla")), REGISTRY)
    policy.reset(INSTRUCTION)
    moved(policy, 1.0)
    seen = plain(observation(backbone.config))
    fast = policy.act(seen).trace.kept[-1].shape[1]
    policy.reset(INSTRUCTION)
    assert fast < policy.act(seen).trace.kept[-1].shape[1] == len(backbone.layout(INSTRUCTION).prunable)


def test_of_a_fixed_number_edges_come_first_and_no_query_waits() -> None:
    config = tiny_config()
    backbone = tiny_policy_parts(config)
    stage = pipeline(SPVLAConfig(use="sp_vla", keep=14))
    speeds = (0.0, 0.7, 1.0)
    together = Policy(backbone, stage, REGISTRY)
    seen = {slot: plain(observation(config), slot) for slot in range(3)}
    for slot, z in enumerate(speeds):
        together.reset(INSTRUCTION, slot)
        moved(together, z, slot)
    with no_waiting(backbone):
        chunks = together.act_batch(seen)
    for slot, z in enumerate(speeds):
        alone = Policy(backbone, stage, REGISTRY)
        alone.reset(INSTRUCTION)
        moved(alone, z)
        kept = alone.act(seen[slot]).trace.kept[-1][0]
        assert chunks[slot].trace.kept[-1][slot].tolist() == kept.tolist()
    reasons = chunks[0].trace.reasons[-1]
    assert reasons["edge"].any(1).all()
    assert chunks[0].trace.plan.graph_safe


def test_it_prunes_after_a_layer_what_an_earlier_cut_left() -> None:
    backbone = tiny_policy_parts(tiny_config())
    grid = REGISTRY.stage_class("uniform_grid").Config(use="uniform_grid", keep=20)
    policy = Policy(backbone, pipeline(grid, SPVLAConfig(use="sp_vla", after=(0,))), REGISTRY)
    policy.reset(INSTRUCTION)
    moved(policy, 1.0)
    kept = policy.act(plain(observation(backbone.config))).trace.kept
    assert set(kept[0][0].tolist()) < set(kept[-1][0].tolist())


def test_actions_without_a_vertical_part_are_refused() -> None:
    backbone = tiny_policy_parts(tiny_config(constants="aloha"))
    with pytest.raises(ConfigError, match=r"actions with a translation of three numbers; .* moves joints"):
        Policy(backbone, pipeline(SPVLAConfig(use="sp_vla")), REGISTRY)


def test_thresholds_in_the_wrong_order_are_refused() -> None:
    with pytest.raises(ValidationError, match=r"lower threshold comes first and is at least 0, got \[200, 100\]"):
        SPVLAConfig(use="sp_vla", edges=(200, 100))
