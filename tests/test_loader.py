from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, field_validator

from tokenprune.config import DENSE, CutConfig, StageConfig, Strict
from tokenprune.errors import ConfigError, PluginError
from tokenprune.loader import load_pipeline, pipeline_schema
from tokenprune.registry import Owner, Registered, Registry
from tokenprune.specs import PipelineSpec, StageSpec
from tokenprune.stage import Stage

MODULE = "planted_stages"


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


@pytest.fixture(scope="module", autouse=True)
def stages():
    module = ModuleType(MODULE)
    module.Pick, module.Steer = Pick, Steer
    sys.modules[MODULE] = module
    yield
    del sys.modules[MODULE]


@pytest.fixture(scope="module")
def registry():
    return make_registry()


def make_registry(**pipelines):
    """Stages of this file; pipelines are given as name=(package, resource)."""
    found = Registry()
    owner = Owner("planted-plugin", "1.2", MODULE)
    specs = (
        StageSpec("pick", "selector", "picks", f"{MODULE}:Pick"),
        StageSpec("steer", "controller", "steers", f"{MODULE}:Steer"),
        StageSpec("broken", "selector", "cannot be imported", "no_such_module_at_all:Thing"),
    )
    found.stages.update({spec.name: Registered(spec, owner) for spec in specs})
    for name, place in pipelines.items():
        found.pipelines[name] = Registered(PipelineSpec(name, "", *place), owner)
    return found


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """A registry whose package `planted_package` ships `good` in a folder."""
    package = tmp_path / "planted_package"
    (package / "files").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "files" / "good.yaml").write_text(GOOD)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield make_registry(good=("planted_package", "files/good.yaml"), gone=("planted_package", "files/gone.yaml"))
    sys.modules.pop("planted_package", None)


@pytest.fixture
def write(tmp_path):
    def write(text, name="pipe.yaml"):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


@pytest.fixture
def fails(write, registry):
    """Errors of a file, one string a line, each without the file's path."""

    def fails(text, overrides=()):
        path = write(text)
        with pytest.raises(ConfigError) as caught:
            load_pipeline(path, registry, overrides)
        said = str(caught.value)
        assert "http" not in said
        assert "type=" not in said
        assert "Input should" not in said
        return [line.replace(f"{path}:", "") for line in said.splitlines()]

    return fails


def planted(old, new):
    assert GOOD.count(old) == 1
    return GOOD.replace(old, new)


# What a good file becomes.


def test_a_good_file_is_read(write, registry):
    path = write(GOOD)
    loaded = load_pipeline(path, registry)
    steer, pick = loaded.config.stages
    assert (loaded.label, loaded.origin) == ("pick-two", str(path))
    assert loaded.config.modes == ("coarse", "fine")
    assert steer == SteerConfig(use="steer", patience=3)
    assert pick.after == (1, "31%")
    assert pick.keep == {"coarse": 160, "fine": 0.5}
    assert pick.views["wrist"].keep == 96
    assert (pick.metric, pick.windows) == ("dot", [Window(size=2, shape="round")])


def test_resolved_is_plain_and_holds_what_the_file_says(write, registry):
    resolved = load_pipeline(write(GOOD), registry).resolved
    assert resolved == {
        "version": 1,
        "name": "pick-two",
        "description": "two stages",
        "modes": ["coarse", "fine"],
        "positions": "preserve",
        "stages": [
            {"use": "steer", "patience": 3},
            {
                "use": "pick",
                "after": [1, "31%"],
                "keep": {"coarse": 160, "fine": 0.5},
                "views": {"wrist": {"keep": 96}},
                "metric": "dot",
                "windows": [{"size": 2, "shape": "round"}],
            },
        ],
    }
    assert {type(value) for value in resolved.values()} <= {int, str, list}


def test_dense_is_always_known():
    loaded = load_pipeline("dense", Registry())
    assert (loaded.config, loaded.label, loaded.origin) == (DENSE, "dense", "built in")
    assert loaded.resolved["name"] == "dense"


def test_a_shipped_pipeline_is_known_by_name(shipped, tmp_path):
    loaded = load_pipeline("good", shipped)
    assert loaded.config.name == "pick-two"
    assert loaded.origin == str(tmp_path / "planted_package" / "files" / "good.yaml")


def test_an_unknown_pipeline_is_answered_with_the_nearest(shipped):
    with pytest.raises(PluginError, match="'goood'.*did you mean 'good'.*dense"):
        load_pipeline("goood", shipped)


def test_a_shipped_pipeline_without_its_file_names_the_owner(shipped):
    with pytest.raises(PluginError, match=r"'gone' of planted-plugin 1\.2.*'planted_package' holds no file 'files/gone"):
        load_pipeline("gone", shipped)


def test_a_pipeline_of_a_single_plugin_file_lies_beside_it(tmp_path, write):
    write(GOOD, "beside.yaml")
    module = ModuleType("planted_file")
    module.__file__ = str(tmp_path / "plugin.py")
    sys.modules["planted_file"] = module
    try:
        assert load_pipeline("mine", make_registry(mine=("planted_file", "beside.yaml"))).config.name == "pick-two"
    finally:
        del sys.modules["planted_file"]


def test_a_date_stays_text_and_a_number_of_text_stays_text(write, registry):
    text = planted('"two stages"', "2026-01-31").replace("pick-two", "'7'")
    config = load_pipeline(write(text), registry).config
    assert (config.description, config.name) == ("2026-01-31", "7")


def test_an_alias_repeats_a_value_and_an_override_moves_only_one(write, registry):
    text = planted("patience: 3", "patience: &three 3") + "    limit: *three\n"
    config = load_pipeline(write(text), registry, ["stages.0.patience=5"]).config
    assert (config.stages[0].patience, config.stages[1].limit) == (5, 3)


# Every error, planted in the good file, with its exact place.

PLANTED = [
    # What is not YAML.
    ("patience: 3", "patience: [3", "10:3 not YAML: while parsing a flow sequence, expected ',' or ']', but got '-'"),
    ("patience: 3", "\tpatience: 3", "9:5 not YAML:.*'\\\\t'"),
    ('"two stages"', '"two \x07 stages"', "4:19 not YAML: character U+0007: special characters are not allowed"),
    ("metric: dot", "metric: *dot", "15:13 not YAML: found undefined alias 'dot'"),
    ("version: 1", "version: 1\n---", "3:1 not YAML: expected a single document in the stream, but found another document"),
    # What is YAML that no pipeline needs.
    ("patience: 3", "patience: 3\n    patience: 4", "10:5 key 'patience' is given twice, first in line 9"),
    ("metric: dot", "metric: !dot x", "15:13 tag '!dot' is not used here"),
    ("metric: dot", "metric: !!python/object:os.system x", "15:13 tag '!!python/object:os.system' is not used here"),
    ("patience: 3", "patience: 010", "9:15 '010' is no valid int; put text in quotes"),
    ("patience: 3", "patience: .inf", "9:15 '.inf' is no valid float; put text in quotes"),
    ("patience: 3", "1: 3", "9:5 a key is text; put it in quotes"),
    ("patience: 3", "[a, b]: 3", "9:5 a key is text; put it in quotes"),
    ("patience: 3", "<<: {patience: 3}", "9:5 '<<' is not supported; write the keys out, or use 'extends'"),
    ("patience: 3", "patience: &loop [*loop]", "9:15 an alias cannot contain itself"),
    # The top of the file.
    ("positions:", "position:", "6:1 unknown key 'position'; did you mean 'positions'? valid: description, extends, "),
    ("preserve", "presrve", "6:12 positions: must be 'preserve' or 'compact', got 'presrve'; did you mean 'preserve'?"),
    ("version: 1", "version: 2", "2:10 version: must be 1, got 2"),
    ("version: 1", 'version: "1"', "2:10 version: must be 1, got '1'"),
    ("version: 1\n", "", "2:1 missing key 'version'"),
    ("name: pick-two\n", "", "2:1 missing key 'name'"),
    ("name: pick-two", "name: Pick Two", "3:7 name: must match ^[a-z0-9][a-z0-9_.\\-]*$, got 'Pick Two'"),
    ("name: pick-two", "name:", "3:1 name: must be a valid string, got None"),
    ("positions: preserve", "seed: '3'", "6:7 seed: must be a valid integer, got '3'"),
    ("positions: preserve", "seed: true", "6:7 seed: must be a valid integer, got True"),
    ("positions: preserve", "seed: -1", "6:7 seed: must be greater than or equal to 0, got -1"),
    ("[coarse, fine]", "coarse", "5:8 modes: must be a list, got 'coarse'"),
    ("[coarse, fine]", "[coarse, 2]", "5:17 modes.1: must be a valid string, got 2"),
    ("[coarse, fine]", "[coarse, coarse]", "5:8 modes: modes must have distinct names"),
    ("[coarse, fine]", "[]", "5:8 modes: must have at least 1 entries, got []"),
    # Stages.
    ("  - use: steer\n    patience: 3", "  - steer", "8:5 a stage is a mapping such as 'use: fastv', got 'steer'"),
    ("use: steer", "use: stear", "8:10 .*'stear'; did you mean 'steer'? valid: broken, pick, steer"),
    ("use: steer", "use: 4", "8:10 use: must be the name of a stage, got 4"),
    ("use: steer", "use:", "8:5 use: must be the name of a stage, got None"),
    ("  - use: steer\n    pat", "  - pat", "8:5 missing key 'use'"),
    ("use: steer", "use: broken", "8:10 .*'broken' of planted-plugin 1.2.*no_such_module_at_all:Thing.*ModuleNotFoundError"),
    ("patience: 3", "patence: 3", "8:5 missing key 'patience'"),
    ("patience: 3", "patience: 3\n    patence: 3", "10:5 unknown key 'patence'; did you mean 'patience'? valid: patience, speed, use"),
    ("patience: 3", "patience: soon", "9:15 patience: must be a valid integer, got 'soon'"),
    ("patience: 3", "patience:\n      - 3", "10:7 patience: must be a valid integer, got [3]"),
    ("patience: 3", "patience: 3\n    speed: 0", "8:5 SteerConfig cannot read this: KeyError: 'stopped'"),
    ("[1, 31%]", "[1, 31 %]", "11:16 after.1: '31 %' is not a cut: write 'embedding', a layer number, or a share"),
    ("[1, 31%]", "early", "11:12 after: 'early' is not a cut: write 'embedding', a layer number, or a share"),
    ("[1, 31%]", "-2", "11:12 after: layers count from 0, got -2"),
    ("[1, 31%]", "[]", "11:12 after: must have at least 1 entries, got ()"),
    ("{coarse: 160, fine: 0.5}", "{ratio: 0.5, count: 3}", "12:11 keep: give a ratio or a count, not both"),
    ("{coarse: 160, fine: 0.5}", "1.5", "12:11 keep: a ratio lies in (0, 1], got 1.5; write a count as a whole number"),
    ("{coarse: 160, fine: 0.5}", "most", "12:11 keep: keep is a count (128), a ratio (0.25) or 'union'"),
    ("    keep: {coarse: 160, fine: 0.5}\n", "", "10:5 missing key 'keep'"),
    ("fine: 0.5", "fime: 0.5", "12:25 unknown mode 'fime'; did you mean 'fine'? valid: coarse, fine"),
    ("coarse: 160, fine", "fine", "12:11 keep says nothing about mode 'coarse'"),
    ("wrist: {keep: 96}", "wrist: 96", "14:14 views.wrist: must be an object, got 96"),
    ("wrist: {keep: 96}", "wrist: {kep: 96}", "14:15 unknown key 'kep'; did you mean 'keep'? valid: keep"),
    ("wrist: {keep: 96}", "a.b: {keep: {fine: 1}}", "14:19 views.a.b.keep says nothing about mode 'coarse'"),
    ("metric: dot", "metric: dott", "15:13 metric: must be 'cosine' or 'dot', got 'dott'; did you mean 'dot'?"),
    ("shape: round", "shpe: round", "18:9 unknown key 'shpe'; did you mean 'shape'? valid: shape, size"),
    ("shape: round", "shape: 3", "18:16 windows.0.shape: must be 'square' or 'round', got 3"),
    ("metric: dot", "limit: x", "15:12 limit: must be a valid integer or must be a valid boolean, got 'x'"),
]


@pytest.mark.parametrize(("old", "new", "expected"), PLANTED, ids=[f"{e.split()[0]}-{n[:20]!r}" for _, n, e in PLANTED])
def test_every_error_has_its_place_and_the_nearest_name(fails, old, new, expected):
    lines = fails(planted(old, new))
    place = expected.split()[0]
    found = [line for line in lines if line.startswith(f"{place} ")]
    assert found, lines
    pattern = ".*".join(map(re.escape, expected.replace("\\\\", "\\").split(".*")))
    assert any(re.match(pattern, line) for line in found), lines


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "1:1 the file is empty; a pipeline begins with 'version: 1' and 'name: ...'"),
        ("# nothing but this\n", "1:1 the file is empty; a pipeline begins with 'version: 1' and 'name: ...'"),
        ("\n- use: steer\n", "2:1 this is no mapping; a pipeline begins with 'version: 1' and 'name: ...'"),
        ("steer\n", "1:1 this is no mapping; a pipeline begins with 'version: 1' and 'name: ...'"),
        (b"version: 1\nname: caf\xe9\n", "2:10 byte 0xe9 is not UTF-8"),
        ("version: 1\nname: é\xff\n".encode("utf-16"), "1:1 byte 0xff is not UTF-8"),
        ("version: 1\nname: a\nstages: pick\n", "3:9 stages: must be a list of mappings such as 'use: fastv', got 'pick'"),
        ("version: 1\nname: a\nstages: {use: pick}\n", "3:9 stages: must be a list of mappings such as 'use: fastv'"),
        ("version: 1\nname: a\nstages:\n", "3:1 stages: must be a list of mappings such as 'use: fastv', got None"),
        ("[" * 5000, "1:1 nested too deeply"),
    ],
)
def test_a_file_of_the_wrong_kind_is_refused(fails, text, expected):
    (line,) = fails(text)
    assert line.startswith(expected)


def test_a_byte_order_mark_is_no_error(write, registry):
    assert load_pipeline(write(b"\xef\xbb\xbf" + GOOD.encode()), registry).config.name == "pick-two"


def test_a_missing_file_is_answered_with_the_nearest(write, tmp_path, registry):
    write(GOOD, "fast.yaml")
    with pytest.raises(ConfigError, match=r"fsat\.yaml: no such file; did you mean 'fast\.yaml'\?"):
        load_pipeline(tmp_path / "fsat.yaml", registry)
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        (tmp_path / "folder.yaml").mkdir()
        load_pipeline(tmp_path / "folder.yaml", registry)
    with pytest.raises(ConfigError, match=r"notes\.txt: the name of a pipeline file ends in \.yaml or \.yml"):
        load_pipeline(str(write(GOOD, "notes.txt")), registry)


def test_all_errors_are_reported_together_in_the_order_of_the_file(fails):
    text = GOOD.replace("positions", "position").replace("use: steer", "use: stear").replace("fine: 0.5", "fime: 0.5")
    text = text.replace("metric: dot", "metric: dott\n    metric: dot").replace("size: 2", "sizes: 2")
    lines = fails(text)
    assert [line.split()[0] for line in lines] == ["6:1", "8:10", "15:13", "16:5", "17:9", "17:9"]
    assert {line.split(maxsplit=1)[1][:11] for line in lines if line.startswith("17:9")} == {"missing key", "unknown key"}


def test_mode_errors_are_reported_with_the_others(fails):
    text = GOOD.replace("positions", "position").replace("fine: 0.5", "fime: 0.5")
    assert [line.split()[0] for line in fails(text)] == ["6:1"], "modes wait for a top that can be read"
    text = GOOD.replace("patience: 3", "patience: no").replace("fine: 0.5", "fime: 0.5")
    assert [line.split()[0] for line in fails(text)] == ["9:15", "12:11", "12:25"]


# extends.


def test_a_child_replaces_whole_keys_of_its_parent(write, registry):
    write(GOOD, "parent.yaml")
    child = write("extends: parent.yaml\nname: child\nmodes: [coarse, fine]\nstages: [{use: steer, patience: 1}]\n")
    loaded = load_pipeline(child, registry)
    assert loaded.resolved == {
        "version": 1,
        "name": "child",
        "description": "two stages",
        "modes": ["coarse", "fine"],
        "positions": "preserve",
        "stages": [{"use": "steer", "patience": 1}],
    }
    assert loaded.origin == str(child)


def test_extends_is_relative_to_the_file_that_says_it(tmp_path, registry):
    for folder, text in {"a": "extends: ../b/two.yml\nseed: 1\n", "b": "extends: three.yaml\nseed: 2\non_error: dense\n"}.items():
        (tmp_path / folder).mkdir()
        (tmp_path / folder / {"a": "one.yaml", "b": "two.yml"}[folder]).write_text(text)
    (tmp_path / "b" / "three.yaml").write_text("version: 1\nname: three\nseed: 3\non_error: raise\n")
    config = load_pipeline(tmp_path / "a" / "one.yaml", registry).config
    assert (config.name, config.seed, config.on_error) == ("three", 1, "dense")


def test_a_shipped_pipeline_or_dense_can_be_extended(write, shipped):
    assert len(load_pipeline(write("extends: good\nname: x\n"), shipped).config.stages) == 2
    assert load_pipeline(write("extends: dense\nname: x\n"), shipped).config.stages == ()


def test_errors_name_the_file_that_has_them(write, registry):
    parent = write(GOOD.replace("positions", "position").replace("patience: 3", "patience: x"), "parent.yaml")
    child = write("extends: parent.yaml\nseed: x\n", "child.yaml")
    with pytest.raises(ConfigError) as caught:
        load_pipeline(child, registry)
    assert [line.split()[0] for line in str(caught.value).splitlines()] == [f"{child}:2:7", f"{parent}:6:1", f"{parent}:9:15"]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"a": "version: 1\nextends: b.yaml", "b": "extends: a.yaml"}, "b.yaml:1:10 extends: .*circle: a.yaml -> b.yaml -> a.yaml"),
        ({"a": "extends: a.yaml"}, "a.yaml:1:10 extends: .*circle: a.yaml -> a.yaml"),
        ({"a": "seed: 1\nextends: bb.yaml", "ab": ""}, "a.yaml:2:10 extends: .*bb.yaml: no such file; did you mean 'ab.yaml'"),
        ({"a": "extends: goood"}, "a.yaml:1:10 extends: .*'goood'; did you mean 'good'"),
        ({"a": "extends: [b]"}, r"a.yaml:1:10 extends: name a file or a shipped pipeline, got \['b'\]"),
        ({"a": "extends:"}, "a.yaml:1:1 extends: name a file or a shipped pipeline, got None"),
        ({"a": "extends: b.yaml", "b": "x: ["}, "b.yaml:1:5 not YAML"),
        ({"a": "extends: b.yaml", "b": ""}, "b.yaml:1:1 the file is empty"),
    ],
)
def test_what_cannot_be_extended_is_said_where_it_is_asked(write, shipped, files, expected):
    paths = [write(text, f"{name}.yaml") for name, text in files.items()]
    with pytest.raises(ConfigError, match=expected) as caught:
        load_pipeline(paths[0], shipped)
    assert "\n" not in str(caught.value)


# Overrides.


@pytest.mark.parametrize(
    ("override", "read", "value"),
    [
        ("stages.1.keep=0.25", lambda c: c.stages[1].keep, 0.25),
        ("stages.1.keep={coarse: 1, fine: 2}", lambda c: c.stages[1].keep, {"coarse": 1, "fine": 2}),
        ("stages.1.keep.fine=union", lambda c: c.stages[1].keep, {"coarse": 160, "fine": "union"}),
        ("stages.1.views.primary.keep=5", lambda c: {n: v.keep for n, v in c.stages[1].views.items()}, {"wrist": 96, "primary": 5}),
        ("stages.1.windows.0.size=9", lambda c: c.stages[1].windows[0].size, 9),
        ("stages=[]", lambda c: c.stages, ()),
        ("seed=7", lambda c: c.seed, 7),
        ("description=a=b", lambda c: c.description, "a=b"),
    ],
)
def test_set_changes_one_part(write, registry, override, read, value):
    path = write(GOOD)
    loaded = load_pipeline(path, registry, [override])
    assert read(loaded.config) == value
    assert loaded.label == "pick-two"
    assert load_pipeline(write(json.dumps(loaded.resolved)), registry).config == loaded.config


def test_set_makes_mappings_on_the_way(write, registry):
    path = write("version: 1\nname: a\nstages: [{use: pick, keep: 3}]\n")
    config = load_pipeline(path, registry, ["stages.0.views.wrist.keep=1"]).config
    assert config.stages[0].views["wrist"].keep == 1


def test_the_last_override_holds(write, registry):
    path = write(GOOD)
    assert load_pipeline(path, registry, ["seed=1", "seed=2"]).config.seed == 2
    assert load_pipeline(f"{path}@seed=3", registry, ["seed=4"]).config.seed == 4


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("stages.1.keep=2.0", "--set stages.1.keep: keep: a ratio lies in (0, 1], got 2.0"),
        ("stages.1.keep", "--set stages.1.keep: write PATH=VALUE, such as stages.0.keep=0.5"),
        ("stages.1.keep=[1", "--set stages.1.keep: not YAML: while parsing a flow sequence"),
        ("stages.2.keep=1", "--set stages.2.keep: there is no 'stages.2'; stages has 2 entries, counted from 0"),
        ("stages.one.keep=1", "--set stages.one.keep: there is no 'stages.one'; stages has 2 entries"),
        ("stages.-1.keep=1", "--set stages.-1.keep: there is no 'stages.-1'"),
        ("stages.²=1", "--set stages.²: there is no 'stages.²'"),
        ("name.first=1", "--set name.first: name is 'pick-two', which has no 'first'"),
        ("stages.1.kep=1", "--set stages.1.kep: unknown key 'kep'; did you mean 'keep'?"),
        ("stagse.1.keep=1", "--set stagse.1.keep: unknown key 'stagse'; did you mean 'stages'?"),
        ("stages.1.views.wrist.kep=1", "--set stages.1.views.wrist.kep: unknown key 'kep'; did you mean 'keep'?"),
        ("stages.1.keep.fime=1", "--set stages.1.keep.fime: unknown mode 'fime'; did you mean 'fine'?"),
        ("stages.1.use=pik", "--set stages.1.use: "),
        ("seed=x", "--set seed: seed: must be a valid integer, got 'x'"),
        ("=3", "--set : unknown key ''"),
    ],
)
def test_errors_of_set_begin_with_it(fails, override, expected):
    (line,) = fails(GOOD, [override])
    assert line.startswith(expected)


def test_errors_of_the_file_and_of_set_are_reported_together(fails):
    lines = fails(planted("positions:", "position:"), ["stages.1.floor=-1", "nothing"])
    assert [line.split(": ")[0] for line in lines] == ["--set nothing", "--set stages.1.floor", "6:1 unknown key 'position'; did you mean 'positions'? valid"]


# Overrides within the name.


def test_a_name_may_carry_overrides_and_is_then_the_label(shipped):
    loaded = load_pipeline("good@keep=0.25,patience=9,seed=4,stages.1.floor=2", shipped)
    steer, pick = loaded.config.stages
    assert (loaded.label, loaded.config.name) == ("good@keep=0.25,patience=9,seed=4,stages.1.floor=2", "pick-two")
    assert (pick.keep, steer.patience, loaded.config.seed, pick.floor) == (0.25, 9, 4, 2)


def test_a_field_is_set_in_every_stage_that_has_it(write, registry):
    path = write("version: 1\nname: a\nstages: [{use: pick, keep: 3}, {use: steer, patience: 0}, {use: pick, keep: 4}]\n")
    first, _, last = load_pipeline(f"{path}@keep=union,after=[2,3]", registry).config.stages
    assert (first.keep, last.keep, first.after, last.after) == ("union", "union", (2, 3), (2, 3))


def test_commas_and_braces_within_a_value_stay_there(shipped):
    pick = load_pipeline("good@after=[1,2],keep={coarse: 3, fine: 4},metric=cosine", shipped).config.stages[1]
    assert (pick.after, pick.keep, pick.metric) == ((1, 2), {"coarse": 3, "fine": 4}, "cosine")


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("good@kep=1", "good@kep: no stage of this pipeline has a field 'kep'; did you mean 'keep'?"),
        ("good@keep", "good@keep: write NAME@KEY=VALUE, such as fastv@keep=0.5"),
        ("good@", "good@: write NAME@KEY=VALUE, such as fastv@keep=0.5"),
        ("good@keep=2.0", "good@keep: keep: a ratio lies in (0, 1], got 2.0"),
        ("good@stages.9.keep=1", "good@stages.9.keep: there is no 'stages.9'"),
        ("dense@keep=1", "dense@keep: no stage of this pipeline has a field 'keep'"),
    ],
)
def test_errors_within_the_name_begin_with_it(shipped, source, expected):
    with pytest.raises(ConfigError) as caught:
        load_pipeline(source, shipped)
    assert str(caught.value).startswith(expected)
    assert "\n" not in str(caught.value)


def test_a_path_may_hold_an_at_sign(tmp_path, registry):
    folder = tmp_path / "me@home"
    folder.mkdir()
    odd = folder / "a@keep=1.yaml"
    odd.write_text(GOOD)
    plain = folder / "b.yaml"
    plain.write_text(GOOD)
    assert load_pipeline(str(odd), registry).label == "pick-two"
    assert load_pipeline(odd, registry).label == "pick-two"
    assert load_pipeline(str(plain), registry).label == "pick-two"
    assert load_pipeline(f"{plain}@seed=3", registry).config.seed == 3
    with pytest.raises(ConfigError, match="no such file"):
        load_pipeline(str(folder / "c.yaml"), registry)


# Properties.

AMOUNTS = st.one_of(
    st.integers(0, 500), st.floats(0, 1, exclude_min=True), st.just("union"), st.builds(lambda n: {"count": n}, st.integers(0, 9))
)
CUTS = st.one_of(st.integers(0, 31), st.just("embedding"), st.integers(0, 100).map(lambda n: f"{n}%"))
TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]) | st.just(" "), max_size=20)


@st.composite
def pipelines(draw):
    modes = draw(st.lists(st.sampled_from(["coarse", "fine", "10", "true", "null", "a b"]), min_size=1, max_size=3, unique=True))
    keeps = AMOUNTS | st.fixed_dictionaries(dict.fromkeys(modes, AMOUNTS))
    pick = st.fixed_dictionaries(
        {"use": st.just("pick"), "keep": keeps},
        optional={
            "after": CUTS | st.lists(CUTS, min_size=1, max_size=4),
            "views": st.dictionaries(st.sampled_from(["wrist", "primary"]), st.fixed_dictionaries({"keep": keeps})),
            "weight": st.floats(0.001, 1e6) | st.integers(1, 9),
        },
    )
    steer = st.fixed_dictionaries({"use": st.just("steer"), "patience": st.integers(0, 2**70)})
    return {
        "version": 1,
        "name": draw(st.from_regex(r"\A[a-z0-9][a-z0-9_.\-]{0,9}\Z")),
        "description": draw(TEXT),
        "modes": modes,
        "seed": draw(st.integers(0, 2**64)),
        "stages": draw(st.lists(pick | steer, max_size=4)),
    }


@given(data=pipelines(), ascii_only=st.booleans())
def test_resolved_is_json_and_loads_back_to_the_same_configuration(tmp_path_factory, registry, data, ascii_only):
    path = tmp_path_factory.mktemp("pipe") / "pipe.yaml"
    path.write_text(json.dumps(data, ensure_ascii=ascii_only))
    loaded = load_pipeline(path, registry)
    assert loaded.resolved == data
    path.write_text(json.dumps(loaded.resolved, ensure_ascii=not ascii_only, indent=1))
    again = load_pipeline(path, registry)
    assert again.config == loaded.config
    assert list(map(type, again.config.stages)) == list(map(type, loaded.config.stages))


@given(data=pipelines(), amount=AMOUNTS, seed=st.integers(0, 99))
def test_an_override_equals_the_same_words_in_the_file(tmp_path_factory, registry, data, amount, seed):
    data["stages"].append({"use": "pick", "keep": 1})
    last = len(data["stages"]) - 1
    path = tmp_path_factory.mktemp("pipe") / "pipe.yaml"
    path.write_text(json.dumps(data))
    overridden = load_pipeline(path, registry, [f"stages.{last}.keep={json.dumps(amount)}", f"seed={seed}"])
    data["stages"][last]["keep"], data["seed"] = amount, seed
    path.write_text(json.dumps(data))
    assert overridden.config == load_pipeline(path, registry).config
    assert overridden.resolved == data


@given(line=st.integers(0, 17), garbage=st.text(st.sampled_from(" \t:-[]{}&*!|>'\"%@`#?,a1\n\x00é"), min_size=1, max_size=6), column=st.integers(0, 30))
def test_a_damaged_file_loads_or_fails_with_places_only(tmp_path_factory, registry, line, garbage, column):
    lines = GOOD.split("\n")
    lines[line] = lines[line][:column] + garbage + lines[line][column:]
    path = tmp_path_factory.mktemp("pipe") / "pipe.yaml"
    path.write_text("\n".join(lines))
    try:
        load_pipeline(path, registry)
    except ConfigError as error:
        for said in str(error).splitlines():
            place = re.match(rf"{re.escape(str(path))}:(\d+):(\d+) \S", said)
            assert place, said
            assert int(place[1]) <= "\n".join(lines).count("\n") + 1


# The JSON schema.


def valid(schema, data, root):
    """A JSON schema check of the keywords pipeline schemas use; anything else is an error."""
    for keyword, wanted in schema.items():
        if keyword in ("title", "description", "default", "$schema", "$defs", "minLength"):
            continue
        kinds = {"object": dict, "array": list, "string": str, "integer": int, "number": int | float, "boolean": bool}
        check = {
            "$ref": lambda w: valid(root["$defs"][w.removeprefix("#/$defs/")], data, root),
            "type": lambda w: isinstance(data, kinds[w]) and (w == "boolean" or not isinstance(data, bool)),
            "const": lambda w: data == w and type(data) is type(w),
            "enum": lambda w: data in w,
            "not": lambda w: not valid(w, data, root),
            "anyOf": lambda w: any(valid(s, data, root) for s in w),
            "oneOf": lambda w: sum(valid(s, data, root) for s in w) == 1,
            "required": lambda w: not isinstance(data, dict) or set(w) <= set(data),
            "properties": lambda w: not isinstance(data, dict) or all(valid(w[k], v, root) for k, v in data.items() if k in w),
            "additionalProperties": lambda w: not isinstance(data, dict) or all(
                w is not False and valid(w, v, root) for k, v in data.items() if k not in schema.get("properties", {})
            ),
            "propertyNames": lambda w: not isinstance(data, dict) or all(valid(w, k, root) for k in data),
            "minProperties": lambda w: not isinstance(data, dict) or len(data) >= w,
            "items": lambda w: not isinstance(data, list) or all(valid(w, item, root) for item in data),
            "minItems": lambda w: not isinstance(data, list) or len(data) >= w,
            "minimum": lambda w: not isinstance(data, int | float) or data >= w,
            "maximum": lambda w: not isinstance(data, int | float) or data <= w,
            "exclusiveMinimum": lambda w: not isinstance(data, int | float) or data > w,
            "pattern": lambda w: not isinstance(data, str) or re.search(w, data) is not None,
        }[keyword]
        if not check(wanted):
            return False
    return True


@given(data=pipelines())
def test_the_schema_accepts_what_the_loader_accepts(registry, data):
    schema = pipeline_schema(registry)
    assert valid(schema, data, schema)


@pytest.mark.parametrize(
    "change",
    [
        {"stages.1.kep": 1},
        {"stages.1.keep": 1.5},
        {"stages.1.keep": {"ratio": 0.5, "count": 3}},
        {"stages.1.keep": {"fine": 2.5}},
        {"stages.1.after": "31 %"},
        {"stages.1.after": []},
        {"stages.1.use": "stear"},
        {"stages.1.metric": "dott"},
        {"stages.1.views": {"wrist": 96}},
        {"stages.0.keep": 1},
        {"stages.0.patience": "3"},
        {"stages": {"use": "pick"}},
        {"version": 2},
        {"name": "Pick Two"},
        {"position": "preserve"},
        {"extends": 3},
    ],
    ids=str,
)
def test_the_schema_refuses_what_the_loader_refuses(write, registry, change):
    schema = pipeline_schema(registry)
    data = load_pipeline(write(GOOD), registry).resolved
    assert valid(schema, data, schema)
    (key, value), = change.items()
    *steps, last = [int(step) if step.isdecimal() else step for step in key.split(".")]
    node = data
    for step in steps:
        node = node[step]
    node[last] = value
    assert not valid(schema, data, schema)
    with pytest.raises(ConfigError):
        load_pipeline(write(json.dumps(data)), registry)


@pytest.mark.parametrize("missing", ["version", "name"])
def test_the_schema_lets_a_child_leave_out_what_its_parent_says(write, registry, missing):
    schema = pipeline_schema(registry)
    data = load_pipeline(write(GOOD), registry).resolved
    del data[missing]
    assert not valid(schema, data, schema)
    assert valid(schema, {**data, "extends": "parent.yaml"}, schema)


def test_the_schema_keeps_descriptions_and_says_why_a_stage_cannot_be_loaded(registry):
    schema = pipeline_schema(registry)
    json.dumps(schema)
    definitions = schema["$defs"]
    assert [one["$ref"] for one in schema["properties"]["stages"]["items"]["oneOf"]] == [
        f"#/$defs/{name}" for name in ("broken", "pick", "steer")
    ]
    assert definitions["pick"]["properties"]["use"] == {"const": "pick", "description": "picks"}
    assert definitions["pick"]["properties"]["floor"]["description"] == "Prunable tokens never to fall below."
    assert definitions["pick"]["properties"]["windows"]["description"] == "Where to look."
    assert "ModuleNotFoundError" in definitions["broken"]["description"]
    assert valid(schema, {"version": 1, "name": "a", "stages": [{"use": "broken", "anything": 1}]}, schema)


def test_every_shipped_pipeline_loads_and_passes_the_schema():
    found = Registry.discover()
    schema = pipeline_schema(found)
    assert found.pipelines
    for name in [*found.pipelines, "dense"]:
        loaded = load_pipeline(name, found)
        assert loaded.config.name == name
        assert valid(schema, loaded.resolved, schema), name


def test_loading_imports_no_torch_unless_a_stage_does(tmp_path):
    (tmp_path / "light.py").write_text(
        "from tokenprune.config import StageConfig\nfrom tokenprune.stage import Stage\n"
        "class Light(Stage[StageConfig]):\n    pass\n"
    )
    (tmp_path / "pipe.yaml").write_text("version: 1\nname: light\nstages: [{use: light}]\n")
    program = """
import sys
from tokenprune.loader import load_pipeline, pipeline_schema
from tokenprune.registry import Owner, Registered, Registry
from tokenprune.specs import StageSpec
found = Registry()
found.stages["light"] = Registered(StageSpec("light", "control", "", "light:Light"), Owner("light", "1", "light"))
print(load_pipeline("pipe.yaml", found).config.stages[0].use, len(pipeline_schema(found)["$defs"]), "torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["light", "1", "False"]
