"""The memory of an episode: one slot per environment, cleared by `reset`."""

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
    """The start of an episode in one slot; `number` counts the episodes of that slot from 0."""

    slot: int
    instruction: str
    number: int


@dataclass(frozen=True, slots=True)
class ExecutedAction:
    """One action that the robot executed.

    Attributes:
        slot: The environment.
        action: Commanded action `[D]` in the environment's units.
        pose: Achieved end-effector pose, or None if the host does not know it.
        time: Seconds since the start of the episode, or None.
    """

    slot: int
    action: np.ndarray
    pose: np.ndarray | None = None
    time: float | None = None


@dataclass(frozen=True, slots=True)
class TokenMap:
    """Values `[P]` of a layout's prunable tokens, and the mask `seen` `[P]` of known values (unknown is not 0).

    Indexed by the token's place among the prunable ones, which does not change with the length of the prompt.
    """

    values: Tensor
    seen: Tensor


@dataclass(slots=True)
class SlotMemory:
    """What one environment's queries leave on the device for its next query.

    Attributes:
        frames: The last query's cropped pixels by view.
        features: The last query's features by view, if a stage transforms features.
        maps: Values of prunable tokens, by name.
        numbers: Scalars by name.
        kv: Keys and values of the last query, if the pipeline reuses them.
    """

    frames: Mapping[str, Tensor] = field(default_factory=dict)
    features: Mapping[str, Tensor] = field(default_factory=dict)
    maps: dict[str, TokenMap] = field(default_factory=dict)
    numbers: dict[str, Tensor] = field(default_factory=dict)
    kv: LastKV | None = None

    def copy(self) -> SlotMemory:
        """A copy that shares the tensors."""
        return SlotMemory(self.frames, self.features, dict(self.maps), dict(self.numbers), self.kv)


@dataclass(slots=True)
class Slot:
    """The state of one environment; `reset` makes a new one.

    Attributes:
        index: Number of the slot.
        instruction: Instruction of the episode.
        prompt: The tokenised instruction.
        past: Frames of past control steps, on the host.
        number: Episodes of this slot before this one.
        queries: Queries since the reset.
        asked_at: Control step of the last query.
        memory: Memory on the device.
        host: Controllers' memory on the host, by stage index.
        executed: Actions since the reset.
        failed: A stage's error since the last query, which makes the next query fall back.
        crops: Cropped frames, on the device, of the control steps that the last query looked back at.
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
        """A copy for one query to write to, so that a query that fails changes nothing."""
        return replace(self, memory=self.memory.copy())


def flags(values: Sequence[bool], device: torch.device) -> Tensor:
    """Host booleans as a tensor `[B]`, filled on the device, because a copy would wait."""
    return torch.stack([torch.full((), value, device=device) for value in values])


def last_of(kept: Sequence[Tensor | None], current: Tensor) -> tuple[Tensor, Tensor]:
    """Stack the rows of `kept` `[B, …]`, with zeros for None, and return which rows `[B]` were present."""
    blank = torch.zeros_like(current[0])
    had = flags([one is not None for one in kept], current.device)
    return torch.stack([blank if one is None else one for one in kept]), had


@dataclass(frozen=True, slots=True)
class StageMemory:
    """One stage's memory in a batch of environments; `Policy.reset` empties it.

    Attributes:
        slots: Environment of each batch row.
        prefix: Prefix of the stage's names, so that two stages never share one.
        size: Prunable tokens of the layout.
        device: Device of the tensors.
    """

    slots: Sequence[Slot]
    prefix: str
    size: int
    device: torch.device

    def remember(self, name: str, places: Tensor, values: Tensor) -> None:
        """Keep values `[B, M]` of the prunable tokens at places `[B, M]`; all others become unknown."""
        for row, slot in enumerate(self.slots):
            blank = torch.zeros(self.size, dtype=values.dtype, device=values.device)
            seen = torch.zeros(self.size, dtype=torch.bool, device=values.device)
            slot.memory.maps[self.prefix + name] = TokenMap(
                blank.scatter(0, places[row], values[row]), seen.scatter(0, places[row], True)
            )

    def push(self, name: str, places: Tensor, values: Tensor, depth: int) -> None:
        """Keep values as `name.0`; earlier ones move to `name.1` and so on, up to `depth` in all."""
        for slot in self.slots:
            maps = slot.memory.maps
            for age in reversed(range(depth - 1)):
                if f"{self.prefix}{name}.{age}" in maps:
                    maps[f"{self.prefix}{name}.{age + 1}"] = maps[f"{self.prefix}{name}.{age}"]
        self.remember(f"{name}.0", places, values)

    def recall(self, name: str, places: Tensor) -> tuple[Tensor, Tensor]:
        """Values remembered at places `[B, M]`, and the mask of known values; both `[B, M]`."""
        blank = TokenMap(
            torch.zeros(self.size, device=self.device), torch.zeros(self.size, dtype=torch.bool, device=self.device)
        )
        maps = [slot.memory.maps.get(self.prefix + name, blank) for slot in self.slots]
        values, seen = torch.stack([m.values for m in maps]), torch.stack([m.seen for m in maps])
        return values.gather(1, places), seen.gather(1, places)

    def once(self, name: str, compute: Callable[[], Tensor]) -> Tensor:
        """Scalars `[B]` that each slot keeps from its first query; `compute` runs only if a slot has none."""
        name = self.prefix + name
        if any(name not in slot.memory.numbers for slot in self.slots):
            for slot, value in zip(self.slots, compute(), strict=True):
                slot.memory.numbers.setdefault(name, value)
        return torch.stack([slot.memory.numbers[name] for slot in self.slots])
