"""What `tokenprune new` writes installs, passes the checks and its own tests, untouched."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.helpers.command import PRELUDE
from tokenprune.cli import app
from tokenprune.errors import ConfigError


def new(*words: str) -> str:
    done = CliRunner().invoke(app, ["new", *words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_a_new_plugin_works_as_it_is(tmp_path: Path) -> None:
    said = new("plugin", "long_patches", "--in", str(tmp_path))
    package, installed = tmp_path / "tokenprune-long-patches", tmp_path / "installed"
    assert str(package) in said
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--no-build-isolation", "--target", installed, package], check=True)
    path = os.pathsep.join([str(installed), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    check = [sys.executable, "-c", PRELUDE, "check", "long_patches"]
    done = subprocess.run(check, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "long_patches: keeps every promise; run on openvla, openvla-oft, pi0, pi05" in done.stdout
    tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(package / "tests")]
    done = subprocess.run(tests, cwd=package, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    ruff = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "E,F,I,UP,B", "--line-length", "120"]
    subprocess.run([*ruff, package], check=True)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("plugin", "My-Stage"), "'My-Stage' is no name for a stage"),
        (("plugin", "fastv"), "a stage called 'fastv' exists already, from tokenprune-vla"),
        (("pipeline", "A B"), "'A B' is no name for a pipeline"),
    ],
)
def test_names_that_cannot_be(tmp_path: Path, words: tuple[str, ...], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        new(*words, "--in", str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_written_over(tmp_path: Path) -> None:
    for words in (("plugin", "mine"), ("pipeline", "mine")):
        new(*words, "--in", str(tmp_path))
        with pytest.raises(ConfigError, match="exists already; nothing was written"):
            new(*words, "--in", str(tmp_path))


def test_a_new_pipeline_is_valid(tmp_path: Path) -> None:
    new("pipeline", "mine", "--in", str(tmp_path))
    done = CliRunner().invoke(app, ["validate", str(tmp_path / "mine.yaml")])
    assert done.exit_code == 0, done.output
