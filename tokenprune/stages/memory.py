"""What is remembered within an episode, one slot per environment, and cleared by `reset`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tokenprune.stages.frames import FrameBuffer
from tokenprune.tokens.prompt import EncodedPrompt

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
class SlotMemory:
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

    def copy(self) -> SlotMemory:
        """The same tensors in containers of its own."""
        return SlotMemory(self.frames, self.features, dict(self.maps), dict(self.numbers), self.kv)


@dataclass(slots=True)
class Slot:
    """One environment, made anew by `reset`.

    Attributes:
        index: Number of the slot.
        instruction: What the episode is about.
        prompt: The instruction, tokenised.
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
    prompt: EncodedPrompt | None = None
    number: int = 0
    queries: int = 0
    asked_at: int = 0
    memory: SlotMemory = field(default_factory=SlotMemory)
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


@dataclass(frozen=True, slots=True)
class StageMemory:
    """What one stage remembers within the episodes of a batch; `Policy.reset` empties it.

    Attributes:
        slots: Environment of each batch row.
        prefix: Begins the name of everything the stage remembers, so that stages do not meet.
        size: Prunable tokens of the layout.
        device: Where tensors lie.
    """

    slots: Sequence[Slot]
    prefix: str
    size: int
    device: torch.device

    def remember(self, name: str, places: Tensor, values: Tensor) -> None:
        """Keep values `[B, M]` of the prunable tokens at places `[B, M]`; all others count as unseen."""
        for row, slot in enumerate(self.slots):
            blank = torch.zeros(self.size, dtype=values.dtype, device=values.device)
            seen = torch.zeros(self.size, dtype=torch.bool, device=values.device)
            slot.memory.maps[self.prefix + name] = TokenMap(
                blank.scatter(0, places[row], values[row]), seen.scatter(0, places[row], True)
            )

    def push(self, name: str, places: Tensor, values: Tensor, depth: int) -> None:
        """Keep values as `name.0`; what was kept so before becomes `name.1` and so on, up to `depth` of them."""
        for slot in self.slots:
            maps = slot.memory.maps
            for age in reversed(range(depth - 1)):
                if f"{self.prefix}{name}.{age}" in maps:
                    maps[f"{self.prefix}{name}.{age + 1}"] = maps[f"{self.prefix}{name}.{age}"]
        self.remember(f"{name}.0", places, values)

    def recall(self, name: str, places: Tensor) -> tuple[Tensor, Tensor]:
        """Values `[B, M]` at some places `[B, M]`, and whether each was seen; nothing is, before anything was kept."""
        blank = TokenMap(
            torch.zeros(self.size, device=self.device), torch.zeros(self.size, dtype=torch.bool, device=self.device)
        )
        maps = [slot.memory.maps.get(self.prefix + name, blank) for slot in self.slots]
        values, seen = torch.stack([m.values for m in maps]), torch.stack([m.seen for m in maps])
        return values.gather(1, places), seen.gather(1, places)

    def once(self, name: str, compute: Callable[[], Tensor]) -> Tensor:
        """Numbers `[B]`, of which each slot keeps the first since its reset; computed only where one lacks."""
        name = self.prefix + name
        if any(name not in slot.memory.numbers for slot in self.slots):
            for slot, value in zip(self.slots, compute(), strict=True):
                slot.memory.numbers.setdefault(name, value)
        return torch.stack([slot.memory.numbers[name] for slot in self.slots])
