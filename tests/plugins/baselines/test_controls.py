"""What the shipped strategies choose, against rules worked out by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.naive_oft import attention_map, entering
from tests.helpers.planting import REGISTRY, pipeline
from tests.helpers.tiny_oft import INSTRUCTION, observation, tiny_config, tiny_policy_parts
from tokenprune.model.info import DecoderShape
from tokenprune.policy import Policy
from tokenprune.stages.stage import Probe
from tokenprune.tokens.layout import Role, Segment, TokenLayout
from tokenprune_plugins.baselines.none import NothingConfig
from tokenprune_plugins.baselines.random import hashed
from tokenprune_plugins.fastv import FastV, FastVConfig
from tokenprune_plugins.shared.bases import HalfConfig
from tokenprune_plugins.shared.grid import dither, grid_scores


def kept_ids(config: object, queries: int = 1, views: tuple[str, ...] = ("primary", "wrist")) -> list[list[int]]:
    backbone = tiny_policy_parts(tiny_config(views))
    policy = Policy(backbone, pipeline(config), REGISTRY)
    policy.reset(INSTRUCTION)
    chunks = [policy.act(observation(backbone.config)) for _ in range(queries)]
    return [next(iter(chunk.trace.kept.values()))[0].tolist() for chunk in chunks]


def test_uniform_grid_is_a_lattice_at_a_quarter() -> None:
    layout = TokenLayout.build([Segment(Role.BOS, 0, 1), Segment(Role.VISION, 0, 64, "primary", (8, 8), prunable=True)])
    best = grid_scores(layout)[1:].topk(16).indices
    assert {(int(i) // 8, int(i) % 8) for i in best} == set(itertools.product(range(0, 8, 2), repeat=2))


@given(st.integers(1, 12), st.integers(1, 12), st.floats(0.1, 1))
def test_uniform_grid_leaves_no_large_hole(rows: int, cols: int, share: float) -> None:
    """Every patch has a kept one near: within twice the spacing an ideal lattice of that size would have."""
    keep = max(1, round(rows * cols * share))
    order = dither(rows, cols).flatten().argsort()[:keep]
    chosen = torch.stack([order // cols, order % cols], 1).double()
    everywhere = torch.cartesian_prod(torch.arange(rows), torch.arange(cols)).double()
    worst = torch.cdist(everywhere, chosen, p=float("inf")).min(1).values.max()
    assert worst <= 2 * (max(rows, cols) / keep**0.5 + 1)


def test_dither_is_a_permutation_of_the_grid() -> None:
    for side in (2, 4, 8, 16):
        assert sorted(dither(side, side).flatten().tolist()) == list(range(side * side))


def test_uniform_grid_treats_views_alike() -> None:
    kept = kept_ids(HalfConfig(use="uniform_grid", keep=12))[0]
    primary = [i for i in kept if i < 17]
    assert [i + 16 for i in primary] == [i for i in kept if i >= 17]


def test_random_differs_between_queries_and_repeats_with_the_seed() -> None:
    first, second = kept_ids(HalfConfig(use="random"), queries=2)
    assert first != second
    assert kept_ids(HalfConfig(use="random"), queries=2) == [first, second]


def test_hashed_numbers_are_uniform_and_uncorrelated() -> None:
    ids = torch.arange(20000)
    numbers = hashed(ids, 7)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert abs(numbers.mean() - 0.5) < 0.01
    assert abs(numbers.var() - 1 / 12) < 0.005
    for other in (hashed(ids, 8), numbers.roll(1)):
        assert abs(np.corrcoef(numbers, other)[0, 1]) < 0.03


@pytest.mark.parametrize("keep", [1.0, 0.5])
def test_none_keeps_everything_or_is_an_error(keep: float) -> None:
    from tokenprune.errors import StageError

    config = NothingConfig(use="none", after=("embedding", 1), keep=keep)
    if keep == 1.0:
        assert kept_ids(config)[0] == list(range(1, 33))
    else:
        with pytest.raises(StageError, match="no stage said which"):
            kept_ids(config)


@pytest.mark.parametrize("rows", ["auto", "text", "instruction", "action", "last"])
def test_fastv_keeps_the_most_attended_patches(rows: str) -> None:
    """The attention map of layer 1, worked out from the weights, mean over heads and the chosen rows."""
    backbone = tiny_policy_parts(tiny_config())
    policy = Policy(backbone, pipeline(FastVConfig(use="fastv", after=(1,), keep=10, rows=rows)), REGISTRY)
    policy.reset(INSTRUCTION)
    with entering(backbone.decoder.layers[1]) as inputs:
        kept = policy.act(observation(backbone.config)).trace.kept[1][0].tolist()
    layout = backbone.layout(INSTRUCTION)
    chosen = list(layout.span("text" if rows == "auto" else rows))
    total = attention_map(backbone, 1, inputs[0]).sum(0)[chosen].sum(0)
    expected = sorted(sorted(layout.prunable, key=lambda i: (-float(total[i]), i))[:10])
    assert kept == expected


def test_fastv_says_whose_attention_it_reads() -> None:
    info = tiny_config().info("tiny", untrained=True)
    layout = tiny_policy_parts(tiny_config()).layout(INSTRUCTION)
    stage = FastV(FastVConfig(use="fastv"))
    assert "'text' rows" in stage.caveats(info)
    assert stage.probes(info, layout, "default") == (Probe(1, "text"),)
    causal = DecoderShape(depth=3, hidden=32, heads=4, kv_heads=2, head_dim=8, mlp=48, causal=True)
    from dataclasses import replace

    assert "'last' rows" in stage.caveats(replace(info, decoder=causal))
