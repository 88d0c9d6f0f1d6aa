"""The floor of a query against numbers worked out by hand, and the weights it reads against the models'."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.helpers.planting import REGISTRY
from tokenprune.bench.roofline import Roof, floor
from tokenprune.loading import load_backbone
from tokenprune.model.flops import layer_weights
from tokenprune.model.info import ActionSpec, BackboneInfo, DecoderShape, FollowUp
from tokenprune.model.phase import Phase
from tokenprune.tokens.layout import Role, Segment, TokenLayout
from tokenprune.tokens.plan import Cut, Plan, Removal

# A layer has 4 * 8 * 8 + 3 * 8 * 10 = 496 weights.
SHAPE = DecoderShape(depth=3, hidden=8, heads=2, kv_heads=2, head_dim=4, mlp=10, causal=False)
PARTS = [Segment(Role.VISION, 0, 90, "primary", (9, 10), prunable=True), Segment(Role.TEXT, 0, 10)]
LAYOUT = TokenLayout.build(PARTS)
ACTION = ActionSpec(horizon=1, groups={"all": (0,)})
INFO = BackboneInfo("toy", "test", True, SHAPE, ("primary",), ACTION)


def plan_of(layout: TokenLayout, *cuts: Cut):
    return replace(Plan.dense(layout, SHAPE.depth), cuts=cuts)


def layer(tokens: int, read: int | None = None) -> int:
    read = tokens if read is None else read
    return 2 * (tokens * 192 + read * 304) + 4 * read * tokens * 8


def test_a_layer_takes_as_long_as_its_arithmetic_or_its_weights():
    # 1e6 FLOP/s and 1e5 bytes/s: 992 bytes of weights take 9.92 ms, which about ten tokens' arithmetic takes as well.
    roof = Roof(1e6, 1e5, 1, 1)
    found = floor(INFO, plan_of(LAYOUT, Cut(0, (), 90, 0)), roof, itemsize=2)
    assert found.layers[0] == pytest.approx(layer(100) / 1e3)
    assert found.layers[1] == pytest.approx(max(layer(10) / 1e3, 9.92))
    assert found.layers[2] == pytest.approx(9.92)
    assert layer(10, read=1) / 1e3 < 9.92 < layer(10) / 1e3
    assert found.total == pytest.approx(sum(found.layers))
    slow = floor(INFO, plan_of(LAYOUT), Roof(1e6, 1e3, 1, 1), itemsize=4)
    assert slow.layers == pytest.approx((1984.0,) * 3)


def test_parts_outside_the_decoder_likewise():
    info = replace(
        INFO, other_flops={"vision": 5_000, "head": 10, "rest": 7}, other_weights={"vision": 50, "head": 300}
    )
    found = floor(info, plan_of(LAYOUT), Roof(1e6, 1e5, 1, 1), itemsize=2)
    assert found.other == pytest.approx({"vision": 5.0, "head": 6.0, "rest": 0.007})
    assert found.total == pytest.approx(11.007 + sum(found.layers))


def test_passes_behind_the_layout_read_their_weights_each_time():
    shape = replace(SHAPE, hidden=4, mlp=5)
    follow = FollowUp(Phase.FLOW, shape, ((1, 0), (5, 1), (5, 1)), steps=2, norms=100)
    # 4 * 4 * 8 + 3 * 4 * 5 = 188 weights, and 50 of the adaptive norms in the two flow steps.
    found = floor(replace(INFO, follow_up=follow), plan_of(LAYOUT), Roof(1e12, 1e3, 1, 1), itemsize=2)
    assert found.follow_up == pytest.approx(3 * 2 * (188 + 2 * 238))
    fast = floor(replace(INFO, follow_up=follow), plan_of(LAYOUT), Roof(1e3, 1e12, 1, 1), itemsize=2)
    works = [2 * rows * 188 + 4 * rows * keys * 8 for rows, keys in ((1, 101), (5, 106), (5, 106))]
    assert fast.follow_up == pytest.approx(3 * (sum(works) + 2 * 100))


def test_a_last_layer_that_nobody_reads_only_makes_keys_and_values():
    layout = TokenLayout.build(PARTS, {"readout": range(100, 100)})
    found = floor(INFO, plan_of(layout), Roof(1e12, 1e3, 1, 1), itemsize=1)
    assert found.layers == pytest.approx((496.0, 496.0, 192.0))


def test_repeated_passes_read_everything_again_and_skipped_layers_nothing():
    plan = replace(plan_of(LAYOUT), skipped=frozenset({1}))
    found = floor(replace(INFO, repeats=3), plan, Roof(1e12, 1e3, 1, 1), itemsize=1)
    assert found.layers == pytest.approx((3 * 496.0, 0.0, 3 * 496.0))


def test_merging_and_probes_are_no_part_of_the_floor():
    roof = Roof(1e6, 1e9, 1, 1)
    dropping, merging = (
        floor(INFO, plan_of(LAYOUT, Cut(0, (), 90, 9, removal=removal)), roof, 2).total
        for removal in (Removal.DROP, Removal.MERGE)
    )
    assert dropping == merging


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("openvla", {}),
        ("openvla-oft", {}),
        ("openvla-oft", {"head": "discrete"}),
        ("openvla-oft", {"head": "diffusion", "steps": 3}),
        ("openvla-oft", {"film": True}),
        ("pi0", {}),
        ("pi05", {}),
    ],
)
def test_weights_that_a_query_reads_are_those_of_the_model(name, options):
    backbone = load_backbone(name, REGISTRY, None, "tiny", "cpu", "float32", 0, options)
    info = backbone.info
    assert set(info.other_weights) == set(info.other_flops)
    times = {"head": info.repeats, "noisy_actions": info.repeats}
    if name == "openvla":
        times["lm_head"] = info.action.dims
    steps = info.follow_up.steps if info.follow_up is not None else 1
    times |= {"actions": steps, "time": steps}
    counted = sum(n // times.get(part, 1) for part, n in info.other_weights.items())
    counted += info.decoder.depth * layer_weights(info.decoder)
    if info.follow_up is not None and name != "openvla":
        follow = info.follow_up
        counted += follow.decoder.depth * (layer_weights(follow.decoder) + follow.norms // 2)
    held = {key: value for key, value in backbone.model.named_parameters() if value.dim() >= 2}
    tables = ("embed_tokens", "pos_embed", "position", "cls_token", "reg_token")
    assert counted == sum(value.numel() for key, value in held.items() if not any(word in key for word in tables))
