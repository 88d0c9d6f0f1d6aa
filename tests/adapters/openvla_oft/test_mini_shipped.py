"""The policy that comes with the package, judged by what it does where it was not trained."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

import tokenprune
from tests.helpers.paths import MINI_POLICY
from tokenprune.compare.episode import load_episode
from tokenprune.compare.episode_source import bundled_episode
from tokenprune.evaluation.run import run_episode
from tokenprune.evaluation.starts import Start
from tokenprune.evaluation.variant import parse_variant
from tokenprune.registry.discovery import Registry

MOVING = [0, 1, 2, 6]
"""Numbers of an action that the expert uses: it never turns the hand."""


@pytest.fixture(scope="module")
def policy():
    return tokenprune.load("openvla-oft", preset="mini", dtype="float32")


@pytest.fixture(scope="module")
def episode():
    """A held-out start of a task it was trained for, solved by the scripted expert."""
    return load_episode(bundled_episode(Registry.discover(), "openvla-oft"))


def error(policy, episode, instruction=None, black=()):
    """Mean distance of the chunks from what the expert did in the same steps."""
    policy.reset(instruction or episode.instruction)
    distances = []
    for step in range(0, len(episode) - 8, 8):
        frames = {view: episode.frame(step, view) for view in episode.views}
        images = {view: np.zeros_like(frame) if view in black else frame for view, frame in frames.items()}
        chunk = policy.act({"images": images, "state": episode.state[step]})
        distances.append(np.abs(chunk.actions - episode.actions[step : step + 8])[:, MOVING].mean())
    return float(np.mean(distances))


def test_it_does_what_the_expert_does_because_it_sees_it(policy, episode):
    constant = np.abs(episode.actions - episode.actions.mean(0))[:, MOVING].mean()
    seeing, blind = error(policy, episode), error(policy, episode, black=episode.views)
    assert seeing < 0.5 * constant
    assert seeing < 0.7 * blind


def test_what_is_cut_costs_more_the_more_it_is(policy, episode):
    def pruned(keep):
        settings = {"pipeline": "random", "overrides": [f"stages.0.keep={keep}"]}
        return tokenprune.load("openvla-oft", preset="mini", dtype="float32", **settings)

    errors = [error(each, episode) for each in (policy, pruned(0.5), pruned(0.125), pruned(2))]
    assert errors == sorted(errors)


def test_its_card_says_where_it_comes_from():
    import tokenprune_adapters

    folder = Path(tokenprune_adapters.__file__).parent / "checkpoints" / "mini"
    card = (folder / "README.md").read_text()
    for word in ("Licence", "Training", "Success", "What it is not"):
        assert f"## {word}" in card
    assert sum(path.stat().st_size for path in folder.iterdir()) < 60e6


@pytest.mark.skipif(
    importlib.util.find_spec("libero") is None, reason="LIBERO is missing: pip install 'tokenprune-vla[libero]'"
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_it_solves_most_held_out_starts_of_a_task_in_the_simulator(policy):
    """Best of five, because one start may go the other way on another processor.

    At the 49 of 50 that were measured for this task, it fails without a reason once in 13,000 runs; at 9 of 10, once in
    117.
    """
    from tokenprune_adapters.environments.libero.environment import LiberoFactory

    known = json.loads((MINI_POLICY / "starts-widened.json").read_text())
    starts = [Start(**entry) for entry in known if (entry["environment"], entry["task"]) == ("libero_goal", 8)][:5]
    assert len(starts) == 5
    options = {"size": 224, "quality": "fast", "spread": 0.05}
    environment = LiberoFactory.build("libero_goal", options)
    solved: list[bool] = []
    try:
        variant = parse_variant("dense", Registry.discover())
        while max(solved.count(True), solved.count(False)) < 3:
            start = starts[len(solved)]
            record = run_episode(policy, environment, start, variant, [start.task], None, True, None)
            solved.append(record.success)
    finally:
        environment.close()
    assert solved.count(True) == 3, f"solved of its first starts: {solved}"
