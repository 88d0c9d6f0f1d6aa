"""Closed-form FLOPs against torch's own counter over the real decoder."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.helpers.drawing import decoder_of, random, tiny_llama
from tokenprune.model.attention import attention_rows, similarity
from tokenprune.model.decoder import Decoder, project_rows
from tokenprune.model.flops import Probed, layer_flops, probe_flops, query_flops
from tokenprune.model.info import ActionSpec, BackboneInfo, DecoderShape, FollowUp
from tokenprune.model.kv_cache import FrozenKV, KVCache, LayerKV
from tokenprune.model.phase import Phase
from tokenprune.pipelines.planning import make_plan
from tokenprune.stages.config import CutConfig
from tokenprune.stages.needs import StageNeeds
from tokenprune.stages.stage import Stage
from tokenprune.tokens.layout import Role, Segment, TokenLayout
from tokenprune.tokens.plan import Plan
from tokenprune.tokens.selection import CurrentIds, OriginalIds, TokenSelection

SHAPES = [
    DecoderShape(depth=3, hidden=24, heads=4, kv_heads=4, head_dim=6, mlp=40, causal=True),
    DecoderShape(depth=2, hidden=16, heads=4, kv_heads=2, head_dim=6, mlp=20, causal=False),
    DecoderShape(depth=4, hidden=32, heads=8, kv_heads=1, head_dim=8, mlp=12, causal=True),
]


def decoder(shape: DecoderShape) -> Decoder:
    model = tiny_llama(shape.depth, shape.hidden, shape.heads, shape.kv_heads, shape.head_dim, shape.mlp)
    return decoder_of(model, shape.causal)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tokens", [1, 2, 7, 33])
def test_a_layer_counts_what_the_decoder_does(shape: DecoderShape, tokens: int) -> None:
    llama, x = decoder(shape), random(0, 1, tokens, shape.hidden)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        llama.run(x, TokenSelection.identity(tokens, 1))
    assert shape.depth * layer_flops(shape, tokens) == counter.get_total_flops()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tokens", [1, 9])
def test_a_cached_step_counts_its_keys(shape: DecoderShape, tokens: int) -> None:
    llama, x, cache = decoder(shape), random(0, 1, tokens + 1, shape.hidden), KVCache()
    llama.run(x[:, :tokens], TokenSelection.identity(tokens, 1), cache=cache)
    new = TokenSelection(OriginalIds(torch.tensor([[tokens]])), tokens + 1)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        llama.run(x[:, tokens:], new, cache=cache)
    assert shape.depth * layer_flops(shape, 1, tokens + 1) == counter.get_total_flops()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("rows", "keys"), [(1, 1), (1, 20), (5, 20)])
def test_a_look_ahead_counts_its_projections(shape: DecoderShape, rows: int, keys: int) -> None:
    layer = decoder(shape).layers[0]
    with FlopCounterMode(display=False) as counter:
        q, k = project_rows(layer, random(0, 1, keys, shape.hidden), CurrentIds(torch.arange(rows)[None]),
                            shape.head_dim, None)  # fmt: skip
        similarity(q, k)
    assert probe_flops(shape, rows, keys, ahead=True) == counter.get_total_flops()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("rows", "keys"), [(1, 1), (1, 20), (5, 20)])
def test_a_probe_counts_what_it_does(shape: DecoderShape, rows: int, keys: int) -> None:
    q, k = random(0, 1, shape.heads, keys, shape.head_dim), random(1, 1, shape.kv_heads, keys, shape.head_dim)
    with FlopCounterMode(display=False) as counter:
        attention_rows(q, k, CurrentIds(torch.arange(rows)[None]), shape.causal)
    assert probe_flops(shape, rows, keys) == counter.get_total_flops()


def test_a_query_counts_its_plan() -> None:
    shape = SHAPES[0]
    layout = TokenLayout.build(
        [Segment(Role.VISION, 0, 16, "primary", (4, 4), prunable=True), Segment(Role.TEXT, 0, 5)]
    )
    selector = Stage(CutConfig.model_validate({"use": "x", "keep": 4, "after": 0}))
    plan = make_plan([selector], [StageNeeds((0,))], ["x"], layout, "default", shape.depth)
    action = ActionSpec(horizon=1, groups={"all": (0,)})
    info = BackboneInfo("tiny", "test", True, shape, ("primary",), action, other_flops={"vision": 1000, "head": 7})
    query = query_flops(info, plan, (Probed(0, 2), Probed(2, 3)))

    last = OriginalIds(torch.tensor([[20]]))
    counted = []
    for tokens, read in ((21, None), (9, None), (9, last)):
        layer, held = decoder(replace(shape, depth=1)), OriginalIds(torch.arange(21 - tokens, 21)[None])
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            layer.run(random(0, 1, tokens, shape.hidden), TokenSelection(held, 21), read=read)
        counted.append(counter.get_total_flops())
    assert query.layers == tuple(counted)
    assert query.probe == 2 * (2 * 21 + 3 * 9) * shape.heads * shape.head_dim
    assert query.other == {"vision": 1000, "head": 7}
    assert query.decoder == sum(counted)
    assert query.total == 1007 + sum(counted) + query.probe


def test_what_follows_counts_the_keys_that_pruning_left() -> None:
    shape = replace(SHAPES[0], causal=False)
    layout = TokenLayout.build(
        [Segment(Role.VISION, 0, 16, "primary", (4, 4), prunable=True), Segment(Role.TEXT, 0, 5)],
        {"readout": range(21, 21)},
    )
    selector = Stage(CutConfig.model_validate({"use": "x", "keep": 4, "after": 0}))
    plan = make_plan([selector], [StageNeeds((0,))], ["x"], layout, "default", shape.depth)
    follow = FollowUp(Phase.FLOW, replace(shape, hidden=8, mlp=12), ((1, 0), (3, 1), (3, 1)))
    action = ActionSpec(horizon=1, groups={"all": (0,)})
    query = query_flops(BackboneInfo("tiny", "test", True, shape, ("primary",), action, follow_up=follow), plan)

    counted = 0
    for rows, before in follow.passes:
        for held in (21, 9, 9):
            expert = decoder(replace(follow.decoder, depth=1))
            size = (1, shape.kv_heads, held + before, shape.head_dim)
            prefix = FrozenKV([LayerKV(random(1, *size), random(2, *size), torch.arange(held + before)[None])])
            tokens = TokenSelection(OriginalIds(torch.arange(rows)[None] + held + before), held + before + rows)
            with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
                expert.run(random(0, 1, rows, 8), tokens, cache=prefix)
            counted += counter.get_total_flops()
    assert query.follow_up == counted
    assert query.total == counted + sum(query.layers)


def test_a_repeated_pass_counts_each_time() -> None:
    shape = SHAPES[0]
    layout = TokenLayout.build([Segment(Role.VISION, 0, 16, "primary", (4, 4), prunable=True)])
    plan = Plan.dense(layout, shape.depth, "default")
    info = BackboneInfo("tiny", "test", True, shape, ("primary",), ActionSpec(horizon=1, groups={"all": (0,)}))
    once, twice = query_flops(info, plan), query_flops(replace(info, repeats=2), plan)
    assert twice.decoder == 2 * once.decoder > 0
