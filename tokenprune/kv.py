"""Keys and values per layer, of different lengths after pruning, addressed by original id."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from tokenprune.selection import OriginalIds


@dataclass(frozen=True, slots=True)
class LayerKV:
    """Keys and values `[B, G, n, d]` of one layer, after rotary embedding, and their original ids `[B, n]`."""

    k: Tensor
    v: Tensor
    ids: OriginalIds

    @classmethod
    def empty(cls, hidden: Tensor) -> LayerKV:
        """What a layer holds that is left out, for hidden states `[B, n, D]`."""
        nothing = hidden.new_zeros(len(hidden), 1, 0, 1)
        return cls(nothing, nothing, OriginalIds(torch.zeros(len(hidden), 0, dtype=torch.int64, device=hidden.device)))

    def then(self, later: LayerKV) -> LayerKV:
        """These entries followed by later ones."""
        return LayerKV(
            torch.cat([self.k, later.k], dim=2),
            torch.cat([self.v, later.v], dim=2),
            OriginalIds(torch.cat([self.ids, later.ids], dim=1)),
        )


class Memory(Protocol):
    """What new tokens attend to besides themselves, layer by layer."""

    @property
    def lengths(self) -> tuple[int, ...]:
        """Entries each layer that has run holds."""
        ...

    def extend(self, layer: int, new: LayerKV) -> LayerKV:
        """Everything a layer's queries attend to, the new tokens' own entries last."""
        ...


@dataclass(slots=True)
class KVCache:
    """One `LayerKV` per layer that has run; what new tokens bring stays."""

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

    def frozen(self) -> FrozenKV:
        """What is held now, for passes that leave nothing behind."""
        return FrozenKV(tuple(self.layers))


@dataclass(frozen=True, slots=True)
class FrozenKV:
    """One `LayerKV` per layer that no pass changes: the prefix of an action expert's flow steps."""

    layers: Sequence[LayerKV]

    def extend(self, layer: int, new: LayerKV) -> LayerKV:
        """The entries of a layer, followed by new ones that are forgotten afterwards."""
        return self.layers[layer].then(new)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Entries each layer holds."""
        return tuple(entry.ids.shape[1] for entry in self.layers)
