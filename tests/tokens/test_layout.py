"""Layouts: what they answer, and what they refuse."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.drawing import layouts
from tokenprune.errors import LayoutError
from tokenprune.tokens.layout import Role, Segment, TokenLayout


@given(layouts())
def test_segments_tile_the_sequence(layout: TokenLayout) -> None:
    owners = [segment for segment in layout.segments for _ in range(segment.length)]
    assert len(owners) == layout.n_tokens
    for segment in layout.segments:
        assert [i for i, owner in enumerate(owners) if owner is segment] == list(segment.span)


@given(layouts())
def test_every_token_is_prunable_or_fixed(layout: TokenLayout) -> None:
    owners = [segment for segment in layout.segments for _ in range(segment.length)]
    assert layout.prunable == tuple(i for i, owner in enumerate(owners) if owner.role == "vision")
    assert layout.fixed == tuple(i for i, owner in enumerate(owners) if owner.role != "vision")


@given(layouts())
def test_views_are_named_in_sequence_order(layout: TokenLayout) -> None:
    assert [segment.start for segment in layout.views.values()] == sorted(s.start for s in layout.views.values())
    for name, segment in layout.views.items():
        assert (segment.view, segment.role) == (name, Role.VISION)
        assert segment.grid is not None
        assert segment.grid[0] * segment.grid[1] == segment.length


@given(layouts())
def test_named_rows_stay(layout: TokenLayout) -> None:
    for name in layout.row_names:
        assert set(layout.span(name)) <= set(layout.fixed)
    assert list(layout.span("last")) == [layout.n_tokens - 1]
    assert set(layout.span("instruction")) <= set(layout.span("text"))
    if "action" in layout.row_names:
        assert list(layout.span("readout")) == [i - 1 for i in layout.span("action")]


@given(layouts())
def test_equal_layouts_share_a_hash_and_different_ones_are_not_equal(layout: TokenLayout) -> None:
    again = TokenLayout.build(
        [dataclasses.replace(segment, start=99) for segment in layout.segments],
        {name: layout.span(name) for name in layout.row_names if name != "last"},
    )
    assert again == layout
    assert hash(again) == hash(layout)
    longer = TokenLayout.build([*layout.segments, Segment(Role.PAD, 0, 1)])
    assert longer != layout
    assert TokenLayout(layout.segments) != layout, "the named rows are part of a layout"


def test_build_leaves_empty_segments_out() -> None:
    layout = TokenLayout.build([Segment(Role.BOS, 7, 1), Segment(Role.PAD, 0, 0), Segment(Role.TEXT, 3, 4)])
    assert [(s.role, s.start, s.length) for s in layout.segments] == [(Role.BOS, 0, 1), (Role.TEXT, 1, 4)]
    assert layout.n_tokens == 5


def test_a_view_may_be_unprunable() -> None:
    layout = TokenLayout.build(
        [Segment(Role.VISION, 0, 4, "primary", (2, 2)), Segment(Role.VISION, 0, 2, "wrist", (1, 2), prunable=True)]
    )
    assert layout.prunable == (4, 5)
    assert layout.fixed == (0, 1, 2, 3)
    assert list(layout.views) == ["primary", "wrist"]


BAD_SEGMENTS = {
    "negative length": (dict(role=Role.TEXT, start=0, length=-1), "length -1"),
    "negative start": (dict(role=Role.TEXT, start=-2, length=1), "start -2"),
    "vision without a view": (dict(role=Role.VISION, start=0, length=4), "view name"),
    "view on text": (dict(role=Role.TEXT, start=0, length=4, view="wrist"), "view name"),
    "prunable text": (dict(role=Role.TEXT, start=0, length=4, prunable=True), "'text'.*cannot be prunable"),
    "grid too small": (
        dict(role=Role.VISION, start=0, length=5, view="wrist", grid=(2, 2)),
        "'wrist'.*does not hold 5",
    ),
}


@pytest.mark.parametrize("case", BAD_SEGMENTS)
def test_bad_segments_are_refused(case: str) -> None:
    fields, message = BAD_SEGMENTS[case]
    with pytest.raises(LayoutError, match=message):
        Segment(**fields)


BOS, TEXT = Segment(Role.BOS, 0, 1), Segment(Role.TEXT, 1, 4)
VIEW = Segment(Role.VISION, 5, 4, "wrist", (2, 2), prunable=True)

BAD_LAYOUTS = {
    "gap": ((BOS, dataclasses.replace(TEXT, start=2)), (), "'text' starts at 2.*ends at 1"),
    "overlap": ((BOS, dataclasses.replace(TEXT, start=0)), (), "'text' starts at 0.*ends at 1"),
    "late start": ((TEXT,), (), "'text' starts at 1.*ends at 0"),
    "repeated view": ((BOS, TEXT, VIEW, dataclasses.replace(VIEW, start=9)), (), "distinct names"),
    "row out of range": ((BOS, TEXT), (("text", range(1, 6)),), "'text'.*5 tokens"),
    "row before the start": ((BOS, TEXT), (("text", range(-1, 2)),), "'text'"),
    "row with a stride": ((BOS, TEXT), (("text", range(0, 4, 2)),), "'text'"),
    "prunable row": ((BOS, TEXT, VIEW), (("readout", range(4, 6)),), "'readout'.*pruned"),
}


@pytest.mark.parametrize("case", BAD_LAYOUTS)
def test_bad_layouts_are_refused(case: str) -> None:
    segments, rows, message = BAD_LAYOUTS[case]
    with pytest.raises(LayoutError, match=message):
        TokenLayout(segments, rows)


@given(layouts(), st.sampled_from(["instructions", "insruction"]))
def test_an_unknown_row_names_the_nearest(layout: TokenLayout, name: str) -> None:
    with pytest.raises(LayoutError, match=f"no rows '{name}'; did you mean 'instruction'"):
        layout.span(name)
