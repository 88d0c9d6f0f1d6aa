"""One query: what an adapter calls while it runs its model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenprune.engine.action_attention import AttentionLogger
from tokenprune.engine.cuts import RepeatedCuts, StagePruner, stage_memory
from tokenprune.engine.inputs import QueryInputs
from tokenprune.engine.timing import Clock
from tokenprune.engine.trace import ProbeRecord, QueryTrace
from tokenprune.errors import StageError, TraceError
from tokenprune.model.decoder import Decoder, DecoderRunner, run_decoder
from tokenprune.model.kv_cache import KVCache, LastKV, Memory, ReusedKV
from tokenprune.model.phase import Phase
from tokenprune.pipelines.binding import BoundPipeline
from tokenprune.stages.feature_context import FeatureContext
from tokenprune.stages.memory import SlotMemory
from tokenprune.stages.query_record import QueryRecord
from tokenprune.tokens.plan import Plan
from tokenprune.tokens.selection import OriginalIds, TokenSelection


@dataclass(frozen=True)
class DeviceOutcome:
    """The results of a query on the device.

    Attributes:
        actions: Normalised actions `[B, T, D]`.
        memories: Memory of each environment after the query.
        kept: Prunable original ids kept at each cut `[B, K]`, by the layer it follows.
        reasons: Per cut, boolean `[B, K]` over the kept ids, by the name of the reason.
        nan: Stage and place of each score, and whether it has a NaN.
        overfull: Per cut, the most protected tokens of any row minus the tokens it keeps.
    """

    actions: Tensor
    memories: tuple[SlotMemory, ...]
    kept: Mapping[int, Tensor]
    reasons: Mapping[int, Mapping[str, Tensor]]
    nan: Sequence[tuple[str, Tensor]]
    overfull: Mapping[int, Tensor]


@dataclass(frozen=True)
class QueryOutcome:
    """The results of a query: tensors on the device, and its trace on the host."""

    device: DeviceOutcome
    trace: QueryTrace

    def finish(self) -> None:  # cold: after the actions have left the device
        """Read what was recorded on the device into the trace.

        Raises:
            StageError: If a stage gave a NaN score.
        """
        scores, overfull = self.device.nan, self.device.overfull
        flags = [bad.long() for _, bad in scores] + [count.long() for count in overfull.values()]
        if not flags:
            return
        # A single copy from the device.
        numbers = torch.stack(flags).tolist()
        for (what, _), bad in zip(scores, numbers, strict=False):
            if bad:
                raise StageError(f"{what} gave a NaN score")
        self.trace.overfull = {
            after: max(count, 0) for after, count in zip(overfull, numbers[len(scores) :], strict=True)
        }


class Query:
    """What an adapter calls while it runs its model.

    Attributes:
        trace: Filled during the query.
        runner: Runs the decoder's layers; a backbone may replace it before `decode`.
        tokens: Tokens of the last layer, once the decoder has run.
    """

    tokens: TokenSelection

    def __init__(
        self,
        pipeline: BoundPipeline,
        plan: Plan,
        inputs: QueryInputs,
        clock: Clock,
        runner: DecoderRunner = run_decoder,
    ) -> None:
        """Prepare a query."""
        self.trace = QueryTrace(pipeline.config.name, plan)
        self.runner = runner
        self._pipeline = pipeline
        self._inputs = inputs
        self._clock = clock
        self._pruner = StagePruner(pipeline, plan, inputs, self.trace, clock)
        self._features: dict[str, Tensor] = {}
        self._residual: Tensor | None = None
        self._encoder: dict[str, dict[str, Tensor]] = {}

    def phase(self, phase: Phase) -> AbstractContextManager[None]:
        """Time a phase; time inside it that belongs to another phase counts there."""
        return self._clock.phase(phase)

    def transform(self, view: str, features: Tensor) -> Tensor:
        """Pass the features `[B, N, D]` of one view through `transform_features`."""
        inputs = self._inputs
        for call in self._pipeline.hooks["transform_features"]:
            with self.phase(Phase.SELECTION):
                images, memory = inputs.model.images[view], stage_memory(inputs, f"{call.stage}.")
                context = FeatureContext(view, features, images, self._plan.layout, inputs.slots, inputs.tables, memory)
                changed = self._pipeline.call(call, context)
            if changed is None:
                continue
            if changed.shape != features.shape:
                raise StageError(
                    f"stage '{self._pipeline.names[call.stage]}': transform_features of view '{view}' returned "
                    f"{list(changed.shape)}; it must keep {list(features.shape)}"
                )
            features = changed
        if self._pipeline.hooks["transform_features"]:
            self._features[view] = features
        return features

    @property
    def encoder_kinds(self) -> frozenset[str]:
        """Kinds of the vision towers' attention that stages need."""
        return self._pipeline.encoder_attention

    def note_encoder(self, views: Sequence[str], maps: Mapping[str, Tensor]) -> None:
        """Take the vision towers' attention `[views * B, N]` by kind; the views follow one another."""
        self.trace.encoder = tuple(sorted(maps))
        for kind, values in maps.items():
            self._encoder[kind] = dict(zip(views, values.chunk(len(views)), strict=True))

    def noise(self, *shape: int) -> Tensor:
        """Standard normal noise `[B, *shape]`, float32; the same in every pipeline, different in every query."""
        return self._inputs.rng.noise(*shape)

    def decode(self, decoder: Decoder, embeddings: Tensor, cache: KVCache | None = None) -> Tensor:
        """Prefill: cut before layer 0, run the decoder with its cuts, and check the token counts against the plan.

        Args:
            decoder: The backbone's decoder.
            embeddings: All tokens of the layout `[B, N, D]`.
            cache: Filled with the keys and values of each layer, for adapters that call `follow` afterwards.

        Returns:
            Hidden states `[B, R, D]` of the layout's `readout` rows.

        Raises:
            TraceError: If a layer held another number of tokens than planned.
        """
        with self.phase(Phase.SELECTION):
            hidden, tokens = self._pruner.begin(decoder, embeddings, self._encoder)
        with self.phase(Phase.DECODER):
            memory: Memory | None = cache
            if self._plan.reuses:
                (slot,) = self._inputs.slots
                memory = self._pruner.reused = ReusedKV(slot.memory.kv, cache)
            decoded = self.runner(
                decoder,
                hidden,
                tokens,
                self._pruner,
                memory,
                positions=self._pipeline.config.positions,
                read=self._readout(len(embeddings)),
                skip=self._plan.skipped,
            )
        self.tokens = decoded.tokens
        self.trace.held, self.trace.plan = decoded.held, self._plan
        self.trace.check()
        return decoded.hidden

    def repeat(self, decoder: Decoder, embeddings: Tensor) -> Tensor:
        """Run the layout's tokens again with other embeddings `[B, N, D]` through the same cuts; calls no stage.

        Returns:
            Hidden states `[B, R, D]` of the layout's `readout` rows.
        """
        with self.phase(Phase.DECODER):
            cuts = RepeatedCuts(self._pruner.held)
            hidden, tokens = cuts.begin(embeddings)
            return self.runner(
                decoder,
                hidden,
                tokens,
                cuts,
                positions=self._pipeline.config.positions,
                read=self._readout(len(embeddings)),
                skip=self._plan.skipped,
            ).hidden

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
        """Run tokens after the prefill, which attend to the keys and values left in each layer.

        Args:
            decoder: Decoder to run; has as many layers as the one that filled the memory.
            embeddings: The tokens `[B, n, D]`.
            behind: Index of the first token, counted from the end of the unpruned layout; sets the positions.
            memory: Keys and values of all tokens before.
            condition: Input of adaptive norms `[B, C]`.
            actions: Whether these are action tokens, whose attention stages may observe.

        Returns:
            Normalised hidden states `[B, n, D]`.

        Raises:
            TraceError: If the memory holds other numbers of keys than planned.
        """
        if actions:
            skip_layers = (self.trace.ran + self.trace.spared) % self._plan.flow_interval > 0
            self.trace.ran, self.trace.spared = self.trace.ran + (not skip_layers), self.trace.spared + skip_layers
            if skip_layers:
                assert self._residual is not None, "the first flow step runs"
                return decoder.finish(embeddings + self._residual, condition)
        if not self.trace.cached:
            self.trace.cached = memory.lengths
            if memory.lengths != self._plan.keys:
                raise TraceError(f"cached {list(memory.lengths)} keys, planned {list(self._plan.keys)}")
        batch, n, _ = embeddings.shape
        first = self._plan.layout.n_tokens + behind
        ids = OriginalIds(torch.arange(first, first + n, device=embeddings.device).expand(batch, n))
        logger = None
        if actions and self._pruner.attention.layers:
            logger = AttentionLogger(self._pruner.attention, behind, self._prunable_at, self._note_observed)
        run = self.runner(
            decoder,
            embeddings,
            TokenSelection(ids, first + n),
            logger,
            memory,
            positions=self._pipeline.config.positions,
            condition=condition,
            skip=self._plan.skipped,
        )
        if actions and self._plan.flow_interval > 1:
            self._residual = run.stream - embeddings
        return run.hidden

    def outcome(self, actions: Tensor) -> QueryOutcome:
        """Call the observers, store the memory for the next query, and return the results."""
        self._observe(actions)
        slots, reused = self._inputs.slots, self._pruner.reused
        for row, slot in enumerate(slots):
            slot.memory.features = {view: features[row] for view, features in self._features.items()}
            slot.memory.kv = None
        if reused is not None:
            slots[0].memory.kv = LastKV(self._plan.layout.prunable, tuple(reused.now.layers))
        memories = tuple(slot.memory for slot in slots)
        trace, pruner = self.trace, self._pruner
        device = DeviceOutcome(actions, memories, trace.kept, trace.reasons, pruner.nan, pruner.overfull)
        return QueryOutcome(device, trace)

    def _observe(self, actions: Tensor) -> None:
        calls = self._pipeline.hooks["observe"]
        if not calls:
            return
        inputs = self._inputs
        attention = self._pruner.attention.result()
        for call in calls:
            record = QueryRecord(
                slots=tuple(slot.index for slot in inputs.slots),
                mode=self._plan.mode,
                layout=self._plan.layout,
                tokens=self.tokens,
                actions=actions,
                attention=attention,
                _tables=inputs.tables,
                _memory=stage_memory(inputs, f"{call.stage}."),
            )
            self._pipeline.call(call, record)

    @property
    def _plan(self) -> Plan:
        return self._pruner.plan

    def _prunable_at(self, layer: int) -> OriginalIds:
        before = [after for after in self.trace.kept if after < layer]
        if before:
            return OriginalIds(self.trace.kept[max(before)])
        return OriginalIds(self._inputs.tables.prunable.expand(len(self._inputs.slots), -1))

    def _note_observed(self, layer: int, rows: int, keys: int) -> None:
        self.trace.probes.append(ProbeRecord("observe", layer, "action", rows, behind=keys - self._plan.keys[layer]))

    def _readout(self, batch: int) -> OriginalIds:
        rows = self._inputs.tables.rows
        return OriginalIds(rows.get("readout", rows["last"]).expand(batch, -1))
