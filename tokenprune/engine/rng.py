"""Random numbers of a query: drawn on the host, so that they are the same on every device, then uploaded."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tokenprune.model.device import upload
from tokenprune.stages.memory import Slot


class QueryRng:
    """Random numbers of one query, one batch row per environment.

    Attributes:
        seeds: One seed per batch row, int64 `[B]`; differs from query to query, repeats with the pipeline's seed.
        drawn: All noise drawn so far, in order.
    """

    def __init__(self, slots: Sequence[Slot], seed: int, device: torch.device) -> None:  # cold: before the model runs
        """Seed the slots' next query."""
        self.seeds = upload(torch.tensor([mix(seed, *_place(slot)) for slot in slots], dtype=torch.int64), device)
        self.drawn: list[Tensor] = []
        self._places = [_place(slot) for slot in slots]
        self._device = device

    def noise(self, *shape: int) -> Tensor:  # cold: drawn on the host
        """Standard normal noise `[B, *shape]`, float32; the same in every pipeline, different in every query."""
        seeds = (mix(0, *place) for place in self._places)
        rows = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        self.drawn.append(upload(torch.stack(rows), self._device))
        return self.drawn[-1]


class BufferedRng(QueryRng):
    """Fixed buffers for the random numbers of queries that replay a CUDA graph."""

    def __init__(self, first: QueryRng) -> None:
        """Allocate buffers for the same draws as in `first`, a query that has run."""
        self.seeds = first.seeds.clone()
        self.drawn = [noise.clone() for noise in first.drawn]
        self._next = iter(self.drawn)

    def noise(self, *shape: int) -> Tensor:
        """The buffer of the next draw."""
        return next(self._next)

    def refill(self, rng: QueryRng) -> None:
        """Copy the random numbers of another query into the buffers."""
        self.seeds.copy_(rng.seeds, non_blocking=True)
        for buffer in self.drawn:
            buffer.copy_(rng.noise(*buffer.shape[1:]), non_blocking=True)


def mix(*numbers: int) -> int:
    """Hash small integers into one 63-bit seed, the same on every machine."""
    mixed = 0x9E3779B97F4A7C15
    for number in numbers:
        mixed = (mixed ^ number) * 0xBF58476D1CE4E5B9 % 2**64
        mixed ^= mixed >> 29
    return mixed >> 1


def _place(slot: Slot) -> tuple[int, int, int]:
    return slot.number, slot.queries, slot.index
