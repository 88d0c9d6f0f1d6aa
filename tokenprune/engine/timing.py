"""Clocks that time the phases of a query without waiting for the device."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from tokenprune.model.phase import Phase


class Clock:
    """Times phases; each lasts until the next one is entered.

    On a GPU the marks are CUDA events, read after the query; elsewhere they are readings of the host's clock.
    """

    _in_graph = False

    def __init__(self, device: torch.device) -> None:
        """Timing begins at the first `enter`."""
        self._cuda = device.type == "cuda"
        self._marks: list[tuple[Phase | None, Any]] = []
        self._inside: list[tuple[Phase, Clock]] = []

    def enter(self, phase: Phase | None) -> Phase | None:
        """Begin a phase and return the one that ended, None at the first."""
        before = self._marks[-1][0] if self._marks else None
        self._marks.append((phase, self._mark()))
        return before

    def _mark(self) -> Any:  # noqa: ANN401
        if not self._cuda:
            return time.perf_counter()
        mark = torch.cuda.Event(enable_timing=True, external=self._in_graph)
        mark.record()
        return mark

    @contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        """Time a phase; time inside it that belongs to another phase counts there."""
        before = self.enter(name)
        try:
            yield
        finally:
            self.enter(before)

    def split(self, clock: Clock) -> None:
        """Split the current phase by the phases of another clock; the remainder stays in the current phase."""
        phase = self._marks[-1][0]
        assert phase is not None, "a clock splits a phase that has begun"
        self._inside.append((phase, clock))

    def milliseconds(self) -> dict[Phase, float]:
        """Milliseconds per phase up to the last mark; call it when the device has finished."""
        spent: dict[Phase, float] = {}
        for (phase, start), (_, stop) in zip(self._marks, self._marks[1:], strict=False):
            if phase is None:
                continue
            passed = start.elapsed_time(stop) if self._cuda else (stop - start) * 1e3
            spent[phase] = spent.get(phase, 0.0) + passed
        for whole, clock in self._inside:
            for part, passed in clock.milliseconds().items():
                spent[part] = spent.get(part, 0.0) + passed
                spent[whole] -= passed
        return spent


class GraphClock(Clock):
    """Times phases inside a CUDA graph, with events that are captured and recorded again in every replay.

    Without CUDA it times nothing.
    """

    # In a graph, only external events have times; others are dependencies between streams.
    _in_graph = True

    def enter(self, phase: Phase | None) -> Phase | None:
        """Begin a phase of the graph."""
        return super().enter(phase) if self._cuda else None
