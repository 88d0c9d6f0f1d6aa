"""One tiny backbone of each family."""

from __future__ import annotations

from typing import Any

from tests.helpers import tiny_oft, tiny_openvla, tiny_pi0
from tokenprune.engine.adapter import Backbone
from tokenprune.model.decoder import Decoder

DEPTH = 5


def oft() -> tuple[Backbone, dict[str, Any], list[Decoder]]:
    backbone = tiny_oft.tiny_policy_parts(tiny_oft.tiny_config(depth=DEPTH))
    return backbone, tiny_oft.observation(backbone.config), [backbone.decoder]


def openvla() -> tuple[Backbone, dict[str, Any], list[Decoder]]:
    backbone = tiny_openvla.tiny_openvla(tiny_openvla.tiny_config(depth=DEPTH))
    return backbone, tiny_openvla.observation(), [backbone.decoder]


def pi0(variant: Any) -> tuple[Backbone, dict[str, Any], list[Decoder]]:
    backbone = tiny_pi0.tiny_backbone(tiny_pi0.tiny_config(variant, depth=DEPTH))
    return backbone, tiny_pi0.observation(backbone.config), [backbone.prefix, backbone.expert]


BACKBONES = {"oft": oft, "openvla": openvla, "pi0": lambda: pi0("pi0"), "pi05": lambda: pi0("pi05")}
