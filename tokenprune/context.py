"""What stages see: read-only views of a query, in which every list of tokens is in original coordinates."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tokenprune.history import ExecutedAction, Slot, recall, remember
from tokenprune.layout import TokenLayout
from tokenprune.probe import attention_rows
from tokenprune.selection import OriginalIds, TokenSelection


@dataclass(frozen=True, slots=True)
class ControlDecision:
    """A controller's choice: one of the modes the pipeline declares."""

    mode: str


@dataclass(frozen=True, slots=True)
class ControlContext:
    """What a controller sees before a query, on the host.

    Attributes:
        slot: Environment the query is for.
        modes: What may be chosen; the first is the default.
        queries: Queries since the last reset.
        executed: Actions executed since the last reset, oldest first.
    """

    slot: int
    modes: tuple[str, ...]
    queries: int
    executed: Sequence[ExecutedAction]


@dataclass(frozen=True, slots=True)
class FeatureContext:
    """Features of one view on their way to the projector.

    Attributes:
        view: Camera name.
        features: `[B, N, D]`.
        images: The view's own cropped pixels, uint8 `[B, 3, S, S]`.
    """

    view: str
    features: Tensor
    images: Tensor


class LayoutTables:
    """A layout's host integers as tensors, made once per layout and device."""

    def __init__(self, layout: TokenLayout, device: torch.device) -> None:  # cold: once per layout
        """Upload the ids of fixed and prunable tokens, of named rows, and each token's view number."""
        self.fixed = torch.tensor(layout.fixed, dtype=torch.int64, device=device)
        self.prunable = torch.tensor(layout.prunable, dtype=torch.int64, device=device)
        self.rows = {
            name: torch.tensor(tuple(layout.span(name)), dtype=torch.int64, device=device) for name in layout.row_names
        }
        owner = [-1] * layout.n_tokens
        for number, segment in enumerate(layout.views.values()):
            for token in segment.span:
                owner[token] = number
        self.view_of = torch.tensor(owner, dtype=torch.int64, device=device)
        self.view_number = {name: number for number, name in enumerate(layout.views)}


@dataclass(frozen=True, slots=True)
class SelectContext:
    """What a selector sees before layer 0.

    Attributes:
        layout: The query's tokens.
        mode: The query's mode.
        causal: Whether the decoder is causal.
        tokens: What is held now.
        prunable: Original ids of the prunable tokens held now `[B, P]`; proposals are over these, in this order.
        hidden: Embeddings or hidden states of all tokens held now `[B, n, D]`.
        images: Per view, the policy's own cropped pixels, uint8 `[B, 3, S, S]`; patches align to these.
        seeds: One number per batch row that differs from query to query and repeats with the pipeline's seed.
        tables: The layout as tensors.
    """

    layout: TokenLayout
    mode: str
    causal: bool
    tokens: TokenSelection
    prunable: OriginalIds
    hidden: Tensor
    images: Mapping[str, Tensor]
    seeds: tuple[int, ...]
    tables: LayoutTables
    slots: Sequence[Slot]

    @property
    def patches(self) -> Tensor:
        """Rows of `hidden` that belong to the prunable tokens `[B, P, D]`."""
        at = self.tokens.to_current(self.prunable)
        return self.hidden.gather(1, at[..., None].expand(-1, -1, self.hidden.shape[2]))

    def rows(self, name: str) -> Tensor:
        """Rows of `hidden` of a named span, such as `instruction` `[B, R, D]`."""
        at = self.tokens.to_current(self.row_ids(name))
        return self.hidden.gather(1, at[..., None].expand(-1, -1, self.hidden.shape[2]))

    def row_ids(self, name: str) -> OriginalIds:
        """Original ids `[B, R]` of a named span.

        Raises:
            LayoutError: If the layout has no such rows.
        """
        if name not in self.tables.rows:
            self.layout.span(name)
        return OriginalIds(self.tables.rows[name].expand(self.prunable.shape[0], -1))

    def previous_images(self, view: str) -> tuple[Tensor, Tensor]:
        """Pixels `[B, 3, S, S]` of the last query since the reset, and which rows `[B]` had one (zeros where none)."""
        blank = torch.zeros_like(self.images[view][0])
        frames = [slot.frames.get(view) for slot in self.slots]
        had = [torch.full((), frame is not None, device=blank.device) for frame in frames]
        return torch.stack([blank if frame is None else frame for frame in frames]), torch.stack(had)

    def remember(self, name: str, values: Tensor) -> None:
        """Keep values `[B, P]` of the prunable tokens for later queries of the episode."""
        remember(self.slots, name, self.prunable, values, self.layout.n_tokens)

    def recall(self, name: str) -> tuple[Tensor, Tensor]:
        """Values remembered for the prunable tokens held now `[B, P]`, and whether each was seen then `[B, P]`."""
        values, seen = recall(self.slots, name, self.hidden.new_zeros(0, dtype=torch.float32), self.layout.n_tokens)
        return values.gather(1, self.prunable), seen.gather(1, self.prunable)


@dataclass(frozen=True, slots=True)
class LayerContext(SelectContext):
    """What a scorer sees after a layer; `hidden` is the layer's output.

    Attributes:
        layer: Index of the layer that has just run.
        q: Its queries after rotary embedding `[B, H, n, d]`.
        k: Its keys after rotary embedding `[B, G, n, d]`.
        probed: Called with the rows' name and their number whenever attention is computed.
    """

    layer: int
    q: Tensor
    k: Tensor
    probed: Callable[[str, int], None]

    def attention_rows(self, rows: str | OriginalIds) -> Tensor:
        """Attention of some queries to the prunable tokens, exact, computed only when asked for.

        Args:
            rows: A named span (`text`, `instruction`, `last`, `action`, …) or original ids `[B, R]` held now.

        Returns:
            `[B, H, R, P]`; the softmax is over all keys, in at least float32.
        """
        ids = self.row_ids(rows) if isinstance(rows, str) else rows
        self.probed(rows if isinstance(rows, str) else "ids", ids.shape[1])
        weights = attention_rows(self.q, self.k, self.tokens.to_current(ids), self.causal)
        columns = self.tokens.to_current(self.prunable)
        return weights.gather(3, columns[:, None, None].expand(*weights.shape[:3], -1))


def at_layer(ctx: SelectContext, layer: int, q: Tensor, k: Tensor, probed: Callable[[str, int], None]) -> LayerContext:
    """The same query seen after a layer."""
    shared = {name: getattr(ctx, name) for name in SelectContext.__dataclass_fields__}
    return LayerContext(**shared, layer=layer, q=q, k=k, probed=probed)


def moved(ctx: SelectContext, tokens: TokenSelection, prunable: OriginalIds, hidden: Tensor) -> SelectContext:
    """The same query after a cut or a layer."""
    return replace(ctx, tokens=tokens, prunable=prunable, hidden=hidden)
