"""Adapters to the outside world: backbones, their preprocessing and checkpoints, recordings. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable

from tokenprune.hookspecs import hookimpl
from tokenprune.specs import BackboneSpec, Spec


@hookimpl
def tokenprune_register() -> Iterable[Spec]:
    """Backbones."""
    return (
        BackboneSpec(
            name="openvla-oft",
            summary="OpenVLA-OFT with the L1 head: bidirectional, one pass, 1-3 views",
            target=f"{__name__}.backbones.openvla_oft.factory:OFTFactory",
            presets={
                "7b": "the release's dimensions, untrained",
                "small": "the release's tokens, a small decoder, untrained",
            },
            episode=f"{__name__}:episodes/libero_spatial.npz",
        ),
    )
