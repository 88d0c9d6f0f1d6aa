"""TRIM against its rule in NumPy, and the similarity it is given against open_clip's own modules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.helpers.naive_oft import entering
from tests.helpers.planting import REGISTRY
from tests.helpers.tiny_clip import CONFIG, GRID, open_clip, untrained_clip, write_clip
from tests.helpers.tiny_oft import INSTRUCTION, observation, tiny_config, tiny_policy_parts
from tests.helpers.trim_policy import OFT, policy_of
from tokenprune.model.flops import query_flops
from tokenprune.pipelines.config import DENSE
from tokenprune.policy import Policy
from tokenprune_plugins import trim
from tokenprune_plugins.shared import clip
from tokenprune_plugins.trim import TRIMConfig, mean_weights

LAYOUT = OFT.layout(INSTRUCTION)
SIDE = 4
PATCHES = 2 * SIDE * SIDE


class Told:
    """Stands for a CLIP whose similarity of patches and text is known, `[views, N]`."""

    grid, flops = (SIDE, SIDE), 0

    def __init__(self, similarity: np.ndarray) -> None:
        self._similarity = torch.from_numpy(similarity)

    def move_to(self, like: Tensor) -> None:
        pass

    def embed_text(self, sentence: str) -> Tensor:
        return torch.ones(1, dtype=torch.float64)

    def embed_patches(self, views: Sequence[Tensor]) -> list[Tensor]:
        return [row[None, :, None].expand(len(views[0]), -1, 1) for row in self._similarity]


def by_the_card(similarity: np.ndarray, keep: int | None, negated: bool, mean: bool) -> tuple[list[int], np.ndarray]:
    """Kept patches, and weights `[K, P]` of what each becomes; without `keep`, as many as are outliers."""
    scores, outliers = [], set()
    for view in -similarity if negated else similarity:
        grown = np.exp(view - view.max())
        share = grown / grown.sum()
        q1, q3 = np.percentile(share, 25), np.percentile(share, 75)
        outliers |= {len(scores) + i for i, one in enumerate(share) if one > q3 + 1.5 * (q3 - q1)}
        scores += share.tolist()
    everything = range(len(scores))
    order = sorted(everything, key=lambda i: (keep is None and i not in outliers, -scores[i], i))
    k = len(outliers) + mean if keep is None else keep
    weights = np.eye(len(scores))
    if mean and k < len(scores):
        weights[order[k - 1]] = 0
        weights[order[k - 1], order[k - 1 :]] = 1 / len(order[k - 1 :])
    kept = sorted(order[:k])
    return kept, weights[kept]


def run_told(known: np.ndarray, **settings: Any) -> tuple[list[int], np.ndarray, np.ndarray]:
    """Places of the kept patches, what they become, and what all patches were before."""
    patches = list(LAYOUT.prunable)
    with patch.object(trim, "load", lambda *_: Told(known)):
        policy = policy_of(TRIMConfig(use="trim", checkpoint="told", **settings))
    layer = OFT.decoder.layers[0]
    with entering(layer) as plain:
        policy_of().act(observation(OFT.config))
    with entering(layer) as pruned:
        kept = policy.act(observation(OFT.config)).trace.kept[-1][0].tolist()
    held = sorted({*LAYOUT.fixed, *kept})
    became = pruned[0][[held.index(i) for i in kept]]
    return [patches.index(i) for i in kept], became.numpy(), plain[0][patches].numpy()


def drawn(data: st.DataObject) -> np.ndarray:
    """A similarity map with ties, and some patches that stand out."""
    draw = np.random.default_rng(data.draw(st.integers(0, 10_000)))
    usual = draw.integers(0, data.draw(st.sampled_from((1, 3, 40))), (2, SIDE * SIDE)) / 10
    return usual + draw.choice([0.0, 3.0, -3.0], size=usual.shape, p=[0.9, 0.05, 0.05])


@given(st.data())
def test_it_keeps_what_the_card_says_ties_included(data: st.DataObject) -> None:
    similarity, keep = drawn(data), data.draw(st.integers(1, PATCHES))
    direct, mean = data.draw(st.booleans()), data.draw(st.booleans())
    kind = "direct" if direct else "negated"
    kept, became, before = run_told(similarity, keep=keep, similarity=kind, aggregate=mean)
    expected, weights = by_the_card(similarity, keep, not direct, mean)
    assert kept == expected
    np.testing.assert_allclose(became, weights @ before, atol=1e-12)


@given(st.data())
def test_a_union_keeps_the_outliers_and_the_mean(data: st.DataObject) -> None:
    similarity, mean = drawn(data), data.draw(st.booleans())
    kept, became, before = run_told(similarity, keep="union", aggregate=mean)
    expected, weights = by_the_card(similarity, None, True, mean)
    assert kept == expected
    np.testing.assert_allclose(became, weights @ before, atol=1e-12)


def test_a_union_is_rounded_up_to_a_bucket() -> None:
    similarity = np.zeros((2, SIDE * SIDE))
    similarity[0, [3, 5]] = similarity[1, 7] = -4
    kept, _, _ = run_told(similarity, keep="union")
    assert len(kept) == 4
    assert {3, 5, 16 + 7} < set(kept)
    kept, _, _ = run_told(similarity, keep="union", bucket=6)
    assert len(kept) == 6


def test_the_released_code_keeps_the_least_similar_and_direct_the_most() -> None:
    similarity = np.linspace(0, 1, PATCHES).reshape(2, -1)
    similarity[1] = similarity[0]
    least, most = list(range(4)), list(range(12, 16))
    for kind, best in (("negated", least), ("direct", most)):
        kept, _, _ = run_told(similarity, keep=8, similarity=kind, aggregate=False)
        assert kept == [*best, *(16 + i for i in best)]
    assert TRIMConfig(use="trim").similarity == "negated"


@given(st.integers(0, 10_000), st.integers(1, 30), st.integers(1, 3))
def test_the_mean_conserves_mass(seed: int, n: int, batch: int) -> None:
    draw = np.random.default_rng(seed)
    keep = draw.integers(1, n + 1)
    chosen = np.stack([np.sort(draw.choice(n, size=keep, replace=False)) for _ in range(batch)])
    score, tokens = draw.integers(0, 5, (batch, n)).astype(float), draw.normal(size=(batch, n, 3))
    weights = mean_weights(torch.from_numpy(score), torch.from_numpy(chosen)).numpy()
    mass = (weights > 0).sum(2)
    np.testing.assert_allclose(weights.sum(2), 1)
    assert (mass.sum(1) == n).all()
    np.testing.assert_allclose((mass[..., None] * (weights @ tokens)).sum(1), tokens.sum(1), atol=1e-9)


def test_a_cut_that_keeps_nothing_merges_into_nothing() -> None:
    assert mean_weights(torch.zeros(2, 5), torch.zeros(2, 0, dtype=torch.int64)).shape == (2, 0, 5)
    assert run_told(np.zeros((2, 16)), keep=0)[0] == []


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_clip(tmp_path_factory.mktemp("clip"))


def similarity_by_open_clip(pixels: np.ndarray, layer: int, sentence: str) -> Tensor:
    """Of one picture `[H, W, 3]` and a sentence `[N]`: CLIP's own transform, forward passes and projections."""
    model = untrained_clip().double()
    seen: list[Tensor] = []
    model.visual.transformer.resblocks[layer].register_forward_hook(lambda _m, _a, out: seen.append(out))
    side = CONFIG["vision_cfg"]["image_size"]
    resized = np.array(Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC)) / 255
    normed = (resized - open_clip.OPENAI_DATASET_MEAN) / open_clip.OPENAI_DATASET_STD
    with torch.no_grad():
        model.visual(torch.from_numpy(normed).permute(2, 0, 1)[None])
        text = model.encode_text(open_clip.SimpleTokenizer(context_length=16)([sentence]))
        return (model.visual.ln_post(seen[0][0, 1:]) @ model.visual.proj) @ text[0]


@pytest.mark.parametrize("layer", [-1, -2])
@pytest.mark.parametrize("side", [32, 80])
def test_the_similarity_is_open_clips_own(files: dict[str, str], layer: int, side: int) -> None:
    draw = np.random.default_rng(3)
    # Smooth, as frames are; the last bit of PIL's rounding is another matter.
    rough = draw.integers(0, 256, (2, 4, 4, 3), dtype=np.uint8)
    pictures = [np.array(Image.fromarray(one).resize((side, side), Image.Resampling.BICUBIC)) for one in rough]
    mine = clip.load(**files, layer=layer)
    mine.move_to(torch.zeros(0, dtype=torch.float64))
    with torch.inference_mode():
        text = mine.embed_text(INSTRUCTION)
        found = mine.embed_patches([torch.from_numpy(p).permute(2, 0, 1)[None] for p in pictures])
    for picture, features in zip(pictures, found, strict=True):
        expected = similarity_by_open_clip(picture, layer, INSTRUCTION)
        # Where a picture is resized, PIL's fixed-point arithmetic may round a pixel the other way.
        tolerance = 1e-6 if side == 32 else 0.02 * float(expected.std())
        torch.testing.assert_close(features[0] @ text, expected, rtol=0, atol=tolerance)


def test_a_query_keeps_by_the_whole_of_it(files: dict[str, str]) -> None:
    config, keep = tiny_config(), 9
    backbone = tiny_policy_parts(config)
    policy = policy_of(TRIMConfig(use="trim", keep=keep, **files), backbone=backbone)
    shown: dict[str, Tensor] = {}
    real = clip.Clip.embed_patches
    seen = observation(config)

    def watched(self: clip.Clip, views: Sequence[Tensor]) -> tuple[Tensor, ...]:
        shown.update(zip(config.views, views, strict=True))
        return real(self, views)

    with patch.object(clip.Clip, "embed_patches", watched):
        kept = policy.act(seen).trace.kept[-1][0].tolist()
    pictures = [shown[view][0].permute(1, 2, 0).numpy() for view in config.views]
    maps = np.stack([similarity_by_open_clip(picture, -2, INSTRUCTION).numpy() for picture in pictures])
    expected, _ = by_the_card(maps, keep, True, True)
    assert GRID == (SIDE, SIDE)
    assert kept == [LAYOUT.prunable[i] for i in expected]


def test_views_are_laid_over_each_other_where_grids_differ() -> None:
    slope = torch.arange(8.0).expand(6, 8)
    found = trim.resample_grid(slope.reshape(1, -1), (6, 8), (3, 4)).view(3, 4)
    assert (found.diff(dim=1) > 0).all()
    torch.testing.assert_close(found, found[:1].expand(3, 4))
    torch.testing.assert_close(trim.resample_grid(torch.ones(2, 4), (2, 2), (5, 3)), torch.ones(2, 15))


def test_the_text_tower_runs_once_for_each_instruction(files: dict[str, str]) -> None:
    asked: list[int] = []
    real = open_clip.CLIP.encode_text

    def counted(self: nn.Module, tokens: Tensor) -> Tensor:
        asked.append(len(tokens))
        return real(self, tokens)

    with patch.object(open_clip.CLIP, "encode_text", counted):
        policy = policy_of(TRIMConfig(use="trim", **files))
        for query in range(3):
            policy.act(observation(OFT.config, query))
        policy.reset(INSTRUCTION)
        policy.act(observation(OFT.config))
        assert asked == [1]
        policy.reset("push it")
        other = policy.act(observation(OFT.config)).trace.kept[-1]
        policy.reset(INSTRUCTION)
        own = policy.act(observation(OFT.config)).trace.kept[-1]
        assert asked == [1, 1]
    assert not torch.equal(own, other)


def test_the_last_few_texts_are_kept(files: dict[str, str]) -> None:
    mine = clip.load(**files, layer=-2)
    with patch.object(clip, "TEXTS", 2):
        for sentence in ("a", "b", "a", "c"):
            mine.embed_text(sentence)
    assert list(mine._texts) == ["a", "c"]


def test_keeping_everything_is_dense_bit_for_bit(files: dict[str, str]) -> None:
    dense = Policy(OFT, DENSE, REGISTRY)
    dense.reset(INSTRUCTION)
    chunk = policy_of(TRIMConfig(use="trim", keep=1.0, **files)).act(observation(OFT.config))
    assert np.array_equal(chunk.normalised, dense.act(observation(OFT.config)).normalised)


def test_binding_leaves_random_numbers_as_they_were(files: dict[str, str]) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    clip.load(**files, layer=-1)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_image_tower_is_counted(files: dict[str, str]) -> None:
    policy = policy_of(TRIMConfig(use="trim", keep=9, **files))
    policy.act(observation(OFT.config))
    real = clip.Clip.embed_patches
    counted = []

    def watched(self: clip.Clip, views: Sequence[Tensor]) -> tuple[Tensor, ...]:
        # The fused kernel of torch's attention module is not known to the counter.
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
                found = real(self, views)
                for features in found:
                    assert (features @ self.embed_text(INSTRUCTION)[None, :, None]).shape[1] == SIDE * SIDE
        finally:
            torch.backends.mha.set_fastpath_enabled(True)
        counted.append(counter.get_total_flops())
        return found

    with patch.object(clip.Clip, "embed_patches", watched):
        plan = policy.act(observation(OFT.config)).trace.plan
    assert counted == [plan.own_flops]
    merging = 2 * 9 * PATCHES * OFT.config.body.decoder.hidden
    assert query_flops(OFT.info, plan).probe == plan.own_flops + merging
    (stage,) = policy.pipeline.stages
    assert "counted among the probes" in stage.caveats(OFT.info)
