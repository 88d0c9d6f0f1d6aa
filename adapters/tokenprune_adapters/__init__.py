"""Adapters to the outside world: backbones with their checkpoints, environments, recordings. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from tokenprune.registry.hookspecs import hookimpl
from tokenprune.registry.specs import BackboneSpec, EnvironmentSpec, Spec

OFT_TRAINED: Mapping[str, str] = {"mini": "trained for ten LIBERO tasks, 7.7 M parameters, comes with its weights"}
"""Presets of OpenVLA-OFT that ship with their weights, in folders of `checkpoints`: name to summary."""

_LIBERO = {
    "libero_spatial": "LIBERO-Spatial: ten tasks, one bowl of two told by where it stands",
    "libero_object": "LIBERO-Object: ten tasks, one object of many into the basket",
    "libero_goal": "LIBERO-Goal: ten tasks in one scene",
    "libero_10": "LIBERO-10 (Long): ten tasks of two parts",
    "libero_90": "LIBERO-90: ninety short tasks",
}


@hookimpl
def tokenprune_register() -> Iterable[Spec]:
    """Backbones and environments."""
    return (
        BackboneSpec(
            name="openvla",
            summary="OpenVLA: a causal prefill over one view, then six cached steps that spell the action",
            target=f"{__name__}.backbones.openvla.factory:OpenVLAFactory",
            presets={
                "small": "the release's tokens, a small decoder, untrained",
                "7b": "the release's dimensions, untrained",
                "tiny": "milliseconds a query, for checks, untrained",
            },
            episode=f"{__name__}:episodes/libero_spatial.npz",
        ),
        BackboneSpec(
            name="openvla-oft",
            summary="OpenVLA-OFT: bidirectional, one pass (diffusion head: one a step), 1-3 views",
            target=f"{__name__}.backbones.openvla_oft.factory:OFTFactory",
            presets={
                **OFT_TRAINED,
                "small": "the release's tokens, a small decoder, untrained",
                "7b": "the release's dimensions, untrained",
                "tiny": "milliseconds a query, for checks, untrained",
            },
            episode=f"{__name__}:episodes/libero_spatial.npz",
        ),
        BackboneSpec(
            name="pi0",
            summary="pi0: a bidirectional prefix and ten flow steps of an action expert behind it, 1-3 views",
            target=f"{__name__}.backbones.pi0.factory:PI0Factory",
            presets={
                "small": "the release's tokens, small decoders, untrained",
                "base": "the release's dimensions, untrained",
                "tiny": "milliseconds a query, for checks, untrained",
            },
            episode=f"{__name__}:episodes/libero_spatial.npz",
        ),
        BackboneSpec(
            name="pi05",
            summary="pi0.5: as pi0, with the robot state in the prompt and norms that depend on the flow's time",
            target=f"{__name__}.backbones.pi0.factory:PI05Factory",
            presets={
                "small": "the release's tokens, small decoders, untrained",
                "base": "the release's dimensions, untrained",
                "tiny": "milliseconds a query, for checks, untrained",
            },
            episode=f"{__name__}:episodes/libero_spatial.npz",
        ),
        *(
            EnvironmentSpec(name, summary, f"{__name__}.environments.libero.environment:LiberoFactory")
            for name, summary in _LIBERO.items()
        ),
    )
