"""The least time of a query: its arithmetic at the device's peak, or its weights at the device's bandwidth."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch

from tokenprune.model.flops import layer_flops, layer_weights, query_flops
from tokenprune.model.info import BackboneInfo, DecoderShape
from tokenprune.tokens.plan import Plan

_REPEATS = 5
# Rows of the square matrices, and bytes of the copy: so large that the launch does not count.
_ON_GPU, _ON_CPU = (8192, 2**30), (2048, 2**28)


@dataclass(frozen=True, slots=True)
class Roof:
    """The speed that a device reached, best of a few tries.

    Attributes:
        flops: Per second, in one large matrix product.
        bandwidth: Bytes per second, read and written, in one large copy.
        rows: Rows and columns of the matrices.
        copied: Bytes of the copy.
    """

    flops: float
    bandwidth: float
    rows: int
    copied: int

    def best(self, other: Roof) -> Roof:
        """Return the higher of two measurements of the same device."""
        return replace(self, flops=max(self.flops, other.flops), bandwidth=max(self.bandwidth, other.bandwidth))


@dataclass(frozen=True, slots=True)
class Floor:
    """Least milliseconds of a query; each part takes the longer of its arithmetic and of reading its weights.

    Attributes:
        other: Outside the decoder, by part.
        layers: Each decoder layer, all its passes over the layout's tokens.
        follow_up: Passes of tokens behind the layout.
    """

    other: dict[str, float]
    layers: tuple[float, ...]
    follow_up: float

    @property
    def total(self) -> float:
        """The whole query."""
        return sum(self.other.values()) + sum(self.layers) + self.follow_up


def measure_roof(device: torch.device, dtype: torch.dtype) -> Roof:
    """Multiply two large matrices and copy one large block, several times each."""
    rows, copied = _ON_GPU if device.type == "cuda" else _ON_CPU
    a, b = (torch.randn(rows, rows, device=device).to(dtype) for _ in range(2))
    product = torch.empty(rows, rows, device=device, dtype=dtype)
    # Linear layers multiply by a transposed matrix too.
    flops = 2 * rows**3 / _shortest(partial(torch.mm, a, b.T, out=product), device)
    # Ones, because untouched pages of zeros are not read from memory.
    source, target = (torch.ones(copied, dtype=torch.uint8, device=device) for _ in range(2))
    bandwidth = 2 * copied / _shortest(partial(target.copy_, source), device)
    return Roof(flops, bandwidth, rows, copied)


def _shortest(work: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of the fastest of a few tries, after one for warm-up."""
    spent = []
    for _ in range(1 + _REPEATS):
        _wait(device)
        started = time.perf_counter()
        work()
        _wait(device)
        spent.append(time.perf_counter() - started)
    return min(spent[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def floor(info: BackboneInfo, plan: Plan, roof: Roof, itemsize: int) -> Floor:
    """Return the least time of a query that runs to plan, without the selection of tokens.

    A part whose weights are not known counts by its arithmetic alone, and reading activations, keys and values does not
    count. The floor may therefore be too low, but never too high.

    Args:
        info: The backbone.
        plan: Token counts per layer.
        roof: The device.
        itemsize: Bytes per weight.
    """
    flops = query_flops(info, plan)

    def least(work: float, weights: float) -> float:
        return 1e3 * max(work / roof.flops, weights * itemsize / roof.bandwidth)

    weights = [layer_weights(info.decoder) if n else 0 for n in flops.layers]
    if not plan.layout.readout:
        weights[-1] = _entering_weights(info.decoder)
    follow_up = 0.0
    if (follow := info.follow_up) is not None:
        for rows, before, norms in follow.ran(plan.flow_interval):
            # Adaptive norms multiply a single condition vector, so they read one weight per two FLOPs.
            read = layer_weights(follow.decoder) + norms // 2
            works = (layer_flops(follow.decoder, rows, n + before + rows) + norms for n in plan.keys if n)
            follow_up += sum(least(work, read) for work in works)
    return Floor(
        other={part: least(n, info.other_weights.get(part, 0)) for part, n in flops.other.items()},
        layers=tuple(least(n, info.repeats * read) for n, read in zip(flops.layers, weights, strict=True)),
        follow_up=follow_up,
    )


def _entering_weights(shape: DecoderShape) -> int:
    """Return the number of weights in the projections of queries, keys and values."""
    return shape.hidden * (shape.heads + 2 * shape.kv_heads) * shape.head_dim
