"""EfficientVLA's action-head cache (arXiv 2506.10100): most flow steps repeat what the head's layers added before.

The paper recomputes attention and MLP outputs of the head at every fifth of ten steps and reuses them in between. Here
what all layers together added to the action tokens is kept, gates of adaptive norms included, which is the same: with
every branch's output reused nothing else of a layer is left to run.
"""

from __future__ import annotations

from dataclasses import replace

from pydantic import Field

from tokenprune import BackboneInfo, Stage, StageConfig, StageNeeds


class HeadCacheConfig(StageConfig):
    """How often the layers run."""

    interval: int = Field(default=5, ge=1, description="Flow steps of which the first runs; 1 is every step.")


class HeadCache(Stage[HeadCacheConfig]):
    """Runs the action head's layers at the first of each `interval` flow steps."""

    Config = HeadCacheConfig

    def requirements(self, info: BackboneInfo) -> StageNeeds:
        """One of several flow steps."""
        return replace(super().requirements(info), flow_interval=self.config.interval)
