"""What holds of SpecPrune in every episode, each with a fault planted to show that its property can fail."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from tests.helpers.planting import NOTICED, prop
from tests.helpers.tiny_episodes import (
    DEPTH,
    OTHER_TASK,
    PIPELINES,
    PRESETS,
    VIEWS,
    Episode,
    Host,
    Turn,
    chosen,
    episodes,
    everything,
    kept,
    play,
    policy_of,
    registry,
    scripted,
    shrunk,
    wanted,
)
from tests.helpers.tiny_oft import tiny_config, tiny_policy_parts
from tokenprune.pipelines.config import PipelineConfig
from tokenprune.pipelines.loader import load_pipeline
from tokenprune.policy import ActionChunk, Policy
from tokenprune.stages import token_context as context
from tokenprune.stages.config import CutConfig
from tokenprune.stages.memory import StageMemory
from tokenprune_plugins.shared import ranks
from tokenprune_plugins.shared.patch_change import frame_similarity
from tokenprune_plugins.shared.ranks import rank_within
from tokenprune_plugins.specprune import signals, static
from tokenprune_plugins.specprune.static import Static

modes = st.lists(st.sampled_from(["coarse", "fine"]), max_size=2)


def last_of(config: PipelineConfig, episode: Episode, views: int = 2, side: int = 4) -> ActionChunk:
    """The episode's last query."""
    *_, chunk = play(policy_of(config, views, side), episode)
    return chunk


@prop(
    st.sampled_from(["specprune", "specprune-paper"]), episodes(), modes, st.integers(1, 3), st.integers(1, 6),
    examples=20,
)  # fmt: skip
def i19(name: str, episode: Episode, before: list[str], views: int, top: int) -> None:
    config = shrunk(name, f"stages.1.local_top={top}")
    before = before[: len(episode.turns) - 1] + ["coarse"] * (len(episode.turns) - 1 - len(before))
    coarse, fine = (last_of(scripted(config, *before, mode), episode, views) for mode in ("coarse", "fine"))
    assert (coarse.trace.mode, fine.trace.mode) == ("coarse", "fine")
    assert kept(coarse).keys() == kept(fine).keys()
    for after, ids in kept(coarse).items():
        assert set(ids) <= set(kept(fine)[after])


def test_I19_fine_keeps_all_that_coarse_keeps() -> None:
    i19()


def test_I19_notices_a_smaller_union_in_fine() -> None:
    real = signals.in_mode
    turned = {"coarse": "fine", "fine": "coarse"}
    i19.notices(signals, "in_mode", lambda value, mode: real(value, turned[mode]))


def test_I19_notices_a_smaller_budget_in_fine() -> None:
    real = CutConfig.budget
    turned = {"coarse": "fine", "fine": "coarse"}
    i19.notices(CutConfig, "budget", lambda self, mode, *rest: real(self, turned[mode], *rest))


def test_I19_notices_another_order_in_fine() -> None:
    real = Static._propose

    def reversed_in_fine(self: Static, ctx: Any, known: dict[str, Tensor]) -> Any:
        return real(self, ctx, {n: c.flip(1) for n, c in known.items()} if ctx.mode == "fine" else known)

    i19.notices(Static, "_propose", reversed_in_fine)


def test_I19_notices_a_history_that_depends_on_the_mode() -> None:
    real = context.SelectContext.recall

    def forgetful(self: Any, name: str) -> tuple[Tensor, Tensor]:
        values, seen = real(self, name)
        return values, seen & (self.mode == "coarse" or not name.startswith("previous."))

    i19.notices(context.SelectContext, "recall", forgetful)


def test_specprune_c3_keeps_fewer_in_fine() -> None:
    """As released, over a scene that hardly changes and with its own constants: 256 patches a view."""
    config = load_pipeline("specprune-c3", registry()).config
    episode = Episode(0, (Turn(("slow",) * 8), Turn()))
    coarse, fine = (last_of(scripted(config, "coarse", mode), episode, side=16) for mode in ("coarse", "fine"))
    assert len(kept(fine)[0]) < len(kept(coarse)[0])
    assert len(kept(fine)[1]) < len(kept(coarse)[1])
    assert not set(kept(coarse)[1]) <= set(kept(fine)[1])


turns = st.lists(
    st.tuples(st.lists(st.sampled_from(["slow", "fast"]), min_size=2, max_size=2), st.booleans()),
    min_size=1, max_size=2,
)  # fmt: skip


@prop(st.sampled_from(PIPELINES), turns, st.integers(0, 9999), examples=10)
def i9(name: str, lived: list[tuple[list[str], bool]], scene: int) -> None:
    config = shrunk(name)
    together, alone = policy_of(config), [policy_of(config) for _ in range(2)]
    hosts = [(Host(together, Episode(scene + s, ()), s), Host(alone[s], Episode(scene + s, ()), s)) for s in (0, 1)]
    for moves, shown in [*lived, ([], True)]:
        chunks = together.act_batch({slot: pair[0].sight for slot, pair in enumerate(hosts)})
        shared = chunks[0].trace is chunks[1].trace
        for slot, (_, single) in enumerate(hosts):
            expected = single.act()
            assert chosen(chunks[slot], slot if shared else 0) == chosen(expected)
            np.testing.assert_allclose(chunks[slot].normalised, expected.normalised, rtol=0, atol=1e-10)
            for host in hosts[slot] if moves else ():
                host.execute(*[moves[slot]] * 8, shown=shown)


def test_I9_environments_of_a_batch_do_not_meet() -> None:
    i9()


def test_I9_notices_the_first_environments_memory() -> None:
    real = StageMemory.recall

    def of_the_first(self: StageMemory, name: str, places: Tensor) -> tuple[Tensor, Tensor]:
        return real(replace(self, slots=[self.slots[0]] * len(self.slots)), name, places)

    i9.notices(StageMemory, "recall", of_the_first)


def test_I9_notices_the_first_environments_frames() -> None:
    real = frame_similarity

    def first(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        similar, found = real(ctx, *args)
        return similar[:1].expand_as(similar), found

    i9.notices(static, "frame_similarity", first)


def test_I9_notices_ranks_over_the_whole_batch() -> None:
    real = rank_within
    i9.notices(ranks, "rank_within", lambda score, member: real(score.mean(0, keepdim=True) + 0 * score, member))


@prop(st.sampled_from(PIPELINES), episodes(), st.integers(0, 2**31 - 1), examples=10)
def i13(name: str, episode: Episode, noise: int) -> None:
    first = [everything(chunk) for chunk in play(policy_of(shrunk(name)), episode)]
    torch.manual_seed(noise)
    again = [everything(chunk) for chunk in play(policy_of(shrunk(name)), episode)]
    assert first == again


def test_I13_the_same_seed_selects_the_same() -> None:
    i13()


def test_I13_notices_ties_left_to_chance() -> None:
    real = rank_within
    i13.notices(ranks, "rank_within", lambda score, member: real(score + torch.rand(score.shape), member))


def forgets(name: str, before: Episode, episode: Episode) -> None:
    experienced = policy_of(shrunk(name))
    for _ in play(experienced, before):
        pass
    own, fresh = (list(map(everything, play(acting, episode))) for acting in (experienced, policy_of(shrunk(name))))
    assert own == fresh


i20 = prop(st.sampled_from(PIPELINES), episodes(max_turns=2), episodes(max_turns=2), examples=15)(forgets)


def test_I20_nothing_of_the_last_episode_is_visible() -> None:
    i20()


@pytest.mark.parametrize(
    ("name", "surviving"),
    [
        ("specprune", "maps"),
        ("specprune-c3", "maps"),
        ("specprune.dynamic", "numbers"),
        ("specprune.controller", "host"),
        ("specprune-c3", "executed"),
        ("specprune", "past"),
        ("specprune-c3", "past"),
    ],
)
def test_I20_notices_what_survives_a_reset(name: str, surviving: str) -> None:
    real = Policy.reset

    def reset(self: Policy, instruction: str, slot: int = 0) -> None:
        old = self._slots.get(slot)
        real(self, instruction, slot)
        if old is not None:
            new = self._slots[slot]
            holder, former = (new.memory, old.memory) if hasattr(new.memory, surviving) else (new, old)
            setattr(holder, surviving, getattr(former, surviving))

    # Frames of the old episode lie between the queries of the new one, whose host shows none.
    moves = ("fast",) * 7 + ("slow",)
    before, episode = Episode(0, (Turn(moves),)), Episode(1, (Turn(moves, shown=False), Turn()))
    forgets(name, before, episode)
    with patch.object(Policy, "reset", reset), pytest.raises(NOTICED):
        forgets(name, before, episode)


STILL = (Turn(("middling",) * 8, shown=False),) * 3


def still(config: PipelineConfig, image: np.ndarray, acting: Policy | None = None) -> list[ActionChunk]:
    """Queries of an episode whose cameras always show the same."""
    acting = acting or policy_of(config)
    seen = {"images": dict.fromkeys(VIEWS[:2], image), "state": np.zeros(8)}
    with patch.object(Host, "sight", seen):
        return list(play(acting, Episode(0, STILL)))


NOISE = np.random.default_rng(0).integers(1, 256, (80, 80, 3), dtype=np.uint8)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize(
    "image", [NOISE, np.zeros_like(NOISE), np.full_like(NOISE, 255)], ids=["same", "black", "white"]
)
def test_a_view_that_never_changes_selects_the_same_again_and_again(name: str, image: np.ndarray) -> None:
    first, *later = still(shrunk(name), image)
    assert [chosen(chunk) for chunk in (first, *later)] == [chosen(chunk) for chunk in still(shrunk(name), image)]
    for chunk in later:
        ((steps,),) = chunk.trace.looked_back.values()
        assert steps
        if name != "specprune-c3":
            assert not wanted(chunk, "dynamic")


def test_c3_takes_black_patches_for_changed() -> None:
    *_, black = still(shrunk("specprune-c3"), np.zeros_like(NOISE))
    assert kept(black)[0] == list(black.trace.plan.layout.prunable)


def test_c3_takes_the_lowest_ids_for_changed_where_nothing_changed() -> None:
    *_, chunk = still(shrunk("specprune-c3"), NOISE)
    changed = chunk.trace.reasons[0]["dynamic"][0]
    assert chunk.trace.kept[0][0][changed].tolist() == [*range(1, 5), *range(17, 22)]


def indifferent() -> Policy:
    """A model in which every query attends to every token alike, with the shrunk `specprune`."""
    model = tiny_policy_parts(tiny_config(VIEWS[:2], depth=DEPTH))
    for layer in model.model.language_model.model.layers:
        layer.self_attn.q_proj.weight.zero_()
    return Policy(model, shrunk("specprune"), registry())


def test_equal_attention_keeps_the_lower_ids() -> None:
    chunks = still(shrunk("specprune"), NOISE, indifferent())
    # 11 of 2 x 16: claims are equal across views, and the eleventh is the sixth of the first. Later cuts rank jointly,
    # and of each view one is kept in any case.
    wish = {0: 11, 1: 7, 2: 6, 4: 5, 5: 4, 6: 3}
    first = {0: [*range(1, 7), *range(17, 22)], 1: [*range(1, 5), *range(17, 20)]}
    first |= {2: [*range(1, 5), 17, 18], 4: [*range(1, 5), 17], 5: [1, 2, 3, 17], 6: [1, 2, 17]}
    assert {after: len(ids) for after, ids in first.items()} == wish
    assert kept(chunks[0]) == first
    assert [kept(chunk) for chunk in chunks] == [
        kept(chunk) for chunk in still(shrunk("specprune"), NOISE, indifferent())
    ]
    assert kept(chunks[1]) == kept(chunks[2])


def test_a_new_task_in_mid_episode_forgets_the_old_one() -> None:
    acting = policy_of(shrunk("specprune"))
    for chunk in play(acting, Episode(0, (Turn(("slow",) * 8),))):
        assert chunk.trace.mode == "coarse"
    first, *_ = play(acting, Episode(0, (Turn(),), OTHER_TASK))
    assert first.trace.mode == "coarse"
    assert first.trace.looked_back == {"specprune.static": (None,)}
