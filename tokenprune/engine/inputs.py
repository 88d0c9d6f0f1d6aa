"""Everything a query reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor

from tokenprune.engine.rng import QueryRng
from tokenprune.stages.memory import Slot
from tokenprune.stages.token_context import PastFrames
from tokenprune.tokens.layout_tables import LayoutTables


class ModelInputs(Protocol):
    """Preprocessed observations on the device; each adapter has its own type with more fields.

    Attributes:
        images: Per view, the cropped pixels that patches align to, uint8 `[B, 3, S, S]`.
    """

    images: Mapping[str, Tensor]


@dataclass(frozen=True)
class QueryInputs:
    """Everything a query reads.

    Attributes:
        model: The adapter's inputs.
        slots: Drafts of the environments, one per batch row; the query writes its memory there.
        past: Frames that each stage looks back at, by the stage's index.
        rng: Random numbers.
        tables: The layout as tensors.
    """

    model: ModelInputs
    slots: Sequence[Slot]
    past: Mapping[int, PastFrames]
    rng: QueryRng
    tables: LayoutTables

    def drafted(self) -> QueryInputs:
        """The same inputs with new drafts of the slots."""
        return replace(self, slots=[slot.draft() for slot in self.slots])
