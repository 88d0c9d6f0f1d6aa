"""SparseVLM's raters and scores against its rule written out with NumPy, and in a query."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.naive_oft import attention_map, entering
from tests.helpers.naive_sparsevlm import chosen_by_the_paper, scored_by_the_paper
from tests.helpers.planting import REGISTRY, pipeline
from tests.helpers.tiny_oft import INSTRUCTION, observation, tiny_config, tiny_policy_parts
from tokenprune.errors import ConfigError
from tokenprune.pipelines.loader import load_pipeline
from tokenprune.policy import Policy
from tokenprune_plugins.sparsevlm import SparseVLMConfig, rater_scores, raters


@given(st.integers(0, 10_000), st.integers(1, 3), st.integers(1, 20), st.integers(2, 9), st.integers(1, 4))
def test_raters_and_scores_are_the_papers(seed: int, batch: int, n: int, words: int, n_heads: int) -> None:
    draw = np.random.default_rng(seed)
    patches, text = draw.normal(size=(batch, n, 6)), draw.normal(size=(batch, words, 6))
    attention = draw.dirichlet(np.ones(n + 3), size=(batch, n_heads, words))[..., :n]
    heads = int(draw.integers(1, n_heads + 1)) if seed % 2 else None
    chosen = raters(torch.from_numpy(patches), torch.from_numpy(text))
    score = rater_scores(torch.from_numpy(attention), chosen, heads)
    for row in range(batch):
        rows = chosen_by_the_paper(patches[row], text[row])
        assert chosen[row].nonzero()[:, 0].tolist() == rows
        np.testing.assert_allclose(score[row], scored_by_the_paper(attention[row], rows, heads), atol=1e-12)


def test_where_no_word_stands_out_all_are_raters() -> None:
    assert raters(torch.zeros(1, 5, 4), torch.ones(1, 3, 4)).all()


@pytest.mark.parametrize("heads", [None, 1])
def test_in_a_query_it_reads_the_embeddings_and_the_layers_attention(heads: int | None) -> None:
    backbone = tiny_policy_parts(tiny_config())
    layout, layers = backbone.layout(INSTRUCTION), backbone.decoder.layers
    config = SparseVLMConfig(use="sparsevlm", after=(1,), keep=11, heads=heads)
    with entering(layers[0]) as embeddings, entering(layers[1]) as inputs:
        policy = Policy(backbone, pipeline(config), REGISTRY)
        policy.reset(INSTRUCTION)
        kept = policy.act(observation(backbone.config)).trace.kept[1][0].tolist()
    patches, text = list(layout.prunable), list(layout.span("text"))
    rows = chosen_by_the_paper(embeddings[0][patches].numpy(), embeddings[0][text].numpy())
    attention = attention_map(backbone, 1, inputs[0])[:, text][:, :, patches].numpy()
    score = scored_by_the_paper(attention, rows, heads)
    assert kept == sorted(patches[i] for i in np.argsort(-score, kind="stable")[:11])


def test_the_preset_keeps_the_released_counts() -> None:
    backbone = tiny_policy_parts(tiny_config(depth=32))
    plan = Policy(backbone, load_pipeline("sparsevlm", REGISTRY).config, REGISTRY).pipeline
    cuts = plan.plan(backbone.layout(INSTRUCTION)).cuts
    n = len(backbone.layout(INSTRUCTION).prunable)
    assert [cut.after for cut in cuts] == [2, 6, 15]
    for cut, count in zip(cuts, (300, 200, 110), strict=True):
        assert abs(cut.keep - n * count / 576) <= 1.5


def test_more_heads_than_there_are_are_refused() -> None:
    config = SparseVLMConfig(use="sparsevlm", heads=99)
    with pytest.raises(ConfigError, match=r"heads: 99, but the decoder of 'openvla-oft' has \d+"):
        Policy(tiny_policy_parts(tiny_config()), pipeline(config), REGISTRY)
