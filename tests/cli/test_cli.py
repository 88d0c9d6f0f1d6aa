"""The command line as a user meets it: output, exit codes, one message per mistake."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.command import PRELUDE, call


def test_list_names_everything_and_imports_no_torch() -> None:
    code = PRELUDE.replace("c.main()", "\ntry: c.main()\nexcept SystemExit: pass\n")
    code += "print([m for m in ('torch', 'transformers') if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code, "list"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "COLUMNS": "80"},
    )
    for name in ("dense", "none", "random", "uniform_grid", "fastv", "openvla-oft"):
        assert name in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_list_filters_and_prints_json() -> None:
    entries = json.loads(call("list", "uniform*", "--json").stdout)
    assert {(e["kind"], e["name"]) for e in entries} == {
        ("stage/baseline", "uniform_grid"),
        ("pipeline", "uniform_grid"),
    }


def test_show_a_stage_names_its_settings() -> None:
    done = call("show", "fastv")
    assert done.returncode == 0
    for word in ("arXiv 2403.06764", "rows = 'auto'", "keep = 0.5", "tokenprune-vla"):
        assert word in done.stdout


def test_explain_counts_without_weights() -> None:
    # Not getrusage: its peak is inherited from the process that started this one.
    code = PRELUDE + "\nprint(open('/proc/self/status').read().split('VmHWM:')[1].split()[0], file=sys.stderr)"
    words = ["explain", "fastv", "--backbone", "openvla-oft", "--preset", "7b", "--json"]
    code = code.replace("c.main()", "\ntry: c.main()\nexcept SystemExit: pass")
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
    assert int(done.stderr) < 2**20, "more than a gibibyte: the weights alone would take 28"
    facts = json.loads(done.stdout)
    mode = facts["modes"]["default"]
    assert [layer["prunable"] for layer in mode["layers"]] == [512] * 2 + [256] * 30
    assert mode["cuts"][0] | {"views": {}} == {
        "after": "1", "found": 512, "keep": 256, "at_most": False, "views": {}, "stages": ["fastv"],
    }  # fmt: skip
    rows = facts["segments"][4]["length"]
    # 32 heads of 128: rows of 602 scores each.
    gflops = pytest.approx(2 * rows * 602 * 4096 / 1e9)
    assert mode["probes"] == [{"layer": 1, "rows": "text", "count": rows, "ahead": False, "gflops": gflops}]
    # Upstream's dimensions give 7.97 TFLOP for the decoder at 601 tokens.
    assert mode["gflops"]["dense"] == pytest.approx(8629, rel=0.001)


@pytest.mark.parametrize("preset", ["mini", "small"])
def test_explain_prints_a_table(preset: str) -> None:
    done = call("explain", "uniform_grid@keep=0.25", "--preset", preset)
    assert done.returncode == 0
    assert "times fewer" in done.stdout
    assert ("untrained" in done.stdout) == (preset == "small")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("explain", "fasttv"), "did you mean 'fastv'"),
        (("explain", "fastv", "--preset", "8b"), "did you mean '7b'"),
        (("explain", "fastv", "--backbone", "openvla-of"), "did you mean 'openvla-oft'"),
        (("explain", "fastv@kep=0.5"), "keep"),
        (("explain", "fastv", "--set", "stages.0.after=40"), "0 to 4"),
        (("explain", "fastv", "--option", "proprio"), "key=value"),
        (("explain", "missing.yaml"), "missing.yaml"),
        (("show", "fastvv"), "did you mean 'fastv'"),
        (("compare", "fastv", "--episode", "nowhere.npz"), "nowhere.npz"),
        (("compare", "fastv", "--checkpoint", "nowhere"), "nowhere"),
        (("list", "--plugin", "nowhere.py"), "nowhere.py"),
    ],
)
def test_mistakes_exit_2_with_one_message(words: tuple[str, ...], message: str, tmp_path: Path) -> None:
    done = call(*words, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_validate_reports_every_problem_with_its_place(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("version: 1\nname: mine\nstages:\n  - use: fastv\n    kep: 0.5\n  - use: randm\n", encoding="utf-8")
    done = call("validate", "mine.yaml", "random", cwd=tmp_path)
    assert done.returncode == 1
    assert "mine.yaml:5:5" in done.stdout
    assert "did you mean 'keep'" in done.stdout
    assert "mine.yaml:6:" in done.stdout
    assert "did you mean 'random'" in done.stdout
    assert json.loads(call("validate", "mine.yaml", "--json", cwd=tmp_path).stdout)


def test_validate_against_a_backbone(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("version: 1\nname: mine\nstages:\n  - use: fastv\n    after: 20\n", encoding="utf-8")
    assert call("validate", str(file)).returncode == 0
    assert call("validate", str(file), "--backbone", "openvla-oft", "--preset", "7b").returncode == 0
    done = call("validate", str(file), "--backbone", "openvla-oft", "--preset", "small")
    assert done.returncode == 1
    assert "0 to 6" in done.stdout


def test_schema_is_written(tmp_path: Path) -> None:
    done = call("schema", "--out", "tokenprune.schema.json", cwd=tmp_path)
    assert done.returncode == 0
    schema = json.loads((tmp_path / "tokenprune.schema.json").read_text(encoding="utf-8"))
    assert "fastv" in json.dumps(schema)


PLUGIN = """
from tokenprune.stages.config import CutConfig, Keep
from tokenprune.registry.hookspecs import hookimpl
from tokenprune.tokens.proposal import Proposal
from tokenprune.registry.specs import StageSpec
from tokenprune.stages.stage import Stage


class Config(CutConfig):
    keep: Keep = 0.25


class Bright(Stage[Config]):
    Config = Config

    @hookimpl
    def select_tokens(self, ctx):
        return Proposal(score=ctx.patches.mean(-1))


@hookimpl
def tokenprune_register():
    return [StageSpec("bright", "selector", "keeps large embeddings", ":Bright")]
"""


def test_a_plugin_file_and_a_pipeline_of_ones_own_are_compared(tmp_path: Path) -> None:
    (tmp_path / "bright.py").write_text(PLUGIN, encoding="utf-8")
    (tmp_path / "mine.yaml").write_text("version: 1\nname: mine\nstages:\n  - use: bright\n", encoding="utf-8")
    done = call("compare", "dense", "mine.yaml", "--plugin", "bright.py", "--queries", "1", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = {row["pipeline"]: row for row in json.loads(done.stdout)["rows"]}
    assert rows["mine"]["tokens_last"] == 128
    assert len(list((tmp_path / "results").glob("compare-openvla-oft-*.json"))) == 1


def test_run_prints_each_query(tmp_path: Path) -> None:
    done = call("run", "fastv", "--preset", "tiny", "--queries", "1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "kept after 1:" in done.stdout
    assert "untrained" in done.stdout


def test_the_first_preset_is_the_default_and_trained(tmp_path: Path) -> None:
    done = call("run", "fastv", "--queries", "1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "openvla-oft mini" in done.stdout
    assert "untrained" not in done.stdout


def test_doctor_shows_a_broken_plugin(tmp_path: Path) -> None:
    dist = tmp_path / "sadly-1.2.dist-info"
    dist.mkdir()
    (dist / "METADATA").write_text("Metadata-Version: 2.1\nName: sadly\nVersion: 1.2\n", encoding="utf-8")
    (dist / "entry_points.txt").write_text("[tokenprune]\nsad = sadly_plugin\n", encoding="utf-8")
    (tmp_path / "sadly_plugin.py").write_text("raise OSError('no luck')\n", encoding="utf-8")
    done = call("doctor", env={"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 1
    for word in ("sad", "sadly 1.2", "no luck", "Traceback"):
        assert word in done.stdout
    listed = call("list", env={"PYTHONPATH": str(tmp_path)})
    assert listed.returncode == 0
    assert "doctor" in listed.stderr
    disabled = call("doctor", env={"PYTHONPATH": str(tmp_path), "TOKENPRUNE_DISABLE": "sad"})
    assert disabled.returncode == 0
    unknown = call("doctor", env={"TOKENPRUNE_DISABLE": "nobody"})
    assert unknown.returncode == 1
    assert "nobody" in unknown.stdout
