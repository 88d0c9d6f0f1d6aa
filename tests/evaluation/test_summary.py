"""From records to rows, and tables: every number by own loops, pairs, what is unfinished, and widths."""

from __future__ import annotations

import csv
import json
import math
import random
import statistics

import pytest
from rich.console import Console

from tests.helpers.eval_records import record
from tokenprune.errors import ResultError
from tokenprune.evaluation.starts import Start
from tokenprune.evaluation.statistics import paired, wilson
from tokenprune.evaluation.summary import summarise
from tokenprune.evaluation.table import WIDTH, eval_legend, eval_table, success_tables, verdict_lines

COLUMNS = [
    "variant", "environment", "task", "episodes", "missing", "successes", "success_share", "success_low",
    "success_high", "steps_per_success", "steps_per_episode", "queries_per_episode", "replans_per_episode",
    "fallbacks", "query_ms_p50", "query_ms_p95", "control_steps_per_policy_s", "action_change", "seam_change",
    "gripper_switches_per_episode", "tokens_mean", "tokens_last", "gflops_per_query", "flop_ratio", "speedup",
    "crashes", "overhead_share", "unpaired", "pairs", "pairs_both", "pairs_only_baseline", "pairs_only_variant",
    "pairs_neither", "difference_share", "difference_low", "difference_high", "mcnemar_p", "pairs_needed", "verdict",
]  # fmt: skip

LABELS = [
    "dense", "none", "random", "uniform_grid", "fastv", "fastv@keep=0.25", "fastv@keep=0.25,layer=3", "specprune",
    "specprune.static", "specprune.dynamic", "specprune.controller", "vlacache", "sparsevlm", "prumerge", "divprune",
    "specprune.controller@keep=0.25,layer=3+no-wrist", "dense+blind", "dense+no-wrist", "dense+other-instruction",
    "a_pipeline_of_one_very_long_name",
]  # fmt: skip


def drawn(chance, variant, environment, task, init_state, success=0.7):
    """A record that differs from every other in every number."""
    times = [chance.uniform(10, 100) for _ in range(chance.randint(1, 6))]
    simulator, policy = chance.uniform(1, 3), sum(times) / 1e3
    return record(
        variant, environment, task, init_state, chance.random() < success, chance.randint(5, 60), times,
        replans=chance.randint(0, 2), fallbacks=chance.randint(0, 1), crashes=chance.randint(0, 1),
        gripper_switches=chance.randint(0, 5), tokens_mean=chance.uniform(50, 500), tokens_last=chance.uniform(9, 50),
        gflops=chance.uniform(100, 900), action_change=chance.uniform(0, 1),
        seam_change=chance.uniform(0, 1) if len(times) > 1 else None,
        simulator_s=simulator, policy_s=policy, episode_s=simulator + policy + chance.uniform(0, 1),
    )  # fmt: skip


@pytest.fixture(scope="module")
def many():
    chance = random.Random(1)
    return [
        drawn(chance, variant, environment, task, state)
        for state in range(4)
        for variant in ("fastv", "dense")
        for environment, task in (("goal", 2), ("spatial", 0), ("goal", 10))
    ]


def expected(records, baseline):
    """A row's numbers in the plainest way."""
    won, times, steps = [], [], []
    queries = gflops = tokens = last = 0
    for one in records:
        won += [one.steps] if one.success else []
        times += one.query_ms
        steps.append(one.steps)
        for _ in range(one.queries):
            queries, gflops = queries + 1, gflops + one.gflops
            tokens, last = tokens + one.tokens_mean, last + one.tokens_last
    n = len(records)
    episode = sum(one.episode_s for one in records)
    spent = sum(one.simulator_s for one in records) + sum(one.policy_s for one in records)
    seams = [one.seam_change for one in records if one.seam_change is not None]
    dense_gflops = [one.gflops for one in baseline for _ in range(one.queries)]
    ordered = sorted(times)
    at = 0.95 * (len(ordered) - 1)
    low, high = ordered[math.floor(at)], ordered[math.ceil(at)]
    return {
        "episodes": n,
        "successes": len(won),
        "success_share": len(won) / n,
        "success_low": wilson(len(won), n)[0],
        "success_high": wilson(len(won), n)[1],
        "steps_per_success": statistics.mean(won) if won else None,
        "steps_per_episode": statistics.mean(steps),
        "queries_per_episode": queries / n,
        "replans_per_episode": statistics.mean(one.replans for one in records),
        "fallbacks": sum(one.fallbacks for one in records),
        "query_ms_p50": statistics.median(times),
        "query_ms_p95": low + (high - low) * (at - math.floor(at)),
        "control_steps_per_policy_s": sum(steps) / sum(one.policy_s for one in records),
        "action_change": statistics.mean(one.action_change for one in records),
        "seam_change": statistics.mean(seams) if seams else None,
        "gripper_switches_per_episode": statistics.mean(one.gripper_switches for one in records),
        "tokens_mean": tokens / queries,
        "tokens_last": last / queries,
        "gflops_per_query": gflops / queries,
        "flop_ratio": statistics.mean(dense_gflops) / (gflops / queries),
        "speedup": statistics.median([ms for one in baseline for ms in one.query_ms]) / statistics.median(times),
        "crashes": sum(one.crashes for one in records),
        "overhead_share": (episode - spent) / episode,
    }


def test_every_number_of_every_row(many):
    summary = summarise(many)
    places = [(None, None), ("goal", None), ("spatial", None), ("goal", 2), ("goal", 10), ("spatial", 0)]
    assert [(r.variant, r.environment, r.task) for r in summary.rows] == [
        (variant, *at) for variant in ("dense", "fastv") for at in places
    ]
    for row in summary.rows:
        within = [
            one for one in many if row.environment in (None, one.environment) and row.task in (None, one.task)
        ]  # fmt: skip
        mine = [one for one in within if one.variant == row.variant]
        plain = row.to_json()
        for name, value in expected(mine, [one for one in within if one.variant == "dense"]).items():
            assert plain[name] == (None if value is None else pytest.approx(value, rel=1e-12)), name


def test_pairs_are_those_of_the_same_start(many):
    dense = {one.start: one.success for one in many if one.variant == "dense"}
    own = {one.start: one.success for one in many if one.variant == "fastv"}
    plain = summarise(many).at()[1].to_json()
    assert plain["pairs"] == len(dense) == 12
    assert plain["unpaired"] == 0
    assert plain["pairs_only_baseline"] == sum(dense[start] and not own[start] for start in dense)
    assert plain["pairs_only_variant"] == sum(own[start] and not dense[start] for start in dense)
    assert plain["difference_share"] == pytest.approx((sum(own.values()) - sum(dense.values())) / 12)


def test_pairs_are_resampled_within_their_task():
    chance = random.Random(4)
    records = [
        record(label, environment, task, state, success=label == "dense" or chance.random() < task / 2)
        for environment in ("spatial", "goal")
        for task in range(3)
        for state in range(10 + 20 * task)
        for label in ("dense", "fastv")
    ]
    dense, own = ({one.start: one.success for one in records if one.variant == v} for v in ("dense", "fastv"))
    starts = sorted(dense)
    arguments = [dense[start] for start in starts], [own[start] for start in starts]
    result = summarise(records).at()[1].paired
    assert result == paired(*arguments, [f"{start.environment} {start.task}" for start in starts])
    assert result != paired(*arguments, [0] * len(starts))


def test_the_order_in_which_episodes_end_changes_nothing(many):
    mixed = random.Random(7).sample(many, len(many))
    assert mixed != many
    assert summarise(mixed) == summarise(many)


def test_pairs_are_compared_in_the_order_of_their_tasks(many, monkeypatch):
    strata = []
    monkeypatch.setattr(
        "tokenprune.evaluation.summary.paired", lambda *given: strata.append(given[2]) or paired(*given)
    )
    summarise(many)
    assert len(strata) == 6
    assert all(list(tasks) == sorted(tasks) for tasks in strata)


def test_rows_follow_the_order_asked_for_and_then_names(many):
    more = [*many, record("b"), record("a")]
    assert [row.variant for row in summarise(more, variants=["fastv", "later", "dense"]).at()] == [
        "fastv", "later", "dense", "a", "b",
    ]  # fmt: skip


def test_only_complete_pairs_are_compared_and_the_rest_is_counted():
    records = [record("dense", init_state=k, success=True) for k in range(6)]
    records += [record("fastv", init_state=k, success=False) for k in range(4, 9)]
    summary = summarise(records)
    dense, fastv = summary.at()
    assert fastv.paired.n == fastv.paired.only_baseline == 2
    assert fastv.paired.difference == -1
    assert fastv.unpaired == 7
    assert (dense.missing, fastv.missing) == (3, 4)
    assert dense.paired is None
    assert dense.unpaired is None
    assert "5 of 9 episodes finished, 2 pairs compared: fastv." in summary.notes
    assert "unfinished" in summary.notes[0]


def test_what_is_the_same_of_several_variants_is_said_once():
    records = [record(variant, init_state=k, success=True) for variant in ("fastv", "random") for k in range(2)]
    notes = summarise([*records, *(record("dense", init_state=k, success=True) for k in range(5))]).notes
    assert "2 of 5 episodes finished, 2 pairs compared: fastv, random." in notes


def test_speed_is_compared_on_the_same_starts_only():
    records = [record("dense", init_state=k, ms=(30.0,)) for k in range(2)]
    records += [record("dense", init_state=k, ms=(90.0,), gflops=9000.0) for k in range(2, 9)]
    records += [record("fastv", init_state=k, ms=(10.0,), gflops=500.0) for k in range(2)]
    dense, fastv = summarise(records).at()
    assert (fastv.speedup, fastv.flop_ratio) == (3, 2)
    assert (dense.speedup, dense.flop_ratio, dense.query_ms_p50) == (1, 1, 90)


def test_a_finished_evaluation_has_no_notes(many):
    assert summarise(many).notes == ()


def test_planned_starts_that_nobody_has_met_are_missing(many):
    planned = [one.start for one in many] + [Start("goal", 2, 90, 0), Start("object", 1, 0, 0)]
    summary = summarise(many, planned=planned)
    assert [row.missing for row in summary.at()] == [2, 2]
    assert [row.missing for row in summary.at("goal", 2)] == [1, 1]
    unmet = summary.at("object", 1)[1]
    assert (unmet.episodes, unmet.missing, unmet.success_share, unmet.speedup) == (0, 1, None, None)
    assert (unmet.success_low, unmet.success_high) == (0, 1)
    assert unmet.verdict == "cannot be compared: no start has been finished by both"
    assert "12 of 14 episodes finished: dense." in summary.notes


def test_the_baseline_is_dense_or_the_one_named(many):
    assert summarise(many).baseline == "dense"
    swapped = summarise(many, baseline="fastv")
    dense, fastv = swapped.at()
    assert fastv.paired is None
    assert dense.paired.difference == -summarise(many).at()[1].paired.difference
    assert dense.speedup == pytest.approx(1 / summarise(many).at()[1].speedup)
    without = summarise([one for one in many if one.variant == "fastv"])
    assert without.baseline is None
    assert without.at()[0].paired is None
    assert without.at()[0].speedup is None
    assert "Nothing is compared" in without.notes[-1]


def test_what_cannot_be_summarised_is_refused(many):
    with pytest.raises(ResultError, match="baseline 'densse' was not evaluated; did you mean 'dense'"):
        summarise(many, baseline="densse")
    with pytest.raises(ResultError, match=r"'fastv' has two episodes that begin alike: goal, task 2"):
        summarise([*many, many[0]])
    with pytest.raises(ResultError, match="no episode"):
        summarise([])


def test_what_an_episode_does_not_know_is_left_out_of_the_mean():
    records = [record(init_state=0, seam_change=0.5, action_change=None), record(init_state=1, action_change=0.2)]
    row = summarise(records).at()[0]
    assert (row.seam_change, row.action_change) == (0.5, 0.2)
    assert summarise(records[1:]).at()[0].seam_change is None


def test_plain_data_and_csv_have_the_same_stable_columns(many, tmp_path):
    summary = summarise(many, variants=["dense", "fastv", "later"])
    plain = json.loads(json.dumps(summary.to_json(), allow_nan=False))
    assert plain["baseline"] == "dense"
    assert all(list(row) == COLUMNS for row in plain["rows"])
    summary.write_csv(tmp_path / "rows.csv")
    with (tmp_path / "rows.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert list(lines[0]) == COLUMNS
    for line, row in zip(lines, plain["rows"], strict=True):
        assert line == {name: "" if value is None else str(value) for name, value in row.items()}
    with pytest.raises(ResultError, match="cannot write"):
        summary.write_csv(tmp_path / "absent" / "rows.csv")


def many_variants(labels=LABELS, tasks=10, episodes=4, environments=("libero_goal",)):
    chance = random.Random(2)
    return [
        drawn(chance, label, environment, task, state, success=1 - 0.03 * number)
        for number, label in enumerate(labels)
        for environment in environments
        for task in range(tasks)
        for state in range(episodes)
    ]


@pytest.fixture(scope="module")
def wide():
    return summarise(many_variants(), variants=LABELS)


def printed(*tables):
    console = Console(width=WIDTH, highlight=False, file=None, record=True, quiet=False, force_terminal=False)
    with console.capture() as captured:
        for table in tables:
            console.print(table)
    return [line.rstrip() for line in captured.get().splitlines()]


def test_twenty_variants_and_ten_tasks_fit(wide):
    lines = printed(eval_table(wide), *success_tables(wide))
    lines += verdict_lines(wide).splitlines() + eval_legend(wide).splitlines()
    assert WIDTH == 79
    assert max(map(len, lines)) <= WIDTH
    assert not any("…" in line for line in lines)
    whole = "".join(line.split(" ")[0] for line in lines)
    assert all(label in whole for label in LABELS)


def test_the_widest_numbers_fit():
    records = [
        record(label, task=task, init_state=state, success=label == "dense", steps=12345, ms=[12345.6] * 130,
               tokens_mean=1536.0, gflops=99999.0 if label == "dense" else 999.0)
        for label in ("dense", LABELS[15]) for task in range(10) for state in range(200)
    ]  # fmt: skip
    lines = printed(eval_table(summarise(records)))
    assert max(map(len, lines)) <= WIDTH
    row = next(line for line in lines if line.startswith("specprune")).split()
    assert row[1:] == ["0.0", "0-0", "-100", "<.0001", "12345", "130.0", "12s", "1.00", "100.10", "1536"]


def test_a_line_of_the_table_says_what_its_row_says():
    records = [record("dense", init_state=k, ms=[100.0, 100.0]) for k in range(40)]
    records += [
        record("fastv", init_state=k, success=k >= 9, steps=50, ms=[40.0] * 3, tokens_mean=128.0, gflops=400.0)
        for k in range(40)
    ]
    lines = printed(eval_table(summarise(records)))
    assert lines[-2].split() == ["dense", "100", "91-100", "-", "-", "40", "2.0", "100", "1.00", "1.00", "512"]
    assert lines[-1].split() == [
        "fastv", "77.5", "62-88", "-22.5", "0.0039", "50", "3.0", "40", "2.50", "2.50", "128",
    ]  # fmt: skip


def test_success_by_task_is_that_of_the_task():
    records = [
        record(label, environment, task, state, success=state < wins)
        for environment, shift in (("goal", 0), ("spatial", 1))
        for label, wins_of in (("dense", (4, 3)), ("fastv", (2, 0)))
        for task, wins in enumerate(wins_of)
        for state in range(4 + shift)
    ]
    goal, spatial = ([line.split() for line in printed(table)] for table in success_tables(summarise(records)))
    assert goal[0] == ["goal"]
    assert goal[1][-3:] == ["0", "1", "all"]
    assert goal[3:] == [["dense", "100", "75", "88"], ["fastv", "50", "0", "25"]]
    assert spatial[3:] == [["dense", "80", "60", "70"], ["fastv", "40", "0", "20"]]


def test_more_tasks_than_fit_are_broken_into_several_tables():
    summary = summarise([record("dense", "long", task, success=task % 7 > 2) for task in range(90)])
    tables = [printed(table) for table in success_tables(summary)]
    assert max(len(line) for lines in tables for line in lines) <= WIDTH
    headed = [lines[1].removeprefix("success %, task").split() for lines in tables]
    assert [int(name) for names in headed for name in names[:-1]] == list(range(90))
    assert {names[-1] for names in headed} == {"all"}
    values = [lines[3].split()[1:] for lines in tables]
    assert [int(value) for line in values for value in line[:-1]] == [100 * (task % 7 > 2) for task in range(90)]


def test_tables_of_what_is_unfinished(many):
    summary = summarise(many, variants=["dense", "later"])
    assert printed(eval_table(summary))[-2].split() == ["later", "-", "0-100", *"--------"]
    assert ["later", "-", "-", "-"] in [line.split() for line in printed(success_tables(summary)[0])]
    assert "0 of 12 episodes finished, 0 pairs compared: later." in eval_legend(summary).splitlines()


def test_a_label_is_shown_as_it_is_written():
    label = "fastv@names=[bold],kind=[/x]"
    assert "".join(line.split(" ")[0] for line in printed(eval_table(summarise([record(label)])))).endswith(label)


def test_verdicts_and_legend_name_who_is_meant():
    records = [record("dense", init_state=k) for k in range(30)]
    records += [record("fastv", init_state=k, success=k > 9, fallbacks=2) for k in range(30)]
    records += [record("random", init_state=k, success=k > 1, crashes=int(k == 3)) for k in range(30)]
    summary = summarise(records)
    lines = verdict_lines(summary)
    assert lines.startswith("Against dense, on the same starts:\nfastv: loses 33.3 points (95 % interval")
    assert "\nrandom: no difference can be seen with 30 episodes; about" in lines
    legend = " ".join(eval_legend(summary).split())
    assert "Queries that fell back to dense: fastv 60." in legend
    assert "Simulators restarted: random 1." in legend
    assert "not corrected for 2 comparisons" in legend
    assert "A p below 0.025 stands" in legend
    alone = summarise(records[:30])
    assert verdict_lines(alone) == ""
    assert "corrected" not in eval_legend(alone)
