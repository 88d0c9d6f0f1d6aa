"""What `select_tokens` and `score_layer` read: views of a query, with tokens named by original id."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tokenprune.model.attention import probabilities, received, row_entropy, similarity
from tokenprune.model.decoder import Decoder, project_rows, rotary
from tokenprune.stages.memory import Slot, StageMemory, flags, last_of
from tokenprune.tokens.layout import TokenLayout
from tokenprune.tokens.layout_tables import LayoutTables
from tokenprune.tokens.plan import Plan
from tokenprune.tokens.positions import Positions
from tokenprune.tokens.selection import CurrentIds, OriginalIds, TokenSelection, head_rows_at, key_columns_at, rows_at


@dataclass(frozen=True, slots=True)
class PastFrames:
    """The frames one stage's `look_back` asked for.

    Attributes:
        steps: Age of each batch row's frames in control steps; None without a past frame.
        pixels: Per view, cropped pixels, uint8 `[B, 3, S, S]`; zeros without a past frame.
    """

    steps: tuple[int | None, ...]
    pixels: Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class QueryView:
    """What all stages share in one query.

    Attributes:
        decoder: The backbone's decoder.
        positions: Rotary positions of kept tokens.
        images: Per view, cropped pixels, uint8 `[B, 3, S, S]`.
        seeds: One seed per batch row, int64 `[B]`.
        tables: The layout as tensors.
        slots: Environment of each batch row.
        encoder: Attention of the vision towers by kind and view, `[B, N]` or `[B, N, d]`.
    """

    decoder: Decoder
    positions: Positions
    images: Mapping[str, Tensor]
    seeds: Tensor
    tables: LayoutTables
    slots: Sequence[Slot]
    encoder: Mapping[str, Mapping[str, Tensor]]


@dataclass(frozen=True, slots=True)
class StageView:
    """What one stage has for itself in one query.

    Attributes:
        memory: Its memory.
        past: Frames its `look_back` asked for.
        scratch: Its own tensors within the query.
        note_probe: Called whenever attention is computed for it, with the layer, the rows' name, their number, and
            whether the layer has not run yet.
    """

    memory: StageMemory
    past: PastFrames | None
    scratch: dict[str, Tensor]
    note_probe: Callable[[int, str, int, bool], None]


@dataclass(frozen=True, slots=True)
class SelectContext:
    """What a selector reads before layer 0.

    Attributes:
        plan: Every cut of the query, with the tokens before and after it.
        layer: Index of the layer that has just run, -1 before layer 0.
        tokens: The tokens held now.
        prunable: Original ids of the prunable tokens held now `[B, P]`; proposals are over these, in this order.
        hidden: Embeddings or hidden states of all tokens held now `[B, n, D]`.
    """

    plan: Plan
    layer: int
    tokens: TokenSelection
    prunable: OriginalIds
    hidden: Tensor
    _query: QueryView
    _stage: StageView

    @property
    def causal(self) -> bool:
        """Whether the decoder is causal."""
        return self.decoder.causal

    @property
    def decoder(self) -> Decoder:
        """The backbone's decoder."""
        return self._query.decoder

    @property
    def images(self) -> Mapping[str, Tensor]:
        """Per view, the policy's own cropped pixels, uint8 `[B, 3, S, S]`; patches align to these."""
        return self._query.images

    @property
    def seeds(self) -> Tensor:
        """One seed per batch row, int64 `[B]`; differs from query to query, repeats with the pipeline's seed."""
        return self._query.seeds

    @property
    def slots(self) -> Sequence[Slot]:
        """Environment of each batch row."""
        return self._query.slots

    @property
    def scratch(self) -> dict[str, Tensor]:
        """The stage's own tensors, of any shape, kept until the end of this query."""
        return self._stage.scratch

    @property
    def layout(self) -> TokenLayout:
        """The query's tokens."""
        return self.plan.layout

    @property
    def mode(self) -> str:
        """The query's mode."""
        return self.plan.mode

    @property
    def instructions(self) -> tuple[str, ...]:
        """Instruction of each batch row."""
        return tuple(slot.instruction for slot in self.slots)

    @property
    def patches(self) -> Tensor:
        """Hidden states of the prunable tokens `[B, P, D]`."""
        return rows_at(self.hidden, self.tokens.to_current(self.prunable))

    def rows(self, name: str) -> Tensor:
        """Hidden states `[B, R, D]` of a named span, such as `instruction`."""
        return rows_at(self.hidden, self.tokens.to_current(self.row_ids(name)))

    @property
    def places(self) -> Tensor:
        """Index of each prunable token held now among all prunable ones of the layout `[B, P]`."""
        return self._query.tables.place[self.prunable]

    @property
    def views_of(self) -> Tensor:
        """View of each prunable token held now, as its number in sequence order `[B, P]`."""
        return self._query.tables.view_of[self.prunable]

    def in_view(self, view: str) -> Tensor:
        """Whether each prunable token held now belongs to a view, boolean `[B, P]`."""
        return self.views_of == self._query.tables.view_number[view]

    def row_ids(self, name: str) -> OriginalIds:
        """Original ids `[B, R]` of a named span.

        Raises:
            LayoutError: If the layout has no such rows.
        """
        if name not in self._query.tables.rows:
            self.layout.span(name)
        return OriginalIds(self._query.tables.rows[name].expand(self.prunable.shape[0], -1))

    def attention_ahead(self, rows: str) -> Tensor:
        """Attention `[B, H, R, P]` of a named span to the prunable tokens in the next layer, which has not run yet.

        Exact: the next layer's norm and projections are applied to the tokens held now.
        """
        ids = self.row_ids(rows)
        at = self.tokens.to_current(ids)
        rotation = rotary(
            self.tokens,
            self._query.positions,
            self.decoder.head_dim,
            self.decoder.rope_theta,
            self.hidden.dtype,
        )
        q, k = project_rows(self._next_layer(rows, ids), self.hidden, at, self.decoder.head_dim, rotation)
        return self._prunable_columns(probabilities(q, k, at if self.causal else None))

    def similarity_ahead(self, rows: str) -> Tensor:
        """Scaled products `[B, H, R, P]` of the next layer's queries of a named span and its keys of prunable tokens.

        Without rotary embedding, mask and softmax, so it does not depend on positions.
        """
        ids = self.row_ids(rows)
        at = self.tokens.to_current(ids)
        q, k = project_rows(self._next_layer(rows, ids), self.hidden, at, self.decoder.head_dim, None)
        return self._prunable_columns(similarity(q, k))

    def _next_layer(self, rows: str, ids: OriginalIds) -> nn.Module:
        self._stage.note_probe(self.layer + 1, rows, ids.shape[1], True)
        skipped = self.plan.skipped
        return next(self.decoder.layers[at] for at in range(self.layer + 1, self.plan.depth) if at not in skipped)

    def encoder_attention(self, kind: str) -> Tensor:
        """Attention of the vision towers for the prunable tokens held now, at the block whose output is read.

        - `cls`: attention received from the class token, mean over heads, `[B, P]`
        - `received`: attention received from all tokens, mean over heads, `[B, P]`
        - `keys`: keys, mean over heads, `[B, P, d]`
        - `cls_whole`, `keys_whole`: the same as if there were one head of the full width, `[B, P]` and `[B, P, D]`
        """
        by_view = self._query.encoder[kind]
        like = next(iter(by_view.values()))
        everywhere = like.new_zeros(len(self.prunable), self.layout.n_tokens, *like.shape[2:])
        for view, segment in self.layout.views.items():
            everywhere[:, segment.start : segment.start + segment.length] = by_view[view]
        return everywhere.gather(1, self.prunable) if like.dim() == 2 else rows_at(everywhere, self.prunable)

    def reusable(self) -> Tensor:
        """Which batch rows `[B]` have keys and values of a last query with the same prunable tokens."""
        known = [slot.memory.kv is not None and slot.memory.kv.prunable == self.layout.prunable for slot in self.slots]
        return flags(known, self.prunable.device)

    def _prunable_columns(self, weights: Tensor) -> Tensor:
        return key_columns_at(weights, self.tokens.to_current(self.prunable))

    def previous_images(self, view: str) -> tuple[Tensor, Tensor]:
        """Pixels `[B, 3, S, S]` of the last query since the reset (zeros if none), and which rows `[B]` have any."""
        return last_of([slot.memory.frames.get(view) for slot in self.slots], self.images[view])

    def past_images(self, view: str) -> tuple[Tensor, Tensor]:
        """Pixels `[B, 3, S, S]` of the frames `look_back` asked for (zeros if none), and which rows `[B]` have any."""
        current = self.images[view]
        past = self._stage.past
        if past is None:
            return torch.zeros_like(current), flags([False] * len(current), current.device)
        return past.pixels[view], flags([back is not None for back in past.steps], current.device)

    def remember(self, name: str, values: Tensor, of_all: bool = False) -> None:
        """Keep values `[B, P]` of the prunable tokens, for later layers and for later queries of the episode.

        By default of the tokens held now; with `of_all`, of all prunable tokens of the layout.
        """
        places = self.places
        if of_all:
            places = self._query.tables.place[self._query.tables.prunable.expand(len(values), -1)]
        self._stage.memory.remember(name, places, values)

    def recall(self, name: str) -> tuple[Tensor, Tensor]:
        """Values remembered for the prunable tokens held now, and the mask of known values; both `[B, P]`."""
        return self._stage.memory.recall(name, self.places)

    def once(self, name: str, compute: Callable[[], Tensor]) -> Tensor:
        """Scalars `[B]` computed in the first query of each environment's episode, and kept until its reset."""
        return self._stage.memory.once(name, compute)


@dataclass(frozen=True, slots=True)
class LayerContext(SelectContext):
    """What a scorer reads after a layer; `hidden` is the layer's output, at the last layer its input.

    Attributes:
        q: The layer's queries after rotary embedding `[B, H, n, d]`.
        k: Its keys after rotary embedding `[B, G, m, d]`.
        keys: Original ids of the keys `[B, m]`: tokens it holds, and tokens reused from the last query.
    """

    q: Tensor
    k: Tensor
    keys: OriginalIds
    _computed: dict[str, Tensor]

    def attention_rows(self, rows: str | range | OriginalIds) -> Tensor:
        """Exact attention of some rows to the prunable tokens `[B, H, R, P]`, computed at most once per layer.

        Args:
            rows: A named span (`text`, `instruction`, `last`, `action`, …), a range of original ids, or original
                ids `[B, R]`; all of them held now.

        Returns:
            Probabilities in at least float32; the softmax is over all keys.
        """
        name = rows_name(rows)
        if name in self._computed:
            return self._computed[name]
        if isinstance(rows, str):
            ids = self.row_ids(rows)
        elif isinstance(rows, range):
            span = torch.arange(rows.start, rows.stop, device=self.prunable.device)
            ids = OriginalIds(span.expand(self.prunable.shape[0], -1))
        else:
            ids = rows
        self._stage.note_probe(self.layer, name, ids.shape[1], False)
        attention = self._at(self._weights(ids), self.prunable)
        if isinstance(rows, str | range):
            self._computed[name] = attention
        return attention

    def attention_to_all(self, rows: str) -> Tensor:
        """Attention `[B, H, R, P]` of a named span to every prunable token of the layout, reused ones included.

        Valid only if no token was dropped.
        """
        ids = self.row_ids(rows)
        self._stage.note_probe(self.layer, rows, ids.shape[1], False)
        return self._at(self._weights(ids), OriginalIds(self._query.tables.prunable.expand(len(ids), -1)))

    def received_attention(self) -> Tensor:
        """Attention that each prunable token receives `[B, P]`, mean over heads and all tokens held; not cached."""
        self._stage.note_probe(self.layer, "all", self.tokens.n_kept, False)
        attention = received(self.q, self.k, self._places(self.tokens.ids) if self.causal else None)
        return attention.gather(1, self._places(self.prunable))

    def row_entropy(self) -> Tensor:
        """Entropy in nats of the head-averaged attention, mean over all tokens held `[B]`; not cached."""
        self._stage.note_probe(self.layer, "all", self.tokens.n_kept, False)
        return row_entropy(self.q, self.k, self._places(self.tokens.ids) if self.causal else None)

    def _weights(self, ids: OriginalIds) -> Tensor:
        q = head_rows_at(self.q, self.tokens.to_current(ids))
        return probabilities(q, self.k, self._places(ids) if self.causal else None)

    def _at(self, weights: Tensor, columns: OriginalIds) -> Tensor:
        return key_columns_at(weights, self._places(columns))

    def _places(self, ids: OriginalIds) -> CurrentIds:
        return TokenSelection(self.keys, self.layout.n_tokens).to_current(ids)


def rows_name(rows: str | range | OriginalIds) -> str:
    """Name of attention rows in traces."""
    if isinstance(rows, range):
        return f"{rows.start}-{rows.stop - 1}"
    return rows if isinstance(rows, str) else "ids"
