"""What a stage sees of a view's features on their way from the vision towers to the projector."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenprune.stages.memory import Slot, last_of, recall
from tokenprune.tokens.layout import TokenLayout
from tokenprune.tokens.layout_tables import LayoutTables


@dataclass(frozen=True, slots=True)
class FeatureContext:
    """Features of one view on their way to the projector.

    Attributes:
        view: Camera name.
        features: `[B, N, D]`.
        images: The view's own cropped pixels, uint8 `[B, 3, S, S]`.
        layout: The query's tokens.
        tables: The layout as tensors.
        slots: Memory of each environment.
        scope: Prefix of what the stage remembers.
    """

    view: str
    features: Tensor
    images: Tensor
    layout: TokenLayout
    tables: LayoutTables
    slots: Sequence[Slot]
    scope: str

    def previous_images(self) -> tuple[Tensor, Tensor]:
        """Pixels `[B, 3, S, S]` of the last query since the reset, and which rows `[B]` had one (zeros where none)."""
        return last_of([slot.memory.frames.get(self.view) for slot in self.slots], self.images)

    def previous_features(self) -> tuple[Tensor, Tensor]:
        """What the last query passed on to the projector `[B, N, D]`, and which rows `[B]` had one."""
        return last_of([slot.memory.features.get(self.view) for slot in self.slots], self.features)

    def recall(self, name: str) -> tuple[Tensor, Tensor]:
        """Values the stage remembered for the view's patches `[B, N]`, and whether each was seen then `[B, N]`."""
        blank = self.features.new_zeros(0, dtype=torch.float32)
        values, seen = recall(self.slots, self.scope + name, blank, len(self.layout.prunable))
        span = self.layout.views[self.view].span
        places = self.tables.place[span.start : span.stop].expand(len(values), -1)
        return values.gather(1, places), seen.gather(1, places)
