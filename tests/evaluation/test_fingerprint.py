"""Weights are known by what they are, not by where they lie."""

from __future__ import annotations

import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenprune.evaluation.fingerprint import fingerprint


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "checkpoint"
    made.mkdir()
    (made / "config.json").write_text("{}")
    (made / "model.safetensors").write_bytes(bytes(range(256)) * 20_000)
    return made


def test_a_copy_elsewhere_is_the_same(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / ".cache").write_text("no part of it")
    (tmp_path / "copy" / "README.md").write_text("about it")
    assert fingerprint(tmp_path / "copy") == fingerprint(folder)


@given(start=st.integers(0, 5_119_999), length=st.integers(200_000, 1_000_000))
def test_what_training_would_change_shows(tmp_path_factory, start, length):
    made = tmp_path_factory.mktemp("weights")
    content = bytearray(bytes(range(256)) * 20_000)
    (made / "model.safetensors").write_bytes(content)
    before = fingerprint(made)
    start = min(start, len(content) - length)
    content[start : start + length] = bytes(255 - byte for byte in content[start : start + length])
    (made / "model.safetensors").write_bytes(content)
    assert fingerprint(made) != before


def test_other_names_sizes_and_settings_show(folder):
    hashes = {fingerprint(folder)}
    (folder / "config.json").write_text("{ }")
    hashes.add(fingerprint(folder))
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    hashes.add(fingerprint(folder))
    (folder / "other.safetensors").write_bytes(bytes(range(256)) * 20_001)
    hashes.add(fingerprint(folder))
    assert len(hashes) == 4
