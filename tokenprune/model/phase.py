"""The phases of a query, in which its time and its operations are counted."""

from __future__ import annotations

from enum import StrEnum


class Phase(StrEnum):
    """Part of a query; every moment of it belongs to one."""

    PREPROCESS = "preprocess"
    """Observations are checked, cropped and uploaded."""
    VISION = "vision"
    """Vision towers and projector."""
    SELECTION = "selection"
    """Stages are asked, tokens are cut."""
    DECODER = "decoder"
    """The layout's tokens go through the decoder: the prefill."""
    DECODE = "decode"
    """Autoregressive steps after the prefill."""
    FLOW = "flow"
    """Flow steps of an action expert after the prefill."""
    HEAD = "head"
    """Action head, and the copy of its actions to the host."""
    HISTORY = "history"
    """Observers, and what the next query is to find."""
    REPLAY = "replay"
    """What surrounds the phases of a CUDA graph that is replayed."""
    CAPTURE = "recording"
    """A CUDA graph is captured, once."""
    DRAWING = "drawing"
    """The host draws past frames; no part of the query's time."""
    END = "end"
    """The query is over."""
