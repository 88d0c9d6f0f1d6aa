"""Stages to plant errors in, a good pipeline file that uses them, and strategies that draw such files."""

from __future__ import annotations

import sys
from typing import Literal

import pytest
from hypothesis import strategies as st
from pydantic import Field, field_validator

from tokenprune.errors import ConfigError
from tokenprune.pipelines.loader import load_pipeline
from tokenprune.registry.discovery import Registry
from tokenprune.registry.plugin_checks import Owner
from tokenprune.registry.specs import PipelineSpec, StageSpec
from tokenprune.stages.config import CutConfig, StageConfig, Strict
from tokenprune.stages.stage import Stage


class Window(Strict):
    size: int
    shape: Literal["square", "round"] = "square"


class PickConfig(CutConfig):
    metric: Literal["cosine", "dot"] = "cosine"
    windows: list[Window] = Field(default=[], description="Where to look.")
    limit: int | bool = 0


class SteerConfig(StageConfig):
    patience: int = Field(ge=0)
    speed: float = 1.0
    paces: list[dict[str, int]] = Field(default=[], description="Each names every mode.")
    target: str | None = None

    def modes(self) -> dict[str, set[str]]:
        return {f"paces.{index}": set(pace) for index, pace in enumerate(self.paces)}

    def chooses(self) -> set[str]:
        return {self.target} - {None}

    @field_validator("speed")
    @classmethod
    def _real(cls, speed: float) -> float:
        return {0.0: {}["stopped"]}[speed] if speed == 0 else speed


class Pick(Stage[PickConfig]):
    Config = PickConfig


class Steer(Stage[SteerConfig]):
    Config = SteerConfig


GOOD = """\
# a comment first
version: 1
name: pick-two
description: "two stages"
modes: [coarse, fine]
positions: preserve
stages:
  - use: steer
    patience: 3
  - use: pick
    after: [1, 31%]
    keep: {coarse: 160, fine: 0.5}
    views:
      wrist: {keep: 96}
    metric: dot
    windows:
      - size: 2
        shape: round
"""


def make_registry(**pipelines):
    """Stages of this file; pipelines are given as name=(package, resource)."""
    owner = Owner("planted-plugin", "1.2", __name__)
    specs = (
        StageSpec("pick", "selector", "picks", f"{__name__}:Pick"),
        StageSpec("steer", "controller", "steers", f"{__name__}:Steer"),
        StageSpec("broken", "selector", "cannot be imported", "no_such_module_at_all:Thing"),
    )
    files = (PipelineSpec(name, "", *place) for name, place in pipelines.items())
    return Registry().with_specs(*specs, *files, owner=owner)


REGISTRY = make_registry()


def shipping(folder, monkeypatch):
    """A registry with a package `planted_package` made in a folder, which ships `good` and lacks the file of `gone`."""
    package = folder / "planted_package"
    (package / "files").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "files" / "good.yaml").write_text(GOOD)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "planted_package", raising=False)
    return make_registry(good=("planted_package", "files/good.yaml"), gone=("planted_package", "files/gone.yaml"))


def write(folder, text, name="pipe.yaml"):
    """A pipeline file of text or bytes."""
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def planted(old, new):
    """The good file with one thing changed."""
    assert GOOD.count(old) == 1
    return GOOD.replace(old, new)


def problems(folder, text, overrides=()):
    """Lines of the error a file must cause, without the file's path; never in pydantic's own words."""
    path = write(folder, text)
    with pytest.raises(ConfigError) as caught:
        load_pipeline(path, REGISTRY, overrides)
    said = str(caught.value)
    assert "http" not in said
    assert "type=" not in said
    assert "Input should" not in said
    return [line.replace(f"{path}:", "") for line in said.splitlines()]


AMOUNTS = st.one_of(
    st.integers(0, 500),
    st.floats(0, 1, exclude_min=True),
    st.just("union"),
    st.builds(lambda n: {"count": n}, st.integers(0, 9)),
)

CUTS = st.one_of(st.integers(0, 31), st.just("embedding"), st.integers(0, 100).map(lambda n: f"{n}%"))
TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]) | st.just(" "), max_size=20)


@st.composite
def _picks(draw, modes):
    after = draw(st.none() | CUTS | st.lists(CUTS, min_size=1, max_size=4))
    cuts = len(after) if isinstance(after, list) else 1
    amounts = AMOUNTS | st.lists(AMOUNTS, min_size=cuts, max_size=cuts)
    keeps = amounts | st.fixed_dictionaries(dict.fromkeys(modes, amounts))
    stage = st.fixed_dictionaries(
        {"use": st.just("pick"), "keep": keeps},
        optional={
            "views": st.dictionaries(st.sampled_from(["wrist", "primary"]), st.fixed_dictionaries({"keep": keeps})),
            "weight": st.floats(0.001, 1e6) | st.integers(1, 9),
        },
    )
    return draw(stage) | ({} if after is None else {"after": after})


@st.composite
def pipelines(draw):
    modes = draw(
        st.lists(st.sampled_from(["coarse", "fine", "10", "true", "null", "a b"]), min_size=1, max_size=3, unique=True)
    )
    steer = st.fixed_dictionaries(
        {"use": st.just("steer"), "patience": st.integers(0, 2**70)}, optional={"target": st.sampled_from(modes)}
    )
    return {
        "version": 1,
        "name": draw(st.from_regex(r"\A[a-z0-9][a-z0-9_.\-]{0,9}\Z")),
        "description": draw(TEXT),
        "modes": modes,
        "seed": draw(st.integers(0, 2**64)),
        "stages": draw(st.lists(_picks(modes) | steer, max_size=4)),
    }
