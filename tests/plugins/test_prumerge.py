"""PruMerge and PruMerge+ against their rule in NumPy, and the attention without split heads that they go by."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.helpers import tiny_oft
from tests.helpers.backbones import BACKBONES
from tests.helpers.naive_oft import entering
from tests.helpers.planting import REGISTRY, pipeline
from tests.helpers.tiny_oft import INSTRUCTION, observation, tiny_config, tiny_policy_parts
from tests.helpers.tower_attention import ASKED, last_inputs, whole_map
from tokenprune.errors import ConfigError
from tokenprune.model.flops import query_flops
from tokenprune.pipelines.config import DENSE
from tokenprune.policy import Policy
from tokenprune_adapters.vision.attention import AttentionCapture
from tokenprune_adapters.vision.transformer import Attention, VisionTower
from tokenprune_plugins.prumerge import PruMergeConfig, kept_patches, neighbour_weights, scores_and_protected


def wanted_by_the_paper(attention: np.ndarray, spread: bool) -> list[int]:
    """Patches of one view that stay, without the one that the rest becomes; all where none stands out."""
    ordered, n = sorted(attention.tolist()), len(attention)

    def quartile(share: float) -> float:
        below, part = divmod(share * (n - 1), 1)
        upper = ordered[min(int(below) + 1, n - 1)]
        return ordered[int(below)] * (1 - part) + upper * part

    bound = quartile(0.75) + 1.5 * (quartile(0.75) - quartile(0.25))
    found = {i for i in range(n) if attention[i] > bound}
    if not found:
        return list(range(n))
    if spread:
        step = n // len(found)
        found |= set(range(int(step / 6), n, max(int(step / 3), 1)))
    return sorted(found)


def merged_by_the_paper(
    attention: np.ndarray, keys: np.ndarray, wanted: list[int], neighbours: int
) -> tuple[list[int], np.ndarray]:
    """Kept patches of one view, ascending, and weights `[K, P]` of what each becomes."""
    n = len(attention)
    rest = [i for i in range(n) if i not in wanted]
    weights = np.eye(n)
    if not rest:
        return wanted, weights[wanted]
    for i in wanted:
        others = sorted((j for j in range(n) if j != i), key=lambda j: (-alike(keys[i], keys[j]), j))
        for j in others[:neighbours]:
            weights[i, j] += attention[j]
    place = min(rest, key=lambda j: (-attention[j], j))
    weights[place] = 0
    for j in rest:
        weights[place, j] = attention[j]
    kept = sorted([*wanted, place])
    return kept, weights[kept]


def alike(first: np.ndarray, second: np.ndarray) -> float:
    return float(first @ second / (np.linalg.norm(first) * np.linalg.norm(second)))


@st.composite
def views(draw: st.DrawFn) -> tuple[list[np.ndarray], list[np.ndarray], bool, int]:
    """Attention and keys of one to three views, in few values so that there are ties."""
    sizes = draw(st.lists(st.integers(1, 40), min_size=1, max_size=3))
    drawn = np.random.default_rng(draw(st.integers(0, 10_000)))
    few = draw(st.booleans())
    # Whole numbers of sixteenths, so that sums and quartiles are exact in any order.
    attention = [
        (drawn.integers(0, 4, n) + np.where(drawn.random(n) < 0.15, drawn.integers(3, 60, n), 0)) / (16 if few else 1)
        for n in sizes
    ]
    return (
        attention,
        [drawn.choice([-1.0, 1.0], size=(n, 16)) for n in sizes],
        draw(st.booleans()),
        draw(st.integers(0, 9)),
    )


def as_rows(parts: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts))[None]


@given(views())
def test_it_keeps_and_merges_as_the_paper_says_ties_included(case: Any) -> None:
    attention, keys, spread, neighbours = case
    view = as_rows([np.full(len(part), number) for number, part in enumerate(attention)])
    wanted = kept_patches(as_rows(attention), view, len(attention), spread)
    score, protect = scores_and_protected(as_rows(attention), view, wanted)
    directions = torch.nn.functional.normalize(as_rows(keys), dim=-1)
    kept, found, first = [], [], 0
    for part, own in zip(attention, keys, strict=True):
        by_paper = wanted_by_the_paper(part, spread)
        assert wanted[0, first : first + len(part)].nonzero().flatten().tolist() == by_paper
        stays, weights = merged_by_the_paper(part, own, by_paper, neighbours)
        kept += [first + i for i in stays]
        found.append((first, weights))
        first += len(part)
    assert protect[0].nonzero().flatten().tolist() == kept
    assert len(set(score[0].tolist())) == first
    weights = neighbour_weights(
        as_rows(attention), directions @ directions.mT, view, score, torch.tensor([kept]), neighbours
    )[0].numpy()
    expected, row = np.zeros_like(weights), 0
    for first, own in found:
        expected[row : row + len(own), first : first + own.shape[1]] = own
        row += len(own)
    np.testing.assert_allclose(weights, expected, atol=1e-12)


@given(views(), st.data())
def test_a_view_keeps_the_mass_the_rule_says(case: Any, data: st.DataObject) -> None:
    attention, keys, _, neighbours = case
    given_, n = np.concatenate(attention), sum(map(len, attention))
    view = np.concatenate([np.full(len(part), number) for number, part in enumerate(attention)])
    kept = sorted(data.draw(st.sets(st.integers(0, n - 1), min_size=1)))
    places = torch.from_numpy(view)[None]
    wanted = kept_patches(as_rows(attention), places, len(attention), False)
    score, _ = scores_and_protected(as_rows(attention), places, wanted)
    alike_ = as_rows(keys) @ as_rows(keys).mT
    weights = neighbour_weights(as_rows(attention), alike_, places, score, torch.tensor([kept]), neighbours)[0].numpy()
    for number in set(view[kept]):
        members, rows = np.flatnonzero(view == number), [r for r, i in enumerate(kept) if view[i] == number]
        gone = [i for i in members if i not in kept]
        assert not weights[rows][:, view != number].any()
        if not gone:
            np.testing.assert_array_equal(weights[rows], np.eye(n)[np.array(kept)[rows]])
            continue
        last = min(rows, key=lambda r: float(score[0, kept[r]]))
        assert weights[last].sum() == pytest.approx(given_[gone].sum() + given_[kept[last]])
        for row in set(rows) - {last}:
            added = weights[row] - np.eye(n)[kept[row]]
            assert np.all(np.isclose(added, 0) | np.isclose(added, given_))
            assert (added > 0).sum() <= neighbours


def whole_class_map(attention: Attention, x: Tensor) -> Tensor:
    """Class attention `[B, n]` of a block's normed input `[B, n, D]` in one product of the full width."""
    q, k = attention.qkv(x).chunk(3, -1)[:2]
    products = [[row @ key / q.shape[-1] ** 0.5 for key in of] for row, of in zip(q[:, 0], k, strict=True)]
    raised = torch.stack([torch.stack(row) for row in products]).exp()
    return raised / raised.sum(1, keepdim=True)


def keys_of(attention: Attention, x: Tensor) -> Tensor:
    return attention.k_proj(x) if attention.split else attention.qkv(x).chunk(3, -1)[1]


def expected_kept(
    attention: np.ndarray, keys: np.ndarray, spread: bool, neighbours: int = 32
) -> tuple[list[int], np.ndarray]:
    """Over views `[V, N]`, places in the order of the sequence and weights of all."""
    n, kept, weights = attention.shape[1], [], []
    for number, (part, own) in enumerate(zip(attention, keys, strict=True)):
        stays, merging = merged_by_the_paper(part, own, wanted_by_the_paper(part, spread), neighbours)
        kept += [number * n + i for i in stays]
        weights.append((number, merging))
    every = np.zeros((len(kept), attention.size))
    row = 0
    for number, merging in weights:
        every[row : row + len(merging), number * n : (number + 1) * n] = merging
        row += len(merging)
    return kept, every


def contrasting(backbone: Any) -> None:
    """Attention further from uniform in every tower's last block: some patches stand out, and not too many."""
    with torch.no_grad():
        for module in backbone.model.modules():
            if isinstance(module, VisionTower):
                attention = module.blocks[-1].attn
                width = module.config.hidden_size
                part = attention.q_proj.weight if attention.split else attention.qkv.weight[:width]
                part.mul_(2)


@pytest.mark.parametrize("spread", [False, True])
@pytest.mark.parametrize("kind", ["auto", "cls", "received"])
@pytest.mark.parametrize("name", BACKBONES)
def test_it_keeps_what_stands_out_in_the_tower(name: str, kind: Any, spread: bool) -> None:
    backbone, seen, _ = BACKBONES[name]()
    contrasting(backbone)
    first, has_cls = ASKED[name]
    config = pipeline(PruMergeConfig(use="prumerge", attention=kind, spread=spread))
    if kind == "cls" and not has_cls:
        with pytest.raises(ConfigError, match=f"attention: cls_whole: the towers of '{name}' do not have it"):
            Policy(backbone, config, REGISTRY)
        return
    from_cls = has_cls and kind != "received"
    modules = dict(backbone.model.named_modules())
    places = [f"vision_backbone.{part}" for part in (first, "fused_featurizer")] if has_cls else [first]
    towers = [modules[place] for place in places]
    with ExitStack() as stack:
        inputs = [last_inputs(tower, stack) for tower in towers]
        policy = Policy(backbone, config, REGISTRY)
        policy.reset(INSTRUCTION)
        trace = policy.act(seen).trace
    at = 0 if from_cls or not has_cls else 1
    block, x, prefix = towers[at].blocks[-1].attn, inputs[at][0], towers[at].config.prefix_tokens
    score = (whole_class_map(block, x) if from_cls else whole_map(block, x).mean(1))[:, prefix:].numpy()
    keys = keys_of(towers[0].blocks[-1].attn, inputs[0][0])[:, towers[0].config.prefix_tokens :].numpy()
    kept, _ = expected_kept(score, keys, spread)
    layout = trace.plan.layout
    assert trace.kept[-1][0].tolist() == [layout.prunable[i] for i in kept]
    assert trace.encoder == (("cls_whole", "keys_whole") if from_cls else ("keys_whole", "received"))
    (note,) = [stage.caveats(backbone.info) for stage in policy.pipeline.stages]
    assert ("class token; heads not split" in note) == from_cls
    assert ("has no class token" in note) == (not has_cls)


@pytest.mark.parametrize("spread", [False, True])
def test_the_decoder_gets_the_merged_tokens(spread: bool) -> None:
    backbone = tiny_policy_parts(tiny_config())
    contrasting(backbone)
    layers, layout = backbone.decoder.layers, backbone.layout(INSTRUCTION)
    tower, given_ = backbone.model.vision_backbone.featurizer, observation(backbone.config)
    with ExitStack() as stack:
        inputs = last_inputs(tower, stack)
        plain = stack.enter_context(entering(layers[0]))
        policy_of(backbone).act(given_)
    with entering(layers[0]) as merged:
        stage = PruMergeConfig(use="prumerge", spread=spread, neighbours=3)
        trace = policy_of(backbone, stage).act(given_).trace
    prefix = tower.config.prefix_tokens
    attention = whole_class_map(tower.blocks[-1].attn, inputs[0])[:, prefix:].numpy()
    keys = keys_of(tower.blocks[-1].attn, inputs[0])[:, prefix:].numpy()
    kept, weights = expected_kept(attention, keys, spread, 3)
    patches = list(layout.prunable)
    assert 2 < len(kept) < len(patches)
    assert trace.kept[-1][0].tolist() == [patches[i] for i in kept]
    held = sorted({*layout.fixed, *(patches[i] for i in kept)})
    expected = weights @ plain[0][patches].numpy()
    np.testing.assert_allclose(merged[0][[held.index(patches[i]) for i in kept]], expected, atol=1e-6)
    others = [held.index(i) for i in layout.fixed]
    assert torch.equal(merged[0][others], plain[0][list(layout.fixed)])


def policy_of(backbone: Any, *stages: Any) -> Policy:
    policy = Policy(backbone, pipeline(*stages), REGISTRY)
    policy.reset(INSTRUCTION)
    return policy


def test_whole_keys_are_those_before_the_heads_were_split() -> None:
    config = tiny_config()
    tower = tiny_policy_parts(config).model.vision_backbone.featurizer
    capture = AttentionCapture(config.body.towers, frozenset({"keys_whole"}))
    with ExitStack() as stack:
        inputs = last_inputs(tower, stack)
        tower(torch.rand(2, 3, 56, 56, dtype=torch.float64), on_attention=capture.callback(0))
    keys = keys_of(tower.blocks[-1].attn, inputs[0])[:, tower.config.prefix_tokens :]
    torch.testing.assert_close(capture.captured["keys_whole"], keys, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["auto", "received"])
@pytest.mark.parametrize("name", BACKBONES)
def test_the_look_is_counted(name: str, kind: Any) -> None:
    backbone, seen, _ = BACKBONES[name]()
    # Where nothing leaves nothing merges, and no work is the strategy's own besides the look.
    policy = Policy(backbone, pipeline(PruMergeConfig(use="prumerge", attention=kind, keep=1.0)), REGISTRY)
    policy.reset(INSTRUCTION)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        trace = policy.act(seen).trace
    assert query_flops(backbone.info, trace.plan, (), trace.encoder).total == counter.get_total_flops()


@pytest.mark.parametrize("name", BACKBONES)
def test_keeping_everything_is_dense(name: str) -> None:
    backbone, seen, _ = BACKBONES[name]()
    actions = []
    for config in (DENSE, pipeline(PruMergeConfig(use="prumerge", keep=1.0, spread=True))):
        policy = Policy(backbone, config, REGISTRY)
        policy.reset(INSTRUCTION)
        actions.append(policy.act(seen).normalised)
    assert np.array_equal(*actions)


def test_the_count_is_what_stands_out_rounded_up_to_a_bucket() -> None:
    backbone = tiny_policy_parts(tiny_config())
    contrasting(backbone)
    given_ = observation(backbone.config)
    free = policy_of(backbone, PruMergeConfig(use="prumerge")).act(given_).trace
    rounded = policy_of(backbone, PruMergeConfig(use="prumerge", bucket=8)).act(given_).trace
    ids, more = free.kept[-1][0].tolist(), rounded.kept[-1][0].tolist()
    assert len(ids) % 8
    assert len(more) == -(-len(ids) // 8) * 8
    assert set(ids) < set(more)
    assert not free.plan.graph_safe
    assert not any(rounded.overfull.values())


@pytest.mark.parametrize("keep", [1, 6, 0.5])
def test_a_fixed_number_is_of_the_best(keep: Any) -> None:
    backbone = tiny_policy_parts(tiny_config())
    contrasting(backbone)
    layout, tower = backbone.layout(INSTRUCTION), backbone.model.vision_backbone.featurizer
    with ExitStack() as stack:
        inputs = last_inputs(tower, stack)
        trace = policy_of(backbone, PruMergeConfig(use="prumerge", keep=keep)).act(observation(backbone.config)).trace
    attention = whole_class_map(tower.blocks[-1].attn, inputs[0])[:, tower.config.prefix_tokens :].numpy()
    wanted, places = [], []
    for number, part in enumerate(attention):
        own = wanted_by_the_paper(part, False)
        wanted += [number * len(part) + i for i in own]
        rest = [i for i in range(len(part)) if i not in own]
        places += [number * len(part) + max(rest, key=lambda i: part[i])] if rest else []
    flat = attention.flatten()
    order = sorted(range(flat.size), key=lambda i: (i not in wanted, i not in places, -flat[i]))
    count = keep if isinstance(keep, int) else int(keep * flat.size)
    assert trace.kept[-1][0].tolist() == sorted(layout.prunable[i] for i in order[:count])
    assert trace.plan.graph_safe


def test_it_merges_after_a_layer_what_an_earlier_cut_left() -> None:
    backbone = tiny_policy_parts(tiny_config())
    contrasting(backbone)
    grid = REGISTRY.stage_class("uniform_grid").Config(use="uniform_grid", keep=20)
    later = PruMergeConfig(use="prumerge", after=(0,), keep=6)
    trace = policy_of(backbone, grid, later).act(observation(backbone.config)).trace
    assert len(trace.kept[0][0]) == 6
    assert set(trace.kept[0][0].tolist()) < set(trace.kept[-1][0].tolist())


def test_rows_of_a_batch_do_not_meet() -> None:
    config = tiny_config()
    backbone = tiny_policy_parts(config)
    contrasting(backbone)
    stage = pipeline(PruMergeConfig(use="prumerge", keep=9, spread=True))
    together = Policy(backbone, stage, REGISTRY)
    for slot in range(3):
        together.reset(tiny_oft.INSTRUCTION, slot)
    chunks = together.act_batch({slot: observation(config, slot) for slot in range(3)})
    for slot in range(3):
        alone = Policy(backbone, stage, REGISTRY)
        alone.reset(tiny_oft.INSTRUCTION)
        np.testing.assert_allclose(alone.act(observation(config, slot)).normalised, chunks[slot].normalised, atol=1e-9)
