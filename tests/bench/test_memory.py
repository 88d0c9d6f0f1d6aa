"""Memory at the peak of a query, and waits for the device."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers.planting import REGISTRY
from tests.helpers.tiny_oft import INSTRUCTION, observation, tiny_config, tiny_policy_parts
from tokenprune.bench.memory import MeteredPolicy, count_waits
from tokenprune.pipelines.config import DENSE
from tokenprune.policy import Policy


def peaks_of(monkeypatch: pytest.MonkeyPatch, *sizes: int) -> list[int | None]:
    """Peaks of queries that take and give back so many bytes."""
    backbone = tiny_policy_parts(tiny_config())
    policy = MeteredPolicy(backbone, DENSE, REGISTRY)
    policy.reset(INSTRUCTION)
    left = iter(sizes)
    real = Policy.act

    def act(self: Policy, observation: Any, slot: int = 0) -> Any:
        taken = torch.ones(next(left), dtype=torch.uint8)
        return real(self, observation, slot) if len(taken) else None

    with monkeypatch.context() as patched:
        patched.setattr(Policy, "act", act)
        for _ in sizes:
            policy.act(observation(backbone.config))
    return policy.peaks


def test_peaks_are_of_each_query(monkeypatch):
    large, small = peaks_of(monkeypatch, 2**28, 1)
    if kernel_forgets_peaks():
        assert large is not None
        assert small is not None
        assert large - small > 0.9 * 2**28
    else:
        # A peak that was not reset is reported only where it is about what the process holds anyway.
        assert small is None or small - resident("VmRSS") < 2**27


def kernel_forgets_peaks() -> bool:
    """Not in every container."""
    taken = np.ones(2**28, dtype=np.uint8)
    del taken
    try:
        before = resident("VmHWM")
        Path("/proc/self/clear_refs").write_text("5")
        return before - resident("VmHWM") > 2**27
    except (OSError, StopIteration):
        return False


def resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def test_a_peak_that_cannot_be_forgotten_is_not_told(monkeypatch, tmp_path):
    monkeypatch.setattr("tokenprune.bench.memory._PROCESS", tmp_path)
    assert peaks_of(monkeypatch, 1) == [None]
    (tmp_path / "clear_refs").write_text("")
    (tmp_path / "status").write_text("VmHWM:\t  900000 kB\nVmRSS:\t  100000 kB\n")
    assert peaks_of(monkeypatch, 1) == [None]
    (tmp_path / "status").write_text("VmHWM:\t  100016 kB\nVmRSS:\t  100000 kB\n")
    assert peaks_of(monkeypatch, 1) == [100016 * 1024]
    assert (tmp_path / "clear_refs").read_text() == "5"


def test_waits_are_counted_by_torchs_own_warning(monkeypatch):
    modes: list[Any] = []
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def work() -> str:
        for _ in range(3):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("something else", stacklevel=1)
        return "done"

    assert count_waits(work) == ("done", 3)
    assert modes == ["warn", 0]
