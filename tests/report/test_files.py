"""Result files: free names, whole files, and refusals that name file, key and what is valid."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import pytest

from tokenprune.errors import ResultError
from tokenprune.report.files import free_path, read_result, write_json
from tokenprune.report.result import ResultFile


class Weighing(ResultFile):
    """A kind of its own, in its second format."""

    command = "tools/weigh.py"

    format_version: Literal[2] = 2
    kind: Literal["weighing"] = "weighing"
    grams: dict[str, float]


class Counting(ResultFile):
    """Another kind."""

    command = "tools/count.py"

    kind: Literal["counting"] = "counting"


def test_a_name_that_is_taken_is_not_given_again(tmp_path: Path) -> None:
    paths = []
    for _ in range(3):
        paths.append(free_path(tmp_path / "deep", "run"))
        paths[-1].touch()
    assert len(set(paths)) == 3
    assert all(path.parent == tmp_path / "deep" and path.name.startswith("run-") for path in paths)


def test_a_file_that_cannot_be_written_whole_stays_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "result.json"
    write_json(path, {"number": 1})

    def interrupted(self: Path, target: Path) -> Path:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write_json(path, {"number": 2})
    assert json.loads(path.read_text()) == {"number": 1}


def test_what_was_written_is_read(tmp_path: Path) -> None:
    result = Weighing(grams={"apple": float("inf"), "pear": 0.1})
    write_json(tmp_path / "result.json", result.to_json())
    assert read_result(tmp_path / "result.json", Counting, Weighing) == result


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"kind": "weighing"}, r"one\.json lacks 'grams'; make the result again with `tools/weigh\.py`"),
        ({"kind": "weighing", "format_version": 1}, r"one\.json has format version 1; valid: 2"),
        ({"kind": "weihging"}, r"one\.json is a result of kind 'weihging'; did you mean 'weighing'\? valid: "),
        ({"kind": "weighing", "grams": {"apple": "heavy"}}, r"one\.json: 'grams\.apple' is 'heavy': Input should be"),
        ({"kind": "counting", "grams": {}}, r"one\.json: 'grams' is {}: Extra inputs are not permitted"),
        ({}, r"one\.json is not a result file, which `tools/weigh\.py` or `tools/count\.py` writes: it has no 'kind'"),
    ],
)
def test_wrong_files_are_refused_by_name_and_key(tmp_path: Path, data: dict[str, Any], message: str) -> None:
    (tmp_path / "one.json").write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(ResultError, match=message):
        read_result(tmp_path / "one.json", Weighing, Counting)
