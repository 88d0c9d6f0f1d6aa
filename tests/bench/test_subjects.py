"""What a benchmark measures: a preset and an episode for each backbone."""

from __future__ import annotations

import pytest

from tests.helpers.planting import REGISTRY
from tokenprune.bench.subjects import choose_subjects
from tokenprune.errors import ConfigError


@pytest.mark.parametrize(
    ("presets", "chosen"),
    [((), ["mini", "small"]), (("tiny",), ["tiny", "tiny"]), (("small", "tiny"), ["small", "tiny"])],
)
def test_one_preset_is_for_all_and_several_are_one_for_each(presets: tuple[str, ...], chosen: list[str]) -> None:
    subjects = choose_subjects(REGISTRY, ["openvla-oft", "pi0"], presets)
    assert [(subject.backbone, subject.preset) for subject in subjects] == list(
        zip(["openvla-oft", "pi0"], chosen, strict=True)
    )


def test_another_number_of_presets_is_refused() -> None:
    with pytest.raises(ConfigError, match="given 2 times for 1 backbones"):
        choose_subjects(REGISTRY, ["openvla-oft"], ["tiny", "small"])
