"""The phases of a query, in which its time and its operations are counted."""

from __future__ import annotations

from enum import StrEnum


class Phase(StrEnum):
    """Part of a query; every moment of a query belongs to exactly one."""

    PREPROCESS = "preprocess"
    """Observations are checked, cropped and uploaded."""
    VISION = "vision"
    """Vision towers and projector."""
    SELECTION = "selection"
    """Stages run, tokens are cut."""
    DECODER = "decoder"
    """The layout's tokens go through the decoder: the prefill."""
    DECODE = "decode"
    """Autoregressive steps after the prefill."""
    FLOW = "flow"
    """Flow steps of an action expert after the prefill."""
    HEAD = "head"
    """Action head, and the copy of its actions to the host."""
    HISTORY = "history"
    """Observers run, and memory for the next query is stored."""
    REPLAY = "replay"
    """The replay of a CUDA graph, outside the phases within it."""
    CAPTURE = "recording"
    """A CUDA graph is captured, once."""
    DRAWING = "drawing"
    """The host renders past frames; not part of the query's time."""
    END = "end"
    """The query is over."""
