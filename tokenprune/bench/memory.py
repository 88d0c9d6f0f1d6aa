"""Measures the memory of a query at its peak, and its waits for the device."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import torch

from tokenprune.engine.adapter import Backbone, Observation
from tokenprune.pipelines.config import PipelineConfig
from tokenprune.policy import ActionChunk, Policy
from tokenprune.registry.discovery import Registry

T = TypeVar("T")

_PROCESS = Path("/proc/self")
_RESET_PEAK = "5"
_SLACK = 2**26
"""Linux counts pages per core and adds them up now and then, so its two numbers differ by some MB."""

_WAIT = "called a synchronizing CUDA operation"


class MeteredPolicy(Policy):
    """A policy that records the memory of each query, and its waits for the device on request.

    Attributes:
        peaks: Bytes at the peak of each query, weights included; None where the system does not report it.
        waits: Waits for the device in the last query that counted them; None elsewhere than on CUDA.
        counting: Whether queries count waits. Counting makes them slower, so timed queries do not count.
    """

    def __init__(
        self, backbone: Backbone, config: PipelineConfig, registry: Registry, execution: str = "eager"
    ) -> None:
        """Bind the pipeline to the backbone."""
        super().__init__(backbone, config, registry, execution)
        self.peaks: list[int | None] = []
        self.waits: int | None = None
        self.counting = False

    def act(self, observation: Observation, slot: int = 0) -> ActionChunk:
        """Query the policy and record the peak of its memory."""
        device = self.backbone.device
        was_reset = _reset_peak(device)
        chunk = self._counted(observation, slot) if self.counting else super().act(observation, slot)
        self.peaks.append(_peak(device) if was_reset else None)
        return chunk

    def _counted(self, observation: Observation, slot: int) -> ActionChunk:
        if self.backbone.device.type != "cuda":
            return super().act(observation, slot)
        chunk, self.waits = count_waits(lambda: super(MeteredPolicy, self).act(observation, slot))
        return chunk


def count_waits(work: Callable[[], T]) -> tuple[T, int]:
    """Call `work` on CUDA; return its result, and how often the host waited for the device, as torch counts it."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            result = work()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    return result, sum(_WAIT in str(warning.message) for warning in caught)


def _reset_peak(device: torch.device) -> bool:
    """Begin a new peak; return whether that worked, so that `_peak` covers only what follows."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    # Not every kernel and container lets a process do this, and some that refuse raise nothing.
    with suppress(OSError):
        (_PROCESS / "clear_refs").write_text(_RESET_PEAK)
    peak, now = _resident("VmHWM"), _resident("VmRSS")
    return peak is not None and now is not None and peak - now < _SLACK


def _peak(device: torch.device) -> int | None:
    """Return bytes at the peak: allocated by torch on a GPU, resident elsewhere."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _resident("VmHWM")


def _resident(field: str) -> int | None:
    """Return bytes from a field of `/proc/self/status`; None where there is no such file."""
    try:
        status = (_PROCESS / "status").read_text()
        return 1024 * int(status.split(f"{field}:")[1].split()[0])
    except (OSError, IndexError):
        return None
