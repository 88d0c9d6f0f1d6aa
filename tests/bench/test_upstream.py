"""The reconstruction of how upstream runs: the same actions, every map kept, unread logits made."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.helpers.planting import REGISTRY
from tokenprune.bench.upstream import UpstreamBackbone, UpstreamRunner
from tokenprune.loading import load_backbone
from tokenprune.pipelines.config import DENSE
from tokenprune.policy import Policy
from tokenprune.testing.matrix import INSTRUCTION, random_observation

CASES = [
    ("openvla", {}),
    ("openvla-oft", {}),
    ("openvla-oft", {"head": "discrete"}),
    ("openvla-oft", {"head": "diffusion", "steps": 3}),
    ("pi0", {}),
    ("pi05", {}),
]


def chunks_of(backbone):
    policy = Policy(backbone, DENSE, REGISTRY)
    policy.reset(INSTRUCTION)
    rng = np.random.default_rng(1)
    return [policy.act(random_observation(backbone, rng)) for _ in range(2)]


@pytest.mark.parametrize(("name", "options"), CASES)
def test_actions_equal_dense(name, options):
    backbone = load_backbone(name, REGISTRY, None, "tiny", "cpu", "float64", 0, options)
    pairs = list(zip(chunks_of(backbone), chunks_of(UpstreamBackbone(backbone)), strict=True))
    for dense, upstream in pairs:
        assert np.abs(upstream.actions - dense.actions).max() <= 1e-6
        assert upstream.trace.held == dense.trace.held
    assert np.ptp([dense.actions for dense, _ in pairs]) > 0.01


@pytest.mark.parametrize(
    ("name", "options"),
    # Where tokens are chosen, rounding chooses among those that are about as likely.
    [(name, options) for name, options in CASES if name != "openvla" and options != {"head": "discrete"}],
)
def test_in_bfloat16_they_differ_no_more_than_bfloat16_does(name, options):
    coarse, fine = (
        load_backbone(name, REGISTRY, None, "tiny", "cpu", dtype, 0, options) for dtype in ("bfloat16", "float64")
    )
    dense, exact, upstream = map(chunks_of, (coarse, fine, UpstreamBackbone(coarse)))

    def apart(one, other):
        return np.mean([np.abs(a.actions - b.actions).mean() for a, b in zip(one, other, strict=True)])

    assert 0 < apart(upstream, dense) < 1.5 * apart(dense, exact) < 0.1


@pytest.mark.parametrize(("name", "options"), CASES)
def test_every_map_is_kept_and_logits_are_made_where_upstream_makes_them(name, options, monkeypatch):
    backbone = load_backbone(name, REGISTRY, None, "tiny", "cpu", "float32", 0, options)
    runners = []
    real = UpstreamRunner.__call__

    def run(self, *given, **named):
        runners.append(self)
        return real(self, *given, **named)

    monkeypatch.setattr(UpstreamRunner, "__call__", run)
    chunk = chunks_of(UpstreamBackbone(backbone))[0]
    info, n = backbone.info, chunk.trace.plan.layout.n_tokens
    maps, logits = runners[0].maps, runners[0].logits
    assert all(one is runners[0] for one in runners[: len(runners) // 2])
    passes = info.repeats + (0 if info.follow_up is None else len(info.follow_up.passes))
    assert len(maps) == passes * info.decoder.depth
    assert tuple(maps[0].shape) == (1, info.decoder.heads, n, n)
    assert all(torch.allclose(one.sum(-1), torch.ones(()), atol=1e-5) for one in maps)
    if info.decoder.causal:
        assert not maps[0].triu(1).any()
    else:
        assert maps[0].triu(1).any()
    made = 0 if name.startswith("pi0") else info.repeats
    assert [tuple(one.shape) for one in logits] == [(1, n, 2048)] * made
    assert all(one.dtype == torch.float32 for one in logits)
    assert chunk.trace.kernel == f"eager, {info.decoder.depth} maps kept (cpu)"


def test_the_products_own_decoder_is_left_as_it_was():
    backbone = load_backbone("openvla-oft", REGISTRY, None, "tiny", "cpu", "float32", 0, {})
    decoder = backbone.decoder
    before = chunks_of(backbone)
    chunks_of(UpstreamBackbone(backbone))
    assert backbone.decoder is decoder
    for one, other in zip(before, chunks_of(backbone), strict=True):
        assert np.array_equal(one.actions, other.actions)
