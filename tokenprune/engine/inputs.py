"""What a query is given, on the device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from tokenprune.engine.rng import Chance
from tokenprune.stages.memory import Slot
from tokenprune.stages.token_context import PastFrames
from tokenprune.tokens.layout_tables import LayoutTables


class Inputs(Protocol):
    """Observations made ready; adapters keep more in their own type.

    Attributes:
        images: Per view, the cropped pixels the patches align to, uint8 `[B, 3, S, S]`.
    """

    images: Mapping[str, Tensor]


@dataclass(frozen=True)
class Given:
    """Everything a query reads.

    Attributes:
        inputs: The adapter's.
        slots: Drafts of the environments, a batch row each; what the query remembers is written there.
        past: Frames that each stage looks back at, by its index.
        chance: Random numbers.
        tables: The layout as tensors.
    """

    inputs: Inputs
    slots: Sequence[Slot]
    past: Mapping[int, PastFrames]
    chance: Chance
    tables: LayoutTables
