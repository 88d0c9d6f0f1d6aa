"""Policies with TRIM and a tiny CLIP."""

from __future__ import annotations

from typing import Any

from tests.helpers.planting import REGISTRY, pipeline
from tests.helpers.tiny_oft import INSTRUCTION, tiny_config, tiny_policy_parts
from tokenprune.policy import Policy

OFT = tiny_policy_parts(tiny_config())


def policy_of(*stages: Any, backbone: Any = OFT, instruction: str = INSTRUCTION) -> Policy:
    policy = Policy(backbone, pipeline(*stages), REGISTRY)
    policy.reset(instruction)
    return policy
