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

_OPENVLA_PRESETS = {
    "small": "the release's tokens, a small decoder, untrained",
    "7b": "the release's dimensions, untrained",
    "tiny": "milliseconds a query, for checks, untrained",
}
_PI0_PRESETS = {
    "small": "the release's tokens, small decoders, untrained",
    "base": "the release's dimensions, untrained",
    "tiny": "milliseconds a query, for checks, untrained",
}


@hookimpl
def tokenprune_register() -> Iterable[Spec]:
    """Backbones and environments."""
    return (
        _backbone(
            "openvla",
            "OpenVLA: a causal prefill over one view, then six cached steps that spell the action",
            "openvla.factory:OpenVLAFactory",
            _OPENVLA_PRESETS,
        ),
        _backbone(
            "openvla-oft",
            "OpenVLA-OFT: bidirectional, one pass (diffusion head: one a step), 1-3 views",
            "openvla_oft.factory:OFTFactory",
            {**OFT_TRAINED, **_OPENVLA_PRESETS},
        ),
        _backbone(
            "pi0",
            "pi0: a bidirectional prefix and ten flow steps of an action expert behind it, 1-3 views",
            "pi0.factory:PI0Factory",
            _PI0_PRESETS,
        ),
        _backbone(
            "pi05",
            "pi0.5: as pi0, with the robot state in the prompt and norms that depend on the flow's time",
            "pi0.factory:PI05Factory",
            _PI0_PRESETS,
        ),
        *(
            EnvironmentSpec(name, summary, f"{__name__}.environments.libero.environment:LiberoFactory")
            for name, summary in _LIBERO.items()
        ),
    )


def _backbone(name: str, summary: str, factory: str, presets: Mapping[str, str]) -> BackboneSpec:
    """A backbone that ships with the recorded LIBERO episode."""
    return BackboneSpec(
        name=name,
        summary=summary,
        target=f"{__name__}.backbones.{factory}",
        presets=dict(presets),
        episode=f"{__name__}:episodes/libero_spatial.npz",
    )
