"""Carries out cuts: calls stages between layers and removes the tokens that they do not keep."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from tokenprune.engine.action_attention import AttentionLog
from tokenprune.engine.combine import Proposals, checked, choose, merged
from tokenprune.engine.inputs import QueryInputs
from tokenprune.engine.timing import Clock
from tokenprune.engine.trace import ProbeRecord, QueryTrace, attention_kernel
from tokenprune.errors import StageError
from tokenprune.model.decoder import Decoder
from tokenprune.model.kv_cache import LayerKV, ReusedKV
from tokenprune.model.phase import Phase
from tokenprune.pipelines.binding import BoundPipeline, HookCall
from tokenprune.stages.memory import StageMemory
from tokenprune.stages.token_context import LayerContext, QueryView, SelectContext, StageView
from tokenprune.tokens.budget import union_count
from tokenprune.tokens.plan import Cut, Plan, Removal
from tokenprune.tokens.proposal import Proposal
from tokenprune.tokens.selection import OriginalIds, TokenSelection, apply, others, rows_at


class StagePruner:
    """The `Pruner` of one query: calls the stages and carries out their combined decision.

    Attributes:
        plan: The plan; counts of unions become known during the query.
        held: Tokens after each cut.
        attention: Attention of the action tokens.
        reused: Keys and values of this query and the last, if the pipeline reuses them.
        nan: Stage and place of each score, and whether it has a NaN.
        overfull: Per cut, the most protected tokens of any row minus the tokens it keeps.
    """

    def __init__(
        self, pipeline: BoundPipeline, plan: Plan, inputs: QueryInputs, trace: QueryTrace, clock: Clock
    ) -> None:
        """Prepare for one query."""
        self.plan = plan
        self.held: dict[int, TokenSelection] = {}
        self.attention = AttentionLog(pipeline.action_attention)
        self.reused: ReusedKV | None = None
        self.nan: list[tuple[str, Tensor]] = []
        self.overfull: dict[int, Tensor] = {}
        self._pipeline = pipeline
        self._inputs = inputs
        self._trace = trace
        self._clock = clock
        self._query: QueryView | None = None
        self._stages: dict[int, StageView] = {}
        self._prunable = OriginalIds(inputs.tables.prunable.expand(len(inputs.slots), -1))

    def begin(
        self, decoder: Decoder, embeddings: Tensor, encoder: Mapping[str, Mapping[str, Tensor]]
    ) -> tuple[Tensor, TokenSelection]:
        """Call the selectors and cut before layer 0; return the kept rows `[B, K, D]` of `embeddings` `[B, N, D]`."""
        inputs = self._inputs
        tokens = TokenSelection.identity(self.plan.layout.n_tokens, len(embeddings), embeddings.device)
        self._query = QueryView(
            decoder,
            self._pipeline.config.positions,
            inputs.model.images,
            inputs.rng.seeds,
            inputs.tables,
            inputs.slots,
            encoder,
        )
        proposals: Proposals = []
        for call in self._pipeline.hooks["select_tokens"]:
            proposals += self._propose(call, self._context(call.stage, -1, tokens, embeddings), "before layer 0")
        cut = self.plan.cut_after.get(-1)
        if cut is None:
            return embeddings, tokens
        return self._apply(cut, proposals, self._context(cut.stages[0], -1, tokens, embeddings))

    def acts_after(self, layer: int) -> bool:
        """Whether a stage is called or tokens leave after this layer; after layer 0 the kernel is recorded."""
        return layer == 0 or self._acts(layer)

    def after_layer(
        self, layer: int, hidden: Tensor, tokens: TokenSelection, q: Tensor, kv: LayerKV
    ) -> tuple[Tensor, TokenSelection]:
        """Call the scorers of this layer, and cut if the plan has a cut here."""
        query = self._query
        assert query is not None, "`begin` comes first"
        if layer == 0:
            self._trace.kernel = attention_kernel(q, kv.k, kv.k, query.decoder.causal)
            if not self._acts(layer):
                return hidden, tokens
        with self._clock.phase(Phase.SELECTION):
            computed: dict[str, Tensor] = {}

            def context(stage: StageView) -> LayerContext:
                shared = (self.plan, layer, tokens, self._prunable, hidden, query, stage)
                return LayerContext(*shared, q, kv.k, kv.ids, computed)

            proposals: Proposals = []
            for call in self._pipeline.scorers.get(layer, ()):
                proposals += self._propose(call, context(self._stage_view(call.stage)), f"after layer {layer}")
            if self._logs_attention(layer):
                observer = StageView(stage_memory(self._inputs, ""), None, {}, self._note_probe("observe"))
                self.attention.add(layer, 0, context(observer).attention_rows("action"), self._prunable)
            cut = self.plan.cut_after.get(layer)
            if cut is None:
                return hidden, tokens
            return self._apply(cut, proposals, self._context(cut.stages[0], layer, tokens, hidden))

    def _acts(self, layer: int) -> bool:
        return self._logs_attention(layer) or layer in self._pipeline.scorers or layer in self.plan.cut_after

    def _logs_attention(self, layer: int) -> bool:
        """Whether attention of action tokens in the prefill is logged here."""
        return layer in self.attention.layers and "action" in self._inputs.tables.rows

    def _apply(self, cut: Cut, proposals: Proposals, context: SelectContext) -> tuple[Tensor, TokenSelection]:
        where = "before layer 0" if cut.after < 0 else f"after layer {cut.after}"
        # A stage without a cut here only reads.
        proposals = [(index, proposal) for index, proposal in proposals if index in cut.stages]
        if cut.removal is Removal.REUSE:
            # Tokens without keys and values of a last query cannot leave.
            fresh = ~context.reusable()[:, None].expand_as(context.prunable)
            proposals.append((cut.stages[0], Proposal(protect=fresh)))
        if cut.union:
            cut = self._resolve_union(cut, proposals)
        if cut.keep == cut.found:
            self._trace.kept[cut.after] = context.prunable
            return context.hidden, context.tokens
        chosen = choose(cut, proposals, context, self._pipeline, where)
        self._note_cut(cut, proposals, chosen, where)
        tokens, prunable = apply(context.tokens, context.prunable, self._inputs.tables.fixed, chosen)
        if self.reused is not None:
            self.reused.leave(OriginalIds(context.prunable.gather(1, others(chosen, cut.found))))
        hidden = rows_at(context.hidden, context.tokens.to_current(tokens.ids))
        merging = merged(proposals, context, chosen, self._pipeline, where)
        if merging is not None:
            hidden = hidden.scatter(1, tokens.to_current(prunable)[..., None].expand_as(merging), merging)
        self.held[cut.after] = tokens
        self._trace.kept[cut.after] = self._prunable = prunable
        return hidden, tokens

    def _note_cut(self, cut: Cut, proposals: Proposals, chosen: Tensor, where: str) -> None:
        """Record a cut on the device, to be read into the trace after the query."""
        for index, proposal in proposals:
            if proposal.score is not None:
                self.nan.append((f"stage '{self._pipeline.names[index]}' {where}", proposal.score.isnan().any()))
        protected = [p.protect for _, p in proposals if p.protect is not None]
        if protected:
            self.overfull[cut.after] = torch.stack(protected).any(0).sum(1).max() - cut.keep
        reasons = self._trace.reasons.setdefault(cut.after, {})
        for name, member in ((n, m) for _, p in proposals for n, m in (p.reasons or {}).items()):
            kept = member.gather(1, chosen)
            reasons[name] = kept | reasons[name] if name in reasons else kept

    def _resolve_union(self, cut: Cut, proposals: Proposals) -> Cut:
        votes = [p.protect for _, p in proposals if p.protect is not None]
        if not votes:
            raise StageError(
                f"'keep: union' after layer {cut.after} keeps what is protected, but no stage protected anything"
            )
        count = union_count(torch.stack(votes).any(0))
        self.plan = self._pipeline.plan(self.plan.layout, self.plan.mode, (*self.plan.unions, count))
        return self.plan.cut_after[cut.after]

    def _propose(self, call: HookCall, context: SelectContext, where: str) -> Proposals:
        """Call one stage; return its proposal with its index, or nothing if it abstains."""
        answer = self._pipeline.call(call, context, where)
        checked(answer, context.prunable, f"stage '{self._pipeline.names[call.stage]}': {call.hook} {where} returned")
        return [] if answer is None else [(call.stage, answer)]

    def _context(self, stage: int, layer: int, tokens: TokenSelection, hidden: Tensor) -> SelectContext:
        assert self._query is not None, "`begin` comes first"
        return SelectContext(self.plan, layer, tokens, self._prunable, hidden, self._query, self._stage_view(stage))

    def _stage_view(self, index: int) -> StageView:
        if index not in self._stages:
            memory = stage_memory(self._inputs, f"{index}.")
            past = self._inputs.past.get(index)
            self._stages[index] = StageView(memory, past, {}, self._note_probe(self._pipeline.names[index]))
        return self._stages[index]

    def _note_probe(self, stage: str) -> Callable[[int, str, int, bool], None]:
        # Closing over `self` would make a reference cycle that keeps all tensors of a query until Python's garbage
        # collector runs, which can take hundreds of queries.
        probes = self._trace.probes

        def note(layer: int, rows: str, count: int, ahead: bool) -> None:
            probes.append(ProbeRecord(stage, layer, rows, count, ahead))

        return note


class RepeatedCuts:
    """A `Pruner` for another pass over the same tokens: repeats the cuts of the first pass, without calling stages."""

    def __init__(self, held: Mapping[int, TokenSelection]) -> None:
        """`held` maps the layer each cut follows to the tokens after it."""
        self._held = held

    def begin(self, embeddings: Tensor) -> tuple[Tensor, TokenSelection]:
        """Return the rows `[B, n, D]` of `embeddings` `[B, N, D]` that enter layer 0, and which tokens they are."""
        everything = TokenSelection.identity(embeddings.shape[1], len(embeddings), embeddings.device)
        return self._cut(-1, embeddings, everything)

    def acts_after(self, layer: int) -> bool:
        """Whether a cut follows the layer."""
        return layer in self._held

    def after_layer(
        self, layer: int, hidden: Tensor, tokens: TokenSelection, q: Tensor, kv: LayerKV
    ) -> tuple[Tensor, TokenSelection]:
        """Repeat the cut after this layer, if there is one."""
        return self._cut(layer, hidden, tokens)

    def _cut(self, after: int, hidden: Tensor, tokens: TokenSelection) -> tuple[Tensor, TokenSelection]:
        if after not in self._held:
            return hidden, tokens
        kept = self._held[after]
        return rows_at(hidden, tokens.to_current(kept.ids)), kept


def stage_memory(inputs: QueryInputs, prefix: str) -> StageMemory:
    """The memory of one stage in a query, under its own prefix."""
    prunable = inputs.tables.prunable
    return StageMemory(inputs.slots, prefix, len(prunable), prunable.device)
