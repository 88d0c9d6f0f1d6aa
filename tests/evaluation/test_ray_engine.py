"""Actors of a Ray cluster: the same records, crashes survived, and addresses that do not answer."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import socket
import subprocess
import sys

import pytest

from tests.helpers.rollout_engines import by_job, evaluation, expected
from tokenprune.errors import ConfigError, RolloutError
from tokenprune.evaluation import ray_engine
from tokenprune.evaluation.ray_engine import RayEngine

needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="Ray is not installed: pip install 'tokenprune-vla[ray]'"
)


@pytest.fixture(scope="module")
def cluster():
    """A cluster of this machine, started as an engine starts it, for all tests here."""
    engine = RayEngine(workers=2)
    ray = engine._import()
    engine._connect(ray)
    yield ray
    ray.shutdown()


def listening(ray):
    """Addresses at which the cluster listens."""
    sockets = subprocess.run(["ss", "-ltnpH"], capture_output=True, text=True, check=True).stdout
    return [
        line.split()[3] for line in sockets.splitlines() if "gcs_server" in line or "raylet" in line or "ray::" in line
    ]


@needs_ray
def test_actors_and_crashes_come_to_the_records_of_one_process(cluster, tmp_path):
    log = tmp_path / "log"
    failing = {"crash": {"0-1": 1}, "raise": {"1-2": 1}, "count": str(tmp_path), "log": str(log)}
    spec, jobs = evaluation(**failing)
    plain, crashes = by_job(RayEngine(workers=2).run(spec, jobs), jobs)
    assert plain == expected()
    assert sorted((job.start.task, job.start.init_state, n) for job, n in crashes.items()) == [(0, 1, 1), (1, 2, 1)]
    opened = [pid for pid, what, *_ in map(json.loads, log.read_text().splitlines()) if what == "open"]
    assert len(set(opened)) == len(opened) == 4
    # A cluster that was there before is left as it was.
    assert cluster.is_initialized()


@needs_ray
def test_a_simulator_that_hangs_is_replaced_and_counted(cluster, tmp_path, monkeypatch):
    """The clock stands still, but for the jump it makes when an episode hangs."""
    hanging = tmp_path / "0-1-hang"
    monkeypatch.setattr(ray_engine, "monotonic", lambda: 60.0 if hanging.exists() else 0.0)
    spec, jobs = evaluation(hang={"0-1": 1}, count=str(tmp_path))
    plain, crashes = by_job(RayEngine(workers=1, limit_s=59).run(spec, jobs), jobs)
    assert plain == expected()
    assert [(job.start.task, job.start.init_state, count) for job, count in crashes.items()] == [(0, 1, 1)]


@needs_ray
def test_a_cluster_of_one_machine_listens_to_nobody_else(cluster):
    found = listening(cluster)
    assert found
    assert all(address.rpartition(":")[0].strip("[]").removeprefix("::ffff:").startswith("127.") for address in found)
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"


@needs_ray
def test_an_error_of_an_actor_is_raised_here(cluster):
    spec, jobs = evaluation("dense+no-wirst")
    with pytest.raises(ConfigError, match=r"^'dense\+no-wirst': the policy has no view 'wirst'; did you mean 'wrist'"):
        list(RayEngine().run(spec, jobs))


@needs_ray
def test_what_no_machine_has_is_not_waited_for(cluster):
    spec, jobs = evaluation()
    with pytest.raises(RolloutError, match="no machine of the Ray cluster has the 1 CPU and 64 GPU that one worker"):
        list(RayEngine(gpus_per_worker=64).run(spec, jobs))


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("127.0.0.1:{closed}", "no Ray cluster answers at '127.0.0.1:.*Connection refused"),
        ("127.0.0.1:{silent}", "no Ray cluster answers at '127.0.0.1:.*' within 1 seconds"),
        ("127.0.0.1:port", r"no Ray cluster answers at '127.0.0.1:port' \(write HOST:PORT, or auto\)"),
        ("127.0.0.1:99999", r"no Ray cluster answers at '127.0.0.1:99999' \(write HOST:PORT, or auto\)"),
    ],
)
def test_an_address_that_does_not_answer_is_given_up(monkeypatch, address, message):
    monkeypatch.setattr(ray_engine, "CONNECT_S", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as silent, socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        given = address.format(closed=closed.getsockname()[1], silent=silent.getsockname()[1])
        with pytest.raises(RolloutError, match=message):
            ray_engine._probe(given)


@needs_ray
def test_a_cluster_that_answers_is_found(cluster):
    ray_engine._probe(cluster.get_runtime_context().gcs_address)


def test_without_ray_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    spec, jobs = evaluation()
    with pytest.raises(RolloutError, match=r"^Ray is missing: pip install 'tokenprune-vla\[ray\]'"):
        list(RayEngine().run(spec, jobs))


@pytest.mark.parametrize("given", [{"workers": 0}, {"cpus_per_worker": 0}, {"gpus_per_worker": -1}])
def test_an_engine_without_workers_is_refused(given):
    with pytest.raises(RolloutError, match="at least 1 worker with some CPU and 0 or more GPUs"):
        RayEngine(**given)
