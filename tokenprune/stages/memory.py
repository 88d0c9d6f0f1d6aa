"""What is remembered within an episode, one slot per environment, and cleared by `reset`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tokenprune.stages.frames import FrameBuffer

if TYPE_CHECKING:
    import numpy as np

    from tokenprune.errors import StageError
    from tokenprune.model.kv_cache import LastKV


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
class TokenMap:
    """Values by a token's place among the prunable ones: `values` `[P]`, `seen` `[P]`; "was pruned" is not "scored 0".

    Places stay the same where a prompt of another length moves the original ids of what follows it.
    """

    values: Tensor
    seen: Tensor


@dataclass(slots=True)
class Remembered:
    """What the queries of one environment leave on the device for the next.

    Attributes:
        frames: The last query's cropped pixels by view.
        features: The last query's features by view, where some stage changes features.
        maps: Values by prunable token, by name.
        numbers: Single values by name.
        kv: Keys and values of the last query, where the pipeline reuses them.
    """

    frames: Mapping[str, Tensor] = field(default_factory=dict)
    features: Mapping[str, Tensor] = field(default_factory=dict)
    maps: dict[str, TokenMap] = field(default_factory=dict)
    numbers: dict[str, Tensor] = field(default_factory=dict)
    kv: LastKV | None = None

    def copy(self) -> Remembered:
        """The same tensors under names of its own."""
        return Remembered(self.frames, self.features, dict(self.maps), dict(self.numbers), self.kv)


@dataclass(slots=True)
class Slot:
    """One environment, made anew by `reset`.

    Attributes:
        index: Number of the slot.
        instruction: What the episode is about.
        past: Frames of past control steps, on the host.
        number: Episodes of this slot before this one.
        queries: Queries since the reset.
        asked_at: Control step of the last query.
        memory: What is on the device.
        host: What controllers keep, by stage.
        executed: Actions since the reset.
        failed: What failed since the last query, in a pipeline that then falls back.
        crops: Frames of the control steps that the last query looked back at, cropped and on the device.
    """

    index: int
    instruction: str
    past: FrameBuffer
    number: int = 0
    queries: int = 0
    asked_at: int = 0
    memory: Remembered = field(default_factory=Remembered)
    host: dict[int, dict[str, Any]] = field(default_factory=dict)
    executed: list[ExecutedAction] = field(default_factory=list)
    failed: StageError | None = None
    crops: Mapping[int, Mapping[str, Tensor]] = field(default_factory=dict)

    def draft(self) -> Slot:
        """The same environment for one query, which may fail and then must have changed nothing."""
        return replace(self, memory=self.memory.copy())


def flags(values: Sequence[bool], device: torch.device) -> Tensor:
    """Host truths as a tensor `[B]`, without a copy that would wait."""
    return torch.stack([torch.full((), value, device=device) for value in values])


def last_of(kept: Sequence[Tensor | None], current: Tensor) -> tuple[Tensor, Tensor]:
    """What was kept of each last query `[B, …]`, zeros where nothing was, and which rows `[B]` have it."""
    blank = torch.zeros_like(current[0])
    had = flags([one is not None for one in kept], current.device)
    return torch.stack([blank if one is None else one for one in kept]), had


def remember(slots: Sequence[Slot], name: str, places: Tensor, values: Tensor, size: int) -> None:
    """Scatter values `[B, M]` to the places `[B, M]` of maps with `size` places, one map per slot."""
    for row, slot in enumerate(slots):
        blank = torch.zeros(size, dtype=values.dtype, device=values.device)
        seen = torch.zeros(size, dtype=torch.bool, device=values.device)
        slot.memory.maps[name] = TokenMap(
            blank.scatter(0, places[row], values[row]), seen.scatter(0, places[row], True)
        )


def shift(slots: Sequence[Slot], name: str, depth: int) -> None:
    """Make room for a newest map `name.0`: each map `name.i` becomes `name.(i + 1)`, and `depth` of them stay."""
    for slot in slots:
        for age in reversed(range(depth - 1)):
            if f"{name}.{age}" in slot.memory.maps:
                slot.memory.maps[f"{name}.{age + 1}"] = slot.memory.maps[f"{name}.{age}"]


def recall(slots: Sequence[Slot], name: str, like: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Values `[B, P]` and seen `[B, P]` of a map; nothing is seen in a slot that has none since its reset."""
    blank = TokenMap(like.new_zeros(size), torch.zeros(size, dtype=torch.bool, device=like.device))
    maps = [slot.memory.maps.get(name, blank) for slot in slots]
    return torch.stack([m.values for m in maps]), torch.stack([m.seen for m in maps])


def once(slots: Sequence[Slot], name: str, compute: Callable[[], Tensor]) -> Tensor:
    """Numbers `[B]` of which each slot keeps the first it was given since its reset; computed only where one lacks."""
    if any(name not in slot.memory.numbers for slot in slots):
        for slot, value in zip(slots, compute(), strict=True):
            slot.memory.numbers.setdefault(name, value)
    return torch.stack([slot.memory.numbers[name] for slot in slots])
