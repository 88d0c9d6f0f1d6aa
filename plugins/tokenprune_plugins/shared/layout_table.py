"""Tensors that depend on the token layout alone, computed once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tokenprune import SelectContext, TokenLayout


class LayoutTable:
    """Computes a tensor at the first query of each layout and device, and keeps it.

    Args:
        compute: Makes the tensor on the host.
    """

    def __init__(self, compute: Callable[[TokenLayout], Tensor]) -> None:
        self._compute = compute
        self._tables: dict[tuple[TokenLayout, torch.device], Tensor] = {}

    def of(self, ctx: SelectContext) -> Tensor:
        """The tensor for the layout of a query, on the query's device."""
        key = (ctx.layout, ctx.prunable.device)
        if key not in self._tables:
            self._tables[key] = self._compute(ctx.layout).to(ctx.prunable.device)
        return self._tables[key]
