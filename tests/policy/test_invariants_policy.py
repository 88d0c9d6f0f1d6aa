"""The invariants of whole queries, each with a fault planted to show that its property can fail."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

import tokenprune_plugins.baselines.random
from tests.helpers import drawing, stages
from tests.helpers.naive_oft import naive_actions
from tests.helpers.paths import ROOT
from tests.helpers.planting import REGISTRY, pipeline, pipelines, prop
from tests.helpers.tiny_oft import INSTRUCTION, observation, tiny_config, tiny_policy_parts
from tokenprune import policy
from tokenprune.engine import cuts, query
from tokenprune.model import decoder
from tokenprune.model.decoder import Decoder
from tokenprune.model.kv_cache import KVCache
from tokenprune.pipelines.config import DENSE, PipelineConfig
from tokenprune.tokens.positions import Positions
from tokenprune.tokens.selection import CurrentIds, OriginalIds, TokenSelection
from tokenprune_adapters.backbones.openvla_oft.backbone import OpenVLAOFT


@st.composite
def policies(draw: st.DrawFn) -> tuple[OpenVLAOFT, PipelineConfig, list[dict[str, Any]], str]:
    """A tiny OpenVLA-OFT of 1-3 views, with and without proprio, a random pipeline, and a batch of observations."""
    views = ("primary", "wrist", "left")[: draw(st.integers(1, 3))]
    config = tiny_config(views, draw(st.booleans()), draw(st.sampled_from([1, 2, 4])))
    instruction = draw(
        st.sampled_from(
            ["push it", INSTRUCTION, "pick up the black bowl next to the ramekin and place it on the plate"]
        )
    )
    batch = draw(drawing.batches)
    backbone = tiny_policy_parts(config, draw(st.integers(0, 5)))
    return (
        backbone,
        draw(pipelines(depth=3)),
        [observation(config, draw(drawing.seeds)) for _ in range(batch)],
        instruction,
    )


def act(
    backbone: OpenVLAOFT, config: PipelineConfig, observations: list[dict[str, Any]], instruction: str
) -> list[policy.ActionChunk]:
    acting = policy.Policy(backbone, config, REGISTRY)
    for slot in range(len(observations)):
        acting.reset(instruction, slot)
    return list(acting.act_batch(dict(enumerate(observations))).values())


@prop(policies(), examples=15)
def i10(case: tuple[OpenVLAOFT, PipelineConfig, list[dict[str, Any]], str]) -> None:
    seen: list[Tensor] = []
    real = decoder.rotate
    with patch.object(decoder, "rotate", lambda x, cos, sin: (seen.append(cos), real(x, cos, sin))[1]):
        trace = act(*case)[0].trace
    layout, ids = trace.plan.layout, None
    for layer in range(trace.plan.depth):
        if layer - 1 in trace.kept or ids is None:
            kept = trace.kept.get(layer - 1, torch.tensor(layout.prunable).expand(len(case[2]), -1))
            ids = torch.cat([torch.tensor(layout.fixed).expand(len(kept), -1), kept], 1).sort(1).values
        # The first pair of a head turns by one radian per position.
        expected = ids.float().cos().double()
        assert torch.equal(seen[2 * layer][:, 0, :, 0].expand_as(expected), expected)


def test_I10_original_positions_reach_the_rotary_embedding() -> None:
    i10()


def test_I10_notices_renumbering() -> None:
    real = decoder.rotary
    i10.notices(decoder, "rotary", lambda tokens, positions, *rest: real(tokens, Positions.COMPACT, *rest))


ANYWHERE = (
    "none", "random", "uniform_grid", "divprune", "pyramiddrop", "vla_adp", "fastervlm", "tome", "prumerge", "sp_vla",
)  # fmt: skip


@prop(
    policies(),
    st.sampled_from([*ANYWHERE, "fastv", "efficientvla_tokens", "sparsevlm", "dart", "vla_pruner"]),
    examples=20,
)
def i11(case: tuple[OpenVLAOFT, PipelineConfig, list[dict[str, Any]], str], name: str) -> None:
    backbone, _, observations, instruction = case
    config = REGISTRY.stage_class(name).Config
    after = ("embedding", 0, 1) if name in ANYWHERE else (1,)
    keep = {"full": 1.0, "pruned": 1.0}
    everything = pipeline(config(use=name, after=after, keep=keep), modes=tuple(keep))
    dense = act(backbone, DENSE, observations, instruction)
    for own, plain in zip(act(backbone, everything, observations, instruction), dense, strict=True):
        assert np.array_equal(own.normalised, plain.normalised)


def test_I11_keeping_everything_is_dense_bit_for_bit() -> None:
    i11()


def test_I11_notices_the_last_bit() -> None:
    real = cuts.StagePruner._apply

    def rounding(self: Any, *args: Any) -> Any:
        hidden, tokens = real(self, *args)
        return hidden * (1 + 2**-50), tokens

    i11.notices(cuts.StagePruner, "_apply", rounding)


@prop(policies(), examples=15)
def i12(case: tuple[OpenVLAOFT, PipelineConfig, list[dict[str, Any]], str]) -> None:
    backbone, config, observations, instruction = case
    weights = {name: value.clone() for name, value in backbone.model.state_dict().items()}
    before = act(backbone, DENSE, observations, instruction)
    act(backbone, config, observations, instruction)
    after = act(backbone, DENSE, observations, instruction)
    assert all(np.array_equal(a.normalised, b.normalised) for a, b in zip(before, after, strict=True))
    assert all(torch.equal(value, weights[name]) for name, value in backbone.model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in backbone.model.modules())


def test_I12_a_pipeline_leaves_the_model_untouched() -> None:
    i12()


def test_I12_notices_a_weight_that_moved() -> None:
    real = query.Query.decode

    def careless(self: Any, run: Decoder, *args: Any) -> Any:
        run.norm.weight.mul_(1.001)
        return real(self, run, *args)

    i12.notices(query.Query, "decode", careless)


@prop(policies(), st.integers(0, 2**31 - 1), examples=15)
def i13(case: tuple[OpenVLAOFT, PipelineConfig, list[dict[str, Any]], str], noise: int) -> None:
    first = act(*case)[0].trace.kept
    torch.manual_seed(noise)
    np.random.default_rng(noise).random()
    again = act(*case)[0].trace.kept
    assert all(torch.equal(ids, again[after]) for after, ids in first.items())


def test_I13_the_same_seed_selects_the_same() -> None:
    i13()


def test_I13_notices_global_random_numbers() -> None:
    fault = lambda ids, seed: torch.rand(ids.shape)  # noqa: E731
    i13.notices(tokenprune_plugins.baselines.random, "hashed", fault)


@prop(pipelines(depth=3), st.sampled_from([torch.float32, torch.float64, torch.bfloat16]), examples=15)
def i14(config: PipelineConfig, dtype: torch.dtype) -> None:
    backbone = tiny_policy_parts(tiny_config(), dtype=dtype)
    states: list[Tensor] = []
    real = query.Query.decode

    def decode(self: query.Query, *given: Any) -> Tensor:
        states.append(real(self, *given))
        return states[0]

    with patch.object(query.Query, "decode", decode):
        act(backbone, config, [observation(backbone.config)], INSTRUCTION)
    assert states[0].dtype == dtype
    assert states[0].device == backbone.device


def test_I14_dtype_and_device_stay() -> None:
    i14()


def test_I14_notices_a_silent_upcast() -> None:
    real = cuts.rows_at
    i14.notices(cuts, "rows_at", lambda values, at: real(values, at).double())


LINT = [sys.executable, str(ROOT / "tools" / "lint_hot.py")]


def test_I15_hot_files_never_wait_for_the_device() -> None:
    done = subprocess.run(LINT, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_I15_notices_a_planted_wait(tmp_path: Path) -> None:
    spoiled = tmp_path / "proposal.py"
    source = (ROOT / "tokenprune" / "tokens" / "proposal.py").read_text(encoding="utf-8")
    spoiled.write_text(
        source.replace("return key.topk(keep,", "return key.topk(int(key.max().item()) and keep,"), encoding="utf-8"
    )
    done = subprocess.run([*LINT, str(spoiled)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "host-copy" in done.stdout


@prop(policies(), examples=15)
def i16(case: tuple[OpenVLAOFT, PipelineConfig, list[dict[str, Any]], str]) -> None:
    cache = KVCache()
    real = query.Query.decode
    with patch.object(query.Query, "decode", lambda self, run, embeddings: real(self, run, embeddings, cache)):
        trace = act(*case)[0].trace
    assert cache.lengths == trace.held
    for layer, entry in enumerate(cache.layers):
        assert entry.k.shape[2] == entry.v.shape[2] == trace.held[layer]


def test_I16_cache_lengths_equal_the_trace() -> None:
    i16()


def test_I16_notices_a_cache_that_forgets() -> None:
    real = KVCache.extend

    def forgetful(self: KVCache, layer: int, new: Any) -> Any:
        entry = real(self, layer, new)
        self.layers[layer] = type(new)(new.k[:, :, 1:], new.v[:, :, 1:], OriginalIds(new.ids[:, 1:]))
        return entry

    i16.notices(KVCache, "extend", forgetful)


@prop(policies(), examples=15)
def i17(case: tuple[OpenVLAOFT, PipelineConfig, list[dict[str, Any]], str]) -> None:
    backbone, _, observations, instruction = case
    for row, chunk in enumerate(act(*case)):
        fixed = set(chunk.trace.plan.layout.fixed)
        kept = {after: fixed | set(ids[row].tolist()) for after, ids in chunk.trace.kept.items()}
        expected = naive_actions(backbone, observations[row], instruction, kept=kept)
        torch.testing.assert_close(torch.from_numpy(chunk.normalised), expected, rtol=0, atol=1e-10)


def test_I17_dropping_equals_masking() -> None:
    i17()


def test_I17_notices_hidden_states_of_other_tokens() -> None:
    real = TokenSelection.to_current
    # Only the gather of hidden states asks with as many ids as a cut keeps in all; shift it by one token.
    fault = lambda self, original: CurrentIds((real(self, original) + 1).clamp(max=self.n_kept - 1))  # noqa: E731
    i17.notices(TokenSelection, "to_current", fault)


@prop(st.lists(drawing.seeds, min_size=1, max_size=3), st.lists(drawing.seeds, min_size=1, max_size=3), examples=15)
def i20(before: list[int], episode: list[int]) -> None:
    config = pipeline(stages.TestConfig(use="test.memory", keep=0.3))
    backbone = tiny_policy_parts(tiny_config())
    experienced, fresh = policy.Policy(backbone, config, REGISTRY), policy.Policy(backbone, config, REGISTRY)
    experienced.reset("open the drawer")
    for seed in before:
        experienced.act(observation(backbone.config, seed))
        experienced.executed(np.zeros(7))
    for acting in (experienced, fresh):
        acting.reset(INSTRUCTION)
    for seed in episode:
        chunks = [acting.act(observation(backbone.config, seed)) for acting in (experienced, fresh)]
        assert torch.equal(chunks[0].trace.kept[-1], chunks[1].trace.kept[-1])
        assert np.array_equal(chunks[0].normalised, chunks[1].normalised)


def test_I20_nothing_of_the_last_episode_is_visible() -> None:
    i20()


def test_I20_notices_maps_that_survive_a_reset() -> None:
    real = policy.Policy.reset

    def sticky(self: Any, instruction: str, slot: int = 0) -> None:
        maps = self._slots[slot].memory.maps if slot in self._slots else {}
        real(self, instruction, slot)
        self._slots[slot].memory.maps.update(maps)

    i20.notices(policy.Policy, "reset", sticky)


def test_I20_notices_frames_that_survive_a_reset() -> None:
    real = policy.Policy.reset

    def sticky(self: Any, instruction: str, slot: int = 0) -> None:
        frames = self._slots[slot].memory.frames if slot in self._slots else {}
        real(self, instruction, slot)
        self._slots[slot].memory.frames = frames

    i20.notices(policy.Policy, "reset", sticky)
