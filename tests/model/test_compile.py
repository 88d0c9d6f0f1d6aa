"""A block of two layers with a cut between them is one static graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from tests.helpers.drawing import random, tiny_llama
from tokenprune.model.attention import attention_rows
from tokenprune.model.decoder import finish, project, rotary
from tokenprune.tokens.positions import Positions
from tokenprune.tokens.proposal import Proposal, Quota, resolve
from tokenprune.tokens.selection import OriginalIds, TokenSelection, apply

N, KEEP, DIM = 12, 4, 4
PRUNABLE, FIXED, ROWS = range(1, 9), [0, 9, 10, 11], range(9, 11)


def block(first: nn.Module, second: nn.Module, causal: bool, votes: bool) -> Callable[..., tuple[Tensor, Tensor]]:
    """Two layers; after the first, the attention of two rows chooses which tokens the second one gets."""
    fixed, rows = torch.tensor(FIXED), torch.tensor([list(ROWS)])

    def layer(module: nn.Module, hidden: Tensor, tokens: TokenSelection) -> tuple[Tensor, Tensor, Tensor]:
        cos, sin = rotary(tokens, Positions.PRESERVE, DIM, 500.0, hidden.dtype)
        q, k, v, _ = project(module, hidden, cos, sin, DIM)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
        return finish(module, hidden, mixed), q, k

    def run(hidden: Tensor, ids: Tensor, prunable: Tensor) -> tuple[Tensor, Tensor]:
        batch = hidden.shape[0]
        tokens = TokenSelection(OriginalIds(ids), N)
        hidden, q, k = layer(first, hidden, tokens)
        asked = tokens.to_current(OriginalIds(rows.expand(batch, -1)))
        columns = tokens.to_current(OriginalIds(prunable))
        weights = attention_rows(q, k, asked, causal).mean((1, 2)).gather(1, columns)
        proposals, quotas = [Proposal(score=weights)], []
        if votes:
            proposals.append(Proposal(hidden.norm(dim=-1).gather(1, columns), weights > 0.2, weights < 0.02))
            quotas.append(Quota(prunable < 5, 1))
        chosen = resolve(proposals, KEEP, [1.0] * len(proposals), quotas)
        kept, _ = apply(tokens, OriginalIds(prunable), fixed, chosen)
        at = tokens.to_current(kept.ids)
        hidden = hidden.gather(1, at[..., None].expand(-1, -1, hidden.shape[2]))
        return layer(second, hidden, kept)[0], kept.ids

    return run


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def inputs(batch: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    ids = torch.arange(N).repeat(batch, 1)
    return random(seed, batch, N, 16), ids, torch.tensor(list(PRUNABLE)).repeat(batch, 1)


@pytest.mark.parametrize(("batch", "causal", "votes"), [(1, True, False), (2, False, True)])
def test_a_block_with_a_cut_is_one_graph_and_other_scores_do_not_recompile_it(
    batch: int, causal: bool, votes: bool
) -> None:
    model = tiny_llama(depth=2)
    eager = block(model.layers[0], model.layers[1], causal, votes)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(eager, fullgraph=True, dynamic=False, backend=counter)
    kept = set()
    for seed in range(4):
        arguments = inputs(batch, seed)
        with torch.no_grad():
            expected, actual = eager(*arguments), compiled(*arguments)
        torch.testing.assert_close(actual[0], expected[0], rtol=0, atol=1e-12)
        assert torch.equal(actual[1], expected[1])
        assert actual[1].shape == (batch, len(FIXED) + KEEP)
        kept.add(tuple(actual[1].flatten().tolist()))
    assert len(kept) > 1, "the scores never chose differently"
    assert counter.frame_count == 1
    called = {str(node.target) for graph in counter.graphs for node in graph.graph.nodes}
    assert "topk" in called
    assert not called & {"item", "tolist", "nonzero", "cpu", "unique"}, "the host waits for the device"
