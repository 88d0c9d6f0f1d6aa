"""Registries with stages of tests in them; a registry that others use is never changed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenprune.registry.discovery import Registry
from tokenprune.registry.plugin_checks import Owner
from tokenprune.registry.specs import StageKind, StageSpec
from tokenprune.stages.stage import Stage


def with_stages(
    registry: Registry, stages: Sequence[type[Stage[Any]]], prefix: str = "test", kind: StageKind = "selector"
) -> Registry:
    """A registry with these stages besides, each as the prefix, a dot and its lower-case class name."""
    specs = [
        StageSpec(f"{prefix}.{one.__name__.lower()}", kind, "for tests", f"{one.__module__}:{one.__name__}")
        for one in stages
    ]
    return registry.with_specs(*specs, owner=Owner("tests", "0", __name__))
