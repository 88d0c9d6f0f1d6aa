"""What `transform_features` reads: one view's features between the vision towers and the projector."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from tokenprune.stages.memory import Slot, StageMemory, last_of
from tokenprune.tokens.layout import TokenLayout
from tokenprune.tokens.layout_tables import LayoutTables


@dataclass(frozen=True, slots=True)
class FeatureContext:
    """Features of one view, before the projector.

    Attributes:
        view: Camera name.
        features: `[B, N, D]`.
        images: The view's own cropped pixels, uint8 `[B, 3, S, S]`.
        layout: The query's tokens.
        slots: Environment of each batch row.
    """

    view: str
    features: Tensor
    images: Tensor
    layout: TokenLayout
    slots: Sequence[Slot]
    _tables: LayoutTables
    _memory: StageMemory

    def previous_images(self) -> tuple[Tensor, Tensor]:
        """Pixels `[B, 3, S, S]` of the last query since the reset (zeros if none), and which rows `[B]` have any."""
        return last_of([slot.memory.frames.get(self.view) for slot in self.slots], self.images)

    def previous_features(self) -> tuple[Tensor, Tensor]:
        """Features `[B, N, D]` that the last query passed to the projector, and which rows `[B]` have any."""
        return last_of([slot.memory.features.get(self.view) for slot in self.slots], self.features)

    def recall(self, name: str) -> tuple[Tensor, Tensor]:
        """Values `[B, N]` the stage remembered for the view's patches, and the mask `[B, N]` of known ones."""
        span = self.layout.views[self.view].span
        return self._memory.recall(name, self._tables.place[span.start : span.stop].expand(len(self.slots), -1))
