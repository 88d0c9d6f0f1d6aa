"""Which rotary positions kept tokens have."""

from __future__ import annotations

from enum import StrEnum


class Positions(StrEnum):
    """Rotary positions of kept tokens."""

    PRESERVE = "preserve"
    """Each keeps its original position."""
    COMPACT = "compact"
    """They are renumbered at each cut."""
