"""Comparisons that say what differs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tokenprune.policy import ActionChunk
from tokenprune.testing.verdicts import CheckFailed

CLOSE = 1e-4
"""Greatest difference, of the largest number compared, that rounding explains: norms may compute in float32."""


def require_same(what: str, found: object, expected: object) -> None:
    """Refuse what is not what it should be."""
    if found != expected:
        raise CheckFailed(f"{what}: {found!r:.200}, expected {expected!r:.200}")


def require_equal(first: Sequence[Tensor], second: Sequence[Tensor], message: str) -> None:
    """Refuse tensors that are not equal, bit for bit."""
    if not are_equal(first, second):
        raise CheckFailed(message)


def are_equal(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    """Whether two lists hold equal tensors."""
    return len(first) == len(second) and all(torch.equal(*pair) for pair in zip(first, second, strict=True))


def require_near(found: Tensor, expected: Tensor, what: str) -> None:
    """Refuse tensors that differ by more than rounding explains."""
    if found.shape != expected.shape:
        raise CheckFailed(f"{what}: shapes {list(found.shape)} and {list(expected.shape)}")
    if not found.numel():
        return
    gap = (found.double() - expected.double()).abs().max().item()
    if not gap <= CLOSE * max(1.0, expected.double().abs().max().item()):
        raise CheckFailed(f"{what} differ by {gap:.3g}")


def normalised(chunk: ActionChunk) -> Tensor:
    """Normalised actions `[T, D]` of a chunk that the model answered."""
    assert chunk.normalised is not None, "no controller is there to answer"
    return torch.from_numpy(chunk.normalised)
