"""What a query needs besides time: memory at its peak, and waits for the device."""

from __future__ import annotations

import resource
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from tokenprune.adapter import Backbone, Observation
from tokenprune.config import PipelineConfig
from tokenprune.policy import ActionChunk, Policy
from tokenprune.registry import Registry

T = TypeVar("T")

_RESET_PEAK = "5"
_WAIT = "called a synchronizing CUDA operation"


class Gauged(Policy):
    """A policy whose queries are gauged.

    Attributes:
        peaks: Bytes at the peak of each query, weights included.
        waits: Waits for the device in the last query that was asked to count them; None elsewhere than on CUDA.
        counting: Whether queries count. It makes them slower, so those that are timed do not.
    """

    def __init__(
        self, backbone: Backbone, config: PipelineConfig, registry: Registry, execution: str = "eager"
    ) -> None:
        """Bind the pipeline to the backbone; nothing is gauged yet."""
        super().__init__(backbone, config, registry, execution)
        self.peaks: list[int] = []
        self.waits: int | None = None
        self.counting = False

    def act(self, observation: Observation, slot: int = 0) -> ActionChunk:
        """Query the policy, gauged."""
        device = self.backbone.device
        _forget_peak(device)
        chunk = self._counted(observation, slot) if self.counting else super().act(observation, slot)
        self.peaks.append(_peak(device))
        return chunk

    def _counted(self, observation: Observation, slot: int) -> ActionChunk:
        if self.backbone.device.type != "cuda":
            return super().act(observation, slot)
        chunk, self.waits = count_waits(lambda: super(Gauged, self).act(observation, slot))
        return chunk


def count_waits(work: Callable[[], T]) -> tuple[T, int]:
    """Do some work on CUDA; its result, and how often the host waited for the device, by torch's own count."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            result = work()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    return result, sum(_WAIT in str(warning.message) for warning in told)


def _forget_peak(device: torch.device) -> None:
    """Begin a new peak; where the kernel offers none to a process, its peak is that of its whole life."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        Path("/proc/self/clear_refs").write_text(_RESET_PEAK)
    except OSError:
        return


def _peak(device: torch.device) -> int:
    """Bytes allocated by torch on a GPU, resident elsewhere, at the peak."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.split("VmHWM:")[1].split()[0])
    except (OSError, IndexError):
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
