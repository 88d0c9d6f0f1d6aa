"""Pictures of results: what is grey, what keeps its colours, which reason is drawn where, and every refusal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers.paths import EPISODE
from tests.helpers.planting import REGISTRY
from tests.helpers.tiny_oft import tiny_config, tiny_policy_parts
from tokenprune.compare.comparison import compare
from tokenprune.compare.episode import load_episode
from tokenprune.errors import ResultError
from tokenprune.pipelines.loader import load_pipeline
from tokenprune.report.provenance import provenance
from tokenprune.report.result import CompareRow, RunSettings
from tokenprune.viz.draw import HEIGHT, WIDTH, draw_query
from tokenprune.viz.film import write_pictures
from tokenprune.viz.paint import paint, patch_box
from tokenprune.viz.palette import reason_colours
from tokenprune.viz.reading import read_result
from tokenprune.viz.result import QueryResult, Result, View

SPEED = np.linspace(0, 1, 20)
SIDE = 160


def segment(role: str, start: int, length: int, view: str | None = None, **more: Any) -> dict[str, Any]:
    vision = {"grid": [4, 4], "prunable": True} if view else {"grid": None, "prunable": False}
    return {"role": role, "view": view, "start": start, "length": length, **vision, **more}


def query(mode: str = "coarse", **more: Any) -> dict[str, Any]:
    """Tokens 1 to 16 and 17 to 32 of two views; two cuts, the first keeps ids up to 24, the second up to 8."""
    held = [36, 28, 28, 12]
    return {
        "pipeline": "mine",
        "mode": mode,
        "tokens_held": held,
        "tokens_planned": held,
        "keys_cached": [],
        "layers_skipped": [],
        "head_passes": {"ran": 0, "spared": 0},
        "kept_per_view": {},
        "query_ms": 1.5,
        "phases_ms": {},
        "attention_kernel": "math",
        "probes": [],
        "encoder_attention": [],
        "protected_over_budget": {},
        "looked_back": {},
        "fallback": "",
        "replayed": False,
        "execution": "eager",
        "kept_ids": {"2": [[*range(1, 9)]], "0": [[*range(1, 25)]]},
        "reasons": {},
        "actions": [[0.0] * 7] * 8,
        **more,
    }


SETTINGS = {
    "preset": "small", "checkpoint": None, "device": "cpu", "dtype": "auto", "seed": 0, "options": {},
    "episode": "bundled", "execution": "eager",
}  # fmt: skip


def plain(*queries: dict[str, Any]) -> dict[str, Any]:
    queries = queries or (query(), query("fine"))
    return {
        "format_version": 1,
        "kind": "run",
        "provenance": provenance(torch.device("cpu")).to_json(),
        "settings": dict(SETTINGS),
        "backbone": {
            "name": "openvla-oft",
            "source": "small",
            "untrained": True,
            "dtype": "float32",
            "decoder": {
                "depth": 4, "hidden": 8, "heads": 2, "kv_heads": 2, "head_dim": 4, "mlp": 16, "causal": False,
            },
            "views": ["primary", "wrist"],
            "action": {"horizon": 8, "groups": {"translation": [0, 1, 2], "gripper": [6]}, "gripper": [6, 0.5]},
            "capabilities": [],
        },
        "note": "",
        "episode": {"name": "e", "instruction": "push it", "steps": [8 * i for i in range(len(queries))]},
        "layout": {
            "segments": [
                segment("bos", 0, 1),
                segment("vision", 1, 16, "primary"),
                segment("vision", 17, 16, "wrist"),
                segment("text", 33, 3),
            ]
        },
        "pipeline": {"name": "mine", "modes": ["coarse", "fine"], "stages": []},
        "queries": list(queries),
        "findings": {},
    }  # fmt: skip


def comparison(**queries: list[dict[str, Any]]) -> dict[str, Any]:
    """A comparison with these queries by label, in which only `dense` is declared."""
    own = {label: [{k: v for k, v in one.items() if k != "actions"} for one in ones] for label, ones in queries.items()}
    shared = {key: value for key, value in plain().items() if key not in ("pipeline", "findings")}
    row = {
        **dict.fromkeys(CompareRow.model_fields, 1), "pipeline": "dense", "phases": {}, "error": {},
        "prefill": {"speedup": 1, "flop_ratio": 1, "efficiency": 1},
    }  # fmt: skip
    return shared | {
        "kind": "compare", "episode": plain()["episode"] | {"meta": {}}, "warmup_queries": 0,
        "pipelines": {"dense": {"version": 1, "name": "dense"}}, "notes": {}, "rows": [row], "queries": own,
    }  # fmt: skip


def read(data: dict[str, Any], folder: Path, pipeline: str | None = None) -> Result:
    path = folder / "result.json"
    path.write_text(json.dumps(data), encoding="utf-8")
    return read_result(path, pipeline)


def frames(step: int = 0) -> dict[str, np.ndarray]:
    """Patches of saturated, different colours, none of them a colour of a reason."""
    rng = np.random.default_rng(step)
    blocks = {view: rng.integers(0, 2, (4, 4, 3)) * 90 + [60, 20, 100] for view in ("primary", "wrist")}
    return {view: np.kron(block, np.ones((14, 14, 1))).astype(np.uint8) for view, block in blocks.items()}


def painted(result: Result, view: int = 0, index: int = 0, side: int = SIDE) -> np.ndarray:
    shown = result.views[view]
    return paint(frames()[shown.name], side, shown, result.queries[index], reason_colours(result.reason_names))


def patch(picture: np.ndarray, number: int) -> np.ndarray:
    return picture[patch_box((4, 4), number, picture.shape[:2])]


def contains(page: np.ndarray, picture: np.ndarray) -> bool:
    height, width = picture.shape[:2]
    corners = np.argwhere((page[: 1 - height, : 1 - width] == picture[0, 0]).all(-1))
    return any(np.array_equal(page[y : y + height, x : x + width], picture) for y, x in corners)


def is_grey(block: np.ndarray) -> bool:
    return bool((block.max(-1) == block.min(-1)).all())


def test_each_token_is_lost_at_the_first_cut_that_leaves_it_out(tmp_path: Path) -> None:
    result = read(plain(), tmp_path).queries[0]
    assert result.cuts == ("0", "2")
    assert result.lost == dict.fromkeys(range(25, 33), 0) | dict.fromkeys(range(9, 25), 1)
    assert result.reasons == dict.fromkeys(range(1, 9), "score")


def test_a_cut_before_layer_0_comes_first(tmp_path: Path) -> None:
    kept = {"10": [[1]], "2": [[1, 2]], "embedding": [[1, 2, 3]]}
    assert read(plain(query(kept_ids=kept)), tmp_path).queries[0].cuts == ("embedding", "2", "10")


def test_the_foremost_reason_of_the_last_cut_that_gave_one_counts(tmp_path: Path) -> None:
    reasons = {
        "0": {"local": [[1, 2, 3, 4, 20]], "dynamic": [[3, 4]], "previous": [[2, 3]], "own": [[1, 5]]},
        "2": {"previous": [[4]], "own": [[6]], "score": [[2, 6]]},
    }
    result = read(plain(query(reasons=reasons)), tmp_path)
    assert result.queries[0].reasons == {
        1: "local", 2: "score", 3: "dynamic", 4: "previous", 5: "own", 6: "own", 7: "score", 8: "score",
    }  # fmt: skip
    assert result.reason_names == ("dynamic", "previous", "local", "own", "score")


def test_reasons_beyond_the_colours_share_one(tmp_path: Path) -> None:
    reasons = {"0": {name: [[i]] for i, name in enumerate("abcdefg", start=1)}}
    result = read(plain(query(reasons=reasons)), tmp_path)
    assert result.reason_names == ("a", "b", "c", "other", "score")
    assert len(set(reason_colours(result.reason_names).values())) == 5


def test_cut_patches_are_grey_and_kept_ones_keep_their_colours(tmp_path: Path) -> None:
    result = read(plain(), tmp_path)
    original = np.array(Image.fromarray(frames()["primary"]).resize((SIDE, SIDE), Image.Resampling.BICUBIC))
    picture = painted(result)
    for number in range(8):
        np.testing.assert_array_equal(patch(picture, number)[3:-3, 3:-3], patch(original, number)[3:-3, 3:-3])
        assert not is_grey(patch(picture, number)[5:-5, 5:-5])
    for number in range(8, 16):
        assert is_grey(patch(picture, number))
    # Still recognisable: what was darker stays darker.
    assert np.std([patch(picture, number).mean() for number in range(8, 16)]) > 3


def test_patches_cut_earlier_are_fainter(tmp_path: Path) -> None:
    result = read(plain(), tmp_path)
    flat = np.full((56, 56, 3), (90, 30, 30), np.uint8)
    picture = paint(flat, SIDE, result.views[1], result.queries[0], reason_colours(result.reason_names))
    early, late = patch(picture, 15), patch(picture, 0)
    assert is_grey(early)
    assert is_grey(late)
    assert early.mean() > late.mean() + 20


@pytest.mark.parametrize("side", [SIDE, 40])
def test_the_colour_of_a_reason_frames_its_patch_and_no_other(tmp_path: Path, side: int) -> None:
    reasons = {"0": {"dynamic": [[2]], "previous": [[3, 2]], "local": [[4]]}}
    result = read(plain(query(reasons=reasons)), tmp_path)
    picture, colours = painted(result, side=side), reason_colours(result.reason_names)
    expected = ["score", "dynamic", "previous", "local", *["score"] * 4, *[None] * 8]
    for number, name in enumerate(expected):
        for reason, colour in colours.items():
            ring = (patch(picture, number) == colour).all(-1)
            assert ring.any() == (reason == name)
            assert not ring[4:-4, 4:-4].any()


def test_non_square_grids_and_frames_are_painted() -> None:
    view = View("primary", 1, 6, (2, 3), True)
    assert patch_box((2, 3), 4, (20, 60)) == (slice(10, 20), slice(20, 40))
    lost = QueryResult(0, "m", "", (7,), ("0",), {5: 0}, {}, {})
    picture = paint(np.full((20, 60, 3), (200, 10, 10), np.uint8), 60, view, lost, {})
    assert picture.shape == (20, 60, 3)
    assert is_grey(picture[10:, 20:40])
    assert not (picture[:10].max(-1) == picture[:10].min(-1)).any()


def test_the_page_holds_each_view_as_painted_and_its_legend(tmp_path: Path) -> None:
    result = read(plain(query(reasons={"0": {"dynamic": [[2]]}})), tmp_path)
    page = draw_query(result, 0, frames(), SPEED)
    assert page.shape == (HEIGHT, WIDTH, 3)
    assert page.dtype == np.uint8
    for view in (0, 1):
        assert contains(page, painted(result, view, side=400))
    for colour in reason_colours(("dynamic", "score")).values():
        assert (page[:, 850:] == colour).all(-1).any()


def test_other_reasons_make_another_page_and_equal_ones_the_same(tmp_path: Path) -> None:
    one, other = ({"0": {name: [[2]]}} for name in ("dynamic", "local"))
    pages = [draw_query(read(plain(query(reasons=r)), tmp_path), 0, frames(), SPEED) for r in (one, other, one)]
    assert not np.array_equal(pages[0], pages[1])
    np.testing.assert_array_equal(pages[0], pages[2])


@pytest.mark.parametrize(
    "change",
    [
        {"mode": "fine"},
        {"tokens_held": [36, 28, 28, 11]},
        {"fallback": "stage 'x' raised"},
        {"looked_back": {"x": [4]}},
    ],
)
def test_everything_the_result_says_of_a_query_shows(tmp_path: Path, change: dict[str, Any]) -> None:
    pages = [draw_query(read(plain(q), tmp_path), 0, frames(), SPEED) for q in (query(), query(**change))]
    assert not np.array_equal(*pages)


def test_the_note_on_untrained_weights_stands_on_the_page(tmp_path: Path) -> None:
    trained = plain()
    trained["backbone"]["untrained"] = False
    pages = [draw_query(read(data, tmp_path), 0, frames(), SPEED) for data in (plain(), trained)]
    corners = [page[:35, -300:] for page in pages]
    assert (corners[0] != 255).any()
    assert (corners[1] == 255).all()


@pytest.mark.parametrize("kept", [{}, {"0": [[*range(1, 33)]]}])
def test_where_nothing_is_cut_every_pixel_stays(tmp_path: Path, kept: dict[str, Any]) -> None:
    result = read(plain(query(kept_ids=kept, tokens_held=[36] * 4)), tmp_path)
    assert not result.queries[0].reasons
    original = np.array(Image.fromarray(frames()["wrist"]).resize((400, 400), Image.Resampling.BICUBIC))
    assert contains(draw_query(result, 0, frames(), SPEED), original)


@pytest.mark.parametrize("views", [1, 2, 3])
def test_one_to_three_views_fit_the_page(tmp_path: Path, views: int) -> None:
    data = plain(query(kept_ids={"embedding": [[1, 2, 3]]}))
    names = ("primary", "wrist", "left")[:views]
    data["layout"]["segments"] = [segment("vision", 16 * i, 16, name) for i, name in enumerate(names)]
    result = read(data, tmp_path)
    pixels = {name: frames()["primary"] for name in names}
    page = draw_query(result, 0, pixels, SPEED)
    side = 400 if views < 3 else 280
    for view in result.views:
        assert contains(page, paint(pixels[view.name], side, view, result.queries[0], reason_colours(("score",))))


def test_nothing_is_written_over_the_edge_of_the_page(tmp_path: Path) -> None:
    modes = [f"a mode with a long name {i}" for i in range(6)]
    reasons = {"0": {f"a reason with a long name {i}": [[i]] for i in range(1, 8)}}
    data = plain(*(query(mode, reasons=reasons) for mode in modes))
    data["backbone"]["source"] = data["pipeline"]["name"] = "long/" * 60
    # Read as mathematics this would be an error.
    data["episode"]["instruction"] = r"put $\frac{1 on the very long plate " * 20
    page = draw_query(read(data, tmp_path), 0, frames(), SPEED)
    assert (page[:, -8:] == 255).all()
    assert (page[-4:] == 255).all()


def test_without_translation_the_strip_shows_modes_alone(tmp_path: Path) -> None:
    data = plain()
    del data["backbone"]["action"]["groups"]["translation"]
    result = read(data, tmp_path)
    assert result.translation == ()
    assert not np.array_equal(
        draw_query(result, 0, frames(), np.empty(0)), draw_query(read(plain(), tmp_path), 0, frames(), SPEED)
    )


def test_a_picture_per_query_and_a_film_of_all(tmp_path: Path) -> None:
    result = read(plain(query(), query("fine"), query()), tmp_path)
    written = write_pictures(result, frames, SPEED, tmp_path / "out")
    assert [path.name for path in written] == [*(f"mine-query-00{i}.png" for i in range(3)), "mine.gif"]
    assert sorted((tmp_path / "out").iterdir()) == sorted(written)
    with Image.open(written[-1]) as film:
        assert film.n_frames == 3
        assert film.info["loop"] == 0
        for index in range(3):
            film.seek(index)
            page = np.array(Image.open(written[index]))
            np.testing.assert_array_equal(page, draw_query(result, index, frames(8 * index), SPEED))
            assert np.abs(np.array(film.convert("RGB")).astype(int) - page).mean() < 3


def test_the_same_result_gives_the_same_bytes(tmp_path: Path) -> None:
    result = read(plain(), tmp_path)
    one, two = (write_pictures(result, frames, SPEED, tmp_path / name) for name in ("one", "two"))
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in two]
    with Image.open(one[0]) as picture:
        assert picture.info == {}


def test_one_query_alone_makes_no_film(tmp_path: Path) -> None:
    data = plain()
    data["pipeline"]["name"] = "../x@keep=0.5"
    written = write_pictures(read(data, tmp_path), frames, SPEED, tmp_path / "out", 1)
    assert written == [tmp_path / "out" / ".._x@keep=0.5-query-001.png"]
    assert written[0].exists()


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    result = read(plain(), tmp_path)
    for wrong in (-1, 2):
        with pytest.raises(ResultError, match="0 to 1"):
            write_pictures(result, frames, SPEED, tmp_path / "out", wrong)
    with pytest.raises(ResultError, match=r"result\.json"):
        write_pictures(result, frames, SPEED, tmp_path / "result.json", 0)


def drop(data: dict[str, Any], *path: Any) -> dict[str, Any]:
    inner = data
    for key in path[:-1]:
        inner = inner[key]
    del inner[path[-1]]
    return data


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([1], "no 'kind'"),
        (plain() | {"kind": "runn"}, "did you mean 'run'"),
        (plain() | {"format_version": 2}, "version 2; valid: 1"),
        (drop(plain(), "layout"), "lacks 'layout'.*again with `tokenprune run`"),
        (drop(plain(), "queries", 1, "kept_ids"), r"lacks 'queries\.1\.kept_ids'"),
        (plain() | {"layuot": {}}, "'layuot' is {}: Extra inputs"),
        (plain() | {"settings": None}, "no 'settings'; make the result with `tokenprune run`"),
        (plain() | {"pipeline": {"stages": []}}, "'pipeline'.*needs a 'name'"),
        (plain() | {"pipeline": {"name": "mine", "modes": "coarse"}}, "'modes' of a pipeline must be a list"),
        (plain(query(tokens_held=[])), "tokens_held"),
        (plain(query(kept_ids={"first": [[1]]})), "step 0.*'first'.*valid"),
        (plain(query(kept_ids={"1": []})), "step 0.*'1'"),
        (plain(query(kept_ids={"1": [[34]]})), "token 34"),
        (plain() | {"queries": [query()]}, "1 queries, the episode 2 steps"),
        (plain() | {"layout": {"segments": [segment("vision", 0, 33, "primary")]}}, "'primary'.*33"),
        (comparison(a=[query()] * 2), "queries of 'a'"),
        (comparison(), "queries"),
    ],
)
def test_what_is_no_result_is_refused(tmp_path: Path, data: Any, message: str) -> None:
    with pytest.raises(ResultError, match=message):
        read(data, tmp_path)


def test_files_that_hold_no_result_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text.json").write_text("steps", encoding="utf-8")
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00")
    for name in ("text.json", "bytes.json"):
        with pytest.raises(ResultError, match="not JSON"):
            read_result(tmp_path / name)
    for path in (tmp_path, tmp_path / "nowhere.json"):
        with pytest.raises(ResultError, match="cannot open"):
            read_result(path)


def test_a_comparison_is_read_by_label(tmp_path: Path) -> None:
    labels = ("random", "fastv@keep=8,after=0")
    loaded = [load_pipeline(name, REGISTRY) for name in labels]
    episode, backbone = load_episode(EPISODE), tiny_policy_parts(tiny_config())
    data = compare(backbone, loaded, episode, REGISTRY, queries=2, settings=RunSettings(**SETTINGS)).to_json()
    results = {name: read(data, tmp_path, name) for name in (None, "dense", *labels)}
    assert results[None].label == "random"
    assert not results["dense"].queries[0].lost
    for name, cut in zip(labels, ("embedding", "0"), strict=True):
        for index, drawn in enumerate(results[name].queries):
            kept = data["queries"][name][index]["kept_ids"][cut][0]
            assert set(drawn.reasons) == set(kept)
            assert set(drawn.lost) == set(range(1, 33)) - set(kept)
    assert [view.name for view in results[None].views] == ["primary", "wrist"]
    assert (results[None].horizon, results[None].translation) == (8, (0, 1, 2))
    with pytest.raises(ResultError, match="did you mean 'random'"):
        read(data, tmp_path, "randm")
