"""`tokenprune viz` as a user meets it: from a result file to pictures, and one message per mistake."""

from __future__ import annotations

import json
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.helpers.command import PRELUDE, call
from tests.helpers.paths import EPISODE
from tokenprune.cli import main
from tokenprune.compare.episode import load_episode, save_episode


def viz(monkeypatch: pytest.MonkeyPatch, *words: object, verb: str = "viz") -> int:
    """Run the command in this process; its exit code."""
    monkeypatch.setattr(sys, "argv", ["tokenprune", verb, *map(str, words)])
    with pytest.raises(SystemExit) as done:
        main()
    return int(done.value.code or 0)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as monkeypatch:
        assert viz(monkeypatch, "fastv", "--queries", 2, "--out", folder, verb="run") == 0
    (result,) = folder.glob("run-*.json")
    return result


def test_a_run_is_drawn(made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert viz(monkeypatch, made) == 0
    folder = made.parent / f"{made.stem}-viz"
    names = ["fastv-query-000.png", "fastv-query-001.png", "fastv.gif"]
    assert sorted(path.name for path in folder.iterdir()) == names
    assert capsys.readouterr().out.splitlines() == [f"wrote {folder / name}" for name in names]
    told = json.loads(made.read_text(encoding="utf-8"))
    grid = np.array(Image.open(folder / names[1]))[94:494, 18:418].reshape(16, 25, 16, 25, 3)
    kept = set(told["queries"][1]["kept_ids"]["1"][0])
    colourful = (np.ptp(grid, axis=-1) > 0).any((1, 3)).ravel()
    assert [i + 1 in kept for i in range(256)] == colourful.tolist()


def test_the_chosen_query_is_told_as_plain_data(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert viz(monkeypatch, made, "--query", 1, "--out", tmp_path, "--json") == 0
    picture = tmp_path / "fastv-query-001.png"
    assert json.loads(capsys.readouterr().out) == {"pipeline": "fastv", "files": [str(picture)]}
    assert [*tmp_path.iterdir()] == [picture]


def changed(data: dict[str, Any], path: str, value: object) -> dict[str, Any]:
    *outer, last = path.split(".")
    inner = data = deepcopy(data)
    for key in outer:
        inner = inner[key]
    inner[last] = value
    return data


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("settings.episode", "gone.npz", "is gone: gone.npz"),
        ("episode.instruction", "do another thing", "not the one this result was made from"),
        ("backbone.action.groups", {"translation": [7]}, "actions of 7 numbers"),
        ("episode.steps", [0, 4000], "no step 4000"),
        ("settings.options", {"viws": 1}, "did you mean 'views'"),
        ("settings.preset", "smal", "did you mean 'small'"),
        ("backbone.name", "openvla-of", "did you mean 'openvla-oft'"),
        ("kind", "bench", "kind 'bench'"),
    ],
)
def test_a_result_that_cannot_be_drawn_exits_2_with_one_message(
    made: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    path: str,
    value: object,
    message: str,
) -> None:
    result = tmp_path / "result.json"
    result.write_text(json.dumps(changed(json.loads(made.read_text(encoding="utf-8")), path, value)), encoding="utf-8")
    assert viz(monkeypatch, result, "--out", tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert message in said


@pytest.mark.parametrize(("words", "message"), [(("--pipeline", "fatsv"), "'fastv'"), (("--query", "2"), "0 to 1")])
def test_a_wrong_choice_exits_2(
    made: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: tuple[str, ...],
    message: str,
) -> None:
    assert viz(monkeypatch, made, *words) == 2
    assert message in capsys.readouterr().err


def test_an_episode_of_ones_own_is_opened_again(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundled = load_episode(EPISODE)
    black = (tmp_path / "black.jpg", Image.new("RGB", (64, 64)))
    black[1].save(black[0])
    frames = {view: [black[0].read_bytes()] * 9 for view in bundled.views}
    meta = {"instruction": bundled.instruction}
    save_episode(tmp_path / "own.npz", frames, bundled.state[:9], bundled.actions[:9], meta)
    data = changed(json.loads(made.read_text(encoding="utf-8")), "settings.episode", str(tmp_path / "own.npz"))
    (tmp_path / "own.json").write_text(json.dumps(data), encoding="utf-8")
    assert viz(monkeypatch, tmp_path / "own.json", "--query", 0, "--out", tmp_path) == 0
    page = np.array(Image.open(tmp_path / "fastv-query-000.png"))
    # The inside of the first kept patch of a black frame is black.
    first = data["queries"][0]["kept_ids"]["1"][0][0] - 1
    row, column = divmod(first, 16)
    assert not page[94 + 25 * row + 5 : 94 + 25 * row + 20, 18 + 25 * column + 5 : 18 + 25 * column + 20].any()


def test_without_matplotlib_the_extra_is_named(made: Path) -> None:
    code = "import sys; sys.modules['matplotlib'] = None\n" + PRELUDE
    done = subprocess.run([sys.executable, "-c", code, "viz", str(made)], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert 'pip install "tokenprune-vla[viz]"' in done.stderr


def test_other_verbs_do_without_matplotlib() -> None:
    code = PRELUDE.replace("c.main()", "\ntry: c.main()\nexcept SystemExit: pass\n")
    code += "print([m for m in sys.modules if m.startswith('matplotlib')])"
    done = subprocess.run([sys.executable, "-c", code, "list"], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_help_names_the_verb() -> None:
    assert "viz" in call("--help").stdout
