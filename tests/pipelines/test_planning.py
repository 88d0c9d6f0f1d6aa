"""Plans against a simulation that moves one count, or one set of tokens per view, from layer to layer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tests.helpers.drawing import layouts
from tokenprune.errors import ConfigError
from tokenprune.model.info import ActionSpec, BackboneInfo, DecoderShape
from tokenprune.pipelines.planning import make_plan
from tokenprune.stages.config import CutConfig, StageConfig, ViewBudget, cut_layer
from tokenprune.stages.needs import StageNeeds
from tokenprune.stages.stage import Stage
from tokenprune.tokens.layout import Role, Segment, TokenLayout
from tokenprune.tokens.plan import Plan

Keep = int | Fraction
"""A count, or an exact share."""


class Selector(Stage[StageConfig]):
    """Cuts, and is not asked after layers."""


class Scorer(Selector):
    """Is asked after each of its cuts."""

    def score_layer(self, ctx: object) -> None: ...


class Watcher(Scorer):
    """Looks at two layers more than it cuts after."""

    def requirements(self, info: BackboneInfo) -> StageNeeds:
        return super().requirements(info).also_called_after([0, info.decoder.depth - 1])


def planned(
    stages: list[Stage[Any]], names: list[str], layout: TokenLayout, mode: str, depth: int, **more: object
) -> Plan:
    needs = [stage.requirements(info_of(depth)) for stage in stages]
    return make_plan(stages, needs, names, layout, mode, depth, **more)


def info_of(depth: int) -> BackboneInfo:
    """A backbone of which only the depth matters."""
    shape = DecoderShape(depth, 8, 1, 1, 8, 8, causal=True)
    return BackboneInfo("test", "test", True, shape, ("primary",), ActionSpec(1, {"all": (0,)}))


def cut(keep: object, after: object = "embedding", **more: object) -> CutConfig:
    return CutConfig.model_validate({"use": "x", "keep": keep, "after": after, **more})


def plan_of(configs: list[CutConfig], layout: TokenLayout, depth: int, mode: str = "default", **more: object) -> Plan:
    return planned([Selector(c) for c in configs], [f"s{i}" for i in range(len(configs))], layout, mode, depth, **more)


def layout_of(fixed: int, **views: int) -> TokenLayout:
    parts = [Segment(Role.VISION, 0, n, name, (1, n), prunable=True) for name, n in views.items()]
    return TokenLayout.build([*parts, Segment(Role.TEXT, 0, fixed)])


def wanted(keep: Keep, held: int, fixed: int, of: str = "prunable", floor: int = 0, bucket: int = 1) -> int:
    """A share is of the prunable tokens found, or of all tokens found less the fixed ones, and rounds down."""
    if isinstance(keep, int):
        count = keep
    elif of == "sequence":
        count = math.floor(keep * (held + fixed)) - fixed
    else:
        count = max(math.floor(keep * held), 1)
    count = max(count, floor, 0)
    return min(count + -count % bucket, held)


@dataclass(frozen=True)
class Drawn:
    """A stage's budget, and the same as a configuration."""

    after: tuple[int | str, ...]
    keep: Keep
    of: str
    floor: int
    bucket: int

    def config(self) -> CutConfig:
        keep = self.keep if isinstance(self.keep, int) else float(self.keep)
        return cut(keep, list(self.after), of=self.of, floor=self.floor, bucket=self.bucket)

    def layers(self, depth: int) -> list[int]:
        return [
            -1 if a == "embedding" else a if isinstance(a, int) else math.floor(share(a, depth) + Fraction(1, 2))
            for a in self.after
        ]


def share(text: str, depth: int) -> Fraction:
    return Fraction(text.rstrip("%")) / 100 * depth


keeps = st.one_of(st.integers(0, 60), st.integers(1, 100).map(lambda percent: Fraction(percent, 100)))


@st.composite
def budgets(draw: st.DrawFn, depth: int) -> Drawn:
    points = st.one_of(
        st.just("embedding"),
        st.integers(0, depth - 2),
        st.integers(0, 99)
        .map(lambda percent: f"{percent}%")
        .filter(lambda p: share(p, depth) < depth - Fraction(3, 2)),
    )
    after = tuple(draw(st.lists(points, min_size=1, max_size=4)))
    assume(all(share(a, depth) % 1 != Fraction(1, 2) for a in after if isinstance(a, str) and a != "embedding"))
    of = draw(st.sampled_from(["prunable", "sequence"]))
    return Drawn(after, draw(keeps), of, draw(st.sampled_from([0, 0, 3, 20])), draw(st.sampled_from([1, 1, 4, 8])))


@given(st.data(), layouts(), st.integers(2, 32))
def test_counts_equal_the_simulation(data: st.DataObject, layout: TokenLayout, depth: int) -> None:
    stages = data.draw(st.lists(budgets(depth), max_size=4))
    plan = plan_of([stage.config() for stage in stages], layout, depth)
    held, fixed, counts, cuts = len(layout.prunable), len(layout.fixed), [], []
    for layer in range(-1, depth):
        if layer >= 0:
            counts.append(held)
        here = [i for i, stage in enumerate(stages) if layer in stage.layers(depth)]
        if here:
            found = held
            held = min(wanted(s.keep, found, fixed, s.of, s.floor, s.bucket) for s in (stages[i] for i in here))
            cuts.append((layer, tuple(here), found, held))
    assert plan.prunable == tuple(counts)
    assert plan.tokens == tuple(count + fixed for count in counts)
    assert [(c.after, c.stages, c.found, c.keep) for c in plan.cuts] == cuts
    assert plan.graph_safe


def test_the_published_cascade_of_shares_of_the_sequence() -> None:
    layout = layout_of(84, primary=100, wrist=74)
    cascade = cut(0.9, ["31%", "47%", "62%", "78%"], of="sequence", floor=59)
    plan = plan_of([cascade], layout, 32)
    assert [(c.after, c.found, c.keep) for c in plan.cuts] == [
        (10, 174, 148), (15, 148, 124), (20, 124, 103), (25, 103, 84),
    ]  # fmt: skip
    assert plan.tokens == (258,) * 11 + (232,) * 5 + (208,) * 5 + (187,) * 5 + (168,) * 6


@pytest.mark.parametrize(("depth", "layers"), [(32, [10, 15, 20, 25]), (18, [6, 8, 11, 14]), (6, [2, 3, 4, 4])])
def test_shares_of_the_depth_fit_decoders_of_any_depth(depth: int, layers: list[int]) -> None:
    assert [cut_layer(f"{percent}%", depth) for percent in (31, 47, 62, 78)] == layers


@given(st.integers(2, 80), st.integers(0, 10000))
def test_a_share_is_the_nearest_layer_that_can_be_cut(depth: int, hundredths: int) -> None:
    layer = cut_layer(f"{hundredths / 100}%", depth)
    exact = Fraction(hundredths, 10000) * depth
    nearest = min(abs(other - exact) for other in range(depth - 1))
    assert 0 <= layer <= depth - 2
    assert abs(layer - exact) == nearest


def test_a_decoder_of_one_layer_cannot_be_cut() -> None:
    with pytest.raises(ValueError, match="decoder of 1 layers"):
        cut_layer("0%", 1)


@pytest.mark.parametrize("after", [31, 32])
def test_a_cut_after_the_last_layer_is_refused(after: int) -> None:
    with pytest.raises(ValueError, match="valid in a decoder of 32 layers: 0 to 30"):
        cut_layer(after, 32)
    assert cut_layer(30, 32) == 30
    assert cut_layer("embedding", 32) == -1


def test_a_stage_whose_shares_meet_at_one_layer_cuts_there_once() -> None:
    plan = plan_of([cut(0.5, ["31%", "33%", 6])], layout_of(4, primary=16), 18)
    assert [(c.after, c.stages, c.keep) for c in plan.cuts] == [(6, (0,), 8)]


def test_each_mode_has_its_counts() -> None:
    layout = layout_of(4, primary=16, wrist=16)
    config = cut(
        {"coarse": 8, "fine": 0.5}, views={"wrist": ViewBudget(keep={"coarse": 2, "fine": 10})}, bucket=1
    )  # fmt: skip
    assert [plan_of([config], layout, 4, mode).cuts[0].keep for mode in ("coarse", "fine")] == [10, 18]


@given(st.data(), layouts(), st.integers(2, 32))
def test_a_list_of_equal_amounts_plans_like_the_one_amount(
    data: st.DataObject, layout: TokenLayout, depth: int
) -> None:
    drawn = data.draw(budgets(depth))
    amount = data.draw(st.just("union") | keeps.map(lambda k: k if isinstance(k, int) else float(k)))
    view = data.draw(st.none() | st.sampled_from(list(layout.views)))
    own = data.draw(st.integers(0, 60))

    def said(amount: object, own: object) -> CutConfig:
        views = {} if view is None else {view: {"keep": own}}
        return cut(amount, list(drawn.after), of=drawn.of, floor=drawn.floor, bucket=drawn.bucket, views=views)

    def outcome(config: CutConfig, mode: str) -> object:
        try:
            return plan_of([config], layout, depth, mode)
        except ConfigError as error:
            return str(error)

    cuts = len(drawn.after)
    expected = outcome(said(amount, own), "fine")
    assert outcome(said([amount] * cuts, [own] * cuts), "fine") == expected
    assert (
        outcome(said({"coarse": 1, "fine": [amount] * cuts}, {"coarse": [2] * cuts, "fine": own}), "fine") == expected
    )


@given(st.data(), st.integers(2, 32))
def test_each_entry_has_its_amount_and_the_last_at_a_layer_holds(data: st.DataObject, depth: int) -> None:
    drawn = data.draw(budgets(depth))
    counts = data.draw(st.lists(st.integers(0, 64), min_size=len(drawn.after), max_size=len(drawn.after)))
    plan = plan_of([cut(counts, list(drawn.after))], layout_of(4, primary=64), depth)
    at, held = dict(zip(drawn.layers(depth), counts, strict=True)), 64
    assert [c.after for c in plan.cuts] == sorted(at)
    for planned in plan.cuts:
        held = min(held, at[planned.after])
        assert planned.keep == held


def test_shares_that_meet_at_one_layer_of_a_shallow_decoder_keep_the_amount_of_the_last() -> None:
    config = cut([8, 12, 6], ["31%", "33%", "60%"])
    layout = layout_of(4, primary=16)
    assert [(c.after, c.keep) for c in plan_of([config], layout, 32).cuts] == [(10, 8), (11, 8), (19, 6)]
    assert [(c.after, c.keep) for c in plan_of([config], layout, 18).cuts] == [(6, 12), (11, 6)]


def test_each_cut_has_its_amount_in_each_mode_and_of_each_view() -> None:
    layout = layout_of(4, primary=16, wrist=16)
    # Amounts follow the order of `after`, which need not be that of the layers.
    both = cut({"coarse": [0.25, 0.5], "fine": [24, 28]}, [2, 1])
    assert [plan_of([both], layout, 4, mode).prunable for mode in ("coarse", "fine")] == [
        (32, 32, 16, 4),
        (32, 32, 28, 24),
    ]
    views = cut([12, 8], [0, 1], views={"wrist": {"keep": {"coarse": [4, 1], "fine": 10}}})
    kept = {
        mode: [[(g.views, g.keep) for g in c.groups] for c in plan_of([views], layout, 4, mode).cuts]
        for mode in ("coarse", "fine")
    }
    assert kept == {
        "coarse": [[(("wrist",), 4), (("primary",), 12)], [(("wrist",), 1), (("primary",), 8)]],
        "fine": [[(("wrist",), 10), (("primary",), 12)], [(("wrist",), 10), (("primary",), 8)]],
    }


def test_a_union_may_be_one_of_the_amounts() -> None:
    layout = layout_of(4, primary=16)
    config = cut([0.75, "union"], [0, 1])
    assert [(c.keep, c.union) for c in plan_of([config], layout, 4).cuts] == [(12, False), (12, True)]
    assert plan_of([config], layout, 4, unions=(5,)).prunable == (16, 12, 5, 5)


@st.composite
def view_budgets(draw: st.DrawFn, names: list[str]) -> dict[str | None, Keep]:
    """Budgets of some views, and at None the one of all others together."""
    own = draw(st.sets(st.sampled_from(names), min_size=1))
    return {None: draw(keeps), **{name: draw(keeps) for name in names if name in own}}


@given(st.data(), layouts(), st.sampled_from([1, 1, 4]))
def test_budgets_of_views_equal_a_simulation_with_tokens(data: st.DataObject, layout: TokenLayout, bucket: int) -> None:
    names = list(layout.views)
    held = {name: segment.length for name, segment in layout.views.items()}
    certain, counts, configs = True, [], []
    shares_of_uncertain = False
    for layer in range(3):
        drawn = data.draw(st.one_of(keeps, view_budgets(names)))
        if not isinstance(drawn, dict):
            configs.append(cut(drawn if isinstance(drawn, int) else float(drawn), layer, bucket=bucket))
            keep = wanted(drawn, sum(held.values()), 0, bucket=bucket)
            groups = {tuple(names): keep}
        else:
            plain = {name: k if isinstance(k, int) else float(k) for name, k in drawn.items()}
            views = {name: {"keep": k} for name, k in plain.items() if name is not None}
            configs.append(cut(plain[None], layer, bucket=bucket, views=views))
            rest = tuple(name for name in names if name not in drawn)
            groups = {}
            for group, amount in [*(((name,), drawn[name]) for name in drawn if name is not None), (rest, drawn[None])]:
                if group:
                    shares_of_uncertain |= not certain and not isinstance(amount, int)
                    there = {name: held[name] if certain else layout.views[name].length for name in group}
                    groups[group] = wanted(amount, sum(there.values()), 0, bucket=bucket)
            keep = min(sum(groups.values()), sum(held.values()))
        # Tokens leave: each group keeps its quota, the views within it in drawn proportion, the rest goes to anyone.
        before, left, now = sum(held.values()), keep, dict.fromkeys(names, 0)
        for group, quota in [*groups.items(), (tuple(names), keep)]:
            for name in data.draw(st.permutations(group)):
                take = min(quota, held[name] - now[name], left)
                now[name], quota, left = now[name] + take, quota - take, left - take
        held = now
        assert sum(held.values()) == keep
        if keep < before:
            certain = len(names) == 1 or (certain and all(len(group) == 1 for group in groups))
        counts.append(keep)
    if shares_of_uncertain:
        with pytest.raises(ConfigError, match=r"is a share, but how many tokens of .* is not known beforehand"):
            plan_of(configs, layout, 4)
    else:
        plan = plan_of(configs, layout, 4)
        assert plan.prunable == (len(layout.prunable), *counts)


def test_quotas_of_views_and_of_the_rest() -> None:
    layout = layout_of(4, primary=16, wrist=16, left=8)
    (only,) = plan_of([cut(0.5, views={"wrist": {"keep": 3}})], layout, 4).cuts
    assert [(g.views, g.keep) for g in only.groups] == [(("wrist",), 3), (("primary", "left"), 12)]
    assert (only.found, only.keep) == (40, 15)


def test_stages_that_meet_keep_the_smallest_of_their_counts() -> None:
    layout = layout_of(4, primary=16, wrist=16)
    configs = [cut(20, 1), cut(0.25, [1, 2]), cut(30, 0, views={"wrist": {"keep": 1}})]
    plan = plan_of(configs, layout, 5)
    assert plan.prunable == (32, 17, 4, 1, 1)
    assert plan.cut_after[1].stages == (0, 1)


def test_a_single_view_is_known_whatever_meets_at_a_cut() -> None:
    layout = layout_of(4, primary=16)
    plan = plan_of([cut(12, 0), cut(10, 0), cut(3, 1, views={"primary": {"keep": 0.5}})], layout, 4)
    assert plan.prunable == (16, 10, 5, 5)


def test_counts_of_every_view_do_not_make_an_uncertain_split_certain() -> None:
    layout = layout_of(4, primary=16, wrist=16)
    halves = cut(3, 2, views={"primary": {"keep": 0.5}})
    # The first cut may leave one token of the wrist, which three were asked of in vain at the second.
    counts = cut(3, 1, views={"primary": {"keep": 3}})
    with pytest.raises(ConfigError, match="is a share, but how many tokens of primary"):
        plan_of([cut(8, 0), counts, halves], layout, 4)
    assert plan_of([counts, halves], layout, 4).prunable == (32, 32, 6, 4)


def test_an_unknown_union_leaves_the_most_it_could_keep() -> None:
    layout = layout_of(4, primary=16)
    stages = [cut("union", 0, bucket=4), cut(0.5, 1)]
    plan = plan_of(stages, layout, 4)
    assert plan.prunable == (16, 16, 8, 8)
    assert [c.union for c in plan.cuts] == [True, False]
    assert not plan.graph_safe
    known = plan_of(stages, layout, 4, unions=(5,))
    assert known.prunable == (16, 8, 4, 4)
    assert [c.union for c in known.cuts] == [False, False]
    assert not known.graph_safe


def test_every_union_cut_has_a_count_of_its_own_however_many_stages_meet_there() -> None:
    layout = layout_of(4, primary=16, wrist=16)
    stages = [cut("union", [0, 2]), cut("union", 0), cut(25, 0)]
    assert plan_of(stages, layout, 5).prunable == (32, 25, 25, 25, 25)
    first = plan_of(stages, layout, 5, unions=(20,))
    assert first.prunable == (32, 20, 20, 20, 20)
    assert [c.union for c in first.cuts] == [False, True]
    both = plan_of(stages, layout, 5, unions=(20, 7))
    assert both.prunable == (32, 20, 20, 7, 7)
    assert [c.union for c in both.cuts] == [False, False]


def test_only_stages_with_a_cut_meet_at_it() -> None:
    stages = [Scorer(cut(8, ["embedding", 1])), Selector(cut(8, 1)), Watcher(cut(8, 2)), Selector(StageConfig(use="x"))]
    plan = planned(stages, ["a", "b", "c", "d"], layout_of(4, primary=16), "default", 4)
    assert [(c.after, c.stages) for c in plan.cuts] == [(-1, (0,)), (1, (0, 1)), (2, (2,))]


ERRORS = {
    "unknown view": (
        [cut(5, views={"wirst": {"keep": 3}})],
        "stage 's0': views.wirst is no view.*did you mean 'wrist'",
    ),
    "union of a view": (
        [cut(5, views={"wrist": {"keep": "union"}})],
        r"stage 's0': views\.wrist\.keep: 'union' cannot stand beside",
    ),
    "union of the rest": (
        [cut("union", views={"wrist": {"keep": 3}})],
        r"stage 's0': keep: 'union' cannot stand beside",
    ),
    "share of an unknown view": (
        [cut(8, 0), cut(3, 1, views={"wrist": {"keep": 0.5}})],
        r"stage 's1': views\.wrist\.keep: 0\.5 is a share, but how many tokens of wrist",
    ),
    "share of an unknown rest": (
        [cut("union", 0), cut(0.5, 1, views={"wrist": {"keep": 3}})],
        r"stage 's1': keep: 0\.5 is a share, but how many tokens of primary",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_budgets_that_cannot_be_planned_are_refused(case: str) -> None:
    configs, message = ERRORS[case]
    with pytest.raises(ConfigError, match=message):
        plan_of(configs, layout_of(4, primary=16, wrist=16), 4)
