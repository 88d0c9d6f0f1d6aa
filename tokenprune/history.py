"""What is remembered within an episode, one slot per environment, and cleared by `reset`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tokenprune.frames import FrameBuffer
from tokenprune.selection import OriginalIds, TokenSelection

if TYPE_CHECKING:
    import numpy as np

    from tokenprune.layout import TokenLayout


@dataclass(frozen=True, slots=True)
class EpisodeStart:
    """An episode begins in one slot: `number` counts the episodes of that slot from 0."""

    slot: int
    instruction: str
    number: int


@dataclass(frozen=True, slots=True)
class ExecutedAction:
    """One control step the robot executed.

    Attributes:
        slot: Environment it happened in.
        action: Commanded action `[D]` in the environment's units.
        pose: Achieved end-effector pose, or None where the host does not know it.
        time: Seconds since the start of the episode, or None.
    """

    slot: int
    action: np.ndarray
    pose: np.ndarray | None = None
    time: float | None = None


@dataclass(frozen=True, slots=True)
class QueryRecord:
    """One finished query, still on the device.

    Attributes:
        slots: Environments of the batch rows.
        mode: Mode it ran in.
        layout: Its tokens.
        tokens: What the last layer held.
        actions: Normalised actions `[B, T, D]`.
    """

    slots: tuple[int, ...]
    mode: str
    layout: TokenLayout
    tokens: TokenSelection
    actions: Tensor


@dataclass(frozen=True, slots=True)
class TokenMap:
    """Values by original id: `values` `[N]` and `seen` `[N]`; "was pruned" is not "scored 0"."""

    values: Tensor
    seen: Tensor


@dataclass(slots=True)
class Slot:
    """The memory of one environment, made anew by `reset`.

    Attributes:
        index: Number of the slot.
        instruction: What the episode is about.
        past: Frames of past control steps, on the host.
        number: Episodes of this slot before this one.
        queries: Queries since the reset.
        asked_at: Control step of the last query.
        frames: The last query's cropped pixels by view, on the device.
        maps: Values by original token, by name.
        numbers: Single values by name.
        host: What controllers keep, by stage.
        executed: Actions since the reset.
    """

    index: int
    instruction: str
    past: FrameBuffer
    number: int = 0
    queries: int = 0
    asked_at: int = 0
    frames: Mapping[str, Tensor] = field(default_factory=dict)
    maps: dict[str, TokenMap] = field(default_factory=dict)
    numbers: dict[str, Tensor] = field(default_factory=dict)
    host: dict[int, dict[str, Any]] = field(default_factory=dict)
    executed: list[ExecutedAction] = field(default_factory=list)


def remember(slots: Sequence[Slot], name: str, ids: OriginalIds, values: Tensor, n_source: int) -> None:
    """Scatter values `[B, M]` of the tokens `ids` `[B, M]` to original positions, one map per slot."""
    for row, slot in enumerate(slots):
        blank = torch.zeros(n_source, dtype=values.dtype, device=values.device)
        seen = torch.zeros(n_source, dtype=torch.bool, device=values.device)
        slot.maps[name] = TokenMap(blank.scatter(0, ids[row], values[row]), seen.scatter(0, ids[row], True))


def recall(slots: Sequence[Slot], name: str, like: Tensor, n_source: int) -> tuple[Tensor, Tensor]:
    """Values `[B, N]` and seen `[B, N]` of a map; nothing is seen in a slot that has none since its reset."""
    blank = TokenMap(like.new_zeros(n_source), torch.zeros(n_source, dtype=torch.bool, device=like.device))
    maps = [slot.maps.get(name, blank) for slot in slots]
    return torch.stack([m.values for m in maps]), torch.stack([m.seen for m in maps])


def once(slots: Sequence[Slot], name: str, compute: Callable[[], Tensor]) -> Tensor:
    """Numbers `[B]` of which each slot keeps the first it was given since its reset; computed only where one lacks."""
    if any(name not in slot.numbers for slot in slots):
        for slot, value in zip(slots, compute(), strict=True):
            slot.numbers.setdefault(name, value)
    return torch.stack([slot.numbers[name] for slot in slots])
