""""""

from __future__ import annotations

import re
import subprocess
import sys
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.planted_stages import (
    GOOD,
    REGISTRY,
    SteerConfig,
    Window,
    make_registry,
    planted,
    problems,
    shipping,
    write,
)
from tokenprune.errors import ConfigError, PluginError
from tokenprune.pipelines.config import DENSE, PipelineConfig
from tokenprune.pipelines.loader import load_pipeline
from tokenprune.registry.discovery import Registry

# What a good file becomes.


def test_a_good_file_is_read(tmp_path):
    path = write(tmp_path, GOOD)
    loaded = load_pipeline(path, REGISTRY)
    steer, pick = loaded.config.stages
    assert (loaded.label, loaded.origin) == ("pick-two", str(path))
    assert loaded.config.modes == ("coarse", "fine")
    assert steer == SteerConfig(use="steer", patience=3)
    assert pick.after == (1, "31%")
    assert pick.keep == {"coarse": 160, "fine": 0.5}
    assert pick.views["wrist"].keep == 96
    assert (pick.metric, pick.windows) == ("dot", [Window(size=2, shape="round")])


def test_resolved_is_plain_and_holds_what_the_file_says(tmp_path):
    resolved = load_pipeline(write(tmp_path, GOOD), REGISTRY).resolved
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


def test_a_shipped_pipeline_is_known_by_name(tmp_path, monkeypatch):
    shipped = shipping(tmp_path, monkeypatch)
    loaded = load_pipeline("good", shipped)
    assert loaded.config.name == "pick-two"
    assert loaded.origin == str(tmp_path / "planted_package" / "files" / "good.yaml")


def test_an_unknown_pipeline_is_answered_with_the_nearest(tmp_path, monkeypatch):
    shipped = shipping(tmp_path, monkeypatch)
    with pytest.raises(PluginError, match=r"'goood'.*did you mean 'good'.*dense"):
        load_pipeline("goood", shipped)


def test_a_shipped_pipeline_without_its_file_names_the_owner(tmp_path, monkeypatch):
    shipped = shipping(tmp_path, monkeypatch)
    with pytest.raises(
        PluginError, match=r"'gone' of planted-plugin 1\.2.*'planted_package' holds no file 'files/gone"
    ):
        load_pipeline("gone", shipped)


def test_a_pipeline_of_a_single_plugin_file_lies_beside_it(tmp_path):
    write(tmp_path, GOOD, "beside.yaml")
    module = ModuleType("planted_file")
    module.__file__ = str(tmp_path / "plugin.py")
    sys.modules["planted_file"] = module
    try:
        assert load_pipeline("mine", make_registry(mine=("planted_file", "beside.yaml"))).config.name == "pick-two"
    finally:
        del sys.modules["planted_file"]


def test_a_date_stays_text_and_a_number_of_text_stays_text(tmp_path):
    text = planted('"two stages"', "2026-01-31").replace("pick-two", "'7'")
    config = load_pipeline(write(tmp_path, text), REGISTRY).config
    assert (config.description, config.name) == ("2026-01-31", "7")


def test_an_alias_repeats_a_value_and_an_override_moves_only_one(tmp_path):
    text = planted("patience: 3", "patience: &three 3") + "    limit: *three\n"
    config = load_pipeline(write(tmp_path, text), REGISTRY, ["stages.0.patience=5"]).config
    assert (config.stages[0].patience, config.stages[1].limit) == (5, 3)


# Every error, planted in the good file, with its exact place.

PLANTED = [
    # What is not YAML.
    ("patience: 3", "patience: [3", "10:8 not YAML: while parsing a flow sequence, expected ',' or ']', but got ':'"),
    ("patience: 3", "\tpatience: 3", "9:5 not YAML:.*'\\\\t'"),
    ('"two stages"', '"two \x07 stages"', "4:19 not YAML: character U+0007: special characters are not allowed"),
    ("metric: dot", "metric: *dot", "15:13 not YAML: found undefined alias 'dot'"),
    (
        "version: 1",
        "version: 1\n---",
        "3:1 not YAML: expected a single document in the stream, but found another document",
    ),
    # What is YAML that no pipeline needs.
    ("patience: 3", "patience: 3\n    patience: 4", "10:5 key 'patience' is given twice, first in line 9"),
    ("metric: dot", "metric: !dot x", "15:13 tag '!dot' is not used here"),
    ("metric: dot", "metric: !!python/object:os.system x", "15:13 tag '!!python/object:os.system' is not used here"),
    ("patience: 3", "patience: 010", "9:15 '010' is no valid int; put text in quotes"),
    ("patience: 3", "patience: .inf", "9:15 '.inf' is no valid float; put text in quotes"),
    ("patience: 3", "patience: 1e999", "9:15 '1e999' is no valid float; put text in quotes"),
    ("patience: 3", "1: 3", "9:5 a key is text; put it in quotes"),
    ("patience: 3", "[a, b]: 3", "9:5 a key is text; put it in quotes"),
    ("patience: 3", "<<: {patience: 3}", "9:5 '<<' is not supported; write the keys out, or use 'extends'"),
    ("patience: 3", "patience: &loop [*loop]", "9:15 an alias cannot contain itself"),
    # The top of the file.
    ("positions:", "position:", "6:1 unknown key 'position'; did you mean 'positions'? valid: description, extends, "),
    ("preserve", "presrve", "6:12 positions: must be 'preserve' or 'compact', got 'presrve'; did you mean 'preserve'?"),
    ("version: 1", "version: 2", "2:10 version: must be 1, got 2"),
    ("version: 1", 'version: "1"', "2:10 version: must be 1, got '1'"),
    ("version: 1", "version: true", "2:10 version: must be 1, got True"),
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
    (
        "use: steer",
        "use: broken",
        "8:10 .*'broken' of planted-plugin 1.2.*no_such_module_at_all:Thing.*ModuleNotFoundError",
    ),
    ("patience: 3", "patence: 3", "8:5 missing key 'patience'"),
    (
        "patience: 3",
        "patience: 3\n    patence: 3",
        "10:5 unknown key 'patence'; did you mean 'patience'? valid: paces, patience, speed, target, ",
    ),
    ("patience: 3", "patience: soon", "9:15 patience: must be a valid integer, got 'soon'"),
    ("patience: 3", "patience:\n      - 3", "10:7 patience: must be a valid integer, got [3]"),
    ("patience: 3", "patience: 3\n    speed: 0", "8:5 SteerConfig cannot read this: KeyError: 'stopped'"),
    ("[1, 31%]", "[1, 31 %]", "11:16 after.1: '31 %' is not a cut: write 'embedding', a layer number, or a share"),
    ("[1, 31%]", "early", "11:12 after: 'early' is not a cut: write 'embedding', a layer number, or a share"),
    ("[1, 31%]", "-2", "11:12 after: layers count from 0, got -2"),
    ("[1, 31%]", "[]", "11:12 after: must have at least 1 entries, got []"),
    ("{coarse: 160, fine: 0.5}", "{ratio: 0.5, count: 3}", "12:11 keep: give a ratio or a count, not both"),
    ("{coarse: 160, fine: 0.5}", "1.5", "12:11 keep: a ratio lies in (0, 1], got 1.5; write a count as a whole number"),
    ("{coarse: 160, fine: 0.5}", "most", "12:11 keep: keep is a count (128), a ratio (0.25) or 'union'"),
    ("    keep: {coarse: 160, fine: 0.5}\n", "", "10:5 missing key 'keep'"),
    ("fine: 0.5", "fine: 1.5", "12:31 keep.fine: a ratio lies in (0, 1], got 1.5; write a count as a whole number"),
    ("keep: 96", "keep: {coarse: x, fine: 1}", "14:30 views.wrist.keep.coarse: keep is a count (128), a ratio (0.25)"),
    ("fine: 0.5", "fime: 0.5", "12:25 unknown mode 'fime'; did you mean 'fine'? valid: coarse, fine"),
    ("coarse: 160, fine", "fine", "12:11 keep says nothing about mode 'coarse'"),
    ("{coarse: 160, fine: 0.5}", "[1]", "12:11 keep: must have as many amounts as 'after' has entries (2), got 1"),
    (
        "{coarse: 160, fine: 0.5}",
        "[1, 2, 3]",
        "12:11 keep: must have as many amounts as 'after' has entries (2), got 3",
    ),
    ("[1, 31%]\n    keep: {coarse: 160, fine: 0.5}", "3\n    keep: [1, 2]", "12:11 keep: must have .* (1), got 2"),
    ("fine: 0.5", "fine: [0.5]", "12:31 keep.fine: must have as many amounts as 'after' has entries (2), got 1"),
    ("keep: 96", "keep: [96]", "14:21 views.wrist.keep: must have as many amounts as 'after' has entries (2), got 1"),
    (
        "wrist: {keep: 96}",
        "a.b: {keep: {fine: 1, coarse: [9]}}",
        "14:37 views.a.b.keep.coarse: must have .* (2), got 1",
    ),
    ("{coarse: 160, fine: 0.5}", "[]", "12:11 keep: must have at least 1 entries, got []"),
    ("fine: 0.5", "fine: []", "12:31 keep.fine: must have at least 1 entries, got []"),
    ("{coarse: 160, fine: 0.5}", "[1, 1.5]", "12:15 keep.1: a ratio lies in (0, 1], got 1.5; write a count"),
    ("{coarse: 160, fine: 0.5}", "[1, [2]]", "12:15 keep.1: keep is a count (128), a ratio (0.25) or 'union'"),
    ("fine: 0.5", "fine: [most, 1]", "12:32 keep.fine.0: keep is a count (128), a ratio (0.25) or 'union'"),
    ("fine: 0.5", "fine: {coarse: 1}", "12:31 keep.fine: keep is a count (128), a ratio (0.25) or 'union'"),
    ("keep: 96", "keep: {coarse: [1, -1], fine: 1}", "14:34 views.wrist.keep.coarse.1: a count is at least 0, got -1"),
    ("wrist: {keep: 96}", "wrist: 96", "14:14 views.wrist: must be a mapping, got 96"),
    ("wrist: {keep: 96}", "wrist: {kep: 96}", "14:15 unknown key 'kep'; did you mean 'keep'? valid: keep"),
    ("wrist: {keep: 96}", "a.b: {keep: {fine: 1}}", "14:19 views.a.b.keep says nothing about mode 'coarse'"),
    (
        "patience: 3",
        "patience: 3\n    paces: [{coarse: 1, fine: 2}, {coarse: 1, fime: 2}]",
        "10:47 unknown mode 'fime'; did you mean 'fine'? valid: coarse, fine",
    ),
    ("patience: 3", "patience: 3\n    paces:\n      - coarse: 1", "11:9 paces.0 says nothing about mode 'fine'"),
    (
        "patience: 3",
        "patience: 3\n    target: fime",
        "8:5 stages.0: chooses mode 'fime', which the pipeline does not declare; did you mean 'fine'? valid: ",
    ),
    ("metric: dot", "metric: dott", "15:13 metric: must be 'cosine' or 'dot', got 'dott'; did you mean 'dot'?"),
    ("shape: round", "shpe: round", "18:9 unknown key 'shpe'; did you mean 'shape'? valid: shape, size"),
    ("shape: round", "shape: 3", "18:16 windows.0.shape: must be 'square' or 'round', got 3"),
    ("patience: 3", '"pat\\nence\\e": 3', "9:5 unknown key 'pat\\nence\\x1b'; did you mean 'patience'?"),
    ("metric: dot", "limit: x", "15:12 limit: must be a valid integer or must be a valid boolean, got 'x'"),
]


@pytest.mark.parametrize(("old", "new", "expected"), PLANTED, ids=[f"{e.split()[0]}-{n[:20]!r}" for _, n, e in PLANTED])
def test_every_error_has_its_place_and_the_nearest_name(tmp_path, old, new, expected):
    lines = problems(tmp_path, planted(old, new))
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
        (
            "version: 1\nname: a\nstages: pick\n",
            "3:9 stages: must be a list of mappings such as 'use: fastv', got 'pick'",
        ),
        ("version: 1\nname: a\nstages: {use: pick}\n", "3:9 stages: must be a list of mappings such as 'use: fastv'"),
        ("version: 1\nname: a\nstages:\n", "3:1 stages: must be a list of mappings such as 'use: fastv', got None"),
        ("[" * 600, "1:1 nested too deeply"),
    ],
)
def test_a_file_of_the_wrong_kind_is_refused(tmp_path, text, expected):
    (line,) = problems(tmp_path, text)
    assert line.startswith(expected)


def test_a_byte_order_mark_is_no_error(tmp_path):
    assert load_pipeline(write(tmp_path, b"\xef\xbb\xbf" + GOOD.encode()), REGISTRY).config.name == "pick-two"


def test_a_missing_file_is_answered_with_the_nearest(tmp_path):
    write(tmp_path, GOOD, "fast.yaml")
    with pytest.raises(ConfigError, match=r"fsat\.yaml:1:1 no such file; did you mean 'fast\.yaml'\?"):
        load_pipeline(tmp_path / "fsat.yaml", REGISTRY)
    (tmp_path / "folder.yaml").mkdir()
    with pytest.raises(ConfigError, match=r"folder\.yaml:1:1 cannot be read: Is a directory"):
        load_pipeline(tmp_path / "folder.yaml", REGISTRY)
    with pytest.raises(ConfigError, match=r"notes\.txt: the name of a pipeline file ends in \.yaml or \.yml"):
        load_pipeline(str(write(tmp_path, GOOD, "notes.txt")), REGISTRY)


def test_all_errors_are_reported_together_in_the_order_of_the_file(tmp_path):
    text = GOOD.replace("positions", "position").replace("use: steer", "use: stear").replace("fine: 0.5", "fime: 0.5")
    text = text.replace("metric: dot", "metric: dott\n    metric: dot").replace("size: 2", "sizes: 2")
    lines = problems(tmp_path, text)
    assert [line.split()[0] for line in lines] == ["6:1", "8:10", "15:13", "16:5", "18:9", "18:9"]
    assert {line.split(maxsplit=1)[1][:11] for line in lines if line.startswith("18:9")} == {
        "missing key",
        "unknown key",
    }


def test_mode_errors_are_reported_with_the_others(tmp_path):
    text = (
        GOOD.replace("positions", "position").replace("patience: 3", "patience: no").replace("fine: 0.5", "fime: 0.5")
    )
    assert [line.split()[0] for line in problems(tmp_path, text)] == ["6:1", "9:15", "12:11", "12:25"]


def test_what_cannot_be_read_is_not_reported_again_as_missing_or_wrong(tmp_path):
    (line,) = problems(tmp_path, planted("patience: 3", "patience: 010"))
    assert line.startswith("9:15 '010' is no valid int")


def test_every_list_of_the_wrong_length_is_reported(tmp_path):
    text = planted("{coarse: 160, fine: 0.5}", "{coarse: [1], fine: [1, 2, 3]}").replace("keep: 96", "keep: [96]")
    assert [line.split()[:2] for line in problems(tmp_path, text)] == [
        ["12:20", "keep.coarse:"],
        ["12:31", "keep.fine:"],
        ["14:21", "views.wrist.keep:"],
    ]


def test_a_key_of_a_view_whose_name_holds_dots_is_not_taken_for_another(tmp_path):
    text = planted("wrist: {keep: 96}", "a: {keep: 1}\n      a.b: {keep: {fine: 1}}")
    assert problems(tmp_path, text) == ["15:19 views.a.b.keep says nothing about mode 'coarse'"]


def test_the_modes_of_every_stage_are_checked_without_the_loader_too():
    fine = SteerConfig(use="steer", patience=1, paces=[{"coarse": 1, "fine": 2}], target="fine")
    assert PipelineConfig(version=1, name="a", modes=("coarse", "fine"), stages=(fine,)).stages == (fine,)
    lacking = SteerConfig(use="steer", patience=1, paces=[{"coarse": 1}])
    with pytest.raises(ValueError, match=r"stages\.1\.paces\.0 must name the modes .* see \['fine'\]"):
        PipelineConfig(version=1, name="a", modes=("coarse", "fine"), stages=(fine, lacking))
    choosing = SteerConfig(use="steer", patience=1, target="fine")
    with pytest.raises(ValueError, match=r"stages\.0 chooses mode 'fine', which the pipeline does not declare.*coarse"):
        PipelineConfig(version=1, name="a", modes=("coarse",), stages=(choosing,))


def test_modes_that_cannot_be_read_are_not_held_against_the_stages(tmp_path):
    (line,) = problems(tmp_path, planted("[coarse, fine]", "[coarse, 2]"))
    assert line.startswith("5:17 modes.1: must be a valid string")


@given(
    line=st.integers(0, 17),
    garbage=st.text(st.sampled_from(" \t:-[]{}&*!|>'\"%@`#?,a1\n\x00é"), min_size=1, max_size=6),
    column=st.integers(0, 30),
)
def test_a_damaged_file_loads_or_fails_with_places_only(tmp_path_factory, line, garbage, column):
    lines = GOOD.split("\n")
    lines[line] = lines[line][:column] + garbage + lines[line][column:]
    path = tmp_path_factory.mktemp("pipe") / "pipe.yaml"
    path.write_text("\n".join(lines))
    try:
        load_pipeline(path, REGISTRY)
    except ConfigError as error:
        for said in str(error).splitlines():
            place = re.match(rf"{re.escape(str(path))}:(\d+):(\d+) \S", said)
            assert place, said
            assert int(place[1]) <= "\n".join(lines).count("\n") + 1


def test_loading_imports_no_torch_unless_a_stage_does(tmp_path):
    (tmp_path / "light.py").write_text(
        "from tokenprune.stages.config import StageConfig\nfrom tokenprune.stages.stage import Stage\n"
        "class Light(Stage[StageConfig]):\n    pass\n"
    )
    (tmp_path / "pipe.yaml").write_text("version: 1\nname: light\nstages: [{use: light}]\n")
    program = """
import sys
from tokenprune.pipelines.loader import load_pipeline, pipeline_schema
from tokenprune.registry.discovery import Registry
from tokenprune.registry.plugin_checks import Owner
from tokenprune.registry.specs import StageSpec
spec = StageSpec("light", "baseline", "", "light:Light")
found = Registry().with_specs(spec, owner=Owner("light", "1", "light"))
loaded, schema = load_pipeline("pipe.yaml", found), pipeline_schema(found)
print(loaded.config.stages[0].use, *schema["$defs"], "torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["light", "light", "False"]
