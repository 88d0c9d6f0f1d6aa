"""What selectors and scorers see: read-only views of a query; every list of tokens is in original coordinates."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from tokenprune.model.attention import probabilities, received, row_entropy, similarity
from tokenprune.model.decoder import Decoder, Positions, project_rows, rotary
from tokenprune.model.kv_cache import LayerKV
from tokenprune.stages.memory import Slot, flags, last_of, once, recall, remember
from tokenprune.tokens.layout import TokenLayout
from tokenprune.tokens.layout_tables import LayoutTables
from tokenprune.tokens.plan import Plan
from tokenprune.tokens.selection import CurrentIds, OriginalIds, TokenSelection, rows_at


@dataclass(frozen=True, slots=True)
class PastFrames:
    """The frames one stage's `look_back` asked for.

    Attributes:
        steps: Control steps between them and the current frames, one per batch row; None where there is no past frame.
        pixels: Per view, cropped pixels, uint8 `[B, 3, S, S]`; zeros where there is none.
    """

    steps: tuple[int | None, ...]
    pixels: Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class SelectContext:
    """What a selector sees before layer 0.

    Attributes:
        plan: Every cut of the query, and how many tokens it finds and keeps.
        decoder: The decoder whose layers are still to run.
        positions: Whether kept tokens keep their original positions.
        layer: Index of the layer that has just run, -1 before layer 0.
        tokens: What is held now.
        prunable: Original ids of the prunable tokens held now `[B, P]`; proposals are over these, in this order.
        hidden: Embeddings or hidden states of all tokens held now `[B, n, D]`.
        images: Per view, the policy's own cropped pixels, uint8 `[B, 3, S, S]`; patches align to these.
        seeds: One number per batch row, int64 `[B]`, that differs from query to query and repeats with the pipeline's
            seed.
        tables: The layout as tensors.
        scope: Prefix of what the stage remembers, so that stages do not meet.
        past: What the stage's `look_back` asked for.
        encoder: By kind and view, what the vision towers' attention says of its patches `[B, N]` or `[B, N, d]`.
        notes: The stage's own, for later layers of this query; tensors of any shape.
        probed: Called whenever attention is computed, with the rows' name, their number and whether it is the next
            layer's.
    """

    plan: Plan
    decoder: Decoder
    positions: Positions
    layer: int
    tokens: TokenSelection
    prunable: OriginalIds
    hidden: Tensor
    images: Mapping[str, Tensor]
    seeds: Tensor
    tables: LayoutTables
    slots: Sequence[Slot]
    scope: str
    past: PastFrames | None
    encoder: Mapping[str, Mapping[str, Tensor]]
    notes: dict[str, Tensor]
    probed: Callable[[str, int, bool], None]

    @property
    def causal(self) -> bool:
        """Whether the decoder is causal."""
        return self.decoder.causal

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
        """What each batch row's episode is about."""
        return tuple(slot.instruction for slot in self.slots)

    @property
    def patches(self) -> Tensor:
        """Rows of `hidden` that belong to the prunable tokens `[B, P, D]`."""
        return rows_at(self.hidden, self.tokens.to_current(self.prunable))

    def rows(self, name: str) -> Tensor:
        """Rows of `hidden` of a named span, such as `instruction` `[B, R, D]`."""
        return rows_at(self.hidden, self.tokens.to_current(self.row_ids(name)))

    def in_view(self, view: str) -> Tensor:
        """Which of the prunable tokens held now belong to a view, boolean `[B, P]`."""
        return self.tables.view_of[self.prunable] == self.tables.view_number[view]

    def row_ids(self, name: str) -> OriginalIds:
        """Original ids `[B, R]` of a named span.

        Raises:
            LayoutError: If the layout has no such rows.
        """
        if name not in self.tables.rows:
            self.layout.span(name)
        return OriginalIds(self.tables.rows[name].expand(self.prunable.shape[0], -1))

    def attention_ahead(self, rows: str) -> Tensor:
        """Attention that the next layer would pay from a named span to the prunable tokens `[B, H, R, P]`.

        Exact, as `LayerContext.attention_rows` is, from the next layer's norm and projections of what is held now.
        """
        ids = self.row_ids(rows)
        at = self.tokens.to_current(ids)
        turn = rotary(self.tokens, self.positions, self.decoder.head_dim, self.decoder.rope_theta, self.hidden.dtype)
        q, k = project_rows(self._next_layer(rows, ids), self.hidden, at, self.decoder.head_dim, turn)
        return self._prunable_columns(probabilities(q, k, at if self.causal else None))

    def similarity_ahead(self, rows: str) -> Tensor:
        """Scaled products `[B, H, R, P]` of the next layer's queries of a named span and its keys of prunable tokens.

        Without rotary embedding, mask and softmax, so tokens are compared by what they are, wherever they stand.
        """
        ids = self.row_ids(rows)
        at = self.tokens.to_current(ids)
        q, k = project_rows(self._next_layer(rows, ids), self.hidden, at, self.decoder.head_dim, None)
        return self._prunable_columns(similarity(q, k))

    def _next_layer(self, rows: str, ids: OriginalIds) -> nn.Module:
        self.probed(rows, ids.shape[1], True)
        skipped = self.plan.skipped
        return next(self.decoder.layers[at] for at in range(self.layer + 1, self.plan.depth) if at not in skipped)

    def encoder_attention(self, kind: str) -> Tensor:
        """What the vision towers' attention says of the prunable tokens held now, at the block whose output is read.

        Mean over heads: what they got from the class token (`cls`) or from every token (`received`), `[B, P]`; or
        their keys (`keys`), `[B, P, d]`. As if there were one head of the full width: what they got from the class
        token (`cls_whole`), `[B, P]`; or their keys (`keys_whole`), `[B, P, D]`.
        """
        by_view = self.encoder[kind]
        like = next(iter(by_view.values()))
        everywhere = like.new_zeros(len(self.prunable), self.layout.n_tokens, *like.shape[2:])
        for view, segment in self.layout.views.items():
            everywhere[:, segment.start : segment.start + segment.length] = by_view[view]
        return everywhere.gather(1, self.prunable) if like.dim() == 2 else rows_at(everywhere, self.prunable)

    def reusable(self) -> Tensor:
        """Which rows `[B]` have keys and values of a last query with the same prunable tokens."""
        known = [slot.memory.kv is not None and slot.memory.kv.prunable == self.layout.prunable for slot in self.slots]
        return flags(known, self.prunable.device)

    def _prunable_columns(self, weights: Tensor) -> Tensor:
        columns = self.tokens.to_current(self.prunable)
        return weights.gather(3, columns[:, None, None].expand(*weights.shape[:3], -1))

    def previous_images(self, view: str) -> tuple[Tensor, Tensor]:
        """Pixels `[B, 3, S, S]` of the last query since the reset, and which rows `[B]` had one (zeros where none)."""
        return last_of([slot.memory.frames.get(view) for slot in self.slots], self.images[view])

    def past_images(self, view: str) -> tuple[Tensor, Tensor]:
        """Pixels `[B, 3, S, S]` of the frames the stage's `look_back` asked for, and which rows `[B]` have one."""
        current = self.images[view]
        if self.past is None:
            return torch.zeros_like(current), flags([False] * len(current), current.device)
        return self.past.pixels[view], flags([back is not None for back in self.past.steps], current.device)

    def remember(self, name: str, values: Tensor, of_all: bool = False) -> None:
        """Keep values `[B, P]` of the prunable tokens, for later layers and for later queries of the episode.

        They are of the tokens held now, or `of_all` prunable ones of the layout.
        """
        places = self.tables.place[self.tables.prunable.expand(len(values), -1) if of_all else self.prunable]
        remember(self.slots, self.scope + name, places, values, len(self.layout.prunable))

    def recall(self, name: str) -> tuple[Tensor, Tensor]:
        """Values remembered for the prunable tokens held now `[B, P]`, and whether each was seen then `[B, P]`."""
        blank = self.hidden.new_zeros(0, dtype=torch.float32)
        values, seen = recall(self.slots, self.scope + name, blank, len(self.layout.prunable))
        places = self.tables.place[self.prunable]
        return values.gather(1, places), seen.gather(1, places)

    def once(self, name: str, compute: Callable[[], Tensor]) -> Tensor:
        """Numbers `[B]` computed in the first query of each environment's episode, and kept until its reset."""
        return once(self.slots, self.scope + name, compute)


@dataclass(frozen=True, slots=True)
class LayerContext(SelectContext):
    """What a scorer sees after a layer; `hidden` is the layer's output, after the last layer its input.

    Attributes:
        q: The layer's queries after rotary embedding `[B, H, n, d]`.
        k: Its keys after rotary embedding `[B, G, m, d]`.
        keys: Original ids of the keys `[B, m]`: what it holds, and what it reuses from the last query.
        computed: Attention of named rows and ranges at this layer, so that stages share it.
    """

    q: Tensor
    k: Tensor
    keys: OriginalIds
    computed: dict[str, Tensor]

    def attention_rows(self, rows: str | range | OriginalIds) -> Tensor:
        """Attention of some queries to the prunable tokens, exact, computed only when asked for and once a layer.

        Args:
            rows: A named span (`text`, `instruction`, `last`, `action`, …), a range of original ids, or original
                ids `[B, R]`; all of them held now.

        Returns:
            `[B, H, R, P]`; the softmax is over all keys, in at least float32.
        """
        name = rows_name(rows)
        if name in self.computed:
            return self.computed[name]
        if isinstance(rows, str):
            ids = self.row_ids(rows)
        elif isinstance(rows, range):
            span = torch.arange(rows.start, rows.stop, device=self.prunable.device)
            ids = OriginalIds(span.expand(self.prunable.shape[0], -1))
        else:
            ids = rows
        self.probed(name, ids.shape[1], False)
        attention = self._at(self._weights(ids), self.prunable)
        if isinstance(rows, str | range):
            self.computed[name] = attention
        return attention

    def attention_to_all(self, rows: str) -> Tensor:
        """Attention of a named span to every prunable token of the layout `[B, H, R, P]`, reused ones included.

        Only where none was dropped.
        """
        ids = self.row_ids(rows)
        self.probed(rows, ids.shape[1], False)
        return self._at(self._weights(ids), OriginalIds(self.tables.prunable.expand(len(ids), -1)))

    def received_attention(self) -> Tensor:
        """Attention that the prunable tokens get `[B, P]`, mean over heads and over every token held; not shared."""
        self.probed("all", self.tokens.n_kept, False)
        given = received(self.q, self.k, self._places(self.tokens.ids) if self.causal else None)
        return given.gather(1, self._places(self.prunable))

    def row_entropy(self) -> Tensor:
        """Entropy of the head-averaged attention, mean over every token held `[B]`; not shared."""
        self.probed("all", self.tokens.n_kept, False)
        return row_entropy(self.q, self.k, self._places(self.tokens.ids) if self.causal else None)

    def _weights(self, ids: OriginalIds) -> Tensor:
        at = self.tokens.to_current(ids)[:, None, :, None]
        q = self.q.gather(2, at.expand(-1, self.q.shape[1], -1, self.q.shape[3]))
        return probabilities(q, self.k, self._places(ids) if self.causal else None)

    def _at(self, weights: Tensor, columns: OriginalIds) -> Tensor:
        return weights.gather(3, self._places(columns)[:, None, None].expand(*weights.shape[:3], -1))

    def _places(self, ids: OriginalIds) -> CurrentIds:
        return TokenSelection(self.keys, self.layout.n_tokens).to_current(ids)


def rows_name(rows: str | range | OriginalIds) -> str:
    """How traces call attention rows."""
    if isinstance(rows, range):
        return f"{rows.start}-{rows.stop - 1}"
    return rows if isinstance(rows, str) else "ids"


def at_layer(ctx: SelectContext, q: Tensor, seen: LayerKV, computed: dict[str, Tensor]) -> LayerContext:
    """The same query seen with what its last layer computed and attended to."""
    shared = {name: getattr(ctx, name) for name in SelectContext.__dataclass_fields__}
    return LayerContext(**shared, q=q, k=seen.k, keys=seen.ids, computed=computed)


def moved(
    ctx: SelectContext, layer: int, tokens: TokenSelection, prunable: OriginalIds, hidden: Tensor
) -> SelectContext:
    """The same query after a cut or a layer."""
    return replace(ctx, layer=layer, tokens=tokens, prunable=prunable, hidden=hidden)
