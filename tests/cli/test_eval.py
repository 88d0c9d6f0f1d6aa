"""`tokenprune eval` and `report` as a user meets them: episodes, a file that goes on, tables, a message per mistake."""

import csv
import json
import sys

import pytest

from tests.helpers import toy_environment as toy
from tokenprune.cli import main
from tokenprune.evaluation.results_file import read_results
from tokenprune.evaluation.starts import Start, write_starts

TOY = ("--backbone", "toy-policy", "--preset", "tiny", "--plugin", toy.__file__, "--dtype", "float32")


@pytest.fixture
def tokenprune(monkeypatch, capsys):
    """Runs the command in this process; its exit code, standard output and standard error."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["tokenprune", *map(str, words)])
        with pytest.raises(SystemExit) as done:
            main()
        told = capsys.readouterr()
        return int(done.value.code or 0), told.out, told.err

    return run


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """A finished evaluation of two tasks with two starts each, and what was printed."""
    out = tmp_path_factory.mktemp("evaluated") / "eval.jsonl"
    words = ("eval", "dense", "fastv@keep=0.25", "dense+no-wrist", *TOY, "--env", "toy", "--tasks", "0,task_1")
    words = (*words, "--episodes", 2, "--out", out)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(sys, "argv", ["tokenprune", *map(str, words)])
        with pytest.raises(SystemExit) as done:
            main()
    assert not done.value.code
    return out, words


def expected_success(start):
    return toy.needed(start.task, start.init_state, start.seed) <= toy.HORIZON


def test_every_variant_meets_every_start(evaluated):
    out, _ = evaluated
    results = read_results(out)
    starts = {Start("toy", task, state, 0) for task in (0, 1) for state in (0, 1)}
    labels = ["dense", "fastv@keep=0.25", "dense+no-wrist"]
    assert list(results.variants) == labels
    assert {(r.start, r.variant) for r in results.records} == {(s, label) for s in starts for label in labels}
    assert all(r.success == expected_success(r.start) for r in results.records)
    assert results.settings["untrained"] is True


def test_the_same_command_goes_on_and_repeats_nothing(evaluated, tokenprune):
    out, words = evaluated
    before = out.read_bytes()
    code, told, err = tokenprune(*words)
    assert (code, err) == (0, "")
    assert out.read_bytes() == before
    code, again, _ = tokenprune("report", out)
    assert (code, again) == (0, told)


def test_what_is_printed_fits_a_terminal_and_says_what_it_is_worth(evaluated, tokenprune):
    out, _ = evaluated
    _, told, _ = tokenprune("report", out)
    assert max(map(len, told.splitlines())) <= 80
    assert "fastv@keep=0.25: no difference can be seen with 4 episodes" in told
    assert "The weights are untrained random numbers: success says nothing about pruning." in told
    assert str(out) in told


def test_rows_as_csv_and_json(evaluated, tokenprune, tmp_path):
    out, _ = evaluated
    code, told, _ = tokenprune("report", out, "--csv", tmp_path / "rows.csv", "--json")
    assert code == 0
    plain = json.loads(told)
    assert plain["settings"]["backbone"] == "toy-policy"
    whole = {row["variant"]: row for row in plain["rows"] if row["environment"] is None}
    shares = [expected_success(Start("toy", task, state, 0)) for task in (0, 1) for state in (0, 1)]
    assert whole["dense"]["successes"] == sum(shares)
    with (tmp_path / "rows.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(plain["rows"]) == 3 * (1 + 1 + 2)


def test_a_report_of_some_variants_against_another_baseline(evaluated, tokenprune):
    out, _ = evaluated
    _, told, _ = tokenprune("report", out, "dense", "dense+no-wrist", "--baseline", "dense+no-wrist", "--json")
    assert json.loads(told)["baseline"] == "dense+no-wrist"
    assert {row["variant"] for row in json.loads(told)["rows"]} == {"dense", "dense+no-wrist"}


# imageio's reader leaves its pipe to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_chart_and_videos_are_written(tokenprune, tmp_path):
    words = ("eval", "fastv@keep=0.25", *TOY, "--env", "toy", "--tasks", 0, "--episodes", 1)
    words = (*words, "--out", tmp_path / "e.jsonl", "--videos", tmp_path / "videos", "--chart", tmp_path / "chart.svg")
    assert tokenprune(*words)[0] == 0
    assert (tmp_path / "chart.svg").stat().st_size > 1000
    (video,) = (tmp_path / "videos").iterdir()
    assert video.name == "toy-task0-init0-seed0-fastv@keep=0.25.mp4".replace("@", "_")
    imageio = pytest.importorskip("imageio.v3", reason="reading a video needs the extra `viz`")
    frames = imageio.imread(video)
    assert len(frames) == toy.needed(0, 0, 0) + 1
    pictures = frames[0][:-24].astype(int)
    grey = (pictures.max(-1) - pictures.min(-1)) < 12
    # Video compression blurs edges, so only most of the cut patches are exactly grey.
    assert grey.mean() > 0.5


def test_exact_starts_replace_what_plans_them(tokenprune, tmp_path):
    write_starts(tmp_path / "starts.json", [Start("toy", 1, 3, 7)])
    words = ("eval", "dense", *TOY, "--starts", tmp_path / "starts.json", "--out", tmp_path / "e.jsonl")
    assert tokenprune(*words)[0] == 0
    assert [r.start for r in read_results(tmp_path / "e.jsonl").records] == [Start("toy", 1, 3, 7)]
    code, _, err = tokenprune(*words, "--env", "toy")
    assert code == 2
    assert "leave out --env" in err


def test_episodes_takes_the_first_of_exact_starts(tokenprune, tmp_path):
    listed = [Start("toy", 1, state, 0) for state in (2, 1, 3)]
    write_starts(tmp_path / "starts.json", listed)
    words = ("--starts", tmp_path / "starts.json", "--episodes", 2, "--out", tmp_path / "e.jsonl")
    assert tokenprune("eval", "dense", *TOY, *words)[0] == 0
    assert [r.start for r in read_results(tmp_path / "e.jsonl").records] == listed[:2]


def test_initial_states_are_taken_in_the_order_given(tokenprune, tmp_path):
    words = ("--env", "toy", "--tasks", 0, "--episodes", 3, "--init-states", "3,1", "--start-seed", 5)
    assert tokenprune("eval", "dense", *TOY, *words, "--out", tmp_path / "e.jsonl")[0] == 0
    starts = [(r.init_state, r.seed) for r in read_results(tmp_path / "e.jsonl").records]
    assert starts == [(3, 5), (1, 5), (3, 6)]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "name an environment with --env"),
        (("--env", "toi"), "did you mean 'toy'"),
        (("--env", "toy", "--tasks", "9"), "it has tasks 0 to 2"),
        (("--env", "toy", "--tasks", "task_7"), "has no task 'task_7'"),
        (("--env", "toy", "--tasks", "0", "--tasks", "1"), "given 2 times for 1 environments"),
        (("--env", "toy", "--init-states", "a:b"), "write 25:50"),
        (("--env", "toy", "--init-states", "9"), "no initial state 9"),
        (("--env", "toy", "--env-option", "seeded=false", "--episodes", "9"), "4 initial states"),
        (("--env", "toy", "--env-option", "seeded"), "--env-option seeded: write key=value"),
        (("--env", "toy", "--env-option", "colour=red"), "no option 'colour'"),
        (("--env", "toy", "--address", "localhost:1"), "belong to --engine ray"),
        (("--env", "toy", "--workers", "0"), "at least 1 worker"),
        (("--starts", "/nowhere.json"), "starts cannot be read"),
    ],
)
def test_a_mistake_is_told_before_anything_runs(words, said, tokenprune, tmp_path):
    code, _, err = tokenprune("eval", "dense", *TOY, *words, "--out", tmp_path / "e.jsonl")
    assert code in (1, 2)
    assert said in err
    assert "Traceback" not in err
    assert not (tmp_path / "e.jsonl").exists()


@pytest.mark.parametrize(
    ("label", "said"),
    [
        ("dense+no-wrst", "no view 'wrst'; did you mean 'wrist'"),
        ("dense+blnd", "did you mean 'blind'"),
        ("fastv@keep=1.5", "keep"),
        ("dense+other-instruction", "needs a second task"),
    ],
)
def test_a_variant_that_cannot_be_is_refused(label, said, tokenprune, tmp_path):
    words = (*TOY, "--env", "toy", "--tasks", 0, "--episodes", 1, "--out", tmp_path / "e.jsonl")
    code, _, err = tokenprune("eval", label, *words)
    assert code == 2
    assert said in err
    assert not (tmp_path / "e.jsonl").exists()


def test_other_settings_are_refused_for_the_same_file(evaluated, tokenprune):
    _, words = evaluated
    code, _, err = tokenprune(*words, "--execute", 2)
    assert code == 2
    assert "settings.execute is None there and 2 now" in err


def test_a_damaged_file_is_told_with_its_line(evaluated, tokenprune, tmp_path):
    out, _ = evaluated
    lines = out.read_bytes().splitlines(keepends=True)
    lines[5] = lines[5][:40] + b"\n"
    (tmp_path / "broken.jsonl").write_bytes(b"".join(lines))
    code, _, err = tokenprune("report", tmp_path / "broken.jsonl")
    assert code == 2
    assert "broken.jsonl:6" in err
    code, _, err = tokenprune("report", out, "densee")
    assert code == 2
    assert "did you mean 'dense'" in err
