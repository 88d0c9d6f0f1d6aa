"""The results file: appended line by line, resumed after a kill, refused where it would mix what differs."""

from __future__ import annotations

import errno
import json
from dataclasses import asdict, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.episode_record import RECORD
from tokenprune.errors import ResultError, RolloutError
from tokenprune.evaluation.results_file import ResultsFile, read_results
from tokenprune.evaluation.starts import Start
from tokenprune.report.provenance import provenance

SETTINGS = {"backbone": "toy", "execute": None, "environments": {"toy": {"views": ("primary", "wrist"), "horizon": 9}}}
PROVENANCE = provenance(torch.device("cpu"))
VARIANT = {"pipeline": {"version": 1, "name": "dense", "stages": []}, "condition": ""}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "sub" / "goal.jsonl"


def opened(path, **changed):
    return ResultsFile(path, {**SETTINGS, **changed}, PROVENANCE)


def filled(path, episodes=3):
    records = [replace(RECORD, init_state=number) for number in range(episodes)]
    with opened(path) as file:
        file.declare("dense", VARIANT)
        for record in records:
            file.append(record)
    return records


def test_a_file_holds_a_header_variants_and_episodes_line_by_line(path):
    records = filled(path, 2)
    header, variant, *episodes = (json.loads(line) for line in path.read_text().splitlines())
    plain = {**SETTINGS, "environments": {"toy": {"views": ["primary", "wrist"], "horizon": 9}}}
    assert header == {"kind": "header", "format_version": 1, "settings": plain, "provenance": PROVENANCE.to_json()}
    assert variant == {"kind": "variant", "label": "dense", **VARIANT}
    assert episodes == [{"kind": "episode", **asdict(record)} for record in records]
    results = read_results(path)
    assert (results.settings, results.provenance) == (plain, PROVENANCE.to_json())
    assert (results.variants, results.records) == ({"dense": VARIANT}, records)


def test_an_episode_is_on_the_disk_when_it_has_been_appended(path, monkeypatch):
    synced = []
    monkeypatch.setattr("os.fsync", lambda number: synced.append(path.read_bytes()))
    filled(path, 2)
    whole = path.read_bytes().splitlines(keepends=True)
    assert synced == [b"".join(whole[: n + 1]) for n in range(4)]


def test_a_file_is_gone_on_with(path):
    filled(path, 2)
    with opened(path) as file:
        file.declare("dense", VARIANT)
        assert [file.holds(Start("toy", 1, state, 3), "dense") for state in range(3)] == [True, True, False]
        assert not file.holds(Start("toy", 1, 0, 3), "fastv")
        file.append(replace(RECORD, init_state=2))
        file.declare("fastv", {**VARIANT, "condition": "blind"})
        file.append(replace(RECORD, variant="fastv"))
        written = file.results
    assert read_results(path) == written
    assert [json.loads(line)["kind"] for line in path.read_text().splitlines()] == [
        "header", "variant", "episode", "episode", "episode", "variant", "episode",
    ]  # fmt: skip


@given(cut=st.integers(0, 2000), more=st.booleans())
@settings(max_examples=60)
def test_wherever_a_kill_ends_the_file_only_the_unfinished_line_is_lost(tmp_path_factory, cut, more):
    path = tmp_path_factory.getbasetemp() / "cut.jsonl"
    path.unlink(missing_ok=True)
    records = filled(path)
    whole = path.read_bytes()
    cut = min(cut, len(whole))
    path.write_bytes(whole[:cut])
    finished = whole[:cut].count(b"\n")
    with opened(path) as file:
        assert file.results.records == records[: max(0, finished - 2)]
        assert list(file.results.variants) == (["dense"] if finished > 1 else [])
        file.declare("dense", VARIANT)
        for record in records:
            if not file.holds(record.start, "dense"):
                file.append(record)
    assert path.read_bytes() == whole


def test_a_reader_leaves_out_the_line_that_is_being_written(path):
    records = filled(path)
    path.write_bytes(path.read_bytes()[:-5])
    before = path.read_bytes()
    assert read_results(path).records == records[:2]
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"execute": 4}, r"goal\.jsonl: settings\.execute is None there and 4 now, .*another with --out"),
        (
            {"environments": {"toy": {"views": ["primary"], "horizon": 9}}},
            r"settings\.environments\.toy\.views is \['primary', 'wrist'\] there and \['primary'\] now",
        ),
        (
            {"environments": {"toy": {"views": ["primary", "left"], "horizon": 9}}},
            r"settings\.environments\.toy\.views\.1 is 'wrist' there and 'left' now",
        ),
        ({"seed": 1}, r"settings\.seed is '\(absent\)' there and 1 now"),
    ],
)
def test_other_settings_are_refused(path, changed, message):
    filled(path)
    before = path.read_bytes()
    with pytest.raises(ResultError, match=message):
        opened(path, **changed)
    assert path.read_bytes() == before
    opened(path).__exit__(None, None, None)


def test_a_label_stands_for_one_thing(path):
    filled(path)
    other = {"pipeline": {**VARIANT["pipeline"], "stages": [{"use": "fastv"}]}, "condition": ""}
    with opened(path) as file:
        with pytest.raises(
            ResultError, match=r"variant 'dense'\.pipeline\.stages is \[\] there and \[\{'use': 'fastv'"
        ):
            file.declare("dense", other)
        with pytest.raises(ResultError, match=r"variant 'dense'\.condition is '' there and 'blind' now"):
            file.declare("dense", {**VARIANT, "condition": "blind"})


def test_other_words_about_a_pipeline_are_no_other_pipeline(path):
    filled(path)
    with opened(path) as file:
        file.declare("dense", {**VARIANT, "pipeline": {**VARIANT["pipeline"], "description": "said better"}})


def test_a_second_writer_is_refused_until_the_first_has_closed(path):
    with opened(path):
        with pytest.raises(RolloutError, match=r"goal\.jsonl: another evaluation is writing to this file"):
            opened(path)
        read_results(path)
        with pytest.raises(RolloutError, match="another evaluation"):
            opened(path)
    opened(path).__exit__(None, None, None)


def test_an_episode_is_written_once_and_only_of_a_declared_variant(path):
    filled(path)
    before = path.read_bytes()
    with opened(path) as file:
        with pytest.raises(ResultError, match=r"'dense' from toy, task 1, initial state 0, seed 3 is there already"):
            file.append(replace(RECORD, init_state=0, success=False))
        with pytest.raises(ResultError, match="variant 'fastv' was not declared"):
            file.append(replace(RECORD, variant="fastv"))
    assert path.read_bytes() == before


def line(**changed):
    return json.dumps({"kind": "episode", **asdict(RECORD), **changed})


def header(**changed):
    facts = PROVENANCE.to_json() | changed
    return json.dumps({"kind": "header", "format_version": 1, "settings": SETTINGS, "provenance": facts})


def without(key):
    return json.dumps({k: v for k, v in json.loads(line()).items() if k != key})


@pytest.mark.parametrize(
    ("number", "text", "message"),
    [
        (4, '{"kind": "epis', r"goal\.jsonl:4: the line is damaged: .*; delete it, and its episode will be run again"),
        (4, "", "goal.jsonl:4: the line is damaged"),
        (4, "[]", "goal.jsonl:4: the line is damaged"),
        (4, "\0" * 9, "goal.jsonl:4: the line is damaged"),
        (4, '{"kind": "episod"}', "goal.jsonl:4: .*no line is of the kind 'episod'"),
        (3, line(steps="9"), "goal.jsonl:3: .*steps: Input should be a valid integer"),
        (3, line(success=1), "goal.jsonl:3: .*success: Input should be a valid boolean"),
        (3, line(gflops=float("nan")), "goal.jsonl:3: .*gflops: Input should be a finite number"),
        (3, line(query_ms=[None]), r"goal.jsonl:3: .*query_ms\.0: "),
        (3, line(sucess=True), "goal.jsonl:3: .*sucess: Unexpected keyword"),
        (3, without("seed"), "goal.jsonl:3: .*seed: "),
        (3, without("kind"), "goal.jsonl:3: .*missing key 'kind'"),
        (3, line(variant="fastv"), "goal.jsonl:3: .*variant 'fastv' is not declared before it"),
        (5, line(init_state=0), "goal.jsonl:5: .*the same episode as in line 3"),
        (5, json.dumps({"kind": "variant", "label": "dense", **VARIANT}), "goal.jsonl:5: .*'dense' is declared twice"),
        (1, line(), "goal.jsonl:1: this is not a results file, or its header is damaged: the first line is not a head"),
        (1, '{"kind": "header", "format_version": 2}', "goal.jsonl:1: .*only format version 1 can be read"),
        (1, '{"kind": "header", "format_version": 1}', "goal.jsonl:1: .*settings"),
        (1, '{"kind": "header"}', "goal.jsonl:1: .*missing key 'format_version'"),
        (1, header(cpu=3), "goal.jsonl:1: .*header is damaged: provenance.cpu: Input should be a valid string"),
        (2, '{"kind": "variant", "label": "dense", "condition": ""}', "goal.jsonl:2: .*pipeline: Field required"),
        (2, json.dumps({"kind": "variant", "label": "dense", **VARIANT, "pipeline": {}}), "pipeline: .*a 'name'"),
    ],
)
def test_a_damaged_line_is_named(path, number, text, message):
    filled(path)
    lines = path.read_text().splitlines()
    lines[number - 1] = text
    path.write_text("\n".join(lines) + "\n")
    before = path.read_bytes()
    for reader in (read_results, opened):
        with pytest.raises(ResultError, match=message):
            reader(path)
    assert path.read_bytes() == before


def test_a_file_of_another_kind_is_left_as_it_is(path):
    path.parent.mkdir()
    for content in (b"my thesis", b"my thesis\n", b"\x80\n"):
        path.write_bytes(content)
        with pytest.raises(ResultError, match="not a results file"):
            opened(path)
        assert path.read_bytes() == content


def test_a_file_that_is_not_there_or_empty_holds_no_results(path):
    with pytest.raises(ResultError, match=r"goal\.jsonl: cannot be read: No such file"):
        read_results(path)
    path.parent.mkdir()
    path.touch()
    with pytest.raises(ResultError, match="holds no results"):
        read_results(path)


def test_a_full_disk_ends_the_evaluation(path, monkeypatch):
    records = filled(path)

    def full(number):
        raise OSError(errno.ENOSPC, "No space left on device")

    with opened(path) as file, monkeypatch.context() as patched:
        patched.setattr("os.fsync", full)
        with pytest.raises(RolloutError, match=r"goal\.jsonl: cannot be written: No space left on device"):
            file.append(replace(RECORD, init_state=9))
    assert read_results(path).records[:3] == records
