"""One query on its way through a bound pipeline: stages are asked here, and only here tokens move."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tokenprune.budget import union_count
from tokenprune.context import LayoutTables, PastFrames, SelectContext, at_layer, moved
from tokenprune.decoder import Decoder, Positions
from tokenprune.errors import StageError, TraceError
from tokenprune.features import FeatureContext
from tokenprune.history import Slot
from tokenprune.kv import KVCache, LastKV, LayerKV, Memory, ReusedKV
from tokenprune.pipeline import BoundPipeline
from tokenprune.plan import Cut, Plan
from tokenprune.record import ActionAttention
from tokenprune.repeat import SameCuts
from tokenprune.resolution import checked, choose, merged, mix
from tokenprune.selection import OriginalIds, Proposal, TokenSelection, apply, others, rows_at
from tokenprune.trace import Clock, ProbeRecord, QueryTrace, attention_kernel
from tokenprune.watch import Watch, Watcher


class Query:
    """What an adapter calls back while it runs its model; the decoder loop's `Pruner`.

    Attributes:
        positions: The pipeline's position policy.
        trace: Filled as the query goes.
        tokens: What the last layer held, once the decoder has run.
    """

    tokens: TokenSelection

    def __init__(
        self,
        pipeline: BoundPipeline,
        plan: Plan,
        tables: LayoutTables,
        slots: Sequence[Slot],
        images: Mapping[str, Tensor],
        past: Mapping[int, PastFrames],
        clock: Clock,
    ) -> None:
        """Start a query; nothing runs yet. `past` holds what each stage looks back at, by its index."""
        self.positions: Positions = pipeline.config.positions
        self.trace = QueryTrace(pipeline.config.name, plan)
        self._pipeline = pipeline
        self._plan = plan
        self._tables = tables
        self._slots = slots
        self._images = images
        self._past = past
        self._clock = clock
        self._scorers = _by_layer(pipeline, plan)
        self._watch = Watch(frozenset(layer for stage in pipeline.stages for layer in stage.watches(plan.depth)))
        self._held: dict[int, TokenSelection] = {}
        self._context: SelectContext | None = None
        self._checks: list[tuple[str, Tensor]] = []
        self._protected: dict[int, Tensor] = {}
        self._reused: ReusedKV | None = None
        self._features: dict[str, Tensor] = {}
        self._added: Tensor | None = None
        self._encoder: dict[str, dict[str, Tensor]] = {}
        self._notes: dict[int, dict[str, Tensor]] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a phase; time inside it that belongs to another phase counts there."""
        before = self._clock.enter(name)
        try:
            yield
        finally:
            self._clock.enter(before)

    def transform(self, view: str, features: Tensor) -> Tensor:
        """Pass the features `[B, N, D]` of one view through `transform_features`."""
        for index, hook in self._pipeline.hooks["transform_features"]:
            with self.phase("selection"):
                shown = (view, features, self._images[view], self._plan.layout, self._tables, self._slots)
                context = FeatureContext(*shown, scope=f"{index}.")
                changed = self._pipeline.call(index, "transform_features", hook, context)
            if changed is None:
                continue
            if changed.shape != features.shape:
                raise StageError(
                    f"stage '{self._pipeline.names[index]}': transform_features of view '{view}' returned "
                    f"{list(changed.shape)}; it must keep {list(features.shape)}"
                )
            features = changed
        if self._pipeline.hooks["transform_features"]:
            self._features[view] = features
        return features

    @property
    def encoder_kinds(self) -> frozenset[str]:
        """Attention of the vision towers that stages ask for."""
        return self._pipeline.encoder

    def note_encoder(self, views: Sequence[str], seen: Mapping[str, Tensor]) -> None:
        """Take the attention `[views * B, N]` that patches got in the towers, by kind, views one behind the other."""
        self.trace.encoder = tuple(sorted(seen))
        for kind, values in seen.items():
            self._encoder[kind] = dict(zip(views, values.chunk(len(views)), strict=True))

    def noise(self, *shape: int) -> Tensor:  # cold: drawn on the host and uploaded, like the observation
        """Standard normal numbers `[B, *shape]`, float32: the same for every pipeline, other ones for every query."""
        seeds = (mix(0, slot.number, slot.queries, slot.index) for slot in self._slots)
        drawn = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return torch.stack(drawn).to(self._tables.fixed.device)

    def decode(self, decoder: Decoder, embeddings: Tensor, cache: KVCache | None = None) -> Tensor:
        """Cut before layer 0, run the decoder with its cuts, and check what was held against the plan.

        Args:
            decoder: The backbone's decoder.
            embeddings: All tokens of the layout `[B, N, D]`.
            cache: Filled with the keys and values of each layer, for adapters that go on with `follow`.

        Returns:
            Hidden states `[B, R, D]` at the layout's `readout` rows, wherever cuts have moved them.

        Raises:
            TraceError: If any layer held another number of tokens than planned.
        """
        with self.phase("selection"):
            hidden, tokens = self._begin(decoder, embeddings)
        with self.phase("decoder"):
            read = self._readout(len(embeddings))
            memory: Memory | None = cache
            if self._plan.reuses:
                (slot,) = self._slots
                memory = self._reused = ReusedKV(slot.kv, cache)
            decoded = decoder.run(
                hidden, tokens, self, memory, positions=self.positions, read=read, skip=self._plan.skipped
            )
        self.tokens = decoded.tokens
        self.trace.held, self.trace.plan = decoded.held, self._plan
        self.trace.check()
        return decoded.hidden

    def repeat(self, decoder: Decoder, embeddings: Tensor) -> Tensor:
        """Run the layout's tokens again with other embeddings `[B, N, D]` through the same cuts; no stage is asked.

        Returns:
            Hidden states `[B, R, D]` at the layout's `readout` rows.
        """
        with self.phase("decoder"):
            again = SameCuts(self._held)
            hidden, tokens = again.begin(embeddings)
            read = self._readout(len(embeddings))
            skip = self._plan.skipped
            return decoder.run(hidden, tokens, again, positions=self.positions, read=read, skip=skip).hidden

    def follow(
        self,
        decoder: Decoder,
        embeddings: Tensor,
        behind: int,
        memory: Memory,
        condition: Tensor | None = None,
        *,
        actions: bool = True,
    ) -> Tensor:
        """Run tokens that come after the layout's and attend to what its cuts left in each layer.

        Args:
            decoder: The layers they run through, as many as those that filled the memory.
            embeddings: The tokens `[B, n, D]`.
            behind: Place of the first of them behind the end of the layout, unpruned; positions go on from there.
            memory: Keys and values of everything before them.
            condition: What adaptive norms depend on `[B, C]`.
            actions: Whether they are action tokens, whose attention stages may watch.

        Returns:
            Normalised hidden states `[B, n, D]`.

        Raises:
            TraceError: If the memory does not hold what the plan left.
        """
        if actions:
            spare = (self.trace.ran + self.trace.spared) % self._plan.head_interval > 0
            self.trace.ran, self.trace.spared = self.trace.ran + (not spare), self.trace.spared + spare
            if spare:
                assert self._added is not None
                return decoder.finish(embeddings + self._added, condition)
        if not self.trace.cached:
            self.trace.cached = memory.lengths
            if memory.lengths != self._plan.keys:
                raise TraceError(f"cached {list(memory.lengths)} keys, planned {list(self._plan.keys)}")
        batch, n, _ = embeddings.shape
        first = self._plan.layout.n_tokens + behind
        ids = OriginalIds(torch.arange(first, first + n, device=embeddings.device).expand(batch, n))
        tokens, watcher = TokenSelection(ids, first + n), None
        if actions and self._watch.layers:
            watcher = Watcher(self._watch, behind, self._prunable_at, self._watched)
        run = decoder.run(
            embeddings,
            tokens,
            watcher,
            memory,
            positions=self.positions,
            condition=condition,
            skip=self._plan.skipped,
        )
        if actions and self._plan.head_interval > 1:
            self._added = run.stream - embeddings
        return run.hidden

    def keep(self) -> None:
        """Leave features, keys and values to each environment's next query, if the pipeline needs them."""
        for row, slot in enumerate(self._slots):
            slot.features = {view: features[row] for view, features in self._features.items()}
        if self._reused is not None:
            self._slots[0].kv = LastKV(self._plan.layout.prunable, tuple(self._reused.now.layers))

    @property
    def attention(self) -> dict[int, ActionAttention]:
        """Attention of the action tokens, at the layers some stage watches."""
        return self._watch.result()

    def _prunable_at(self, layer: int) -> OriginalIds:
        before = [after for after in self.trace.kept if after < layer]
        return OriginalIds(self.trace.kept[max(before)]) if before else self._all_prunable

    def _watched(self, layer: int, rows: int) -> None:
        self.trace.probes.append(ProbeRecord("observe", layer, "action", rows))

    def _readout(self, batch: int) -> OriginalIds:
        rows = self._tables.rows
        return OriginalIds(rows.get("readout", rows["last"]).expand(batch, -1))

    def _begin(self, decoder: Decoder, embeddings: Tensor) -> tuple[Tensor, TokenSelection]:
        layout = self._plan.layout
        batch = embeddings.shape[0]
        tokens = TokenSelection.identity(layout.n_tokens, batch, embeddings.device)
        self._all_prunable = prunable = OriginalIds(self._tables.prunable.expand(batch, -1))
        seeds = tuple(mix(self._pipeline.config.seed, slot.number, slot.queries, slot.index) for slot in self._slots)
        self._context = SelectContext(
            plan=self._plan,
            decoder=decoder,
            positions=self.positions,
            layer=-1,
            tokens=tokens,
            prunable=prunable,
            hidden=embeddings,
            images=self._images,
            seeds=seeds,
            tables=self._tables,
            slots=self._slots,
            scope="",
            past=None,
            encoder=self._encoder,
            notes={},
            probed=self._probed("", -1),
        )
        proposals: list[tuple[int, Proposal]] = []
        for index, hook in self._pipeline.hooks["select_tokens"]:
            if index in self._plan.looks:
                proposals += self._ask("select_tokens", "before layer 0", index, hook, self._context)
        cut = self._plan.cut_after.get(-1)
        if cut is None:
            return embeddings, tokens
        return self._apply(cut, [(i, p) for i, p in proposals if i in cut.stages], self._context)

    def acts_after(self, layer: int) -> bool:
        """Whether a stage is asked or tokens leave after this layer."""
        if layer == 0:
            return True
        return self._asked(layer)

    def _asked(self, layer: int) -> bool:
        return self._watches(layer) or layer in self._scorers or layer in self._plan.cut_after

    def _watches(self, layer: int) -> bool:
        """Whether the action tokens' attention is to be recorded here; those behind the layout are watched later."""
        return layer in self._watch.layers and "action" in self._tables.rows

    def after_layer(
        self, layer: int, hidden: Tensor, tokens: TokenSelection, q: Tensor, seen: LayerKV
    ) -> tuple[Tensor, TokenSelection]:
        """Ask the stages that declared this layer, and cut if the plan says so."""
        if layer == 0:
            self.trace.kernel = attention_kernel(q, seen.k, seen.k, bool(self._context and self._context.causal))
            if not self._asked(layer):
                return hidden, tokens
        with self.phase("selection"):
            assert self._context is not None
            context = at_layer(moved(self._context, layer, tokens, self._context.prunable, hidden), q, seen, {})
            proposals = []
            for index, hook in self._scorers.get(layer, ()):
                proposals += self._ask("score_layer", f"after layer {layer}", index, hook, context)
            if self._watches(layer):
                own = replace(context, probed=self._probed("observe", layer))
                self._watch.note(layer, 0, own.attention_rows("action"), context.prunable)
            cut = self._plan.cut_after.get(layer)
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
            self.trace.kept[cut.after] = context.prunable
            return context.hidden, context.tokens
        chosen = choose(cut, proposals, context, self._pipeline, where)
        for index, proposal in proposals:
            if proposal.score is not None:
                self._checks.append((f"stage '{self._pipeline.names[index]}' {where}", proposal.score.isnan().any()))
        protected = [p.protect for _, p in proposals if p.protect is not None]
        if protected:
            self._protected[cut.after] = torch.stack(protected).any(0).sum(1).max() - cut.keep
        tokens, prunable = apply(context.tokens, context.prunable, self._tables.fixed, chosen)
        if self._reused is not None:
            self._reused.leave(OriginalIds(context.prunable.gather(1, others(chosen, cut.found))))
        at = context.tokens.to_current(tokens.ids)
        hidden = rows_at(context.hidden, at)
        merging = merged(proposals, context, chosen, self._pipeline, where)
        if merging is not None:
            places = tokens.to_current(prunable)[..., None].expand_as(merging)
            hidden = hidden.scatter(1, places, merging)
        self._held[cut.after] = tokens
        self.trace.kept[cut.after] = prunable
        self._note_reasons(cut.after, [p for _, p in proposals], chosen)
        assert self._context is not None
        self._context = moved(self._context, cut.after, tokens, prunable, hidden)
        return hidden, tokens

    def _note_reasons(self, after: int, proposals: list[Proposal], chosen: Tensor) -> None:
        noted = self.trace.reasons.setdefault(after, {})
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
        self._plan = self._pipeline.plan(self._plan.layout, self._plan.mode, (*self._plan.unions, count))
        return self._plan.cut_after[cut.after]

    def _ask(
        self, hook_name: str, where: str, index: int, hook: Callable[..., Any], context: SelectContext
    ) -> list[tuple[int, Proposal]]:
        """What one stage proposes, with its index; nothing if it abstains."""
        name = self._pipeline.names[index]
        own = replace(
            context,
            plan=self._plan,
            scope=f"{index}.",
            past=self._past.get(index),
            notes=self._notes.setdefault(index, {}),
            probed=self._probed(name, context.layer),
        )
        answer = self._pipeline.call(index, hook_name, hook, own, where)
        checked(answer, context.prunable, f"stage '{name}': {hook_name} {where} returned")
        return [] if answer is None else [(index, answer)]

    def _probed(self, stage: str, layer: int) -> Callable[[str, int, bool], None]:
        def note(rows: str, count: int, ahead: bool) -> None:
            self.trace.probes.append(ProbeRecord(stage, layer + ahead, rows, count, ahead))

        return note

    def finish(self) -> None:  # cold: after the actions have left the device
        """Read what was noted on the device.

        Raises:
            StageError: If a stage gave a NaN score.
        """
        for what, bad in self._checks:
            if bad.item():
                raise StageError(f"{what} gave a NaN score")
        self.trace.overfull = {after: max(int(n.item()), 0) for after, n in self._protected.items()}


def _by_layer(pipeline: BoundPipeline, plan: Plan) -> dict[int, list[tuple[int, Callable[..., Any]]]]:
    asked: dict[int, list[tuple[int, Callable[..., Any]]]] = {}
    for index, hook in pipeline.hooks["score_layer"]:
        for layer, stages in enumerate(plan.calls):
            if index in stages:
                asked.setdefault(layer, []).append((index, hook))
    return asked
