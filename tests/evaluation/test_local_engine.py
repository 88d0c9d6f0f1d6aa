"""Processes of this machine: the same records, crashes survived, nobody left behind, and a kill that loses nothing."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from tests.helpers.paths import ROOT
from tests.helpers.rollout_engines import by_job, evaluation, expected
from tokenprune.errors import ConfigError, RolloutError
from tokenprune.evaluation import local_engine as local
from tokenprune.evaluation.jobs import Job
from tokenprune.evaluation.local_engine import LocalEngine
from tokenprune.evaluation.results_file import ResultsFile, read_results
from tokenprune.report.provenance import provenance


def children():
    """Worker processes of this one that have not ended."""
    return [process.pid for process in multiprocessing.active_children()]


def states():
    """State and group of every process by its id."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, group = stat.read_text().rpartition(")")[2].split()[:3]
            found[int(stat.parent.name)] = state, int(group)
    return found


def left(group):
    """Processes of a group, once no more of them end; those that nobody has reaped have ended."""
    for _ in range(500):
        members = [pid for pid, (state, own) in states().items() if own == group and state not in "ZX"]
        if not members:
            break
        time.sleep(0.02)
    return members


def test_two_workers_and_crashes_come_to_the_records_of_one_process(tmp_path):
    log = tmp_path / "log"
    failing = {"crash": {"0-1": 1}, "raise": {"1-2": 1}, "count": str(tmp_path), "log": str(log)}
    spec, jobs = evaluation(**failing)
    records, blocked = [], []
    for record in LocalEngine(workers=2).run(spec, jobs):
        records.append(record)
        for pid in children():
            status = Path(f"/proc/{pid}/status").read_text()
            blocked.append(int(status.split("SigBlk:")[1].split()[0], 16) >> (signal.SIGINT - 1) & 1)
    plain, crashes = by_job(records, jobs)
    assert plain == expected()
    # The first variant to meet the start is the one that crashes.
    assert sorted((job.start.task, job.start.init_state, count) for job, count in crashes.items()) == [
        (0, 1, 1),
        (1, 2, 1),
    ]
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    opened = [pid for pid, what, *_ in entries if what == "open"]
    assert len(set(opened)) == len(opened) == 4
    assert len([1 for _, what, *_ in entries if what == "reset"]) == len(jobs) + 2
    # Ctrl-C is for the parent to answer.
    assert set(blocked) == {1}
    assert children() == []
    assert not set(opened) & set(states())


def test_an_episode_that_keeps_crashing_ends_everything(tmp_path, monkeypatch):
    monkeypatch.setattr("tokenprune.evaluation.jobs.CRASHES", 1)
    spec, jobs = evaluation("dense", crash={"0-0": 9}, count=str(tmp_path))
    with pytest.raises(
        RolloutError, match=r"^'dense' from toy, task 0, initial state 0, seed 0: crashed 1 times; .* exit code 7$"
    ):
        list(LocalEngine().run(spec, jobs))
    assert children() == []


def test_an_error_of_a_worker_is_raised_here_and_its_like_nowhere_else():
    spec, jobs = evaluation("dense+no-wirst")
    with pytest.raises(ConfigError, match=r"^'dense\+no-wirst': the policy has no view 'wirst'; did you mean 'wrist'"):
        list(LocalEngine().run(spec, jobs))
    assert children() == []


def test_a_simulator_that_hangs_is_replaced_and_counted(tmp_path, monkeypatch):
    """The clock stands still, but for the jump it makes when an episode hangs."""
    hanging = tmp_path / "0-1-hang"
    monkeypatch.setattr(local, "monotonic", lambda: 60.0 if hanging.exists() else 0.0)
    spec, jobs = evaluation(hang={"0-1": 1}, count=str(tmp_path))
    plain, crashes = by_job(LocalEngine(workers=1, limit_s=59).run(spec, jobs), jobs)
    assert plain == expected()
    assert [(job.start.task, job.start.init_state, count) for job, count in crashes.items()] == [(0, 1, 1)]
    assert children() == []


def test_an_interrupted_evaluation_leaves_no_process():
    spec, jobs = evaluation()
    running = LocalEngine(1).run(spec, jobs)
    next(running)
    (pid,) = children()
    with pytest.raises(KeyboardInterrupt):
        running.throw(KeyboardInterrupt)
    assert children() == []
    assert pid not in states()


def test_nothing_to_do_starts_nothing():
    spec, _ = evaluation()
    assert list(LocalEngine(4).run(spec, [])) == []
    with pytest.raises(RolloutError, match="needs some time, not 0 s"):
        LocalEngine(limit_s=0)
    for workers, threads in ((0, 1), (1, 0)):
        with pytest.raises(RolloutError, match="at least 1 worker with 1 thread"):
            LocalEngine(workers, threads)


EVALUATE = """
import sys
from pathlib import Path
import torch
from tests.helpers.rollout_engines import evaluation
from tokenprune.evaluation.local_engine import LocalEngine
from tokenprune.evaluation.results_file import ResultsFile
from tokenprune.report.provenance import provenance

if __name__ == "__main__":
    spec, jobs = evaluation(log=sys.argv[2], hang={"0-1": 1}, count=str(Path(sys.argv[2]).parent))
    with ResultsFile(Path(sys.argv[1]), {"seed": 0}, provenance(torch.device("cpu"))) as results:
        for variant in spec.variants:
            results.declare(variant.label, {"pipeline": variant.pipeline, "condition": variant.condition})
        missing = [job for job in jobs if not results.holds(job.start, job.variant)]
        for record in LocalEngine(1).run(spec, missing):
            results.append(record)
            print(len(results.results.records), flush=True)
            sys.stdin.readline()
"""


def test_an_evaluation_that_was_killed_goes_on_where_it_was(tmp_path):
    script, path, log = tmp_path / "evaluate.py", tmp_path / "goal.jsonl", tmp_path / "log"
    script.write_text(textwrap.dedent(EVALUATE))
    with subprocess.Popen(
        [sys.executable, str(script), str(path), str(log)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, start_new_session=True,
    ) as process:  # fmt: skip
        for number in (1, 2, 3):
            assert process.stdout.readline() == f"{number}\n"
            process.stdin.write("\n" if number < 3 else "")
            process.stdin.flush()
        (worker,) = {json.loads(line)[0] for line in log.read_text().splitlines()}
        assert states()[worker][1] == process.pid
        # The parent alone: its worker, in the middle of an episode, finds out that it is gone.
        process.kill()
        assert left(process.pid) == []
    done = read_results(path).records
    assert len(done) == 3
    with path.open("ab") as file:
        file.write(b'{"kind": "episode", "variant": "dense", "envi')
    spec, jobs = evaluation()
    with ResultsFile(path, {"seed": 0}, provenance(torch.device("cpu"))) as results:
        missing = [job for job in jobs if not results.holds(job.start, job.variant)]
        assert missing == [job for job in jobs if job not in [Job(r.start, r.variant) for r in done]]
        assert len(missing) == len(jobs) - 3
        for record in LocalEngine(1).run(spec, missing):
            results.append(record)
    records = read_results(path).records
    assert records[:3] == done
    assert by_job(records, jobs) == (expected(), {})
