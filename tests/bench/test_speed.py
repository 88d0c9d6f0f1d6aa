"""The speed measurement: pairs in turn, consistent rows, a file that grows, and errors before anything runs."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from tests.helpers.bench_episode import EPISODE, given_roof
from tests.helpers.paths import ROOT
from tests.helpers.planting import REGISTRY
from tokenprune.bench.memory import MeteredPolicy
from tokenprune.bench.result import BenchResult
from tokenprune.bench.roofline import Roof, measure_roof
from tokenprune.bench.settings import BenchSettings
from tokenprune.bench.speed import Subject, bench
from tokenprune.bench.table import bench_text, needs_table, speed_table
from tokenprune.bench.upstream import UPSTREAM
from tokenprune.cli import app
from tokenprune.compare.episode import load_episode
from tokenprune.engine.executor import Execution
from tokenprune.errors import ConfigError, EpisodeError, ResultError, TokenPruneError
from tokenprune.pipelines.loader import load_pipeline
from tokenprune.report.files import read_result, write_json
from tokenprune.report.text import WIDTH

OFT = Subject("openvla-oft", "tiny", EPISODE)
BACKBONES = ("openvla", "openvla-oft", "pi0", "pi05")


def run(*pipelines: str, subjects: Sequence[Subject] = (OFT,), save: Any = None, **changed: Any) -> dict[str, Any]:
    settings = BenchSettings(**{"dtypes": ("float32",), "pairs": 3, "warmup": 1, "queries": 2, **changed})
    loaded = [load_pipeline(name, REGISTRY) for name in pipelines]
    return bench(subjects, loaded, settings, REGISTRY, save or (lambda result: None), roof=given_roof).to_json()


def text(data: dict[str, Any]) -> str:
    return bench_text(BenchResult.model_validate(data))


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    data = run("random@keep=0.25", "specprune", dtypes=("float32", "float64"), reference="upstream")
    return json.loads(json.dumps(data))


def test_there_is_a_row_for_every_combination(result):
    assert [entry["key"] for entry in result["results"]] == [
        ["openvla-oft", "tiny", dtype, "eager"] for dtype in ("float32", "float64")
    ]
    for entry in result["results"]:
        assert [row["pipeline"] for row in entry["rows"]] == ["dense", "random@keep=0.25", "specprune", UPSTREAM]
        assert [row["pairs"] for row in entry["rows"]] == [9, 3, 3, 3]
        assert entry["backbone"]["dtype"] == entry["dtype"]
        assert entry["backbone"]["untrained"]
        assert set(entry["pipelines"]) == {"random@keep=0.25", "specprune", UPSTREAM}
    assert (result["kind"], result["complete"], result["refused"]) == ("bench", True, [])
    assert set(result["pipelines"]) == {"random@keep=0.25", "specprune"}
    assert {"torch", "transformers"} <= set(result["provenance"]["packages"])
    assert result["settings"]["pairs"] == 3


def test_numbers_of_a_row_agree_with_each_other(result):
    for entry in result["results"]:
        dense = entry["rows"][0]
        assert dense["speedup"] == dense["efficiency"] == dense["flop_ratio"] == 1
        for row in entry["rows"]:
            own, beside = (np.array(row["times"][who]) for who in ("own", "dense"))
            assert len(own) == len(beside) == row["pairs"]
            assert row["speedup"] == pytest.approx(np.median(beside / own), rel=1e-3)
            assert row["efficiency"] == pytest.approx(row["speedup"] / row["flop_ratio"])
            assert row["flop_ratio"] == pytest.approx(dense["gflops"] / row["gflops"], rel=0.2)
            assert row["of_peak"] == pytest.approx(row["tflops"] * 1e12 / entry["roof"]["flops"])
            assert row["median_ms"] == pytest.approx(np.median(own), rel=1e-3)
            assert row["p95_ms"] >= row["median_ms"]
            assert row["waits"] is None
            assert row["peak_bytes"] is None or row["peak_bytes"] > 1e7
        random = entry["rows"][1]
        rate = np.median(random["gflops"] / np.array(random["times"]["own"]))
        assert random["tflops"] == pytest.approx(rate, rel=1e-3)
        assert random["over_floor"] == pytest.approx(random["median_ms"] / random["floor_ms"], rel=1e-3)


def test_the_curve_ends_at_dense_and_never_falls(result):
    entry = result["results"][0]
    curve, dense = entry["curve"], entry["rows"][0]
    assert curve[0]["tokens"] == 0
    assert (curve[-1]["tokens"], curve[-1]["gflops"]) == (dense["tokens_mean"], pytest.approx(dense["gflops"]))
    assert curve[-1]["floor_ms"] == pytest.approx(dense["floor_ms"])
    for one, other in pairwise(curve):
        assert one["gflops"] < other["gflops"]
        assert one["floor_ms"] <= other["floor_ms"]


def test_dense_and_pipeline_are_queried_in_turn_at_the_same_observations(monkeypatch):
    log = []
    real = MeteredPolicy.act

    def act(self: MeteredPolicy, observation: Any, slot: int = 0) -> Any:
        log.append((self.pipeline.config.name, observation["state"].tobytes(), self.counting))
        return real(self, observation, slot)

    monkeypatch.setattr(MeteredPolicy, "act", act)
    # Five pairs of an episode of two queries: it is played three times.
    run("random", "uniform_grid", pairs=5, warmup=1)
    names = [name for name, _, _ in log]
    assert names == ["dense", "random"] * 6 + ["dense", "uniform_grid"] * 6
    assert all(one[1] == other[1] for one, other in zip(log[::2], log[1::2], strict=True))
    first, second = log[0][1], log[4][1]
    assert first != second
    assert [state for _, state, _ in log[:12:2]] == [first, first, second, first, second, first]
    assert [counting for _, _, counting in log[:12]] == [True] * 2 + [False] * 10


def test_every_backbone_is_measured_and_what_it_cannot_run_is_named():
    subjects = [Subject(name, "tiny", EPISODE) for name in BACKBONES]
    data = run("head_cache", "uniform_grid", subjects=subjects, pairs=1, reference="upstream")
    assert [entry["key"][0] for entry in data["results"]] == list(BACKBONES)
    assert {(one["backbone"], one["pipeline"]) for one in data["refused"]} == {
        ("openvla", "head_cache"), ("openvla-oft", "head_cache"),
    }  # fmt: skip
    for entry in data["results"]:
        rows = {row["pipeline"]: row for row in entry["rows"]}
        assert ("head_cache" in rows) == entry["key"][0].startswith("pi0")
        assert rows[UPSTREAM]["kernel"].startswith("eager, ")
        assert rows["dense"]["kernel"].startswith("sdpa/")


def test_what_is_finished_is_saved_before_the_next_begins(monkeypatch):
    saved: list[dict[str, Any]] = []
    real = MeteredPolicy.act

    def act(self: MeteredPolicy, observation: Any, slot: int = 0) -> Any:
        if self.pipeline.config.name == "uniform_grid":
            raise KeyboardInterrupt
        return real(self, observation, slot)

    monkeypatch.setattr(MeteredPolicy, "act", act)
    with pytest.raises(KeyboardInterrupt):
        run("random", "none", "uniform_grid", save=lambda result: saved.append(result.to_json()))
    assert [[row["pipeline"] for row in data["results"][0]["rows"]] for data in saved] == [
        ["dense", "random"], ["dense", "random", "none"],
    ]  # fmt: skip
    assert not any(data["complete"] for data in saved)
    assert "not finished" in text(saved[-1])


def test_a_result_survives_its_file(result, tmp_path):
    write_json(tmp_path / "bench.json", result)
    assert read_result(tmp_path / "bench.json", BenchResult).to_json() == result


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"modes": ("eagr",)}, "unknown mode 'eagr'; did you mean 'eager'"),
        ({"dtypes": ("bfloat61",)}, "unknown dtype 'bfloat61'; did you mean 'bfloat16'"),
        ({"reference": "upsteam"}, "unknown reference 'upsteam'; did you mean 'upstream'"),
        ({"pairs": 0}, "pairs must be 1 or more, got 0"),
        ({"warmup": 0}, "warmup must be 1 or more, got 0"),
        ({"options": {"head": "l2"}}, "head"),
        ({"subjects": (Subject("openvla-oft", "8b", EPISODE),)}, "did you mean '7b'"),
        ({"options": {"views": ["primary", "overhead"]}}, "primary, wrist.*overhead"),
    ],
)
def test_mistakes_are_named_before_weights_are_made(monkeypatch, changed, message):
    monkeypatch.setattr("tokenprune.bench.speed.load_backbone", lambda *given: pytest.fail("weights were made"))
    with pytest.raises((ConfigError, EpisodeError), match=message):
        run("random", **changed)


def test_nothing_to_measure_is_refused(monkeypatch):
    monkeypatch.setattr("tokenprune.bench.speed.load_backbone", lambda *given: pytest.fail("weights were made"))
    with pytest.raises(ConfigError, match="nothing to measure on 'openvla-oft': name a pipeline besides dense"):
        run("dense")
    with pytest.raises(ConfigError, match=r"nothing to measure on 'openvla-oft': .*head_cache"):
        run("head_cache")
    with pytest.raises(EpisodeError, match="1 to 14 queries"):
        run("random", queries=15)


def test_text_fits_eighty_columns(result):
    wide = json.loads(json.dumps(result))
    for row in wide["results"][0]["rows"]:
        row |= {"median_ms": 21034.5, "p95_ms": 99999.0, "tflops": 412.3, "over_floor": 131.2, "floor_ms": 17000.1}
        row |= {"gflops": 8812.3, "peak_bytes": 141e9, "waits": 123, "speedup": 12.34, "tokens_mean": 768.0}
        row |= {"of_peak": 1.0, "selection": 0.4094}
    rows = BenchResult.model_validate(wide).results[0].rows
    # Where a table does not fit, rich crops it without a word.
    for table in (speed_table(rows), needs_table(rows)):
        assert Console(width=200).measure(table).minimum <= WIDTH
    for data in (result, wide):
        lines = text(data).splitlines()
        assert max(map(len, lines)) <= WIDTH
        assert not any("…" in line for line in lines)
    words = text(wide)
    for word in ("131", "412", "8812", "141.00", "floor", "peak", UPSTREAM.split()[0]):
        assert word in words
    # What is not known is not a number.
    for row in wide["results"][0]["rows"]:
        row["peak_bytes"] = None
    assert "141.00" not in text(wide)


def test_the_command_writes_file_chart_and_profile(tmp_path, monkeypatch):
    monkeypatch.setattr("tokenprune.bench.speed.measure_roof", given_roof)
    words = ["bench", "uniform_grid@keep=0.25", "--backbone", "openvla-oft", "--backbone", "pi0", "--preset", "tiny"]
    words += ["--pairs", "1", "--warmup", "1", "--dtype", "float32", "--chart", str(tmp_path / "speed.png")]
    words += ["--profile", str(tmp_path / "profile"), "--out", str(tmp_path / "deep" / "one.json")]
    done = CliRunner().invoke(app, words, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    data = json.loads((tmp_path / "deep" / "one.json").read_text())
    assert [entry["key"][0] for entry in data["results"]] == ["openvla-oft", "pi0"]
    assert max(map(len, done.output.splitlines())) <= max(WIDTH, len(str(tmp_path)) + 30)
    with Image.open(tmp_path / "speed.png") as drawn:
        assert drawn.width == 1200
        assert np.asarray(drawn.convert("L")).std() > 5
    traces = sorted(path.name for path in (tmp_path / "profile").iterdir())
    assert traces == [f"{name}-tiny-float32-eager-uniform_grid_keep=0.25.json" for name in ("openvla-oft", "pi0")]
    assert json.loads((tmp_path / "profile" / traces[0]).read_text())["traceEvents"]


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        (["--mode", "fast"], ConfigError, "unknown mode 'fast'; valid: " + ", ".join(sorted(Execution))),
        (["--mode", "cuda_graph"], ConfigError, "mode 'cuda_graph' needs a CUDA device, got 'cpu'"),
        (["--preset", "tiny", "--preset", "small"], ConfigError, "2 times for 1 backbones"),
        (["--chart", "speed.jpeg"], ResultError, r"its ending is '.jpeg'; valid: .png, .svg"),
        (["--backbone", "openvla-of"], TokenPruneError, "did you mean 'openvla-oft'"),
        (["--device", "cuda"], ConfigError, "sees no GPU"),
    ],
)
def test_mistakes_on_the_command_line(words, error, message, tmp_path):
    if words == ["--device", "cuda"] and torch.cuda.is_available():
        words = ["--device", "cuda:x"]
        message = "is no torch device"
    with pytest.raises(error, match=message):
        CliRunner().invoke(app, ["bench", "random", "--out", str(tmp_path), *words], catch_exceptions=False)
    assert not list(tmp_path.iterdir())


def test_a_trained_preset_is_measured_too(tmp_path, monkeypatch):
    monkeypatch.setattr("tokenprune.bench.speed.measure_roof", given_roof)
    words = ["bench", "random", "--preset", "mini", "--pairs", "1", "--warmup", "1", "--out", str(tmp_path), "--json"]
    data = json.loads(CliRunner().invoke(app, words, catch_exceptions=False).output)
    assert not data["results"][0]["backbone"]["untrained"]
    assert "untrained" not in text(data)
    assert data["settings"]["modes"] == ["eager"]


def test_a_policy_with_three_cameras_looks_at_an_episode_with_three():
    episode = load_episode(ROOT / "examples/three_cameras.npz")
    assert (episode.instruction, episode.meta["success"]) == (EPISODE.instruction, True)
    views = ["primary", "wrist", "side"]
    data = run("specprune", subjects=[Subject("pi0", "tiny", episode)], options={"views": views}, pairs=1, queries=1)
    assert data["results"][0]["backbone"]["views"] == views
    with pytest.raises(EpisodeError, match="views primary, wrist; the policy also looks at side"):
        run("specprune", subjects=[Subject("pi0", "tiny", EPISODE)], options={"views": views})


def test_the_roof_is_the_best_of_those_measured_between_pipelines():
    measured = iter([Roof(2e12, 1e10, 8, 8), Roof(1e12, 3e10, 8, 8), Roof(4e12, 2e10, 8, 8)])
    saved = []
    settings = BenchSettings(dtypes=("float32",), pairs=1, warmup=1, queries=1)
    loaded = [load_pipeline(name, REGISTRY) for name in ("random", "fastv")]

    def save(result):
        saved.append(result.to_json()["results"][0])

    bench([OFT], loaded, settings, REGISTRY, save, roof=lambda device, dtype: next(measured))
    assert [(one["roof"]["flops"], one["roof"]["bandwidth"]) for one in saved[:2]] == [(2e12, 3e10), (4e12, 3e10)]
    for one in saved[:2]:
        assert [row["of_peak"] * one["roof"]["flops"] for row in one["rows"]] == pytest.approx(
            [row["tflops"] * 1e12 for row in one["rows"]]
        )


def test_the_roof_is_a_rate_this_machine_has(monkeypatch):
    monkeypatch.setattr("tokenprune.bench.roofline._ON_CPU", (64, 2**16))
    roof = measure_roof(torch.device("cpu"), torch.float32)
    assert 1e6 < roof.flops < 1e15
    assert 1e6 < roof.bandwidth < 1e13
    assert (roof.rows, roof.copied) == (64, 2**16)


MAKE = """
import json, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from tokenprune.loading import load_backbone
from tokenprune.registry.discovery import Registry

def kibibytes(field):
    return int(Path("/proc/self/status").read_text().split(field + ":")[1].split()[0])

found = Registry.discover()
load_backbone("openvla-oft", found, None, "tiny", "cpu", "bfloat16", 0, {})  # whatever is imported on the way
before = kibibytes("VmRSS")
made = load_backbone("openvla-oft", found, None, "small", "cpu", "bfloat16", 0, {})
weights = [value for value in made.model.state_dict().values()]
print(json.dumps({"grown": (kibibytes("VmHWM") - before) * 1024, "weights": sum(w.nbytes for w in weights),
                  "largest": max(w.numel() for w in weights) * 4, "dtypes": sorted({str(w.dtype) for w in weights})}))
"""


def test_random_weights_take_no_more_than_themselves_and_one_matrix():
    done = subprocess.run([sys.executable, "-c", MAKE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["dtypes"] == ["torch.bfloat16"]
    assert found["weights"] > 150e6
    assert found["weights"] < found["grown"] < 1.1 * found["weights"] + 2 * found["largest"], found
