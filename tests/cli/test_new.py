"""What `tokenprune new` writes installs, passes the checks and its own tests, untouched."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.helpers.command import call
from tests.helpers.paths import ROOT
from tokenprune.cli import app
from tokenprune.errors import ConfigError


def new(*words: str) -> str:
    done = CliRunner().invoke(app, ["new", *words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


PAGE = (ROOT / "docs" / "first-backbone.md").read_text(encoding="utf-8")


def installed(package: Path) -> dict[str, str]:
    """The environment of a process that has it installed."""
    target = package.parent / "installed"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--no-build-isolation", "--target", target, package], check=True)
    path = os.pathsep.join([str(target), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def own_tests_pass(package: Path, env: dict[str, str]) -> None:
    tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(package / "tests")]
    done = subprocess.run(tests, cwd=package, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    ruff = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "E,F,I,UP,B", "--line-length", "120"]
    subprocess.run([*ruff, package], check=True)


def output_of(words: list[str], env: dict[str, str], cwd: Path) -> str:
    done = call(*words, env=env, cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_new_plugin_works_as_it_is(tmp_path: Path) -> None:
    said = new("plugin", "long_patches", "--in", str(tmp_path))
    package = tmp_path / "tokenprune-long-patches"
    assert str(package) in said
    env = installed(package)
    found = output_of(["check", "long_patches"], env, tmp_path)
    assert "long_patches: keeps every promise; run on openvla, openvla-oft, pi0, pi05" in found
    own_tests_pass(package, env)


def test_a_new_backbone_works_as_it_is_and_as_its_page_says(tmp_path: Path) -> None:
    new("backbone", "pocket", "--in", str(tmp_path))
    package = tmp_path / "tokenprune-pocket"
    env = installed(package)
    own_tests_pass(package, env)
    written = [path.read_text(encoding="utf-8") for path in package.rglob("*.py")]
    blocks = re.findall(r"^```(\w+)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    assert [kind for kind, _ in blocks].count("python") == 8
    for kind, block in blocks:
        if kind == "python":
            assert any(block in source for source in written), f"not in the package:\n{block}"
            continue
        assert kind == "console"
        if "new backbone" in block:
            assert block == f"$ tokenprune new backbone pocket\n{wrote(tmp_path)}"
            continue
        commands = [line.split()[2:] for line in block.splitlines() if line.startswith("$ tokenprune ")]
        said = " ".join(" ".join(output_of(words, env, tmp_path) for words in commands).split())
        shown = "\n".join(line for line in block.splitlines() if not line.startswith("$"))
        assert commands
        for part in shown.split("…"):
            assert " ".join(part.split()) in said


def wrote(folder: Path) -> str:
    """What `new backbone` says in a folder of its own, as in the current one."""
    inside = folder / "elsewhere"
    inside.mkdir()
    return new("backbone", "pocket", "--in", str(inside)).replace(f"{inside}/", "")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("plugin", "My-Stage"), "'My-Stage' is no name for a stage"),
        (("plugin", "fastv"), "a stage called 'fastv' exists already, from tokenprune-vla"),
        (("backbone", "My-Backbone"), "'My-Backbone' is no name for a backbone"),
        (("backbone", "pi0"), "a backbone called 'pi0' exists already, from tokenprune-vla"),
        (("pipeline", "A B"), "'A B' is no name for a pipeline"),
    ],
)
def test_names_that_cannot_be(tmp_path: Path, words: tuple[str, ...], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        new(*words, "--in", str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_written_over(tmp_path: Path) -> None:
    for words in (("plugin", "mine"), ("backbone", "yours"), ("pipeline", "mine")):
        new(*words, "--in", str(tmp_path))
        with pytest.raises(ConfigError, match="exists already; nothing was written"):
            new(*words, "--in", str(tmp_path))


def test_a_new_pipeline_is_valid(tmp_path: Path) -> None:
    new("pipeline", "mine", "--in", str(tmp_path))
    done = CliRunner().invoke(app, ["validate", str(tmp_path / "mine.yaml")])
    assert done.exit_code == 0, done.output
