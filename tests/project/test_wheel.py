""""""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT

PACKAGES = (ROOT / "tokenprune", ROOT / "plugins" / "tokenprune_plugins", ROOT / "adapters" / "tokenprune_adapters")
TORCH = re.search(r"^TORCH \?= (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE).group(1)


def run(*command: str | Path, cwd: Path) -> str:
    hidden = {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"}
    env = {
        name: value for name, value in os.environ.items() if name not in hidden and not name.startswith("TOKENPRUNE_")
    }
    done = subprocess.run(
        [*map(str, command)], cwd=cwd, env=env, capture_output=True, text=True, check=False, timeout=900
    )
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", folder, ROOT, cwd=folder)
    (built,) = folder.glob("tokenprune_vla-*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A venv that holds the wheel and what it depends on, and nothing else; removed afterwards, being large."""
    venv = tmp_path_factory.mktemp("venv")
    run(sys.executable, "-m", "venv", venv, cwd=venv)
    # Compiling every module of torch and transformers takes longer than compiling those that get imported.
    run(venv / "bin" / "python", "-m", "pip", "install", "--quiet", "--no-compile", TORCH, wheel, cwd=venv)
    yield venv
    shutil.rmtree(venv)


def test_the_wheel_holds_every_file_of_the_three_packages(wheel):
    expected = {
        str(path.relative_to(package.parent))
        for package in PACKAGES
        for path in package.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert held == expected
    assert {f"{package.name}/py.typed" for package in PACKAGES} <= held


def test_an_installed_wheel_lists_and_compares_outside_the_checkout(installed, tmp_path):
    where = run(installed / "bin" / "python", "-c", "import tokenprune_adapters as a; print(a.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(installed)

    assert "fastv" in run(installed / "bin" / "tokenprune", "list", cwd=tmp_path)

    report = run(
        installed / "bin" / "tokenprune",
        *("compare", "dense", "fastv", "--backbone", "openvla-oft", "--preset", "small", "--queries", "2", "--json"),
        cwd=tmp_path,
    )
    assert [row["pipeline"] for row in json.loads(report)["rows"]] == ["dense", "fastv"]
