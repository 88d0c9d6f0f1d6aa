"""The rows of docs/strategies/specprune-fidelity.md, a test each; lists are in the order of `PRESETS`."""

from __future__ import annotations

import pytest
import torch

from tests.helpers.paths import ROOT
from tests.helpers.planting import REGISTRY
from tests.helpers.specprune_host import (
    BOTH,
    FAST,
    LEFT,
    PRESETS,
    PRIMARY,
    STILL,
    THERE_AND_BACK,
    WRIST,
    Host,
    changed,
    counted,
    kept,
    loaded,
    looked_back,
    looks_at,
    looks_back_after,
    modes_after,
    stop_the_clock,
    wanted,
)
from tokenprune.errors import ConfigError
from tokenprune.pipelines.binding import bind
from tokenprune_plugins.specprune import signals

PAPER, C3, OURS = PRESETS
F, C = "fine", "coarse"
LEAST_OF_C3 = [*PRIMARY[:20], *WRIST[:26]]
every_preset = pytest.mark.parametrize("preset", PRESETS)


def test_look_back() -> None:
    assert looks_back_after(*[STILL] * 16) == [11, 5, 11]
    assert looks_back_after(*[STILL] * 15, (4.875, 0)) == [6, 5, 6]
    assert looks_back_after(*[STILL] * 15, (5, 0)) == [6, 4, 6]
    assert looks_back_after(*[STILL] * 15, (8, 0)) == [3, 2, 3]


def test_look_back_of_a_fast_arm() -> None:
    assert looks_back_after(*[STILL] * 15, (10.5, 0)) == [1, 0, 1]
    assert looks_back_after(*[STILL] * 15, (11.625, 0)) == [1, 16, 1]
    assert looks_back_after(*[STILL] * 15, (12.75, 0)) == [1, 15, 1]


def test_motion_of_the_first_steps() -> None:
    assert looks_back_after(*[FAST] * 8) == [3, 5, 3]


def test_too_few_frames() -> None:
    assert looks_back_after(*[STILL] * 3) == [3, 0, 3]


@pytest.mark.parametrize(("preset", "back"), [(PAPER, 8), (C3, 5), (OURS, 8)])
def test_every_action_is_executed(preset: str, back: int) -> None:
    # Patch 200 differs in one frame. It would be missed, were actions thrown away and frames repeated meanwhile.
    host = Host(preset)
    host.ask(primary={200: 0} if back == 8 else {})
    for step in range(1, 9):
        host.step(STILL, primary={200: 0} if step == 8 - back else {})
    assert PRIMARY[200] in wanted(host.ask(), "dynamic")


def test_similarity_of_a_patch() -> None:
    assert [changed(preset, {}, grey=50) for preset in PRESETS] == [[], LEAST_OF_C3, []]


@every_preset
def test_black_patches(preset: str) -> None:
    host = Host(preset)
    host.ask(grey=0)
    host.step(*THERE_AND_BACK, grey=0)
    answer = host.ask(grey=0)
    assert len(kept(answer, 1)) == 512 if preset == C3 else wanted(answer, "dynamic") == []


def test_threshold_of_change() -> None:  # The cosine of patch 200 is 0.983.
    released = [*PRIMARY[:19], PRIMARY[200], *WRIST[:25], WRIST[200], *LEFT[:25], LEFT[200]]
    assert [changed(preset, {200: 54}, views=3) for preset in PRESETS] == [[PRIMARY[200]], released, [PRIMARY[200]]]


def test_changed_patches() -> None:  # The lower the value, the less similar.
    found = [changed(preset, {100 + value: value for value in range(40)}, views=1) for preset in PRESETS]
    assert found == [[*PRIMARY[100 : 100 + most]] for most in (16, 40, 16)]


def test_static_scene() -> None:
    assert [changed(preset, {}) for preset in PRESETS] == [[], LEAST_OF_C3, []]


@pytest.mark.parametrize("preset", [PAPER, OURS])
def test_what_alpha_scales(preset: str) -> None:
    host = Host(preset, "stages.1.keep=union", "stages.1.alpha=0.5", "stages.1.local_top=80")
    host.ask(looks_at(BOTH))
    host.step(*THERE_AND_BACK)
    values = {200 - value: value for value in range(40)}
    answer = host.ask(looks_at(BOTH), primary=values, wrist=values)
    assert [len(wanted(answer, reason)) for reason in ("dynamic", "previous", "local")] == [2 * 10, 2 * 15, 2 * 40]
    assert not hasattr(loaded(C3).stages[1], "alpha")


@pytest.mark.parametrize(("preset", "primary", "wrist"), [(PAPER, 19, 19), (C3, 24, 19), (OURS, 19, 19)])
def test_local_top(preset: str, primary: int, wrist: int) -> None:
    answer = Host(preset).ask(looks_at(BOTH[200:]))
    assert wanted(answer, "local") == [*PRIMARY[100 : 100 + primary], *WRIST[100 : 100 + wrist]]


def test_local_rows() -> None:
    rows = [[*Host(preset).rows(1).values()][:2] for preset in PRESETS]
    assert rows == [["instruction"] * 2, ["523-537", "524-538"], ["instruction"] * 2]


@pytest.mark.parametrize(("preset", "counts"), [(PAPER, {1: 38}), (C3, {0: 132, 1: 89}), (OURS, {0: 184, 1: 125})])
def test_static_cuts(preset: str, counts: dict[int, int]) -> None:
    answer = Host(preset).ask(looks_at(BOTH[200:]))
    assert {cut: len(kept(answer, cut)) for cut in answer.kept if cut <= 1} == counts


def test_previous_layers() -> None:
    assert [[*Host(preset).rows(1)][2:] for preset in PRESETS] == [[14, 31], [14, 30], [14, 31]]


@pytest.mark.parametrize(("preset", "primary", "wrist"), [(PAPER, 24, 24), (C3, 12, 9), (OURS, 24, 24)])
def test_previous_top(preset: str, primary: int, wrist: int) -> None:
    host = Host(preset)
    host.ask({**looks_at(BOTH), **looks_at(BOTH[38:], [1])})  # Two layers that differ, to have enough to remember.
    host.step(*THERE_AND_BACK)
    assert wanted(host.ask(looks_at(BOTH)), "previous") == [*PRIMARY[:primary], *WRIST[:wrist]]
    if preset == C3:
        host.step(STILL)
        for primary, wrist in ((12, 9), (7, 6)):  # The first of these two fine queries remembers a coarse one.
            assert wanted(host.ask(looks_at(BOTH)), "previous") == [*PRIMARY[:primary], *WRIST[:wrist]]


def test_previous_rows() -> None:
    rows = [[*Host(preset).rows(1).values()][2:] for preset in PRESETS]
    assert rows == [["instruction"] * 2, ["522-546"] * 2, ["instruction"] * 2]
    assert 539 in Host(C3).layout.span("action")


@every_preset
def test_tokens_that_had_left(preset: str) -> None:
    host = Host(preset, views=3)
    # Two views are attended to, so much that the deepest layers hold nothing of the third.
    first = host.ask({**looks_at(BOTH), **looks_at(BOTH[38:], [1])})
    host.step(*THERE_AND_BACK)
    before = set(wanted(host.ask(), "previous"))
    assert (
        before >= set(LEFT[:9]) > set(kept(first, 10)) & set(LEFT) if preset == C3 else before <= set(kept(first, 10))
    )


@every_preset
def test_union_or_fixed_counts(preset: str) -> None:
    host = Host(preset)
    alike, unlike = host.ask(looks_at(BOTH)), host.ask({0: BOTH[100:], 1: BOTH[200:]})
    assert host.pipeline.plan(host.layout).graph_safe == (preset == OURS)
    assert (len(kept(alike, 1)) == len(kept(unlike, 1))) == (preset == OURS)


@pytest.mark.parametrize(("preset", "first", "later"), [(PAPER, 38, 54), (C3, 89, 109), (OURS, 125, 125)])
def test_first_query(preset: str, first: int, later: int) -> None:
    host = Host(preset)
    answer = host.ask(looks_at(BOTH[200:]))
    assert (looked_back(answer), len(kept(answer, 1))) == (0 if preset == C3 else None, first)
    host.step(*THERE_AND_BACK)
    answer = host.ask(looks_at(BOTH[200:]), primary={150 + value: value for value in range(40)})
    assert len(kept(answer, 1)) == later


@pytest.mark.parametrize(("preset", "primary", "wrist"), [(PAPER, 19, 19), (C3, 24, 26), (OURS, 63, 62)])
def test_ties(preset: str, primary: int, wrist: int) -> None:
    # Of one or two rows and two heads the mean over equal attention is exact.
    assert kept(Host(preset, prompt=12).ask(), 1) == [*PRIMARY[:primary], *WRIST[:wrist]]


@every_preset
@pytest.mark.parametrize(("views", "prompt"), [(1, 12), (3, 70)])
def test_positions(preset: str, views: int, prompt: int) -> None:
    task, end = 11 + 256 * views, 2 + 256 * views + prompt
    released = {0: f"{task}-{end - 2}", 1: f"{task + 1}-{end - 1}", 14: f"{task - 1}-{task + 23}"}
    rows = Host(preset, views=views, prompt=prompt).rows(1)
    assert rows.items() >= released.items() if preset == C3 else {*rows.values()} == {"instruction"}


@pytest.mark.parametrize("views", [1, 3])
def test_number_of_cameras(views: int) -> None:
    order = [token for place in zip(*(PRIMARY, WRIST, LEFT)[:views], strict=True) for token in place]
    counts = [Host(preset, views=views).ask(looks_at(order)).view_counts()["1"] for preset in PRESETS]
    expected = [[19, 19, 19], [24, 26, 26], [63, 62, 62] if views == 3 else [62]]
    assert [[n for (n,) in count.values()] for count in counts] == [of_view[:views] for of_view in expected]


@every_preset
def test_layer_numbers(preset: str) -> None:
    found = {}
    for size in ("7b", "small"):
        info = REGISTRY.backbone_factory("openvla-oft").describe(size, None, {}).info
        found[info.decoder.depth] = bind(loaded(preset), info, REGISTRY).stages[2].cuts(info.decoder.depth)
    assert found == {32: (10, 15, 20, 25), 8: (2, 4, 5, 6)}


@every_preset
def test_fine_against_coarse(preset: str) -> None:
    answers = []
    for actions in (THERE_AND_BACK, [STILL] * 12):
        host = Host(preset)
        host.ask(looks_at(BOTH[100:]))
        host.step(*actions)
        answers.append(host.ask(looks_at(BOTH[200:]), primary={value: value for value in range(40)}))
    assert [answer.mode for answer in answers] == ["coarse", "fine"]
    coarse, fine = (set(kept(answer, max(c for c in answer.kept if c <= 1))) for answer in answers)
    assert len(fine) < len(coarse) if preset == C3 else fine > coarse


def test_dynamic_rows() -> None:
    assert [{*Host(preset).rows(2).values()} for preset in PRESETS] == [{"instruction"}, {"action"}, {"instruction"}]


def test_update_layers() -> None:
    assert [[*Host(preset).rows(2)] for preset in PRESETS] == [[9, 14, 19, 24], [14, 19, 24], [9, 14, 19, 24]]


def test_deep_cuts() -> None:
    assert [[cut for cut in Host(preset).ask().kept if cut > 1] for preset in PRESETS] == [[10, 15, 20, 25]] * 3


@every_preset
def test_cut_before_any_score(preset: str) -> None:
    host = Host(preset)
    answer = host.ask({**looks_at(BOTH[100:]), **looks_at(BOTH[::-1], [9])})
    assert (kept(answer, 10) == kept(answer, 1)[: len(kept(answer, 10))]) == (preset == C3)
    if preset != C3:
        with pytest.raises(ConfigError, match="comes before the first update"):
            bind(loaded(preset, "stages.2.updates=[44%]"), host.pipeline.info, REGISTRY)


def test_updates_after_a_cut_that_drops_nothing() -> None:
    answers = [Host(preset, "stages.2.floor=512").ask(looks_at(BOTH)) for preset in PRESETS]
    assert [any(p.stage == "specprune.dynamic" for p in a.probes) for a in answers] == [True, False, True]


def test_share_of_each_cut() -> None:
    assert Host(PAPER).counts(174) == [174, 156, 140, 126, 113]
    assert Host(C3).counts(200, 174) == [200, 174, 148, 124, 103, 84]
    assert Host(OURS).counts() == [184, 125, 112, 100, 90, 81]


def test_floor() -> None:
    assert Host(PAPER).counts(60) == [60, 54, 48, 43, 38]
    assert Host(C3).counts(99, 61) == [99, 61, 59, 59, 59, 59]
    assert Host(OURS, "stages.2.keep=0.5").counts() == [184, 125, 62, 59, 59, 59]


@pytest.mark.parametrize(("preset", "share"), [(PAPER, 1), (C3, 1), (OURS, 0.545)])
def test_rank_weights(preset: str, share: float) -> None:
    weights = signals.rank_weights(125, loaded(preset).stages[2].decay, torch.float64, torch.device("cpu"))
    assert weights[:10].sum() == pytest.approx(share, abs=1e-3)


@pytest.mark.parametrize(
    ("preset", "everything"), [(PAPER, ["stages.1.alpha=100"]), (C3, []), (OURS, ["stages.1.keep=1.0"])]
)
def test_precision_of_rank_weights(preset: str, everything: list[str]) -> None:
    # All 512 are held by the first of these cuts, and the highest ids are attended to most.
    host = Host(preset, *everything)
    host.ask(grey=0)
    host.step(*THERE_AND_BACK, grey=0)
    answer = host.ask(looks_at([*PRIMARY, *WRIST][::-1]), grey=0)
    # In c3 the first cut leaves the lowest 452, and of these all but the best 89 weigh nothing.
    assert kept(answer, 15) == ([*range(1, 310), *range(364, 453)] if preset == C3 else [*range(99, 513)])


@every_preset
def test_confidence(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # All attention on two of four patches alike: an entropy of ln 2, over ln 4.
    assert signals.entropy_confidence(torch.tensor([[[[0.5, 0.5, 0, 0]]]])) == pytest.approx(2)
    calls, host, after = counted(monkeypatch, "entropy_confidence"), Host(preset), []
    for _ in range(2):
        host.policy.reset(host.prompt)
        # Black, so that c3 keeps enough for every cut to drop something: it scores no further otherwise.
        host.ask(looks_at(BOTH), grey=0)
        host.ask(looks_at(BOTH[100:]), grey=0)
        after.append(len(calls))
    assert after == ([3, 6] if preset == C3 else [4, 8])


@every_preset
def test_moving_average(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, host = counted(monkeypatch, "moving_average"), Host(preset)
    for _ in range(2):
        host.ask(looks_at(BOTH), grey=0)
    assert [bool(before.any()) for before, _, _ in calls] == [False, *[True] * (len(calls) // 2 - 1)] * 2
    assert {beta for _, _, beta in calls} == {0.2}
    assert signals.moving_average(torch.ones(1), torch.zeros(1), 0.2) == pytest.approx(0.8)


@pytest.mark.parametrize(("preset", "of_views"), [(PAPER, (4, 0)), (C3, (48, 11)), (OURS, (47, 12))])
def test_views_in_the_dynamic_stage(preset: str, of_views: tuple[int, int]) -> None:
    # Every patch of the first view is attended to more than any of the other.
    host = Host(preset, *([] if preset == C3 else ["stages.2.keep=0.5"]))
    answer = host.ask({**looks_at([*PRIMARY, *WRIST]), **looks_at([*PRIMARY[24:], *WRIST[24:]], [1])})
    assert tuple(n for (n,) in answer.view_counts()["25"].values()) == of_views


def test_dynamic_stage_in_fine() -> None:
    assert Host(PAPER).counts(174, mode="fine") == [174] * 5
    assert Host(C3).counts(200, 174, mode="fine") == [200, 174, 148, 124, 103, 84]
    assert Host(OURS).counts(mode="fine") == [256] * 6


def test_entering_fine() -> None:
    assert modes_after((0.1, 0, -0.1)) == [F, F, F]
    assert modes_after((0.1, 0, 0.1)) == [C, F, C]
    assert modes_after((0.1, 0, 0, 0.9)) == [C, F, C]
    assert modes_after((0, 0, -0.9)) == [C, F, C]
    assert modes_after((0.9, 0, 0)) == [C, C, C]


def test_thresholds_of_fine() -> None:
    assert modes_after((0.34, 0, 0, 0.19)) == [F, F, F]
    assert modes_after((0.36, 0, 0)) == [C, C, C]
    assert modes_after((0, 0, 0, 0.21)) == [C, F, C]
    assert modes_after((0.09, 0, -0.5, 0.19)) == [C, F, C]
    assert modes_after((0.11, 0, -0.5, 0.19)) == [C, C, C]
    assert modes_after((0.09, 0, -0.5, 0.21)) == [C, C, C]


def test_leaving_fine() -> None:
    working = (FAST,) * 10 + (STILL,)
    assert modes_after((0.4, 0, 0.19, 0.29), before=working) == [F, F, F]
    assert modes_after((0, 0, 0.21), before=working) == [C, C, C]
    assert modes_after((0, 0, 0, 0.31), before=working) == [C, C, C]
    assert modes_after((0.51, 0, 0), before=working) == [C, F, C]
    assert modes_after((0, 0, 0.9), (0.1, 0, 0), before=working) == [F, F, F]


def test_first_step_looked_at() -> None:
    assert modes_after(STILL, before=()) == [F, C, F]
    assert modes_after(before=(STILL,) * 10) == [F, C, F]
    assert modes_after(before=(STILL,) * 11) == [F, F, F]


@every_preset
def test_replan(preset: str) -> None:
    quiet, asking = Host(preset), Host(preset, "stages.0.replan=true")
    for host in (quiet, asking):
        host.step(*[FAST] * 10)
        host.ask()
    assert quiet.step(FAST, STILL, STILL) == [False, False, False]
    assert asking.step(FAST, STILL, STILL) == [False, True, False]


@every_preset
def test_readout(preset: str) -> None:
    host = Host(preset)
    host.ask()  # It reads the prompt's last token and all placeholders but the last.
    assert host.backbone.given == [*range(538, 594)] == [*host.layout.span("readout")]
    real = REGISTRY.backbone_factory("openvla-oft").describe("7b", None, {}).layout("put the bowl on the plate")
    assert real.span("readout") == range(real.span("text").stop - 1, real.span("text").stop + 55)


def test_layer_skipping() -> None:
    assert [len(Host(preset).ask().held) for preset in PRESETS] == [32, 32, 32]


@every_preset
def test_attention_weights(preset: str) -> None:
    answer = Host(preset).ask(grey=0)
    layers = {0, 1, 14, 19, 24, 30} if preset == C3 else {0, 1, 9, 14, 19, 24, 31}
    assert {probe.layer for probe in answer.probes} == layers
    assert answer.kernel.startswith("sdpa/")


@every_preset
def test_what_is_timed(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host(preset)
    host.ask()
    host.step(*THERE_AND_BACK)
    stop_the_clock(monkeypatch, host)
    answer = host.ask()
    # A second for the current frames, and one for those looked back at.
    assert (answer.phases["preprocess"], answer.phases["selection"], answer.milliseconds) == (1000, 1000, 2000)


def test_the_table_is_of_these_tests() -> None:
    page = ROOT / "docs/strategies/specprune-fidelity.md"
    rows = [line.split("|") for line in page.read_text().splitlines() if line.startswith("| ")][2:]
    tests = [name for name in globals() if name.startswith("test_") and name != "test_the_table_is_of_these_tests"]
    assert {len(row) for row in rows} == {9}
    assert [row[7] for row in rows] == [f" `tests/plugins/specprune/test_fidelity.py::{name}` " for name in tests]
