"""The speed page says what the result files of the bench say."""

from __future__ import annotations

import json
import sys

import pytest
import speed_page
from speed_page import ROOT, TARGETS, filled

from tests.helpers.bench_episode import EPISODE, given_roof
from tests.helpers.planting import REGISTRY
from tokenprune.bench.result import BenchResult, SpeedRow
from tokenprune.bench.settings import BenchSettings
from tokenprune.bench.speed import Subject, bench
from tokenprune.bench.upstream import UPSTREAM
from tokenprune.pipelines.loader import load_pipeline
from tokenprune.report.files import read_result, write_json

PAGE = ROOT / "docs" / "speed.md"
RESULTS = sorted((ROOT / "docs" / "evidence").glob("bench-*.json"))


def test_every_table_is_what_bench_prints():
    page = PAGE.read_text(encoding="utf-8")
    assert filled(page) == page
    assert all(f"<!-- bench docs/evidence/{path.name} -->" in page for path in RESULTS)


def test_results_are_finished_and_of_a_commit():
    assert RESULTS
    for path in RESULTS:
        result = read_result(path, BenchResult)
        assert result.complete
        assert result.provenance.git is not None


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    settings = BenchSettings(dtypes=("float32",), pairs=1, warmup=1, queries=1)
    subject = Subject("openvla-oft", "small", EPISODE)
    result = bench([subject], [load_pipeline("specprune", REGISTRY)], settings, REGISTRY, roof=given_roof)
    path = tmp_path_factory.mktemp("results") / "bench-small.json"
    write_json(path, result.to_json())
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


@pytest.mark.parametrize(("value", "verdict"), [(0.95, "met"), (0.91, "missed")])
def test_a_target_is_met_or_missed(small, value, verdict):
    efficiency, share = TARGETS["eager"]
    row = json.loads(small.read_text())["results"][0]["rows"][1]

    def rows(**changed):
        return {"specprune": SpeedRow.model_validate(row | changed)}

    assert efficiency.line(rows(efficiency=value)).endswith(f"| {value:g} | {verdict} |")
    # A share of 1 - value: 5 % and 9 % are both too much, a tenth of either is not.
    for taken, expected in ((1 - value, "missed"), ((1 - value) / 100, "met")):
        assert share.line(rows(selection=taken)).endswith(f"| {expected} |")


def test_targets_of_a_gpu_are_of_graphs_and_by_cameras(small, tmp_path):
    data = json.loads(small.read_text())
    case = data["results"][0]
    dense, pruned = case["rows"]
    rows = [
        dense | {"over_floor": 1.4},
        pruned | {"speedup": 1.8, "efficiency": 0.95, "median_ms": 10.0, "phases": {"selection": 0.2, "history": 0.05}},
        dense | {"pipeline": UPSTREAM, "median_ms": 50.0},
    ]
    results = [
        case | {"backbone": case["backbone"] | {"name": name, "views": views}, "mode": mode, "rows": rows}
        for name, views in (("openvla-oft", ["a", "b"]), ("pi0", ["a", "b"]), ("pi0", ["a", "b", "c"]))
        for mode in ("eager", "cuda_graph")
    ]
    path = tmp_path / "bench-gpu.json"
    write_json(path, data | {"provenance": data["provenance"] | {"gpu": "NVIDIA H200"}, "results": results})
    lines = speed_page.targets(str(path)).splitlines()[2:]
    assert [line.split("|")[1].strip().partition(":")[0] for line in lines] == [
        "dense", *["`specprune`"] * 4, "pi0, three cameras, `specprune`",
    ]  # fmt: skip
    cells = [[cell.strip() for cell in line.split("|")[3:5]] for line in lines]
    assert cells == [
        ["1.4", "met"], ["1.8", "missed"], ["0.95", "met"], ["0.25 ms", "met"], ["5", "met"], ["1.8", "met"],
    ]  # fmt: skip


def test_a_result_that_is_not_there_is_not_invented():
    for text_of in (speed_page.tables, speed_page.long_run):
        assert "Not measured" in text_of("docs/evidence/no.json")
    lines = speed_page.targets("docs/evidence/no.json").splitlines()[2:]
    assert len(lines) == len(TARGETS["cuda_graph"])
    assert all(line.endswith("| - | not measured |") for line in lines)


def test_a_page_that_is_behind_its_files_is_noticed(small, tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text(f"<!-- bench {small} -->\nwrong\n<!-- end -->\n", encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["speed_page.py", str(page)])
    speed_page.main()
    assert "wrong" not in page.read_text()
