"""What no pruning can go beyond, against closed forms worked out elsewhere."""

from __future__ import annotations

import pytest

from tests.helpers.planting import REGISTRY
from tokenprune.model.flops import ceiling, layer_weights
from tokenprune.model.info import BackboneInfo
from tokenprune.tokens.layout import TokenLayout

INSTRUCTION = "pick up the black bowl between the plate and the ramekin and place it on the plate"


def described(backbone: str, preset: str) -> tuple[BackboneInfo, TokenLayout]:
    made = REGISTRY.backbone_factory(backbone).describe(preset, None, {})
    return made.info, made.layout(INSTRUCTION)


@pytest.mark.parametrize(
    ("backbone", "preset", "bare", "after_two"),
    [("openvla", "7b", 4.70, 3.82), ("openvla-oft", "7b", 4.41, 3.63)],
)
def test_ceilings_are_those_of_the_dimensions(backbone: str, preset: str, bare: float, after_two: float) -> None:
    info, layout = described(backbone, preset)
    # Worked out for a prompt of 30 tokens, one less than here, with every row of the last layer made.
    assert ceiling(info, layout, -1) == pytest.approx(bare, rel=0.02)
    assert ceiling(info, layout, 1) == pytest.approx(after_two, rel=0.02)


@pytest.mark.parametrize(("backbone", "preset"), [("openvla", "7b"), ("pi0", "base"), ("pi05", "base")])
def test_later_removal_saves_less(backbone: str, preset: str) -> None:
    info, layout = described(backbone, preset)
    bounds = [ceiling(info, layout, after) for after in range(-1, info.decoder.depth - 1)]
    assert bounds == sorted(bounds, reverse=True)
    assert bounds[-1] > 1


def test_llama_7b_reads_six_and_a_half_billion_weights_a_pass() -> None:
    info, _ = described("openvla", "7b")
    assert info.decoder.depth * layer_weights(info.decoder) == 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008)
