"""Labels and numbers that fit their columns."""

from __future__ import annotations

import pytest

from tokenprune.report.text import milliseconds, wrap_label


@pytest.mark.parametrize(
    ("label", "width", "lines"),
    [
        ("specprune", 15, ["specprune"]),
        ("specprune.static", 15, ["specprune", ".static"]),
        ("fastv@keep=8,after=0", 15, ["fastv@keep=8,", "after=0"]),
        ("uniform_grid@keep=0.25", 15, ["uniform_grid", "@keep=0.25"]),
        ("fastv@keep=0.25+no-wrist", 15, ["fastv@keep=0.25", "+no-wrist"]),
        ("specprune.controller@keep=0.25+no-wrist", 20, ["specprune.controller", "@keep=0.25+no-wrist"]),
        ("fastv@keep=0.25,layer=3", 20, ["fastv@keep=0.25,", "layer=3"]),
        ("pipeline@first=0.123456", 20, ["pipeline", "@first=0.123456"]),
    ],
)
def test_labels_break_between_their_parts(label: str, width: int, lines: list[str]) -> None:
    assert wrap_label(label, width).splitlines() == lines


@pytest.mark.parametrize(("value", "text"), [(3.14159, "3.14"), (45.67, "45.7"), (612.3, "612"), (21000.0, "21s")])
def test_milliseconds_in_four_characters(value: float, text: str) -> None:
    assert milliseconds(value) == text
