"""EfficientVLA's action-head cache (arXiv 2506.10100): most flow steps reuse the output of the action head's layers.

The paper computes the head's attention and MLP outputs at every fifth of ten steps and reuses them in between. Here the
residual is reused that all layers together add to the action tokens, including the gates of adaptive norms. This gives
the same result: once the outputs of all branches are reused, nothing else of a layer is left to compute.
"""

from __future__ import annotations

from dataclasses import replace

from pydantic import Field

from tokenprune import BackboneInfo, Stage, StageConfig, StageNeeds


class HeadCacheConfig(StageConfig):
    """How often the action head's layers run."""

    interval: int = Field(default=5, ge=1, description="Layers run at one flow step of this many; 1 is every step.")


class HeadCache(Stage[HeadCacheConfig]):
    """Runs the action head's layers at the first of every `interval` flow steps."""

    Config = HeadCacheConfig

    def requirements(self, info: BackboneInfo) -> StageNeeds:
        """The interval of flow steps."""
        return replace(super().requirements(info), flow_interval=self.config.interval)
