"""Which pipelines a backbone cannot run."""

from __future__ import annotations

from collections.abc import Sequence

from tokenprune.errors import CapabilityError, ConfigError, LayoutError
from tokenprune.model.info import BackboneInfo
from tokenprune.pipelines.binding import bind
from tokenprune.pipelines.loader import LoadedPipeline
from tokenprune.registry.discovery import Registry


def refusals(pipelines: Sequence[LoadedPipeline], info: BackboneInfo, registry: Registry) -> dict[str, str]:
    """Say why a backbone cannot run pipelines: the reason by label, without those that it can run."""
    refused = {}
    for pipeline in pipelines:
        try:
            bind(pipeline.config, info, registry)
        except (CapabilityError, ConfigError, LayoutError) as error:
            refused[pipeline.label] = str(error)
    return refused
