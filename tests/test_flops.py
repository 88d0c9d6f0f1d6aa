"""Closed-form FLOPs against torch's own counter over the real decoder."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.drawing import decoder_of, random, tiny_llama
from tokenprune.backbone import ActionSpec, BackboneInfo, DecoderShape
from tokenprune.config import CutConfig
from tokenprune.decoder import Decoder
from tokenprune.flops import layer_flops, probe_flops, query_flops
from tokenprune.kv import KVCache
from tokenprune.layout import Role, Segment, TokenLayout
from tokenprune.plan import make_plan
from tokenprune.probe import attention_rows
from tokenprune.selection import CurrentIds, OriginalIds, TokenSelection
from tokenprune.stage import Stage

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
    plan = make_plan([selector], ["x"], layout, "default", shape.depth)
    action = ActionSpec(horizon=1, groups={"all": (0,)})
    info = BackboneInfo("tiny", "test", True, shape, ("primary",), action, other_flops={"vision": 1000, "head": 7})
    query = query_flops(info, plan, ((0, 2), (2, 3)))

    counted = []
    for tokens in (21, 9, 9):
        layer = decoder(replace(shape, depth=1))
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            layer.run(random(0, 1, tokens, shape.hidden), TokenSelection.identity(tokens, 1))
        counted.append(counter.get_total_flops())
    assert query.layers == tuple(counted)
    assert query.probe == 2 * (2 * 21 + 3 * 9) * shape.heads * shape.head_dim
    assert query.other == {"vision": 1000, "head": 7}
    assert query.decoder == sum(counted)
    assert query.total == 1007 + sum(counted) + query.probe
