""""""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.planted_stages import AMOUNTS, GOOD, REGISTRY, pipelines, planted, problems, shipping, write
from tokenprune.errors import ConfigError
from tokenprune.pipelines.loader import load_pipeline, parse_pipeline

# extends.


def test_a_child_replaces_whole_keys_of_its_parent(tmp_path):
    write(tmp_path, GOOD, "parent.yaml")
    child = write(tmp_path, "extends: parent.yaml\nname: child\nstages: [{use: steer, patience: 1}]\n")
    loaded = load_pipeline(child, REGISTRY)
    assert loaded.resolved == {
        "version": 1,
        "name": "child",
        "description": "two stages",
        "modes": ["coarse", "fine"],
        "positions": "preserve",
        "stages": [{"use": "steer", "patience": 1}],
    }
    assert loaded.origin == str(child)


def test_extends_is_relative_to_the_file_that_says_it(tmp_path):
    for folder, text in {
        "a": "extends: ../b/two.yml\nseed: 1\n",
        "b": "extends: three.yaml\nseed: 2\non_error: dense\n",
    }.items():
        (tmp_path / folder).mkdir()
        (tmp_path / folder / {"a": "one.yaml", "b": "two.yml"}[folder]).write_text(text)
    (tmp_path / "b" / "three.yaml").write_text("version: 1\nname: three\nseed: 3\non_error: raise\n")
    config = load_pipeline(tmp_path / "a" / "one.yaml", REGISTRY).config
    assert (config.name, config.seed, config.on_error) == ("three", 1, "dense")


def test_a_shipped_pipeline_or_dense_can_be_extended(tmp_path, monkeypatch):
    shipped = shipping(tmp_path, monkeypatch)
    assert len(load_pipeline(write(tmp_path, "extends: good\nname: x\n"), shipped).config.stages) == 2
    assert load_pipeline(write(tmp_path, "extends: dense\nname: x\n"), shipped).config.stages == ()


def test_errors_name_the_file_that_has_them(tmp_path):
    parent = write(tmp_path, GOOD.replace("positions", "position").replace("patience: 3", "patience: x"), "parent.yaml")
    child = write(tmp_path, "extends: parent.yaml\nseed: x\n", "child.yaml")
    with pytest.raises(ConfigError) as caught:
        load_pipeline(child, REGISTRY)
    assert [line.split()[0] for line in str(caught.value).splitlines()] == [
        f"{child}:2:7",
        f"{parent}:6:1",
        f"{parent}:9:15",
    ]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (
            {"a": "version: 1\nextends: b.yaml", "b": "extends: a.yaml"},
            "b.yaml:1:10 extends: .*circle: a.yaml -> b.yaml -> a.yaml",
        ),
        ({"a": "extends: a.yaml"}, "a.yaml:1:10 extends: .*circle: a.yaml -> a.yaml"),
        (
            {"a": "seed: 1\nextends: bb.yaml", "ab": ""},
            "a.yaml:2:10 extends: .*bb.yaml:1:1 no such file; did you mean 'ab.yaml'",
        ),
        ({"a": "extends: goood"}, "a.yaml:1:10 extends: .*'goood'; did you mean 'good'"),
        ({"a": "extends: [b]"}, r"a.yaml:1:10 extends: name a file or a shipped pipeline, got \['b'\]"),
        ({"a": "extends:"}, "a.yaml:1:1 extends: name a file or a shipped pipeline, got None"),
        ({"a": "extends: b.yaml", "b": "x: ["}, "b.yaml:1:5 not YAML"),
        ({"a": "extends: b.yaml", "b": ""}, "b.yaml:1:1 the file is empty"),
    ],
)
def test_what_cannot_be_extended_is_said_where_it_is_asked(tmp_path, monkeypatch, files, expected):
    shipped = shipping(tmp_path, monkeypatch)
    paths = [write(tmp_path, text, f"{name}.yaml") for name, text in files.items()]
    with pytest.raises(ConfigError, match=expected) as caught:
        load_pipeline(paths[0], shipped)
    assert "\n" not in str(caught.value)


# Overrides.


@pytest.mark.parametrize(
    ("override", "read", "value"),
    [
        ("stages.1.keep=0.25", lambda c: c.stages[1].keep, 0.25),
        ("stages.1.keep={coarse: 1, fine: 2}", lambda c: c.stages[1].keep, {"coarse": 1, "fine": 2}),
        ("stages.1.keep=[0.5,0.25]", lambda c: c.stages[1].keep, (0.5, 0.25)),
        ("stages.1.keep.fine=[1, union]", lambda c: c.stages[1].keep, {"coarse": 160, "fine": (1, "union")}),
        ("stages.1.keep.fine=union", lambda c: c.stages[1].keep, {"coarse": 160, "fine": "union"}),
        (
            "stages.1.views.primary.keep=5",
            lambda c: {n: v.keep for n, v in c.stages[1].views.items()},
            {"wrist": 96, "primary": 5},
        ),
        ("stages.1.windows.0.size=9", lambda c: c.stages[1].windows[0].size, 9),
        ("stages=[]", lambda c: c.stages, ()),
        ("seed=7", lambda c: c.seed, 7),
        ("description=a=b", lambda c: c.description, "a=b"),
    ],
)
def test_set_changes_one_part(tmp_path, override, read, value):
    path = write(tmp_path, GOOD)
    loaded = load_pipeline(path, REGISTRY, [override])
    assert read(loaded.config) == value
    assert loaded.label == "pick-two"
    assert load_pipeline(write(tmp_path, json.dumps(loaded.resolved)), REGISTRY).config == loaded.config


def test_set_makes_mappings_on_the_way(tmp_path):
    path = write(tmp_path, "version: 1\nname: a\nstages: [{use: pick, keep: 3}]\n")
    config = load_pipeline(path, REGISTRY, ["stages.0.views.wrist.keep=1"]).config
    assert config.stages[0].views["wrist"].keep == 1


def test_the_last_override_holds(tmp_path):
    path = write(tmp_path, GOOD)
    assert load_pipeline(path, REGISTRY, ["seed=1", "seed=2"]).config.seed == 2
    assert load_pipeline(f"{path}@seed=3", REGISTRY, ["seed=4"]).config.seed == 4


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("stages.1.keep=2.0", "--set stages.1.keep: a ratio lies in (0, 1], got 2.0"),
        ("stages.1.keep", "--set stages.1.keep: write PATH=VALUE, such as stages.0.keep=0.5"),
        ("stages.1.keep=[1]", "--set stages.1.keep: must have as many amounts as 'after' has entries (2), got 1"),
        ("stages.1.keep=[1,2.0]", "--set stages.1.keep: keep.1: a ratio lies in (0, 1], got 2.0"),
        ("stages.1.keep.fine=[1]", "--set stages.1.keep.fine: must have as many amounts as 'after' has entries (2)"),
        ("stages.1.keep=[1", "--set stages.1.keep: not YAML: while parsing a flow sequence"),
        ("stages.2.keep=1", "--set stages.2.keep: there is no 'stages.2'; stages has 2 entries, counted from 0"),
        ("stages.one.keep=1", "--set stages.one.keep: there is no 'stages.one'; stages has 2 entries"),
        ("stages.-1.keep=1", "--set stages.-1.keep: there is no 'stages.-1'"),
        ("stages.²=1", "--set stages.²: there is no 'stages.²'"),
        ("name.first=1", "--set name.first: name is 'pick-two', which has no 'first'"),
        ("stages.1.kep=1", "--set stages.1.kep: unknown key 'kep'; did you mean 'keep'?"),
        ("stagse.1.keep=1", "--set stagse.1.keep: unknown key 'stagse'; did you mean 'stages'?"),
        ("stages.1.views.wrist.kep=1", "--set stages.1.views.wrist.kep: unknown key 'kep'; did you mean 'keep'?"),
        ("stages.1.keep.fine=1.5", "--set stages.1.keep.fine: a ratio lies in (0, 1], got 1.5"),
        ("stages.1.views.wrist.keep={fine: 1.5, coarse: 1}", "--set stages.1.views.wrist.keep: "),
        ("extends=b.yaml", "--set extends: only a file can extend another"),
        ("stages.1.keep.fime=1", "--set stages.1.keep.fime: unknown mode 'fime'; did you mean 'fine'?"),
        ("stages.1.use=pik", "--set stages.1.use: "),
        ("stages.1={use: pick, keep: 2.0}", "--set stages.1: keep: a ratio lies in (0, 1], got 2.0"),
        ("seed=x", "--set seed: must be a valid integer, got 'x'"),
        ("=3", "--set : unknown key ''"),
    ],
)
def test_errors_of_set_begin_with_it(tmp_path, override, expected):
    (line,) = problems(tmp_path, GOOD, [override])
    assert line.startswith(expected)


def test_of_two_overrides_of_one_part_the_last_is_blamed(tmp_path):
    whole, part = "stages.0={use: steer, patience: x}", "stages.0.patience=y"
    assert problems(tmp_path, GOOD, [whole, part]) == ["--set stages.0.patience: must be a valid integer, got 'y'"]
    assert problems(tmp_path, GOOD, [part, whole]) == ["--set stages.0: patience: must be a valid integer, got 'x'"]


def test_an_override_is_not_blamed_for_what_the_file_lacks_beside_it(tmp_path):
    assert problems(tmp_path, planted("use: steer", "speed: 1"), ["stages.0.patience=4"]) == ["8:5 missing key 'use'"]


def test_errors_of_the_file_and_of_set_are_reported_together(tmp_path):
    lines = problems(tmp_path, planted("positions:", "position:"), ["stages.1.floor=-1", "nothing"])
    assert [line.split(": ")[0] for line in lines] == [
        "--set nothing",
        "--set stages.1.floor",
        "6:1 unknown key 'position'; did you mean 'positions'? valid",
    ]


# Overrides within the name.


def test_a_name_may_carry_overrides_and_is_then_the_label(tmp_path, monkeypatch):
    shipped = shipping(tmp_path, monkeypatch)
    loaded = load_pipeline("good@keep=0.25,patience=9,seed=4,stages.1.floor=2", shipped)
    steer, pick = loaded.config.stages
    assert (loaded.label, loaded.config.name) == ("good@keep=0.25,patience=9,seed=4,stages.1.floor=2", "pick-two")
    assert (pick.keep, steer.patience, loaded.config.seed, pick.floor) == (0.25, 9, 4, 2)


def test_a_field_is_set_in_every_stage_that_has_it(tmp_path):
    path = write(
        tmp_path,
        "version: 1\nname: a\nstages: [{use: pick, keep: 3}, {use: steer, patience: 0}, {use: pick, keep: 4}]\n",
    )
    first, _, last = load_pipeline(f"{path}@keep=union,after=[2,3]", REGISTRY).config.stages
    assert (first.keep, last.keep, first.after, last.after) == ("union", "union", (2, 3), (2, 3))


def test_an_error_in_every_stage_is_said_once(tmp_path):
    path = write(tmp_path, "version: 1\nname: a\nstages: [{use: pick, keep: 3}, {use: pick, keep: 4}]\n")
    with pytest.raises(ConfigError) as caught:
        load_pipeline(f"{path}@keep=2.0", REGISTRY)
    assert str(caught.value).splitlines() == [
        f"{path}@keep: a ratio lies in (0, 1], got 2.0; write a count as a whole number"
    ]


def test_commas_and_braces_within_a_value_stay_there(tmp_path, monkeypatch):
    shipped = shipping(tmp_path, monkeypatch)
    pick = load_pipeline("good@after=[1,2],keep={coarse: 3, fine: 4},metric=cosine", shipped).config.stages[1]
    assert (pick.after, pick.keep, pick.metric) == ((1, 2), {"coarse": 3, "fine": 4}, "cosine")


def test_a_list_of_amounts_may_stand_within_the_name(tmp_path, monkeypatch):
    shipped = shipping(tmp_path, monkeypatch)
    pick = load_pipeline("good@keep=[0.5,0.25],metric=cosine,after=[2,3]", shipped).config.stages[1]
    assert (pick.keep, pick.metric, pick.after) == ((0.5, 0.25), "cosine", (2, 3))


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("good@keep=[1,2,3]", "good@keep: must have as many amounts as 'after' has entries (2), got 3"),
        ("good@kep=1", "good@kep: no stage of this pipeline has a field 'kep'; did you mean 'keep'?"),
        ("good@keep", "good@keep: write NAME@KEY=VALUE, such as fastv@keep=0.5"),
        ("good@", "good@: write NAME@KEY=VALUE, such as fastv@keep=0.5"),
        ("good@keep=2.0", "good@keep: a ratio lies in (0, 1], got 2.0"),
        ("good@stages.9.keep=1", "good@stages.9.keep: there is no 'stages.9'"),
        ("dense@keep=1", "dense@keep: no stage of this pipeline has a field 'keep'"),
    ],
)
def test_errors_within_the_name_begin_with_it(tmp_path, monkeypatch, source, expected):
    shipped = shipping(tmp_path, monkeypatch)
    with pytest.raises(ConfigError) as caught:
        load_pipeline(source, shipped)
    assert str(caught.value).startswith(expected)
    assert "\n" not in str(caught.value)


def test_a_path_may_hold_an_at_sign(tmp_path):
    folder = tmp_path / "me@home"
    folder.mkdir()
    odd = folder / "a@keep=1.yaml"
    odd.write_text(GOOD)
    plain = folder / "b.yaml"
    plain.write_text(GOOD)
    assert load_pipeline(str(odd), REGISTRY).label == "pick-two"
    assert load_pipeline(odd, REGISTRY).label == "pick-two"
    assert load_pipeline(str(plain), REGISTRY).label == "pick-two"
    assert load_pipeline(f"{plain}@seed=3", REGISTRY).config.seed == 3
    with pytest.raises(ConfigError, match="no such file"):
        load_pipeline(str(folder / "c.yaml"), REGISTRY)


@given(data=pipelines(), ascii_only=st.booleans())
def test_resolved_is_json_and_loads_back_to_the_same_configuration(tmp_path_factory, data, ascii_only):
    path = tmp_path_factory.mktemp("pipe") / "pipe.yaml"
    path.write_text(json.dumps(data, ensure_ascii=ascii_only))
    loaded = load_pipeline(path, REGISTRY)
    assert loaded.resolved == data
    path.write_text(json.dumps(loaded.resolved, ensure_ascii=not ascii_only, indent=1))
    again = load_pipeline(path, REGISTRY)
    assert again.config == loaded.config
    assert list(map(type, again.config.stages)) == list(map(type, loaded.config.stages))


@given(data=pipelines())
def test_plain_data_parses_to_what_a_file_of_it_loads_to(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("pipe") / "pipe.yaml"
    path.write_text(json.dumps(data))
    loaded, parsed = load_pipeline(path, REGISTRY), parse_pipeline(data, REGISTRY, "result.json")
    assert (parsed.config, parsed.resolved, parsed.label) == (loaded.config, loaded.resolved, loaded.label)
    assert parsed.origin == "result.json"
    assert parsed.resolved is not data


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ([], ["result.json: a pipeline is a mapping"]),
        ({"version": {1}}, ["result.json: not plain data: Object of type set is not JSON serializable"]),
        ({"version": 1, "name": "a", "seed": float("nan")}, ["result.json: not plain data: Out of range float"]),
        ({"version": 1, "name": "a", "extends": "b.yaml"}, ["result.json: extends: only a file can extend another"]),
        ({"version": 1}, ["result.json: missing key 'name'"]),
        (
            {"version": 1, "name": "a", "seed": "x", "stages": [{"use": "pick"}, {"use": "steer", "patence": 3}]},
            [
                "result.json: seed: must be a valid integer, got 'x'",
                "result.json: stages.0: missing key 'keep'",
                "result.json: stages.1: missing key 'patience'",
                "result.json: stages.1.patence: unknown key 'patence'; did you mean 'patience'?",
            ],
        ),
        (
            {"version": 1, "name": "a", "stages": [{"use": "pick", "keep": {"default": 1.5}}]},
            ["result.json: stages.0.keep.default: a ratio lies in (0, 1], got 1.5"],
        ),
        (
            {
                "version": 1,
                "name": "a",
                "stages": [{"use": "steer", "patience": 1, "target": "b"}, {"use": "pick", "keep": [1, 2]}],
            },
            [
                "result.json: stages.0: chooses mode 'b', which the pipeline does not declare; valid: default",
                "result.json: stages.1.keep: must have as many amounts as 'after' has entries (1), got 2",
            ],
        ),
    ],
)
def test_what_is_wrong_with_plain_data_is_said_with_its_path(data, expected):
    with pytest.raises(ConfigError) as caught:
        parse_pipeline(data, REGISTRY, "result.json")
    lines = str(caught.value).splitlines()
    assert len(lines) == len(expected)
    for line, start in zip(lines, expected, strict=True):
        assert line.startswith(start)


@given(data=pipelines(), amount=AMOUNTS, seed=st.integers(0, 99))
def test_an_override_equals_the_same_words_in_the_file(tmp_path_factory, data, amount, seed):
    data["stages"].append({"use": "pick", "keep": 1})
    last = len(data["stages"]) - 1
    path = tmp_path_factory.mktemp("pipe") / "pipe.yaml"
    path.write_text(json.dumps(data))
    overridden = load_pipeline(path, REGISTRY, [f"stages.{last}.keep={json.dumps(amount)}", f"seed={seed}"])
    data["stages"][last]["keep"], data["seed"] = amount, seed
    path.write_text(json.dumps(data))
    assert overridden.config == load_pipeline(path, REGISTRY).config
    assert overridden.resolved == data
