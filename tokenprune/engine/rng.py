"""Random numbers of a query: drawn on the host, so the same on every device, and uploaded like the observation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tokenprune.model.device import upload
from tokenprune.stages.memory import Slot


class QueryRng:
    """Random numbers of one query, a row for each environment.

    Attributes:
        seeds: One number per row that differs from query to query and repeats with the pipeline's seed, int64 `[B]`.
        drawn: Every noise that was asked for, in order.
    """

    def __init__(self, slots: Sequence[Slot], seed: int, device: torch.device) -> None:  # cold: before the model runs
        """Numbers of the slots' next query."""
        self.seeds = upload(torch.tensor([mix(seed, *_place(slot)) for slot in slots], dtype=torch.int64), device)
        self.drawn: list[Tensor] = []
        self._places = [_place(slot) for slot in slots]
        self._device = device

    def noise(self, *shape: int) -> Tensor:  # cold: drawn on the host
        """Standard normal numbers `[B, *shape]`, float32: the same for every pipeline, other ones for every query."""
        seeds = (mix(0, *place) for place in self._places)
        rows = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        self.drawn.append(upload(torch.stack(rows), self._device))
        return self.drawn[-1]


class BufferedRng(QueryRng):
    """Buffers that each query's random numbers are copied into."""

    def __init__(self, first: QueryRng) -> None:
        """Hold the numbers of a query that has run; another asks for as many, in the same order."""
        self.seeds = first.seeds.clone()
        self.drawn = [noise.clone() for noise in first.drawn]
        self._asked = iter(self.drawn)

    def noise(self, *shape: int) -> Tensor:
        """The buffer of the next drawing."""
        return next(self._asked)

    def refill(self, rng: QueryRng) -> None:
        """Take the numbers of another query."""
        self.seeds.copy_(rng.seeds, non_blocking=True)
        for buffer in self.drawn:
            buffer.copy_(rng.noise(*buffer.shape[1:]), non_blocking=True)


def mix(*numbers: int) -> int:
    """Combine small integers into one 63-bit number, the same on every machine."""
    mixed = 0x9E3779B97F4A7C15
    for number in numbers:
        mixed = (mixed ^ number) * 0xBF58476D1CE4E5B9 % 2**64
        mixed ^= mixed >> 29
    return mixed >> 1


def _place(slot: Slot) -> tuple[int, int, int]:
    return slot.number, slot.queries, slot.index
