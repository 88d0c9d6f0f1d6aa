"""One query on its way through a backbone: what an adapter calls back while it runs its model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tokenprune.engine.action_attention import Watcher
from tokenprune.engine.cuts import Cutting, SameCuts
from tokenprune.engine.inputs import Given
from tokenprune.engine.timing import Clock
from tokenprune.engine.trace import ProbeRecord, QueryTrace
from tokenprune.errors import StageError, TraceError
from tokenprune.model.decoder import Decoder, Positions
from tokenprune.model.kv_cache import KVCache, LastKV, Memory, ReusedKV
from tokenprune.pipelines.binding import BoundPipeline
from tokenprune.stages.feature_context import FeatureContext
from tokenprune.stages.memory import Remembered
from tokenprune.stages.query_record import QueryRecord
from tokenprune.tokens.plan import Plan
from tokenprune.tokens.selection import OriginalIds, TokenSelection


@dataclass(frozen=True)
class Outcome:
    """What a query leaves on the device.

    Attributes:
        actions: Normalised actions `[B, T, D]`.
        memories: What each environment is to remember.
        kept: As in `QueryTrace`.
        reasons: Likewise.
        nan: As in `Cutting`.
        overfull: Likewise.
    """

    actions: Tensor
    memories: tuple[Remembered, ...]
    kept: Mapping[int, Tensor]
    reasons: Mapping[int, Mapping[str, Tensor]]
    nan: Sequence[tuple[str, Tensor]]
    overfull: Mapping[int, Tensor]

    def finish(self, trace: QueryTrace) -> None:  # cold: after the actions have left the device
        """Read what was noted on the device.

        Raises:
            StageError: If a stage gave a NaN score.
        """
        noted = [bad.long() for _, bad in self.nan] + [count.long() for count in self.overfull.values()]
        if not noted:
            return
        # One copy instead of one for each.
        numbers = torch.stack(noted).tolist()
        for (what, _), bad in zip(self.nan, numbers, strict=False):
            if bad:
                raise StageError(f"{what} gave a NaN score")
        trace.overfull = {
            after: max(count, 0) for after, count in zip(self.overfull, numbers[len(self.nan) :], strict=True)
        }


class Query:
    """What an adapter calls back while it runs its model.

    Attributes:
        positions: The pipeline's position policy.
        trace: Filled as the query goes.
        tokens: What the last layer held, once the decoder has run.
    """

    tokens: TokenSelection

    def __init__(
        self, pipeline: BoundPipeline, plan: Plan, given: Given, clock: Clock, *, compiled: bool = False
    ) -> None:
        """Start a query, perhaps through compiled layers; nothing runs yet."""
        self.positions: Positions = pipeline.config.positions
        self.trace = QueryTrace(pipeline.config.name, plan)
        self._pipeline = pipeline
        self._given = given
        self._clock = clock
        self._cutting = Cutting(pipeline, plan, given, self.trace, clock)
        self._features: dict[str, Tensor] = {}
        self._added: Tensor | None = None
        self._encoder: dict[str, dict[str, Tensor]] = {}
        self._compiled = compiled

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Time a phase; time inside it that belongs to another phase counts there."""
        return self._clock.phase(name)

    def transform(self, view: str, features: Tensor) -> Tensor:
        """Pass the features `[B, N, D]` of one view through `transform_features`."""
        given = self._given
        for index, hook in self._pipeline.hooks["transform_features"]:
            with self.phase("selection"):
                shown = (view, features, given.inputs.images[view], self._plan.layout, given.tables, given.slots)
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

    def noise(self, *shape: int) -> Tensor:
        """Standard normal numbers `[B, *shape]`, float32: the same for every pipeline, other ones for every query."""
        return self._given.chance.noise(*shape)

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
            hidden, tokens = self._cutting.begin(decoder, embeddings, self._encoder)
        with self.phase("decoder"):
            read = self._readout(len(embeddings))
            memory: Memory | None = cache
            if self._plan.reuses:
                (slot,) = self._given.slots
                memory = self._cutting.reused = ReusedKV(slot.memory.kv, cache)
            decoded = decoder.run(
                hidden,
                tokens,
                self._cutting,
                memory,
                positions=self.positions,
                read=read,
                skip=self._plan.skipped,
                compiled=self._compiled,
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
            again = SameCuts(self._cutting.held)
            hidden, tokens = again.begin(embeddings)
            read = self._readout(len(embeddings))
            skip = self._plan.skipped
            run = decoder.run(
                hidden, tokens, again, positions=self.positions, read=read, skip=skip, compiled=self._compiled
            )
            return run.hidden

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
        if actions and self._cutting.watch.layers:
            watcher = Watcher(self._cutting.watch, behind, self._prunable_at, self._watched)
        run = decoder.run(
            embeddings,
            tokens,
            watcher,
            memory,
            positions=self.positions,
            condition=condition,
            skip=self._plan.skipped,
            compiled=self._compiled,
        )
        if actions and self._plan.head_interval > 1:
            self._added = run.stream - embeddings
        return run.hidden

    def outcome(self, actions: Tensor) -> Outcome:
        """Let observers see the finished query, and leave what the next one may need."""
        hooks = self._pipeline.hooks["observe"]
        given = self._given
        if hooks:
            record = QueryRecord(
                slots=tuple(slot.index for slot in given.slots),
                mode=self._plan.mode,
                layout=self._plan.layout,
                tokens=self.tokens,
                actions=actions,
                attention=self._cutting.watch.result(),
                memories=given.slots,
                tables=given.tables,
            )
            for index, hook in hooks:
                self._pipeline.call(index, "observe", hook, replace(record, scope=f"{index}."))
        for row, slot in enumerate(given.slots):
            slot.memory.features = {view: features[row] for view, features in self._features.items()}
            slot.memory.kv = None
        reused = self._cutting.reused
        if reused is not None:
            given.slots[0].memory.kv = LastKV(self._plan.layout.prunable, tuple(reused.now.layers))
        return Outcome(
            actions,
            tuple(slot.memory for slot in given.slots),
            self.trace.kept,
            self.trace.reasons,
            self._cutting.nan,
            self._cutting.overfull,
        )

    @property
    def _plan(self) -> Plan:
        return self._cutting.plan

    def _prunable_at(self, layer: int) -> OriginalIds:
        before = [after for after in self.trace.kept if after < layer]
        if before:
            return OriginalIds(self.trace.kept[max(before)])
        return OriginalIds(self._given.tables.prunable.expand(len(self._given.slots), -1))

    def _watched(self, layer: int, rows: int, keys: int) -> None:
        self.trace.probes.append(ProbeRecord("observe", layer, "action", rows, behind=keys - self._plan.keys[layer]))

    def _readout(self, batch: int) -> OriginalIds:
        rows = self._given.tables.rows
        return OriginalIds(rows.get("readout", rows["last"]).expand(batch, -1))
