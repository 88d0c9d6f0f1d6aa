"""DivPrune against its rule written out with NumPy, ties included."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tests.helpers.naive_divprune import chosen_by_the_paper
from tests.helpers.planting import REGISTRY, pipeline
from tests.helpers.tiny_oft import INSTRUCTION, observation, tiny_config, tiny_policy_parts
from tokenprune.policy import Policy
from tokenprune.tokens.proposal import Proposal, resolve
from tokenprune_plugins.divprune import DivPruneConfig, farthest_first


def order(score: torch.Tensor, count: int) -> list[int]:
    return score.topk(count).indices.tolist()


# Signs in 16 dimensions have cosines that no rounding touches, and many of them are equal.
signs = hnp.arrays(np.float64, st.tuples(st.integers(1, 24), st.just(16)), elements=st.sampled_from([-1.0, 1.0]))


@given(signs, st.data())
def test_the_choice_is_the_papers_ties_included(embeddings: np.ndarray, data: st.DataObject) -> None:
    count = data.draw(st.integers(0, len(embeddings)))
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        score = farthest_first(torch.from_numpy(embeddings).to(dtype)[None], count)[0]
        assert order(score, count) == chosen_by_the_paper(embeddings, count)


@given(st.integers(0, 10_000), st.integers(2, 60), st.integers(1, 3))
def test_rows_of_a_batch_choose_alone(seed: int, patches: int, batch: int) -> None:
    embeddings = np.random.default_rng(seed).normal(size=(batch, patches, 12))
    scores = farthest_first(torch.from_numpy(embeddings), patches // 2)
    for row in range(batch):
        assert order(scores[row], patches // 2) == chosen_by_the_paper(embeddings[row], patches // 2)


@given(st.integers(0, 10_000))
def test_I7_a_larger_keep_contains_every_smaller_one(seed: int) -> None:
    embeddings = torch.from_numpy(np.random.default_rng(seed).normal(size=(1, 30, 6)))
    kept = [set(resolve([Proposal(score=farthest_first(embeddings, k))], k)[0].tolist()) for k in range(1, 31)]
    assert all(small < large for small, large in pairwise(kept))


def test_what_is_not_chosen_is_ranked_by_its_distance_from_what_is() -> None:
    embeddings = torch.tensor([[[1.0, 0.0], [-1.0, 0.0], [0.9, 0.1], [0.0, 1.0]]])
    score = farthest_first(embeddings, 2)[0]
    assert score.argsort(descending=True).tolist() == [1, 0, 3, 2]


def test_in_a_query_it_keeps_what_the_rule_says_of_the_projected_patches() -> None:
    backbone = tiny_policy_parts(tiny_config())
    seen: list[np.ndarray] = []
    handle = backbone.model.projector.register_forward_hook(lambda _m, _a, out: seen.append(out.numpy()))
    policy = Policy(backbone, pipeline(DivPruneConfig(use="divprune", keep=9)), REGISTRY)
    policy.reset(INSTRUCTION)
    kept = policy.act(observation(backbone.config)).trace.kept[-1][0].tolist()
    handle.remove()
    patches = np.concatenate(list(seen[0]))
    prunable = backbone.layout(INSTRUCTION).prunable
    assert kept == sorted(prunable[i] for i in chosen_by_the_paper(patches, 9))
