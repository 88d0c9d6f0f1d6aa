"""The KV cache: keys and values per layer, of different lengths after pruning, addressed by original id."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from tokenprune.tokens.selection import OriginalIds, head_rows_at


@dataclass(frozen=True, slots=True)
class LayerKV:
    """Keys and values `[B, G, n, d]` of one layer, after rotary embedding, and their original ids `[B, n]`."""

    k: Tensor
    v: Tensor
    ids: OriginalIds

    @classmethod
    def empty(cls, hidden: Tensor) -> LayerKV:
        """The entries of a skipped layer: none, for hidden states `[B, n, D]`."""
        nothing = hidden.new_zeros(len(hidden), 1, 0, 1)
        return cls(nothing, nothing, OriginalIds(torch.zeros(len(hidden), 0, dtype=torch.int64, device=hidden.device)))

    def at(self, places: Tensor) -> LayerKV:
        """Entries at the indices `places` `[B, R]`."""
        return LayerKV(
            head_rows_at(self.k, places), head_rows_at(self.v, places), OriginalIds(self.ids.gather(1, places))
        )

    def sorted(self) -> LayerKV:
        """The same entries in original order."""
        return self.at(self.ids.argsort(dim=1))

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
        """Everything a layer's queries attend to, the new tokens' entries last."""
        ...


@dataclass(slots=True)
class KVCache:
    """One `LayerKV` per layer that has run; new entries are kept."""

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
        """The cache as it is, for passes that must not extend it."""
        return FrozenKV(tuple(self.layers))


@dataclass(frozen=True, slots=True)
class FrozenKV:
    """One `LayerKV` per layer that no pass changes: the prefix of an action expert's flow steps."""

    layers: Sequence[LayerKV]

    def extend(self, layer: int, new: LayerKV) -> LayerKV:
        """The entries of a layer followed by the new ones, which are not kept."""
        return self.layers[layer].then(new)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Entries each layer holds."""
        return tuple(entry.ids.shape[1] for entry in self.layers)


@dataclass(frozen=True, slots=True)
class LastKV:
    """Keys and values of one environment's last query, for every token of its layout in every layer.

    Attributes:
        prunable: Original ids of its prunable tokens.
        layers: One `LayerKV` per layer, each a batch of one.
    """

    prunable: tuple[int, ...]
    layers: tuple[LayerKV, ...]


class ReusedKV:
    """Keys and values of one environment's query; tokens that have left use those of the last query.

    Each layer thus attends to every token of the layout, in original order.

    Args:
        last: Keys and values of the last query; with None, no token may leave.
        inner: A cache to fill as well, for passes after the prefill.
    """

    def __init__(self, last: LastKV | None, inner: KVCache | None) -> None:
        """Start with no token gone."""
        self.now = KVCache()
        self._last = last
        self._inner = inner
        self._left: OriginalIds | None = None

    @property
    def lengths(self) -> tuple[int, ...]:
        """Entries each layer that has run holds."""
        return self.now.lengths

    def leave(self, ids: OriginalIds) -> None:
        """From the next layer on, take these tokens `[1, R]` from the last query."""
        left = ids if self._left is None else torch.cat([self._left, ids], dim=1)
        self._left = OriginalIds(left.sort(dim=1).values)

    def extend(self, layer: int, new: LayerKV) -> LayerKV:
        """The entries of the tokens held, and of those that have left, in original order."""
        if self._left is not None and new.ids.shape[1]:
            assert self._last is not None
            new = new.then(self._last.layers[layer].at(self._left)).sorted()
        if self._inner is not None:
            self._inner.extend(layer, new)
        return self.now.extend(layer, new)
