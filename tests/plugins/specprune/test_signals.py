"""SpecPrune's signals, one by one, against loops over Python numbers."""

from __future__ import annotations

import math
from dataclasses import fields
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.drawing import VIEWS, batches, keep_sets, layouts, random, seeds
from tokenprune.model.decoder import Decoder
from tokenprune.stages.frames import FrameBuffer
from tokenprune.stages.memory import ExecutedAction, Slot, StageMemory
from tokenprune.stages.token_context import LayerContext, PastFrames, QueryView, SelectContext, StageView
from tokenprune.tokens.layout import Role, Segment, TokenLayout
from tokenprune.tokens.layout_tables import LayoutTables
from tokenprune.tokens.plan import Plan
from tokenprune.tokens.positions import Positions
from tokenprune.tokens.selection import OriginalIds, TokenSelection
from tokenprune_plugins.shared.attention_rows import attention_to_patches
from tokenprune_plugins.shared.patch_change import frame_similarity, patch_similarity, patches
from tokenprune_plugins.shared.ranks import claims, per_view, rank_within
from tokenprune_plugins.specprune import signals

SIDE = 12
"""Pixels per side of a test image; a grid of up to four rows and columns divides it."""

FEW = (-1.0, 0.0, 0.25, 2.0)
"""Few different scores, so that ties are common."""


def pixels(seed: int, batch: int = 1, side: int = SIDE, high: int = 256) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, high, (batch, 3, side, side), generator=generator, dtype=torch.uint8)


def blocks(image: torch.Tensor, grid: tuple[int, int]) -> list[list[int]]:
    """Pixel values of each patch of one image `[3, H, W]`, patches in raster order."""
    (rows, cols), values = grid, image.tolist()
    height, width = len(values[0]) // rows, len(values[0][0]) // cols
    return [
        [v for channel in values for line in channel[top : top + height] for v in line[left : left + width]]
        for top in range(0, rows * height, height)
        for left in range(0, cols * width, width)
    ]


def cosine(a: list[int], b: list[int], black: float = 1.0) -> float:
    dot, aa, bb = (sum(x * y for x, y in zip(*pair, strict=True)) for pair in ((a, b), (a, a), (b, b)))
    return black if aa == bb == 0 else dot / max(math.sqrt(aa * bb), 1e-8)


def context(
    layout: TokenLayout,
    held: list[list[int]],
    images: dict[str, torch.Tensor] | None = None,
    past: PastFrames | None = None,
) -> SelectContext:
    """A query that holds these prunable tokens."""
    device = torch.device("cpu")
    slots = [Slot(index, "", FrameBuffer(0)) for index in range(len(held))]
    decoder = Decoder((), torch.nn.Identity(), head_dim=1, rope_theta=1.0, causal=False)
    tables, seeds = LayoutTables(layout, device), torch.zeros(len(held), dtype=torch.int64)
    return SelectContext(
        plan=Plan.dense(layout, 2, "default"),
        layer=-1,
        tokens=TokenSelection.identity(layout.n_tokens, len(held), device),
        prunable=OriginalIds(torch.tensor(held)),
        hidden=torch.zeros(len(held), layout.n_tokens, 1),
        _query=QueryView(decoder, Positions.PRESERVE, images or {}, seeds, tables, slots, {}),
        _stage=StageView(StageMemory(slots, "", len(layout.prunable), device), past, {}, lambda *_: None),
    )


@st.composite
def scenes(draw: st.DrawFn) -> SelectContext:
    """Any layout, with as many tokens held in each row."""
    layout = draw(layouts())
    return context(layout, draw(keep_sets([list(layout.prunable)] * draw(batches))))


def of_views(ctx: SelectContext, row: int) -> list[list[int]]:
    """Columns of the tokens held in one row, by view."""
    held = ctx.prunable[row].tolist()
    return [[c for c, token in enumerate(held) if token in segment.span] for segment in ctx.layout.views.values()]


def drawn(draw: st.DrawFn, ctx: SelectContext, values: st.SearchStrategy) -> list:
    batch, held = ctx.prunable.shape
    row = st.lists(values, min_size=held, max_size=held)
    return draw(st.lists(row, min_size=batch, max_size=batch))


@pytest.mark.parametrize(("distance", "steps"), [(0, 11), (0.25, 10), (5, 6), (10, 1), (14, 1), (50, 1)])
def test_the_faster_the_arm_the_shorter_the_look_back(distance: float, steps: int) -> None:
    assert signals.look_back(distance) == steps


@given(speeds=st.lists(st.floats(0, 50), min_size=2, max_size=2).map(sorted))
def test_a_look_back_is_from_one_to_eleven_and_never_grows_with_distance(speeds: list[float]) -> None:
    slow, fast = (signals.look_back(speed) for speed in speeds)
    assert 1 <= fast <= slow <= 11


@given(
    moves=st.lists(st.lists(st.floats(-2, 2), min_size=7, max_size=7), max_size=8),
    dims=st.permutations(range(7)).map(lambda order: tuple(order[:3])),
)
def test_travelled_is_the_length_of_the_summed_translation(moves: list[list[float]], dims: tuple[int, ...]) -> None:
    executed = [ExecutedAction(0, np.array(move)) for move in moves]
    sums = [math.fsum(move[dim] for move in moves) for dim in dims]
    assert signals.travelled(executed, dims) == pytest.approx(math.sqrt(sum(s * s for s in sums)), abs=1e-12)


def test_travelled_is_where_the_arm_ends_and_not_its_path() -> None:
    there, back = (ExecutedAction(0, np.array([sign * 3.0, sign * 4.0, 0, 9, 9, 9, 1])) for sign in (1, -1))
    assert signals.travelled([there], (0, 1, 2)) == 5
    assert signals.travelled([there, back], (0, 1, 2)) == 0
    assert signals.travelled([], (0, 1, 2)) == 0
    assert signals.travelled([there], ()) == 0


GRIDS = st.tuples(*[st.sampled_from([1, 2, 3, 4, 6])] * 2)


@given(seed=seeds, grid=GRIDS, batch=batches)
def test_patches_are_in_raster_order(seed: int, grid: tuple[int, int], batch: int) -> None:
    images = pixels(seed, batch)
    split = patches(images, grid)
    assert split.shape == (batch, *grid, SIDE // grid[0], 3, SIDE // grid[1])
    for image, mine in zip(images, split, strict=True):
        assert [sorted(patch.flatten().tolist()) for patch in mine.flatten(0, 1)] == list(
            map(sorted, blocks(image, grid))
        )


@given(seed=seeds, grid=GRIDS, high=st.sampled_from([2, 3, 256]), black=st.sampled_from([0.0, 1.0]))
def test_similarity_is_the_cosine_of_the_pixels(seed: int, grid: tuple[int, int], high: int, black: float) -> None:
    now, then = pixels(seed, 2, high=high), pixels(seed + 1, 2, high=high)
    found = patch_similarity(now, then, grid, black)
    assert found.dtype == torch.float64
    for row in range(2):
        pairs = zip(blocks(now[row], grid), blocks(then[row], grid), strict=True)
        # The sums are exact; a vectorised square root may be off by one place.
        np.testing.assert_allclose(found[row], [cosine(a, b, black) for a, b in pairs], rtol=5e-16)


@given(seed=seeds, grid=GRIDS, factor=st.integers(1, 5))
def test_a_patch_is_exactly_like_itself_and_like_itself_brighter(seed: int, grid: tuple[int, int], factor: int) -> None:
    image = pixels(seed, high=51)
    assert patch_similarity(factor * image, image, grid).eq(1).all()


@pytest.mark.parametrize(
    ("now", "then", "share"),
    [
        ((22, 3, 2, 1, 1, 1, 0, 0, 0, 0, 0, 0), (22, 3, 0, 0, 0, 0, 2, 1, 1, 1, 0, 0), Fraction("0.986")),
        ((7, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0), (7, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0), Fraction("0.98")),
    ],
)
def test_a_patch_at_a_published_threshold_is_at_it(now: tuple, then: tuple, share: Fraction) -> None:
    images = [torch.tensor(values, dtype=torch.uint8).view(1, 3, 2, 2) for values in (now, then)]
    assert Fraction(sum(a * b for a, b in zip(now, then, strict=True)), sum(a * a for a in now)) == share
    assert patch_similarity(*images, (1, 1)).item() == float(share)


def test_similarity_to_black() -> None:
    image = torch.full((1, 3, 8, 8), 90, dtype=torch.uint8)
    black, half = torch.zeros_like(image), image.clone()
    half[:, :, :, ::2] = 0
    black_in_part = image.clone()
    black_in_part[:, :, :4, 4:] = 0
    assert patch_similarity(black, black, (2, 2)).tolist() == [[1.0] * 4]
    assert patch_similarity(black, black, (2, 2), black=0.0).tolist() == [[0.0] * 4]
    for pair in ((image, black), (black, image)):
        assert patch_similarity(*pair, (2, 2), black=1.0).tolist() == [[0.0] * 4]
    found = patch_similarity(black_in_part, black, (2, 2), black=1.0)
    assert found.tolist() == [[0.0, 1.0, 0.0, 0.0]]
    np.testing.assert_allclose(patch_similarity(half, image, (2, 2)), math.sqrt(0.5), rtol=1e-15)


@pytest.mark.parametrize("grid", [(2, 3), (3, 2), (1, 4), (4, 4)])
def test_a_changed_patch_changes_its_own_similarity_alone(grid: tuple[int, int]) -> None:
    rows, cols = grid
    height, width, then = SIDE // rows, SIDE // cols, pixels(7)
    same = patch_similarity(then, then, grid)
    for place in range(rows * cols):
        now = then.clone()
        now[:, place % 3, place // cols * height, place % cols * width] ^= 255
        changed = patch_similarity(now, then, grid) != same
        assert changed[0].nonzero().flatten().tolist() == [place]


@given(seed=seeds, grid=GRIDS, batch=st.integers(2, 6))
def test_similarity_does_not_depend_on_the_batch(seed: int, grid: tuple[int, int], batch: int) -> None:
    now, then = pixels(seed, batch), pixels(seed + 1, batch)
    alone = [patch_similarity(now[row : row + 1], then[row : row + 1], grid) for row in range(batch)]
    assert torch.equal(patch_similarity(now, then, grid), torch.cat(alone))


@given(data=st.data(), layout=layouts(), seed=seeds, black=st.sampled_from([0.0, 1.0]))
def test_frames_are_compared_per_view_where_there_is_one(
    data: st.DataObject, layout: TokenLayout, seed: int, black: float
) -> None:
    steps = data.draw(st.lists(st.none() | st.integers(0, 11), min_size=1, max_size=3))
    had = torch.tensor([step is not None for step in steps])
    now = {view: pixels(seed + n, len(steps), high=3) for n, view in enumerate(layout.views)}
    then = {view: pixels(seed - n, len(steps), high=3) * had[:, None, None, None] for n, view in enumerate(now, 1)}
    held = data.draw(keep_sets([list(layout.prunable)] * len(steps)))
    similar, found = frame_similarity(context(layout, held, now, PastFrames(tuple(steps), then)), black)
    assert found.tolist() == had.tolist()
    for row, tokens in enumerate(held):
        wanted = {
            token: cosine(a, b, black)
            for view, segment in layout.views.items()
            for token, a, b in zip(
                segment.span, blocks(now[view][row], segment.grid), blocks(then[view][row], segment.grid), strict=True
            )
        }
        np.testing.assert_allclose(similar[row], [wanted[token] for token in tokens], rtol=0, atol=1e-15)


def test_without_look_back_no_row_has_a_frame() -> None:
    layout = TokenLayout.build([Segment(Role.VISION, 0, 4, "primary", (2, 2), prunable=True)])
    similar, found = frame_similarity(context(layout, [[0, 3], [1, 2]], {"primary": pixels(0, 2)}))
    assert similar.shape == (2, 2)
    assert found.tolist() == [False, False]


def test_patches_without_a_grid_never_count_as_changed() -> None:
    parts = [
        Segment(Role.VISION, 0, 4, "primary", (2, 2), prunable=True),
        Segment(Role.VISION, 0, 3, "wrist", None, prunable=True),
    ]
    layout = TokenLayout.build(parts)
    now, then = ({view: pixels(seed) for view in layout.views} for seed in (0, 9))
    similar, _ = frame_similarity(context(layout, [[2, 3, 4, 6]], now, PastFrames((1,), then)))
    assert (similar[0, :2] < 1).all()
    assert similar[0, 2:].tolist() == [1.0, 1.0]


@given(data=st.data(), ctx=scenes(), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_ranks_count_members_from_the_highest_ties_in_order(
    data: st.DataObject, ctx: SelectContext, dtype: torch.dtype
) -> None:
    score = drawn(data.draw, ctx, st.sampled_from(FEW))
    member = drawn(data.draw, ctx, st.booleans())
    found = rank_within(torch.tensor(score, dtype=dtype), torch.tensor(member))
    for values, belongs, ranks in zip(score, member, found.tolist(), strict=True):
        columns = [column for column, inside in enumerate(belongs) if inside]
        order = sorted(columns, key=lambda column: (-values[column], column))
        assert ranks == [order.index(c) if c in order else len(values) for c in range(len(values))]


def best(ctx: SelectContext, row: int, score: list[float], member: list[bool], count: int) -> set[int]:
    """Columns of the best few members of each view."""
    chosen = set()
    for columns in of_views(ctx, row):
        chosen |= set(sorted((c for c in columns if member[c]), key=lambda c: (-score[c], c))[:count])
    return chosen


shares = st.sampled_from([10, 25, 50, 80, 100, 134, 200]).map(lambda percent: Fraction(percent, 100))


@given(data=st.data(), ctx=scenes(), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_claims_up_to_a_share_are_the_union_of_that_share_of_each_top(
    data: st.DataObject, ctx: SelectContext, dtype: torch.dtype
) -> None:
    asked, less = sorted(data.draw(st.lists(shares, min_size=2, max_size=2)), reverse=True)
    parts = []
    for _ in range(2):
        top = data.draw(st.integers(1, 30) | st.just(5) | st.just(20))
        score = drawn(data.draw, ctx, st.sampled_from(FEW) | st.floats(-9, 9, width=32))
        member = drawn(data.draw, ctx, st.booleans())
        claim = claims(ctx, torch.tensor(score, dtype=dtype), torch.tensor(member), top)
        assert claim.dtype == torch.float64
        assert claim.isinf().tolist() == [[not inside for inside in row] for row in member]
        parts.append((top, score, member, claim))
    joint = torch.minimum(parts[0][3], parts[1][3])
    for row in range(len(joint)):
        for share in (asked, less):
            wanted = set()
            for top, score, member, _ in parts:
                wanted |= best(ctx, row, score[row], member[row], math.floor(share * top))
            assert (joint[row] <= float(share)).nonzero().flatten().tolist() == sorted(wanted)
    assert ((joint <= float(less)) <= (joint <= float(asked))).all()


@pytest.mark.parametrize(("values", "wanted"), [((3,), (3, 3, 3)), ((1, 2), (1, 2, 2)), ((1, 2, 3, 4), (1, 2, 3))])
def test_the_last_number_holds_for_further_views(values: tuple[float, ...], wanted: tuple[float, ...]) -> None:
    parts = [Segment(Role.BOS, 0, 1)]
    for view in VIEWS:
        parts += [Segment(Role.VISION, 0, 4, view, (2, 2), prunable=True), Segment(Role.TEXT, 0, 1)]
    layout = TokenLayout.build(parts)
    held = [[1, 4, 6, 11, 14], [2, 3, 9, 12, 13]]
    found = per_view(context(layout, held), values)
    assert found.dtype == torch.float64
    assert found.tolist() == [[wanted[token // 5 if token % 5 else -1] for token in row] for row in held]


@pytest.mark.parametrize("decay", [0.1, 1.0])
@pytest.mark.parametrize("n", [1, 12, 512])
def test_weights_of_ranks(n: int, decay: float) -> None:
    sigmoids = [1 / (1 + math.exp(decay * rank)) for rank in range(n)]
    weights = signals.rank_weights(n, decay, torch.float64, torch.device("cpu"))
    np.testing.assert_allclose(weights, np.array(sigmoids) / math.fsum(sigmoids), rtol=1e-12)
    assert weights.sum().item() == pytest.approx(1, abs=1e-12)
    assert (weights.diff() < 0).all()


@pytest.mark.parametrize("n", [90, 97, 128, 512])
def test_in_float32_steep_weights_end_at_rank_88(n: int) -> None:
    single, double = (
        signals.rank_weights(n, 1.0, dtype, torch.device("cpu")) for dtype in (torch.float32, torch.float64)
    )
    assert single[89:].eq(0).all()
    assert single[:88].gt(0).all()
    assert single[:80].diff().lt(0).all()
    assert single.sum().item() == pytest.approx(1, abs=1e-6)
    assert double.gt(0).all()


def entropy_of(shares: np.ndarray) -> float:
    return -math.fsum(float(p) * math.log(p) for p in shares if p > 0)


@given(seed=seeds, batch=batches, heads=st.integers(1, 3), rows=st.integers(1, 4), patches=st.integers(1, 9))
def test_confidence_is_one_over_the_mean_entropy_of_the_rows(
    seed: int, batch: int, heads: int, rows: int, patches: int
) -> None:
    # Part of each row goes to other tokens, as in a decoder; some patches get nothing.
    attention = 0.3 * (3 * random(seed, batch, heads, rows, patches + 2)).softmax(-1)[..., :patches]
    attention[..., 1:] *= (random(seed + 1, patches - 1) > -0.5) if patches > 1 else 1
    found = signals.entropy_confidence(attention)
    assert found.shape == (batch,)
    for row, confidence in zip(attention.numpy(), found.tolist(), strict=True):
        means = row.mean(0)
        entropies = [entropy_of(mean / mean.sum()) / math.log(max(patches, 2)) for mean in means]
        assert confidence == pytest.approx(1 / (np.mean(entropies) + 1e-8), rel=1e-7)
    shuffled = attention[:, torch.randperm(heads, generator=torch.Generator().manual_seed(seed))]
    np.testing.assert_allclose(signals.entropy_confidence(shuffled), found, rtol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_confidence_of_even_and_of_single_minded_attention(dtype: torch.dtype) -> None:
    even = torch.full((2, 3, 4, 7), 0.01, dtype=dtype)
    one = torch.zeros_like(even)
    one[..., 5] = 0.2
    np.testing.assert_allclose(signals.entropy_confidence(even), [1, 1], rtol=1e-7)
    np.testing.assert_allclose(signals.entropy_confidence(one), [1e8, 1e8], rtol=1e-6)


def test_a_moving_average_begins_at_nothing_and_nears_what_is_repeated() -> None:
    new, score = torch.tensor([[1.0, -2.0, 8.0]]), torch.zeros(1, 3)
    for times in range(1, 5):
        score = signals.moving_average(score, new, 0.2)
        np.testing.assert_allclose(score, (1 - 0.8**times) * new, rtol=1e-6)
    assert torch.equal(signals.moving_average(score, new, 1.0), new)


def test_a_number_may_depend_on_the_mode() -> None:
    assert signals.in_mode(0.8, "fine") == 0.8
    assert signals.in_mode({"coarse": 0.8, "fine": 1.34}, "fine") == 1.34


def layer(ctx: SelectContext, q: torch.Tensor, k: torch.Tensor) -> LayerContext:
    shared = (getattr(ctx, field.name) for field in fields(SelectContext))
    return LayerContext(*shared, q, k, ctx.tokens.ids, {})


@given(ctx=scenes(), seed=seeds, heads=st.integers(1, 3))
def test_attention_to_patches_is_the_mean_over_heads_and_rows(ctx: SelectContext, seed: int, heads: int) -> None:
    batch, n, width = len(ctx.prunable), ctx.layout.n_tokens, 4
    q, k = (random(seed + side, batch, heads, n, width) for side in (0, 1))
    text = ctx.layout.span("text")
    for rows in ("text", text, OriginalIds(torch.tensor([list(text)] * batch))):
        found = attention_to_patches(layer(ctx, q, k), rows)
        for row in range(batch):
            wanted = np.zeros(n)
            for head in range(heads):
                for place in text:
                    powers = np.exp((k[row, head] @ q[row, head, place] / math.sqrt(width)).numpy())
                    wanted += powers / powers.sum() / heads / len(text)
            np.testing.assert_allclose(found[row], wanted[ctx.prunable[row].numpy()], rtol=1e-6)
