"""The invariants of selections, plans and read-outs, each with a fault planted to show that its property can fail."""

from __future__ import annotations

import itertools
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.helpers import drawing, stages
from tests.helpers.planting import REGISTRY, pipeline, pipelines, prop
from tests.helpers.tiny_oft import INSTRUCTION, tiny_config
from tokenprune.engine import combine as resolution
from tokenprune.engine import cuts as cutting
from tokenprune.engine.inputs import QueryInputs
from tokenprune.engine.query import Query
from tokenprune.engine.rng import QueryRng
from tokenprune.engine.timing import Clock
from tokenprune.model.decoder import Decoded, Decoder
from tokenprune.model.kv_cache import KVCache, LayerKV
from tokenprune.model.phase import Phase
from tokenprune.pipelines.binding import bind
from tokenprune.pipelines.config import PipelineConfig
from tokenprune.stages.frames import FrameBuffer
from tokenprune.stages.memory import Slot
from tokenprune.tokens import proposal
from tokenprune.tokens.layout import TokenLayout
from tokenprune.tokens.layout_tables import LayoutTables
from tokenprune.tokens.proposal import Proposal
from tokenprune.tokens.selection import CurrentIds, OriginalIds, TokenSelection, rows_at


class Passing(Decoder):
    """A decoder whose layers do nothing, so a hidden state keeps saying which token it is."""

    def __init__(self, depth: int) -> None:
        super().__init__(
            nn.ModuleList(nn.Identity() for _ in range(depth)), nn.Identity(), head_dim=4, rope_theta=1e4, causal=False
        )

    def run(
        self, hidden: Tensor, tokens: TokenSelection, pruner: Any = None, cache: KVCache | None = None, **how: Any
    ) -> Decoded:
        held = []
        for layer in range(len(self.layers)):
            held.append(hidden.shape[1])
            heads = torch.ones(hidden.shape[0], 1, hidden.shape[1], 4)
            if pruner.acts_after(layer):
                hidden, tokens = pruner.after_layer(layer, hidden, tokens, heads, LayerKV(heads, heads, tokens.ids))
        self.passed = Decoded(hidden, hidden, tokens, tuple(held))
        return replace(self.passed, hidden=rows_at(hidden, tokens.to_current(how["read"])))


def passed(layout: TokenLayout, config: PipelineConfig, batch: int, depth: int = 4) -> tuple[Query, Decoded]:
    """A query through a passing decoder; every token's hidden state is its original id."""
    info = tiny_config(depth=depth).info("tiny", untrained=True)
    bound = bind(config, info, REGISTRY)
    slots = [Slot(index, INSTRUCTION, FrameBuffer(0)) for index in range(batch)]
    clock = Clock(torch.device("cpu"))
    clock.enter(Phase.PREPROCESS)
    tables = LayoutTables(layout, torch.device("cpu"))
    given = QueryInputs(
        SimpleNamespace(images={}), slots, {}, QueryRng(slots, config.seed, torch.device("cpu")), tables
    )
    query = Query(bound, bound.plan(layout), given, clock)
    embeddings = torch.arange(layout.n_tokens, dtype=torch.float64)[None, :, None].expand(batch, -1, 2).clone()
    decoder = Passing(depth)
    query.read = query.decode(decoder, embeddings)
    return query, decoder.passed


@prop(drawing.layouts(), pipelines(depth=4), drawing.batches)
def i1(layout: TokenLayout, config: PipelineConfig, batch: int) -> None:
    _, decoded = passed(layout, config, batch)
    ids = decoded.tokens.ids
    assert (ids[:, 1:] > ids[:, :-1]).all()
    assert ((ids >= 0) & (ids < layout.n_tokens)).all()


def test_I1_kept_ids_ascend_in_range() -> None:
    i1()


def test_I1_notices_unsorted_tokens() -> None:
    def unsorted(tokens: TokenSelection, prunable: OriginalIds, fixed: Tensor, chosen: Tensor) -> Any:
        kept = prunable.gather(1, chosen)
        return TokenSelection(torch.cat([fixed.expand(len(kept), -1), kept], 1), tokens.n_source), kept

    i1.notices(cutting, "apply", unsorted)


@prop(drawing.layouts(), st.integers(0, 3), st.integers(1, 20), drawing.batches)
def i2(layout: TokenLayout, after: int, keep: int, batch: int) -> None:
    config = pipeline(stages.TestConfig(use="test.protector", after=(min(after, 2),), keep=keep))
    query, decoded = passed(layout, config, batch)
    protected = {i for i in layout.prunable if i % 3 == 0}
    for row in decoded.tokens.ids.tolist():
        assert set(layout.fixed) <= set(row)
        if len(protected) <= keep:
            assert protected <= set(row)
    query.outcome(query.read).finish()
    assert query.trace.overfull.get(min(after, 2), 0) == max(0, len(protected) - min(keep, len(layout.prunable))) or (
        keep >= len(layout.prunable)
    )


def test_I2_fixed_and_protected_tokens_stay() -> None:
    i2()


def test_I2_notices_a_resolver_deaf_to_protection() -> None:
    real = proposal.resolve

    def deaf(proposals: list[Proposal], *rest: Any) -> Tensor:
        return real([Proposal(torch.zeros(p.protect.shape), None, p.drop) for p in proposals], *rest)

    i2.notices(resolution, "resolve", deaf)


@prop(drawing.layouts(), pipelines(depth=4), drawing.batches)
def i3(layout: TokenLayout, config: PipelineConfig, batch: int) -> None:
    query, decoded = passed(layout, config, batch)
    held = [set(layout.prunable)] * batch
    for after in sorted(query.trace.kept):
        now = [set(row) for row in query.trace.kept[after].tolist()]
        assert all(new <= old for new, old in zip(now, held, strict=True))
        held = now
    # The hidden states moved with their ids.
    assert torch.equal(decoded.hidden[..., 0].long(), decoded.tokens.ids)


def test_I3_no_token_returns() -> None:
    i3()


def test_I3_notices_current_indices_taken_for_original_ones() -> None:
    def confused(tokens: TokenSelection, prunable: OriginalIds, fixed: Tensor, chosen: Tensor) -> Any:
        # The published fault: positions among the survivors used as original patch ids.
        kept = (chosen + prunable[:, :1]).contiguous()
        ids = torch.cat([fixed.expand(len(kept), -1), kept], 1).sort(1).values
        return TokenSelection(OriginalIds(ids), tokens.n_source), OriginalIds(kept)

    i3.notices(cutting, "apply", confused)


@prop(drawing.layouts(), pipelines(depth=4), drawing.batches)
def i4(layout: TokenLayout, config: PipelineConfig, batch: int) -> None:
    query, _ = passed(layout, config, batch)
    assert query.trace.held == query.trace.plan.tokens
    for cut in query.trace.plan.cuts:
        assert query.trace.kept[cut.after].shape == (batch, cut.keep)


def test_I4_counts_equal_the_plan() -> None:
    i4()


def test_I4_notices_one_token_too_few() -> None:
    real = proposal.resolve
    i4.notices(resolution, "resolve", lambda *args: real(*args)[:, 1:])


def draw_selection(n: int, keep: int, batch: int, seed: int) -> TokenSelection:
    order = drawing.random(seed, batch, n).argsort(1)[:, :keep].sort(1).values
    return TokenSelection(OriginalIds(order), n)


sizes = st.tuples(st.integers(1, 30), st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))


@prop(sizes, drawing.batches, drawing.seeds)
def i5(size: tuple[int, float, float, float], batch: int, seed: int) -> None:
    kept = draw_selection(size[0], round(size[0] * size[1]), batch, seed)
    current = CurrentIds(torch.arange(kept.n_kept).expand(batch, -1))
    assert torch.equal(kept.to_current(kept.to_original(current)), current)
    assert torch.equal(kept.to_original(kept.to_current(kept.ids)), kept.ids)
    assert torch.equal(kept.seen().sum(1), torch.full((batch,), kept.n_kept))


def test_I5_index_maps_are_inverse() -> None:
    i5()


def test_I5_notices_a_map_that_is_off_by_one() -> None:
    fault = lambda self, original: CurrentIds(torch.searchsorted(self.ids, original, right=True))  # noqa: E731
    i5.notices(TokenSelection, "to_current", fault)


@prop(sizes, drawing.batches, drawing.seeds)
def i6(size: tuple[int, float, float, float], batch: int, seed: int) -> None:
    counts = [size[0]]
    for share in size[1:]:
        counts.append(round(counts[-1] * share))
    first, second, third = (draw_selection(a, b, batch, seed + a) for a, b in itertools.pairwise(counts))
    left, right = first.compose(second).compose(third), first.compose(second.compose(third))
    assert torch.equal(left.ids, right.ids)
    assert left.n_source == right.n_source == size[0]
    assert torch.equal(TokenSelection.identity(size[0], batch).compose(first).ids, first.ids)
    assert torch.equal(first.compose(TokenSelection.identity(first.n_kept, batch)).ids, first.ids)


def test_I6_composition_is_associative_with_identity() -> None:
    i6()


def test_I6_notices_indices_that_were_not_translated() -> None:
    i6.notices(TokenSelection, "compose", lambda self, inner: TokenSelection(inner.ids, self.n_source))


@prop(st.integers(1, 12), drawing.batches, drawing.seeds)
def i7(n: int, batch: int, seed: int) -> None:
    # Few distinct scores, so that ties are common.
    wish = Proposal(score=drawing.random(seed, batch, n).round(), drop=drawing.random(seed + 1, batch, n) > 0)
    kept = [proposal.resolve([wish], keep).tolist() for keep in range(n + 1)]
    for small, large in itertools.pairwise(kept):
        assert all(set(a) <= set(b) for a, b in zip(small, large, strict=True))


def test_I7_a_larger_keep_is_a_superset() -> None:
    i7()


def test_I7_notices_ties_broken_by_the_budget() -> None:
    real = proposal.resolve

    def fickle(proposals: list[Proposal], keep: int) -> Tensor:
        if keep % 2:
            return real(proposals, keep)
        n = proposals[0].score.shape[1]
        flipped = [Proposal(p.score.flip(1), None, p.drop.flip(1)) for p in proposals]
        return (n - 1 - real(flipped, keep)).sort(1).values

    i7.notices(proposal, "resolve", fickle)


@prop(st.integers(1, 40), st.floats(0, 1), drawing.batches, drawing.seeds)
def i8(n: int, share: float, batch: int, seed: int) -> None:
    score, drop, protect = (
        drawing.random(seed, batch, n),
        drawing.random(seed + 1, batch, n) > 0.5,
        drawing.random(seed + 2, batch, n) > 1,
    )
    order = drawing.random(seed + 3, n).argsort()
    keep = round(n * share)
    plain = proposal.resolve([Proposal(score, protect, drop)], keep)
    moved = proposal.resolve([Proposal(score[:, order], protect[:, order], drop[:, order])], keep)
    assert torch.equal(order[moved].sort(1).values, plain)


def test_I8_permuting_tokens_permutes_the_result() -> None:
    i8()


def test_I8_notices_a_preference_for_early_tokens() -> None:
    real = proposal.resolve

    def biased(proposals: list[Proposal], keep: int) -> Tensor:
        early = torch.arange(proposals[0].score.shape[1]) * -0.2
        return real([Proposal(p.score + early, p.protect, p.drop) for p in proposals], keep)

    i8.notices(proposal, "resolve", biased)


@prop(st.integers(1, 30), st.floats(0, 1), drawing.seeds)
def i9(n: int, share: float, seed: int) -> None:
    scores = [drawing.random(seed + i, 3, n).round(decimals=1) for i in range(2)]
    protect = drawing.random(seed + 2, 3, n) > 1
    keep = round(n * share)
    together = proposal.resolve([Proposal(scores[0], protect), Proposal(scores[1])], keep)
    for row in range(3):
        one = slice(row, row + 1)
        alone = proposal.resolve([Proposal(scores[0][one], protect[one]), Proposal(scores[1][one])], keep)
        assert torch.equal(together[one], alone)


def test_I9_batch_rows_are_independent() -> None:
    i9()


def test_I9_notices_ranks_taken_over_the_batch() -> None:
    fault = lambda score: torch.searchsorted(score.flatten().sort().values, score)  # noqa: E731
    i9.notices(proposal, "rank_below", fault)


@prop(drawing.layouts(), pipelines(depth=4), drawing.batches)
def i18(layout: TokenLayout, config: PipelineConfig, batch: int) -> None:
    query, _ = passed(layout, config, batch)
    assert torch.equal(query.read[..., 0].long(), torch.tensor(list(layout.span("readout"))).expand(batch, -1))


def test_I18_read_out_positions_are_the_adapters() -> None:
    i18()


def test_I18_notices_positions_of_the_unpruned_sequence() -> None:
    def shifted(self: Any, batch: int) -> Any:
        # What a layout shortened by its first cut would say, taken for positions of the whole sequence.
        missing = self._plan.layout.n_tokens - self._plan.tokens[-1]
        return OriginalIds((self._inputs.tables.rows["readout"] - missing).clamp(min=0).expand(batch, -1))

    i18.notices(Query, "_readout", shifted)
