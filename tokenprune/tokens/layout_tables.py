"""A token layout as tensors on a device."""

from __future__ import annotations

import torch

from tokenprune.tokens.layout import TokenLayout


class LayoutTables:
    """A token layout as int64 tensors, made once per layout and device.

    Attributes:
        fixed: Original ids of the tokens that always stay `[F]`.
        prunable: Original ids of the prunable tokens `[P]`.
        rows: Original ids of each named span `[R]`.
        place: Per token, its index among the prunable ones `[N]`; -1 for fixed tokens.
        view_of: Per token, the number of its view `[N]`; -1 outside views.
        view_number: Number of each view, in sequence order.
    """

    def __init__(self, layout: TokenLayout, device: torch.device) -> None:  # cold: once per layout
        """Upload the layout."""
        self.fixed = torch.tensor(layout.fixed, dtype=torch.int64, device=device)
        self.prunable = torch.tensor(layout.prunable, dtype=torch.int64, device=device)
        self.rows = {
            name: torch.tensor(tuple(layout.span(name)), dtype=torch.int64, device=device) for name in layout.row_names
        }
        owner = [-1] * layout.n_tokens
        for number, segment in enumerate(layout.views.values()):
            for token in segment.span:
                owner[token] = number
        place = [-1] * layout.n_tokens
        for number, token in enumerate(layout.prunable):
            place[token] = number
        self.place = torch.tensor(place, dtype=torch.int64, device=device)
        self.view_of = torch.tensor(owner, dtype=torch.int64, device=device)
        self.view_number = {name: number for number, name in enumerate(layout.views)}
