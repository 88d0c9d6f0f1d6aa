"""What a benchmark measures besides the pipelines, and how."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenprune.engine.executor import Execution
from tokenprune.errors import ConfigError, nearest
from tokenprune.model.device import DTYPES

REFERENCES = ("upstream",)
"""Other ways to run the dense policy, measured beside it."""


@dataclass(frozen=True)
class BenchSettings:
    """What is measured besides the pipelines, and how.

    Attributes:
        dtypes: Names from `tokenprune.model.device.DTYPES`, or `auto`.
        modes: Names of `Execution`.
        device: torch device.
        pairs: Measured queries per pipeline, each with a dense query beside it.
        warmup: Pairs of queries before the measured ones.
        queries: How many queries from the episode's start are repeated; all when None.
        reference: A name from `REFERENCES`, or None.
        profile: Folder for torch profiler traces, None for none.
        seed: Seed of random weights.
        options: The backbones' own options.
    """

    dtypes: tuple[str, ...] = ("auto",)
    modes: tuple[str, ...] = (Execution.EAGER,)
    device: str = "cpu"
    pairs: int = 10
    warmup: int = 2
    queries: int | None = None
    reference: str | None = None
    profile: Path | None = None
    seed: int = 0
    options: Mapping[str, Any] | None = None

    def check(self) -> None:
        """Refuse settings that cannot be measured.

        Raises:
            ConfigError: Naming the setting, what it is and what it could be.
        """
        named = [("mode", self.modes, tuple(Execution)), ("dtype", self.dtypes, (*DTYPES, "auto"))]
        named += [("reference", () if self.reference is None else (self.reference,), REFERENCES)]
        for setting, names, valid in named:
            for name in names:
                if name not in valid:
                    raise ConfigError(f"unknown {setting} '{name}'{nearest(name, valid)}")
        graphs = [mode for mode in self.modes if Execution(mode).graph]
        if graphs and not self.device.startswith("cuda"):
            raise ConfigError(f"mode '{graphs[0]}' needs a CUDA device, got '{self.device}'")
        for setting, number in (("pairs", self.pairs), ("warmup", self.warmup)):
            if number < 1:
                raise ConfigError(f"{setting} must be 1 or more, got {number}")
