"""The chart of success against latency: points, intervals, colours, and labels that never overlap."""

from __future__ import annotations

import random

import numpy as np
import pytest
from PIL import Image

from tests.helpers.eval_records import record
from tokenprune.errors import ResultError
from tokenprune.evaluation.chart import draw_success, write_success
from tokenprune.evaluation.statistics import wilson
from tokenprune.evaluation.summary import summarise
from tokenprune.viz.labels import place


def labels_of(figure):
    axes = figure.axes[0]
    renderer = figure.canvas.get_renderer()
    return {text.get_text(): text.get_window_extent(renderer).extents for text in axes.texts}


def crowd(seed, spread):
    """Fifteen variants whose points lie as close together as `spread` says; 0 puts all on one."""
    chance = random.Random(seed)
    records = []
    for number in range(15):
        ms, wins = 50 + spread * 50 * chance.random(), round(30 - spread * 25 * chance.random())
        label = f"{chance.choice(('fastv', 'specprune.controller'))}@keep=0.{number + 10}"
        records += [record(label, init_state=k, success=k < wins, ms=[ms]) for k in range(30)]
    return [record("dense", init_state=k, ms=[110.0]) for k in range(30)] + records


@pytest.mark.parametrize(("seed", "spread"), [(0, 1.0), (1, 1.0), (2, 0.2), (3, 0.02), (4, 0.0)])
def test_no_two_labels_of_the_chart_overlap(seed, spread):
    figure = draw_success(summarise(crowd(seed, spread)))
    boxes = labels_of(figure)
    assert len(boxes) == 16
    axes = figure.axes[0]
    left, bottom, right, top = axes.get_window_extent().extents
    dots = [axes.transData.transform(line.get_xydata()[0]) for line in axes.lines if line.get_marker() == "o"]
    assert len(dots) == 16
    named = list(boxes.items())
    for i, (label, (x0, y0, x1, y1)) in enumerate(named):
        assert left <= x0 < x1 <= right, label
        assert bottom <= y0 < y1 <= top, label
        for x, y in dots:
            assert not (x0 < x < x1 and y0 < y < y1), label
        for other, (u0, v0, u1, v1) in named[i + 1 :]:
            assert x1 <= u0 or u1 <= x0 or y1 <= v0 or v1 <= y0, (label, other)


def test_a_lone_label_lies_beside_its_point():
    dots, halves = np.array([[100.0, 100.0], [400.0, 300.0]]), np.array([[40.0, 8.0], [30.0, 8.0]])
    for dot, box in zip(dots, place(dots, halves, np.zeros((0, 4)), np.array([0, 0, 800, 500.0])), strict=True):
        assert np.linalg.norm(np.clip(dot, box[:2], box[2:]) - dot) < 14


def test_points_intervals_and_colours_of_the_chart():
    records = [record("dense", init_state=k, ms=[100.0]) for k in range(30)]
    records += [record("bad", init_state=k, success=k < 6, ms=[40.0]) for k in range(30)]
    records += [record("good", init_state=k, success=k < 29, ms=[50.0]) for k in range(30)]
    figure = draw_success(summarise(records, variants=["dense", "bad", "good", "later"]))
    axes = figure.axes[0]
    dots = [line for line in axes.lines if line.get_marker() == "o"]
    assert [tuple(dot.get_xydata()[0]) for dot in dots] == [(100, 100), (40, 20), (50, pytest.approx(100 * 29 / 30))]
    intervals = [segments.get_segments()[0] for segments in axes.collections]
    assert [tuple(segment[:, 0]) for segment in intervals] == [(100, 100), (40, 40), (50, 50)]
    for segment, wins in zip(intervals, (30, 6, 29), strict=True):
        assert segment[:, 1] / 100 == pytest.approx(wilson(wins, 30))
    assert len({dot.get_color() for dot in dots}) == 3
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts == ["dense", "no difference from dense seen", "differs from dense, p < 0.05"]
    assert [line.get_color() for line in figure.legends[0].get_lines()] == [dots[i].get_color() for i in (0, 2, 1)]


def test_files_of_the_chart(tmp_path):
    summary = summarise([record("dense"), record("fastv@cost=$2,fee=$3", ms=[5.0])])
    for name in ("a.png", "a.svg", "b.svg"):
        write_success(summary, tmp_path / name)
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size == (1200, 750)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert "fastv@cost=$2,fee=$3</text>" in (tmp_path / "a.svg").read_text()
    with pytest.raises(ResultError, match=r"'\.pdf'; valid: \.png, \.svg"):
        write_success(summary, tmp_path / "a.pdf")
    with pytest.raises(ResultError, match="cannot write"):
        write_success(summary, tmp_path / "absent" / "a.png")
    with pytest.raises(ResultError, match="nothing to draw"):
        draw_success(summarise([], variants=["dense"]))


def test_a_chart_without_baseline_has_no_key():
    figure = draw_success(summarise([record("fastv"), record("fastv", init_state=1)]))
    assert not figure.legends
