"""Keys and values per layer, of different lengths after pruning, addressed by original id."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from tokenprune.selection import OriginalIds


@dataclass(frozen=True, slots=True)
class LayerKV:
    """Keys and values `[B, G, n, d]` of one layer, after rotary embedding, and their original ids `[B, n]`."""

    k: Tensor
    v: Tensor
    ids: OriginalIds

    def then(self, later: LayerKV) -> LayerKV:
        """These entries followed by later ones."""
        return LayerKV(
            torch.cat([self.k, later.k], dim=2),
            torch.cat([self.v, later.v], dim=2),
            OriginalIds(torch.cat([self.ids, later.ids], dim=1)),
        )


@dataclass(slots=True)
class KVCache:
    """One `LayerKV` per layer that has run."""

    layers: list[LayerKV] = field(default_factory=list)

    def extend(self, layer: int, new: LayerKV) -> LayerKV:
        """Append the entries of a layer and return all it has."""
        if layer == len(self.layers):
            self.layers.append(new)
        else:
            self.layers[layer] = self.layers[layer].then(new)
        return self.layers[layer]

    @property
    def lengths(self) -> tuple[int, ...]:
        """Entries each layer holds."""
        return tuple(entry.ids.shape[1] for entry in self.layers)
