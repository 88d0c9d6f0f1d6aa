"""What is drawn for plugin authors is what the runtime would give, and holds for the strategies that ship."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from tokenprune.stages.stage import Stage
from tokenprune.stages.token_context import SelectContext
from tokenprune.testing.strategies import contexts, layouts, selections
from tokenprune.tokens.proposal import Proposal, resolve
from tokenprune_plugins.baselines.random import Random
from tokenprune_plugins.baselines.uniform_grid import UniformGrid
from tokenprune_plugins.divprune import DivPrune, DivPruneConfig
from tokenprune_plugins.shared.bases import HalfConfig


@given(st.data())
def test_selections_keep_fixed_tokens_and_ascend(data: st.DataObject) -> None:
    layout = data.draw(layouts())
    batch = data.draw(st.integers(1, 3))
    ids = data.draw(selections(layout, batch)).ids
    assert (ids[:, 1:] > ids[:, :-1]).all()
    for row in ids.tolist():
        assert set(layout.fixed) <= set(row)
        assert any(token in layout.prunable for token in row)


@given(contexts())
def test_a_context_hangs_together(ctx: SelectContext) -> None:
    batch = len(ctx.prunable)
    assert ctx.hidden.shape[:2] == ctx.tokens.ids.shape
    assert ctx.patches.shape[:2] == ctx.prunable.shape
    assert set(ctx.images) == set(ctx.layout.views)
    assert torch.stack([ctx.in_view(view) for view in ctx.layout.views]).sum(0).eq(1).all()
    assert ctx.rows("text").shape[0] == batch
    ctx.remember("x", ctx.patches.mean(-1))
    assert torch.equal(ctx.recall("x")[0], ctx.patches.mean(-1))


STAGES: dict[str, Stage[Any]] = {
    "random": Random(HalfConfig(use="random", keep=0.5)),
    "uniform_grid": UniformGrid(HalfConfig(use="uniform_grid", keep=0.5)),
    "divprune": DivPrune(DivPruneConfig(use="divprune", keep=0.3)),
}


@given(st.data())
def test_a_stage_scores_whatever_is_left_of_any_layout(data: st.DataObject) -> None:
    stage = STAGES[data.draw(st.sampled_from(sorted(STAGES)))]
    ctx = data.draw(contexts(stage))
    proposal = stage.select_tokens(ctx)
    assert isinstance(proposal, Proposal)
    assert proposal.score.shape == ctx.prunable.shape
    assert resolve([proposal], 1).shape == (len(ctx.prunable), 1)
