"""What the comparisons need; where it is not installed they fail and say so."""

from __future__ import annotations

import importlib.metadata

import pytest

_WANTED = "0.6.1"


@pytest.fixture(autouse=True, scope="session")
def _lerobot():
    try:
        found = importlib.metadata.version("lerobot")
    except importlib.metadata.PackageNotFoundError:
        found = "not installed"
    if found != _WANTED:
        pytest.fail(f"these tests compare with lerobot[pi]=={_WANTED}, which is {found} here; run `make peer`")
