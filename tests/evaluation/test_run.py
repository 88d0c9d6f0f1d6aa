"""One episode: what the policy is given, which actions the environment gets, and every number of the record."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from tests.helpers import toy_environment as toy
from tokenprune.errors import ConfigError, ObservationError, SimulatorError
from tokenprune.evaluation.jobs import Job, plan_jobs
from tokenprune.evaluation.run import run_episode
from tokenprune.evaluation.starts import Start, plan_starts
from tokenprune.evaluation.variant import Variant, parse_variant
from tokenprune.evaluation.worker import Worker, WorkerSpec
from tokenprune.model.flops import Probed, query_flops
from tokenprune.pipelines.loader import parse_pipeline
from tokenprune.policy import Policy
from tokenprune.registry.discovery import Registry

PLUGIN = Path(toy.__file__)
REGISTRY = Registry.discover(plugin_files=[PLUGIN])
BACKBONE = toy.ToyPolicy(("primary", "wrist"), 0)


class Spied:
    """The toy, with a diary; every call takes a second of a clock of its own."""

    def __init__(self, clock, **options):
        self.clock, self.diary = clock, []
        self.toy = toy.Factory.build("toy", options)
        self.suite = self.toy.suite

    def _note(self, what, *more):
        self.clock[0] += 1.0
        self.diary.append((what, *more))

    def reset(self, *start):
        self._note("reset", *start)
        self.toy.reset(*start)

    def observe(self):
        self._note("observe")
        return self.toy.observe()

    def frames(self):
        self._note("frames", self.toy.steps)
        draw, steps = self.toy.frames(), self.toy.steps

        def drawn():
            self._note("draw", steps)
            return draw()

        return drawn

    def step(self, action):
        self._note("step", np.array(action))
        return self.toy.step(action)


class Watched:
    """A policy, with a diary; a query takes 100 seconds of the clock, the rest 10."""

    def __init__(self, policy, clock):
        self.policy, self.clock, self.backbone = policy, clock, policy.backbone
        self.instructions, self.observations, self.chunks, self.executions = [], [], [], []

    looks_back = property(lambda self: self.policy.looks_back)

    def reset(self, instruction):
        self.clock[0] += 10.0
        self.instructions.append(instruction)
        self.policy.reset(instruction)

    def act(self, observation):
        self.clock[0] += 100.0
        # The toy draws into the same arrays again.
        images = {view: image.copy() for view, image in observation["images"].items()}
        self.observations.append({**observation, "images": images})
        chunk = self.policy.act(observation)
        # Chunk and step each action begins at.
        self.chunks.append((len(self.executions), chunk))
        return chunk

    def executed(self, action, pose, time, frames):
        self.clock[0] += 10.0
        self.executions.append((np.array(action), pose, time))
        return self.policy.executed(action, pose, time, frames=frames)


def moody(**settings):
    return {"version": 1, "name": "moody", "stages": [{"use": "toy.moody", **settings}]}


DENSE = {"version": 1, "name": "dense"}


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("tokenprune.evaluation.run.perf_counter", lambda: now[0])
    return now


def play(clock, pipeline=DENSE, condition="", start=(0, 2, 0), backbone=BACKBONE, tasks=(0, 1), options=None, **how):
    """An episode with spies on both sides."""
    environment = Spied(clock, **(options or {}))
    bound = Policy(backbone, parse_pipeline(pipeline, REGISTRY, "p").config, REGISTRY)
    policy = Watched(bound, clock)
    variant = Variant("mine", pipeline, condition)
    record = run_episode(policy, environment, Start("toy", *start), variant, tasks, **how)
    return record, policy, environment


def named(diary, what):
    return [entry[1:] for entry in diary if entry[0] == what]


CASES = {
    "dense": (DENSE, {}, 0),
    "prunes late": ({"version": 1, "name": "late", "stages": [{"use": "fastv", "keep": 0.25}]}, {}, 0),
    "three of each chunk": (DENSE, {"execute": 3}, 0),
    "asks": (moody(asks=(1, 3, 6, 7, 8)), {}, 5),
    "asks in vain": (moody(asks=(1, 3, 6, 7, 8)), {"replan": False}, 0),
    # The last of three actions is followed by a query anyway.
    "asks at the end": (moody(asks=(3, 6)), {"execute": 3}, 0),
    "fails": ({**moody(fails=(0, 2)), "on_error": "dense"}, {}, 0),
    "looks back": (moody(back=2), {}, 0),
}


@pytest.mark.parametrize("start", [(0, 2, 0), (1, 3, 2), (0, 0, 0), (2, 1, 0)])
@pytest.mark.parametrize(("pipeline", "how", "replans"), CASES.values(), ids=CASES)
def test_every_number_of_a_record(clock, start, pipeline, how, replans):
    record, policy, environment = play(clock, pipeline, start=start, **how)
    task, init_state, seed = start
    needed = 3 + (7 * task + 5 * init_state + 11 * seed) % 24
    actions = [action for action, _, _ in policy.executions]
    chunks = [chunk for _, chunk in policy.chunks]
    traces = [chunk.trace for chunk in chunks]
    assert (record.variant, record.environment) == ("mine", "toy")
    assert (record.task, record.init_state, record.seed) == start == named(environment.diary, "reset")[0]
    assert record.success == (needed <= 20)
    assert record.steps == len(actions) == min(needed, 20)
    assert record.queries == len(chunks)
    if needed > 8:
        assert record.replans == replans
    assert record.fallbacks == sum(trace.fallback != "" for trace in traces)
    assert (record.fallbacks > 0) == ("on_error" in pipeline)
    modes = [trace.mode for trace in traces]
    assert record.modes == {mode: modes.count(mode) for mode in set(modes)}
    # One token of the state, and one of each number and word, are never pruned.
    fixed = 1 + 16 + len(policy.instructions[0].split())
    held = [[n - fixed for n in trace.held] for trace in traces]
    assert record.tokens_mean == pytest.approx(sum(sum(h) / 3 for h in held) / len(held))
    assert record.tokens_last == pytest.approx(sum(h[-1] for h in held) / len(held))
    probes = [tuple(Probed(probe.layer, probe.count, probe.ahead) for probe in trace.probes) for trace in traces]
    flops = [query_flops(BACKBONE.info, t.plan, rows).total for t, rows in zip(traces, probes, strict=True)]
    assert record.gflops == pytest.approx(sum(flops) / len(flops) / 1e9)
    changes, seams, switches = [], [], 0
    for step in range(1, len(actions)):
        before, after = actions[step - 1], actions[step]
        changes.append(sum(abs(after[dim] - before[dim]) for dim in range(3)))
        switches += (before[3] > 1.3) != (after[3] > 1.3)
        if step in [begin for begin, _ in policy.chunks]:
            seams.append(changes[-1])
    assert record.action_change == pytest.approx(sum(changes) / len(changes))
    assert record.seam_change == (pytest.approx(sum(seams) / len(seams)) if seams else None)
    assert record.gripper_switches == switches
    assert record.crashes == 0
    assert record.query_ms == [trace.milliseconds for trace in traces]
    for phase, mean in record.phases_ms.items():
        assert mean == pytest.approx(sum(trace.phases.get(phase, 0.0) for trace in traces) / len(traces))
    assert set(record.phases_ms) == {phase for trace in traces for phase in trace.phases}
    assert record.simulator_s == len(environment.diary)
    assert record.policy_s == 10 + 100 * len(chunks) + 10 * len(actions)
    assert record.episode_s == record.simulator_s + record.policy_s == clock[0]


def test_there_is_no_change_without_a_second_step(clock, monkeypatch):
    monkeypatch.setattr(toy, "needed", lambda *start: 1)
    record, _, _ = play(clock)
    assert (record.steps, record.action_change, record.seam_change, record.gripper_switches) == (1, None, None, 0)


@pytest.mark.parametrize(("execute", "replan"), [(None, True), (3, True), (1, True), (None, False)])
def test_the_actions_of_a_chunk_are_executed_one_by_one(clock, execute, replan):
    asks = (2, 9)
    _, policy, environment = play(clock, moody(asks=asks), (""), (0, 0, 1), execute=execute, replan=replan)
    expected, begins, place = [], [], None
    for step in range(14):
        if place is None or place == (execute or 4) or (replan and step in asks):
            begins.append(step)
            place = 0
        expected.append((len(begins) - 1, place))
        place += 1
    assert [begin for begin, _ in policy.chunks] == begins
    for (chunk, place), (action, _, _), (stepped,) in zip(
        expected, policy.executions, named(environment.diary, "step"), strict=True
    ):
        assert action.tolist() == stepped.tolist() == policy.chunks[chunk][1].actions[place].tolist()


def test_the_policy_is_told_pose_and_time_of_what_was_executed(clock):
    _, policy, _ = play(clock, start=(0, 1, 0))
    again = toy.Factory.build("toy", {})
    again.reset(0, 1, 0)
    for number, (action, pose, time) in enumerate(policy.executions, 1):
        assert pose.tolist() == again.step(action).pose.tolist()
        assert time == pytest.approx(number / 20)


def black(policy):
    """Views that were black in every query; the others never are."""
    images = [observation["images"] for observation in policy.observations]
    found = [{view for view, image in views.items() if not image.any()} for views in images]
    assert all(views == found[0] for views in found)
    return found[0]


@pytest.mark.parametrize(
    ("condition", "dark", "instruction"),
    [
        ("", set(), toy.TASKS[0]),
        ("blind", {"primary", "wrist"}, toy.TASKS[0]),
        ("no-wrist", {"wrist"}, toy.TASKS[0]),
        ("no-primary", {"primary"}, toy.TASKS[0]),
        ("other-instruction", set(), toy.TASKS[1]),
    ],
)
def test_a_condition_changes_what_the_policy_is_given_and_nothing_else(clock, condition, dark, instruction):
    _, policy, _ = play(clock, moody(back=2), condition, (0, 1, 0))
    assert black(policy) == dark
    assert policy.instructions == [instruction]
    (past,) = [images for images in policy.policy._slots[0].past._frames.values() if callable(images)][-1:]
    assert {view for view, image in past().items() if not image.any()} == dark


@pytest.mark.parametrize("condition", ["", "no-wrist"])
def test_frames_are_drawn_only_where_a_stage_looks_back(clock, condition):
    _, _, environment = play(clock, moody(back=2), condition, (0, 1, 0))
    assert named(environment.diary, "draw") == [(2,)]
    assert len(named(environment.diary, "frames")) == 8
    _, _, environment = play(clock, moody(), condition, (0, 1, 0))
    assert named(environment.diary, "draw") == named(environment.diary, "frames") == []


def test_a_policy_is_given_the_views_it_looks_at_and_no_others(clock):
    one = toy.ToyPolicy(("wrist",), 0)
    _, policy, _ = play(clock, backbone=one)
    assert list(policy.observations[0]["images"]) == ["wrist"]
    with pytest.raises(ConfigError, match="environment 'toy' has the views primary; the policy also looks at wrist"):
        play(clock, options={"views": ["primary"]})


def test_who_looks_on_sees_every_moment_and_its_chunk(clock):
    moments = []

    def look(frames, chunk):
        moments.append(({view: image.copy() for view, image in frames().items()}, chunk))

    record, policy, _ = play(clock, condition="blind", start=(0, 1, 0), on_step=look)
    numbers = {id(chunk): number for number, (_, chunk) in enumerate(policy.chunks)}
    assert [numbers[id(chunk)] for _, chunk in moments] == [0, 0, 0, 0, 1, 1, 1, 1, 1]
    again = toy.Factory.build("toy", {})
    again.reset(0, 1, 0)
    for number, (images, _) in enumerate(moments):
        for view, image in again.observe()["images"].items():
            assert np.array_equal(image, images[view])
        if number < record.steps:
            again.step(policy.executions[number][0])


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"execute": 0}, "execute: 1 to 4 actions of each chunk, not 0"),
        ({"execute": 5}, "execute: 1 to 4 actions of each chunk, not 5"),
        ({"condition": "no-wirst"}, "'mine': the policy has no view 'wirst'; did you mean 'wrist'"),
        ({"condition": "other-instruction", "tasks": (0,)}, "other-instruction needs a second task"),
        ({"start": (3, 0, 0)}, "'toy' has no task 3"),
        ({"start": (0, 4, 0)}, "task 0 of 'toy' has no initial state 4"),
    ],
)
def test_what_cannot_run_is_refused_before_the_simulator_is_asked(clock, how, message):
    with pytest.raises(ConfigError, match=message):
        play(clock, **how)
    assert clock == [0.0]


def test_what_fails_is_passed_on(clock, tmp_path):
    with pytest.raises(SimulatorError, match="the table fell over"):
        play(clock, options={"raise": {"0-2": 1}, "count": str(tmp_path)})
    with pytest.raises(ObservationError, match="the toy looks at"):
        play(clock, backbone=type("Shortsighted", (toy.ToyPolicy,), {"check": refuse})(("primary", "wrist"), 0))


def refuse(self, observation):
    raise ObservationError("the toy looks at nothing")


def spec_of(*labels, backbone="toy-policy", **more):
    variants = tuple(parse_variant(label, REGISTRY) for label in labels)
    values = {
        "options": {}, "device": "cpu", "dtype": "float32", "seed": 0, "environments": {"toy": {}},
        "tasks": {"toy": (0, 1)}, "plugins": (str(PLUGIN),),
    }  # fmt: skip
    return WorkerSpec(backbone, None, "tiny", variants=variants, **{**values, **more})


def same(record):
    return {name: value for name, value in asdict(record).items() if not name.endswith(("_s", "_ms"))}


def test_a_worker_meets_every_variant_with_the_same_episodes(tmp_path):
    log = tmp_path / "log"
    environments = {"toy": {"log": str(log)}, "toy_two": {"log": str(log)}}
    labels = ["dense", "fastv@keep=0.25", "dense+blind"]
    worker = Worker(spec_of(*labels, environments=environments, tasks={"toy": (0,), "toy_two": (0,)}))
    suites = [toy.Factory.describe(name, {}) for name in environments]
    starts = [start for suite in suites for start in plan_starts(suite, ["0"], 5, seed=3)]
    records = [worker.run(job) for job in plan_jobs(starts, labels)]
    worker.close()
    lines = [eval(line)[1:] for line in log.read_text().splitlines()]
    resets = [["reset", 0, state, seed] for state, seed in [(0, 3), (1, 3), (2, 3), (3, 3), (0, 4)] for _ in range(3)]
    assert lines == [["open", "toy"], *resets, ["close", "toy"], ["open", "toy_two"], *resets, ["close", "toy_two"]]
    assert [(record.variant, record.start) for record in records] == [(label, s) for s in starts for label in labels]
    assert len({record.action_change for record in records[:3]}) == 3
    fresh = Worker(spec_of(*reversed(labels)))
    for record in reversed(records[:15]):
        assert same(fresh.run(Job(record.start, record.variant))) == same(record)


def test_a_worker_runs_a_real_backbone_with_a_pipeline_that_looks_back():
    labels = ["dense", "specprune", "specprune+no-wrist"]
    worker = Worker(spec_of(*labels, backbone="openvla-oft"))
    records = {label: worker.run(Job(Start("toy", 1, 2, 0), label)) for label in labels}
    for record in records.values():
        assert (record.success, record.steps, record.queries) == (True, 20, 3)
        assert sum(record.modes.values()) == len(record.query_ms) == 3
    assert records["dense"].tokens_mean > records["specprune"].tokens_mean
    assert records["dense"].gflops > records["specprune"].gflops
    assert len({record.action_change for record in records.values()}) == 3


def test_a_worker_refuses_what_does_not_fit_before_any_episode():
    for spec, message in (
        (spec_of("dense+no-wirst"), r"'dense\+no-wirst': the policy has no view 'wirst'"),
        (spec_of("dense", execute=9), "execute: 1 to 4"),
        (spec_of("dense", backbone="openvla-oft", execution="cuda_graph"), "cuda_graph needs a CUDA device"),
        (spec_of("dense", environments={"toy": {"views": ["primary"]}}), "the policy also looks at wrist"),
        (spec_of("dense", environments={"toy": {"vews": 1}}), "the toy has no option 'vews'"),
    ):
        with pytest.raises(ConfigError, match=message):
            Worker(spec)
    with pytest.raises(ConfigError, match="two variants are called 'dense'; name each once"):
        spec_of("dense", "fastv", "dense")


def test_settings_hold_what_changes_results(tmp_path):
    suites = {"toy": toy.Factory.describe("toy", {})}
    spec = spec_of("dense", "dense+other-instruction", options={"views": ["wrist"]}, execute=2, replan=False)
    assert spec.settings(suites, None) == {
        "backbone": "toy-policy", "checkpoint": None, "weights": None, "preset": "tiny",
        "options": {"views": ["wrist"]}, "device": "cpu", "dtype": "float32", "seed": 0, "execute": 2, "replan": False,
        "environments": {"toy": {
            "options": {}, "views": ["primary", "wrist"], "horizon": 20, "control_hz": 20.0, "settings": {"side": 64},
        }},
    }  # fmt: skip
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    before = spec.settings(suites, tmp_path)["weights"]
    (tmp_path / "model.safetensors").write_bytes(b"trained")
    assert None is not before != spec.settings(suites, tmp_path)["weights"]
    assert replace(spec, dtype="auto").settings(suites, None)["dtype"] in ("float32", "bfloat16")
    assert replace(spec, execution="compile").settings(suites, None)["execution"] == "compile"
    assert spec.describe(spec.variants[0], suites) == {"pipeline": spec.variants[0].pipeline, "condition": ""}
    instructions = spec.describe(spec.variants[1], suites)["instructions"]
    assert instructions == {"toy": {"0": toy.TASKS[1], "1": toy.TASKS[0]}}
    with pytest.raises(ConfigError, match="needs a second task"):
        replace(spec, tasks={"toy": (0,)}).describe(spec.variants[1], suites)
