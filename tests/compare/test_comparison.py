"""Replaying an episode and summarising it: paired queries, honest numbers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from tests.helpers.paths import EPISODE
from tests.helpers.planting import REGISTRY
from tests.helpers.tiny_oft import tiny_config, tiny_policy_parts
from tokenprune.cli import app
from tokenprune.compare.comparison import compare
from tokenprune.compare.episode import Episode, load_episode
from tokenprune.compare.replay import query_steps
from tokenprune.compare.row import make_row
from tokenprune.compare.table import compare_legend, compare_table
from tokenprune.errors import ConfigError, EpisodeError
from tokenprune.pipelines.loader import load_pipeline
from tokenprune.policy import ActionChunk
from tokenprune.registry.discovery import Registry
from tokenprune.report.files import read_result, write_json
from tokenprune.report.result import CompareResult
from tokenprune.report.text import WIDTH


@pytest.fixture(scope="module")
def episode() -> Episode:
    return load_episode(EPISODE)


@pytest.fixture(scope="module")
def result(episode: Episode) -> CompareResult:
    backbone = tiny_policy_parts(tiny_config())
    loaded = [load_pipeline(name, REGISTRY) for name in ("dense", "none", "random", "fastv@keep=8,after=0")]
    return compare(backbone, loaded, episode, REGISTRY, queries=3)


def test_rows_are_what_was_asked_for_with_dense_first(result: CompareResult) -> None:
    assert [row.pipeline for row in result.rows] == ["dense", "none", "random", "fastv@keep=8,after=0"]
    dense, none, random, fastv = result.rows
    assert dense.flop_ratio == dense.speedup == dense.efficiency == 1
    assert (none.tokens_mean, none.tokens_last) == (32, 32)
    assert (random.tokens_mean, random.tokens_last) == (16, 16)
    assert fastv.tokens_last == 8
    assert fastv.tokens_mean == pytest.approx((32 + 8 + 8) / 3)
    assert fastv.flop_ratio > 1


def test_error_is_zero_where_nothing_was_pruned_and_not_where_it_was(result: CompareResult) -> None:
    dense, none, random, _ = result.rows
    assert set(dense.error) == {"translation", "rotation", "gripper"}
    assert not any(none.error.values())
    assert none.gripper_flips == 0
    assert all(random.error.values())


def test_the_result_is_plain_data_with_proof_of_pruning(result: CompareResult) -> None:
    data = json.loads(json.dumps(result.to_json()))
    assert data["kind"] == "compare"
    assert {"torch", "transformers"} <= set(data["provenance"]["packages"])
    assert data["episode"]["steps"] == [0, 8, 16]
    assert data["pipelines"]["fastv@keep=8,after=0"]["stages"][0]["keep"] == 8
    assert "untrained" in data["note"]
    for query in data["queries"]["random"]:
        assert query["tokens_held"] == query["tokens_planned"]
        assert sum(n[0] for n in query["kept_per_view"]["embedding"].values()) == 16
        assert len(query["kept_ids"]["embedding"][0]) == 16
    (note,) = data["notes"]["fastv@keep=8,after=0"]
    assert note.startswith("fastv: attention of the 'text' rows in place of the last one")


def test_a_result_survives_its_file(result: CompareResult, tmp_path: Path) -> None:
    write_json(tmp_path / "result.json", result.to_json())
    assert read_result(tmp_path / "result.json", CompareResult) == result


def chunk(trace: Any, actions: np.ndarray, ms: float, selection: float) -> ActionChunk:
    return ActionChunk(actions, actions, replace(trace, milliseconds=ms, phases={"selection": selection}))


def test_numbers_of_a_row_by_hand(result: CompareResult, episode: Episode) -> None:
    backbone = tiny_policy_parts(tiny_config())
    from tokenprune.pipelines.config import DENSE
    from tokenprune.policy import Policy

    policy = Policy(backbone, DENSE, REGISTRY)
    policy.reset("push it")
    from tests.helpers.tiny_oft import observation

    trace = policy.act(observation(backbone.config)).trace
    zero = np.zeros((8, 7))
    moved = zero.copy()
    moved[:, 0], moved[0, 4], moved[:3, 6] = 0.3, 0.6, 1.0
    dense = [chunk(trace, zero, ms, 0) for ms in (100, 110, 400)]
    own = [chunk(trace, moved, ms, selection) for ms, selection in ((50, 2), (100, 4), (100, 9))]
    row = make_row("own", own, dense, backbone.info)
    assert row.speedup == 2.0
    assert row.median_ms == 100
    assert row.selection == pytest.approx(4 / 110)
    assert row.error["translation"] == pytest.approx(0.1)
    assert row.error["rotation"] == pytest.approx(0.6 / 24)
    assert row.gripper_flips == 9
    assert row.actions == 24
    assert row.flop_ratio == 1
    assert row.efficiency == 2.0


def test_the_table_fits_eighty_columns(result: CompareResult, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        row.model_copy(update={"median_ms": 12345.6, "gflops": 8812.3, "gripper_flips": 160}) for row in result.rows
    ]
    Console(width=WIDTH, highlight=False).print(compare_table(rows))
    print(compare_legend(rows, result.note))
    printed = capsys.readouterr().out.splitlines()
    assert max(map(len, printed)) <= WIDTH
    assert not any("…" in line for line in printed)
    assert "8812" in "".join(printed)
    assert "untrained" in "".join(printed)


def test_two_pipelines_of_one_name_are_refused(episode: Episode) -> None:
    loaded = [load_pipeline("random", REGISTRY)] * 2
    with pytest.raises(ConfigError, match="'random'"):
        compare(tiny_policy_parts(tiny_config()), loaded, episode, REGISTRY, queries=1)


def test_queries_lie_within_the_episode(episode: Episode) -> None:
    assert query_steps(episode, 8, None) == list(range(0, len(episode), 8))
    for wrong in (0, -1, 1000):
        with pytest.raises(EpisodeError, match="1 to 14 queries"):
            query_steps(episode, 8, wrong)


def test_a_view_the_episode_lacks_is_named(episode: Episode) -> None:
    backbone = tiny_policy_parts(tiny_config(("primary", "overhead")))
    with pytest.raises(EpisodeError, match=r"primary, wrist.*overhead"):
        compare(backbone, [load_pipeline("random", REGISTRY)], episode, REGISTRY, queries=1)


def test_everything_that_can_run_is_compared_and_the_rest_is_named(tmp_path: Path) -> None:
    words = ["compare", "--all", "--preset", "tiny", "--queries", "1", "--out", str(tmp_path)]
    done = CliRunner().invoke(app, words, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    (path,) = tmp_path.iterdir()
    compared = set(json.loads(path.read_text())["queries"])
    assert set(Registry.discover().pipelines) - compared == {"efficientvla", "head_cache", "trim"}
    assert done.output.count("left out: ") == 3
    assert "give its weights" in " ".join(done.output.split())
