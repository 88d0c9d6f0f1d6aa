"""The names of `tokenprune` are those on the API page, each at one place, and importing the package loads no torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import Counter
from importlib import import_module
from pathlib import Path

import pytest

import tokenprune
from tests.helpers.paths import ROOT
from tokenprune import testing
from tokenprune.engine import adapter

PREFIX = "::: "
PAGE = ROOT / "docs/reference/api.md"
LISTED = [line.removeprefix(PREFIX) for line in PAGE.read_text("utf-8").splitlines() if line.startswith(PREFIX)]


def described(identifier: str) -> object:
    """What an identifier on the page stands for: a module, or a name of one."""
    try:
        return import_module(identifier)
    except ModuleNotFoundError:
        module, _, name = identifier.rpartition(".")
        return getattr(import_module(module), name)


def type_checked() -> dict[str, str]:
    """Module of each name, as the block for type checkers imports it."""
    (block,) = [
        node
        for node in ast.parse(Path(tokenprune.__file__).read_text("utf-8")).body
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
    ]
    modules = {}
    for node in block.body:
        assert isinstance(node, ast.ImportFrom)
        assert node.module is not None
        for alias in node.names:
            assert alias.asname == alias.name, f"{alias.name}: strict mypy exports only 'import X as X'"
            modules[alias.name] = node.module
    return modules


def names_of(module: str) -> set[str]:
    """Names on the page that are written as this module's."""
    return {name for owner, _, name in (identifier.rpartition(".") for identifier in LISTED) if owner == module}


def test_the_page_lists_every_name_of_tokenprune_and_no_other() -> None:
    assert names_of("tokenprune") == set(tokenprune.__all__)


def test_the_page_lists_every_name_of_the_adapters_module_that_is_not_on_it_already() -> None:
    assert names_of("tokenprune.engine.adapter") == set(adapter.__all__) - set(tokenprune.__all__)


def test_the_page_lists_every_name_of_testing_and_its_strategies() -> None:
    assert names_of("tokenprune.testing") == {*testing.__all__, "strategies"}


def test_the_page_lists_each_name_once() -> None:
    assert [identifier for identifier, times in Counter(LISTED).items() if times > 1] == []


def test_every_name_on_the_page_exists() -> None:
    for identifier in LISTED:
        described(identifier)


def test_type_checkers_and_python_find_each_name_in_the_same_module() -> None:
    assert type_checked() == {name: f"tokenprune.{module}" for name, module in tokenprune._HOME.items()}


def test_importing_tokenprune_loads_no_torch_and_every_name_resolves() -> None:
    script = """
import sys
import tokenprune
assert "torch" not in sys.modules, "the import alone loads torch"
names = {}
exec("from tokenprune import *", names)
missing = set(tokenprune.__all__) - set(names)
assert not missing, missing
assert set(dir(tokenprune)) == set(tokenprune.__all__)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'tokenprune' has no attribute 'Stagee'"):
        tokenprune.Stagee  # noqa: B018 - reading it is the test
