"""The speed page says what the result files of the bench say."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.planting import REGISTRY
from tests.test_bench import EPISODE, given_roof
from tokenprune.bench.bench import BenchSettings, Subject, bench
from tokenprune.bench.rows import SpeedRow
from tokenprune.loader import load_pipeline

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

import speed_page
from speed_page import ROOT, TARGETS, filled

PAGE = ROOT / "docs" / "speed.md"
RESULTS = sorted((ROOT / "docs" / "evidence").glob("bench-*.json"))


def test_every_table_is_what_bench_prints():
    page = PAGE.read_text(encoding="utf-8")
    assert filled(page) == page
    assert all(f"<!-- bench docs/evidence/{path.name} -->" in page for path in RESULTS)


def test_results_are_finished_and_of_a_commit():
    assert RESULTS
    for path in RESULTS:
        data = json.loads(path.read_text(encoding="utf-8"))
        assert data["complete"]
        assert data["provenance"]["git"]["commit"]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    settings = BenchSettings(dtypes=("float32",), pairs=1, warmup=1, queries=1)
    subject = Subject("openvla-oft", "small", EPISODE)
    data = bench([subject], [load_pipeline("specprune", REGISTRY)], settings, REGISTRY, roof=given_roof)
    path = tmp_path_factory.mktemp("results") / "bench-small.json"
    path.write_text(json.dumps(data), encoding="utf-8")
    return path


def test_blocks_are_filled_and_the_rest_stays(small):
    blocks = (f"<!-- {word} {small} -->\nold\n<!-- end -->\n" for word in ("targets", "bench"))
    page = "before\n{}between\n{}after\n".format(*blocks)
    made = filled(page)
    assert filled(made) == made
    lines = made.splitlines()
    assert "old" not in lines
    assert [line for line in lines if line in ("before", "between", "after")] == ["before", "between", "after"]
    assert "openvla-oft small, float32, eager, attention sdpa/" in made
    assert made.count("| at least 0.92 |") == made.count("| at most 0.5 % |") == 1


@pytest.mark.parametrize(("value", "said"), [(0.95, "met"), (0.91, "missed")])
def test_a_target_is_met_or_missed(small, value, said):
    row = json.loads(small.read_text())["results"][0]["rows"][1]
    met = TARGETS[0].line(SpeedRow.from_json(row | {"efficiency": value}))
    assert met.endswith(f"| {value:g} | {said} |")
    # A share of 1 - value: 5 % and 9 % are both too much, a tenth of either is not.
    for share, verdict in ((1 - value, "missed"), ((1 - value) / 100, "met")):
        assert TARGETS[1].line(SpeedRow.from_json(row | {"selection": share})).endswith(f"| {verdict} |")


def test_a_page_that_is_behind_its_files_is_noticed(small, tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text(f"<!-- bench {small} -->\nwrong\n<!-- end -->\n", encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["speed_page.py", str(page)])
    speed_page.main()
    assert "wrong" not in page.read_text()
