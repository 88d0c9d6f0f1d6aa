"""Where tokens leave: stages are asked between layers, and only here tokens move."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tokenprune.engine.action_attention import Watch
from tokenprune.engine.combine import checked, choose, merged
from tokenprune.engine.inputs import Given
from tokenprune.engine.timing import Clock
from tokenprune.engine.trace import ProbeRecord, QueryTrace, attention_kernel
from tokenprune.errors import StageError
from tokenprune.model.decoder import Decoder
from tokenprune.model.kv_cache import LayerKV, ReusedKV
from tokenprune.pipelines.binding import BoundPipeline
from tokenprune.stages.token_context import SelectContext, at_layer, moved
from tokenprune.tokens.budget import union_count
from tokenprune.tokens.plan import Cut, Plan
from tokenprune.tokens.proposal import Proposal
from tokenprune.tokens.selection import OriginalIds, TokenSelection, apply, others, rows_at


class Cutting:
    """The decoder loop's `Pruner` of one query.

    Attributes:
        plan: Every cut; the counts of unions become known on the way.
        held: What each cut left.
        watch: Attention of the action tokens.
        reused: Keys and values of this query and the last, where the pipeline reuses them; None where it does not.
        nan: Stage and place of each score, and whether anything in it is NaN.
        overfull: Per cut, protected tokens beyond what it keeps, the most of any row; negative where there was room.
    """

    def __init__(self, pipeline: BoundPipeline, plan: Plan, given: Given, trace: QueryTrace, clock: Clock) -> None:
        """Nobody has been asked yet."""
        self.plan = plan
        self.held: dict[int, TokenSelection] = {}
        self.watch = Watch(frozenset(layer for stage in pipeline.stages for layer in stage.watches(plan.depth)))
        self.reused: ReusedKV | None = None
        self.nan: list[tuple[str, Tensor]] = []
        self.overfull: dict[int, Tensor] = {}
        self._pipeline = pipeline
        self._given = given
        self._trace = trace
        self._clock = clock
        self._scorers = _by_layer(pipeline, plan)
        self._context: SelectContext | None = None
        self._notes: dict[int, dict[str, Tensor]] = {}

    def begin(
        self, decoder: Decoder, embeddings: Tensor, encoder: Mapping[str, Mapping[str, Tensor]]
    ) -> tuple[Tensor, TokenSelection]:
        """Ask before layer 0, and cut if the plan says so; returns what enters it of all tokens `[B, N, D]`."""
        layout = self.plan.layout
        batch = embeddings.shape[0]
        tokens = TokenSelection.identity(layout.n_tokens, batch, embeddings.device)
        tables = self._given.tables
        prunable = OriginalIds(tables.prunable.expand(batch, -1))
        self._context = SelectContext(
            plan=self.plan,
            decoder=decoder,
            positions=self._pipeline.config.positions,
            layer=-1,
            tokens=tokens,
            prunable=prunable,
            hidden=embeddings,
            images=self._given.inputs.images,
            seeds=self._given.chance.seeds,
            tables=tables,
            slots=self._given.slots,
            scope="",
            past=None,
            encoder=encoder,
            notes={},
            probed=self._probed("", -1),
        )
        proposals: list[tuple[int, Proposal]] = []
        for index, hook in self._pipeline.hooks["select_tokens"]:
            if index in self.plan.looks:
                proposals += self._ask("select_tokens", "before layer 0", index, hook, self._context)
        cut = self.plan.cut_after.get(-1)
        if cut is None:
            return embeddings, tokens
        return self._apply(cut, [(i, p) for i, p in proposals if i in cut.stages], self._context)

    def acts_after(self, layer: int) -> bool:
        """Whether a stage is asked or tokens leave after this layer."""
        if layer == 0:
            return True
        return self._asked(layer)

    def _asked(self, layer: int) -> bool:
        return self._watches(layer) or layer in self._scorers or layer in self.plan.cut_after

    def _watches(self, layer: int) -> bool:
        """Whether the action tokens' attention is to be recorded here; those behind the layout are watched later."""
        return layer in self.watch.layers and "action" in self._given.tables.rows

    def after_layer(
        self, layer: int, hidden: Tensor, tokens: TokenSelection, q: Tensor, seen: LayerKV
    ) -> tuple[Tensor, TokenSelection]:
        """Ask the stages that declared this layer, and cut if the plan says so."""
        if layer == 0:
            self._trace.kernel = attention_kernel(q, seen.k, seen.k, bool(self._context and self._context.causal))
            if not self._asked(layer):
                return hidden, tokens
        with self._clock.phase("selection"):
            assert self._context is not None
            context = at_layer(moved(self._context, layer, tokens, self._context.prunable, hidden), q, seen, {})
            proposals = []
            for index, hook in self._scorers.get(layer, ()):
                proposals += self._ask("score_layer", f"after layer {layer}", index, hook, context)
            if self._watches(layer):
                own = replace(context, probed=self._probed("observe", layer))
                self.watch.note(layer, 0, own.attention_rows("action"), context.prunable)
            cut = self.plan.cut_after.get(layer)
            if cut is None:
                return hidden, tokens
            return self._apply(cut, [(i, p) for i, p in proposals if i in cut.stages], context)

    def _apply(
        self, cut: Cut, proposals: list[tuple[int, Proposal]], context: SelectContext
    ) -> tuple[Tensor, TokenSelection]:
        where = "before layer 0" if cut.after < 0 else f"after layer {cut.after}"
        if cut.reuse:
            # What has no keys and values of a last query cannot leave.
            fresh = ~context.reusable()[:, None].expand_as(context.prunable)
            proposals = [*proposals, (cut.stages[0], Proposal(protect=fresh))]
        if cut.union:
            cut = self._resolve_union(cut, proposals)
        if cut.keep == cut.found:
            self._trace.kept[cut.after] = context.prunable
            return context.hidden, context.tokens
        chosen = choose(cut, proposals, context, self._pipeline, where)
        for index, proposal in proposals:
            if proposal.score is not None:
                self.nan.append((f"stage '{self._pipeline.names[index]}' {where}", proposal.score.isnan().any()))
        protected = [p.protect for _, p in proposals if p.protect is not None]
        if protected:
            self.overfull[cut.after] = torch.stack(protected).any(0).sum(1).max() - cut.keep
        tokens, prunable = apply(context.tokens, context.prunable, self._given.tables.fixed, chosen)
        if self.reused is not None:
            self.reused.leave(OriginalIds(context.prunable.gather(1, others(chosen, cut.found))))
        at = context.tokens.to_current(tokens.ids)
        hidden = rows_at(context.hidden, at)
        merging = merged(proposals, context, chosen, self._pipeline, where)
        if merging is not None:
            places = tokens.to_current(prunable)[..., None].expand_as(merging)
            hidden = hidden.scatter(1, places, merging)
        self.held[cut.after] = tokens
        self._trace.kept[cut.after] = prunable
        self._note_reasons(cut.after, [p for _, p in proposals], chosen)
        assert self._context is not None
        self._context = moved(self._context, cut.after, tokens, prunable, hidden)
        return hidden, tokens

    def _note_reasons(self, after: int, proposals: list[Proposal], chosen: Tensor) -> None:
        noted = self._trace.reasons.setdefault(after, {})
        for name, member in ((n, m) for p in proposals for n, m in (p.reasons or {}).items()):
            kept = member.gather(1, chosen)
            noted[name] = kept | noted[name] if name in noted else kept

    def _resolve_union(self, cut: Cut, proposals: list[tuple[int, Proposal]]) -> Cut:
        votes = [p.protect for _, p in proposals if p.protect is not None]
        if not votes:
            raise StageError(
                f"'keep: union' after layer {cut.after} keeps what is protected, but no stage protected anything"
            )
        count = union_count(torch.stack(votes).any(0))
        self.plan = self._pipeline.plan(self.plan.layout, self.plan.mode, (*self.plan.unions, count))
        return self.plan.cut_after[cut.after]

    def _ask(
        self, hook_name: str, where: str, index: int, hook: Callable[..., Any], context: SelectContext
    ) -> list[tuple[int, Proposal]]:
        """What one stage proposes, with its index; nothing if it abstains."""
        name = self._pipeline.names[index]
        own = replace(
            context,
            plan=self.plan,
            scope=f"{index}.",
            past=self._given.past.get(index),
            notes=self._notes.setdefault(index, {}),
            probed=self._probed(name, context.layer),
        )
        answer = self._pipeline.call(index, hook_name, hook, own, where)
        checked(answer, context.prunable, f"stage '{name}': {hook_name} {where} returned")
        return [] if answer is None else [(index, answer)]

    def _probed(self, stage: str, layer: int) -> Callable[[str, int, bool], None]:
        # A reference to this object would make a cycle with its context, and keep every tensor of a query until Python
        # looks for cycles, which can take hundreds of queries.
        probes = self._trace.probes

        def note(rows: str, count: int, ahead: bool) -> None:
            probes.append(ProbeRecord(stage, layer + ahead, rows, count, ahead))

        return note


def _by_layer(pipeline: BoundPipeline, plan: Plan) -> dict[int, list[tuple[int, Callable[..., Any]]]]:
    asked: dict[int, list[tuple[int, Callable[..., Any]]]] = {}
    for index, hook in pipeline.hooks["score_layer"]:
        for layer, stages in enumerate(plan.calls):
            if index in stages:
                asked.setdefault(layer, []).append((index, hook))
    return asked


class SameCuts:
    """A `Pruner` that keeps what was kept before and asks nobody."""

    def __init__(self, held: Mapping[int, TokenSelection]) -> None:
        """`held` is what each cut left, by the layer it follows."""
        self._held = held

    def begin(self, embeddings: Tensor) -> tuple[Tensor, TokenSelection]:
        """Embeddings `[B, n, D]` that enter layer 0, of all `[B, N, D]`, and which tokens they are."""
        everything = TokenSelection.identity(embeddings.shape[1], len(embeddings), embeddings.device)
        return self._cut(-1, embeddings, everything)

    def acts_after(self, layer: int) -> bool:
        """Whether a cut follows the layer."""
        return layer in self._held

    def after_layer(
        self, layer: int, hidden: Tensor, tokens: TokenSelection, q: Tensor, seen: LayerKV
    ) -> tuple[Tensor, TokenSelection]:
        """Cut as before."""
        return self._cut(layer, hidden, tokens)

    def _cut(self, after: int, hidden: Tensor, tokens: TokenSelection) -> tuple[Tensor, TokenSelection]:
        if after not in self._held:
            return hidden, tokens
        kept = self._held[after]
        return rows_at(hidden, tokens.to_current(kept.ids)), kept
