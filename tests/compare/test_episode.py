""""""

from __future__ import annotations

import io
import itertools
import json
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.helpers.paths import ROOT
from tokenprune.compare.episode import load_episode, save_episode
from tokenprune.errors import EpisodeError

BUNDLED = ROOT / "adapters/tokenprune_adapters/episodes/libero_spatial.npz"
INSTRUCTION = "pick up the black bowl between the plate and the ramekin and place it on the plate"


def jpeg(colour: tuple[int, int, int]) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 8), colour).save(buffer, "JPEG", quality=95, subsampling=0)
    return buffer.getvalue()


COLOURS = [(250, 10, 10), (10, 250, 10), (10, 10, 250)]


def valid_arrays() -> dict[str, np.ndarray]:
    """Three steps, two views, written down key by key rather than through save_episode."""
    arrays: dict[str, np.ndarray] = {
        "state": np.arange(24, dtype=np.float32).reshape(3, 8),
        "actions": np.arange(21, dtype=np.float32).reshape(3, 7),
        "meta": meta_bytes(),
    }
    for view, colours in (("primary", COLOURS), ("wrist", COLOURS[::-1])):
        files = [jpeg(colour) for colour in colours]
        a, b, c = map(len, files)
        arrays[view] = np.frombuffer(b"".join(files), np.uint8)
        arrays[f"{view}_offsets"] = np.array([0, a, a + b, a + b + c], np.int64)
    return arrays


def meta_bytes(**changes: Any) -> np.ndarray:
    meta = {"format_version": 1, "instruction": "pick up the mug", "views": ["primary", "wrist"], "seed": 3} | changes
    return np.frombuffer(json.dumps({k: v for k, v in meta.items() if v is not None}).encode(), np.uint8)


def written(path: Path, **changes: np.ndarray | None) -> Path:
    arrays = valid_arrays() | changes
    np.savez(path / "episode.npz", **{key: array for key, array in arrays.items() if array is not None})
    return path / "episode.npz"


def test_bundled_episode_is_a_success_in_libero() -> None:
    episode = load_episode(BUNDLED)
    assert BUNDLED.stat().st_size <= 4_000_000
    assert 100 <= len(episode) <= 250
    assert episode.name == "libero_spatial"
    assert episode.instruction == INSTRUCTION
    assert episode.views == ("primary", "wrist")
    assert episode.state.shape == (len(episode), 8)
    assert episode.actions.shape == (len(episode), 7)
    assert episode.meta["success"] is True
    assert episode.meta["suite"] == "libero_spatial"
    assert episode.meta["task"] == INSTRUCTION.replace(" ", "_")
    assert episode.meta["control_hz"] == 20
    assert {"init_state_index", "seed", "image", "environment"} <= episode.meta.keys()


def test_every_bundled_frame_decodes_and_the_scene_moves() -> None:
    episode = load_episode(BUNDLED)
    for view in episode.views:
        frames = np.stack([episode.frame(step, view) for step in range(len(episode))])
        assert frames.shape == (len(episode), 224, 224, 3)
        assert frames.dtype == np.uint8
        assert frames[0].std() > 20
        assert all((a != b).any() for a, b in itertools.pairwise(frames))


def test_bundled_primary_view_is_upright() -> None:
    """LIBERO's agentview has the grey wall behind the table at the top, the wooden, reddish table at the bottom."""
    frame = load_episode(BUNDLED).frame(0, "primary").astype(float)
    red_over_blue = (frame[..., 0] - frame[..., 2]).mean(axis=1)
    assert red_over_blue[:30].mean() < 5 < 15 < red_over_blue[-30:].mean()


def test_bundled_actions_grasp_carry_and_release() -> None:
    """Gripper: 1, 0 in one stretch, 1 again (open, closed, open); the bowl's rim keeps the closed fingers apart."""
    episode = load_episode(BUNDLED)
    assert np.abs(episode.actions).max() <= 1
    assert np.flatnonzero(np.diff(episode.actions[:, 6])).size == 2
    assert episode.actions[[0, -1], 6].tolist() == [1, 1]
    closed = np.flatnonzero(episode.actions[:, 6] == 0)
    opening = episode.state[closed[-1], 6] - episode.state[closed[-1], 7]
    assert 0.002 < opening < 0.02
    assert episode.state[closed, 2].max() - episode.state[closed[0], 2] > 0.08


def test_bundled_states_precede_their_actions() -> None:
    """While the arm is driven at a steady command, the next state lies in the direction of the action."""
    episode = load_episode(BUNDLED)
    motion = np.diff(episode.state[:, :3], axis=0)
    commanded = episode.actions[:-1, :3]
    fast = np.linalg.norm(commanded, axis=1) > 0.3
    agrees = (motion[fast] * commanded[fast]).sum(axis=1) > 0
    assert agrees.mean() > 0.9


def test_frames_and_observations_belong_to_their_step_and_view(tmp_path: Path) -> None:
    episode = load_episode(written(tmp_path))
    for step in range(3):
        observation = episode.observation(step)
        assert set(observation) == {"images", "state"}
        for view, colour in (("primary", COLOURS[step]), ("wrist", COLOURS[2 - step])):
            image = observation["images"][view]
            assert image.shape == (8, 16, 3)
            assert image.dtype == np.uint8
            assert np.abs(image.astype(int) - colour).max() <= 4
        np.testing.assert_array_equal(observation["state"], np.arange(8 * step, 8 * step + 8, dtype=np.float32))


def test_an_observation_can_be_changed_without_changing_the_episode(tmp_path: Path) -> None:
    episode = load_episode(written(tmp_path))
    observation = episode.observation(1)
    observation["state"][:] = -1
    observation["images"]["primary"][:] = 0
    assert episode.state[1, 0] == 8
    assert episode.frame(1, "primary").max() > 200
    with pytest.raises(ValueError, match="read-only"):
        episode.actions[0, 0] = 1


def test_keys_the_format_does_not_name_are_ignored(tmp_path: Path) -> None:
    assert len(load_episode(written(tmp_path, more=np.zeros(2)))) == 3


@pytest.mark.parametrize("step", [-1, 3])
def test_a_step_outside_the_episode_is_refused(tmp_path: Path, step: int) -> None:
    episode = load_episode(written(tmp_path))
    with pytest.raises(EpisodeError, match=f"no step {step}; valid: 0 to 2"):
        episode.frame(step, "wrist")
    with pytest.raises(EpisodeError, match=f"no step {step}; valid: 0 to 2"):
        episode.observation(step)


def test_an_unknown_view_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(EpisodeError, match="no view 'wirst'; did you mean 'wrist'"):
        load_episode(written(tmp_path)).frame(0, "wirst")


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(EpisodeError, match=r"cannot open episode .*nowhere\.npz: No such file"):
        load_episode(tmp_path / "nowhere.npz")
    with pytest.raises(EpisodeError, match="cannot open episode"):
        load_episode(tmp_path)


@pytest.mark.parametrize("content", [b"", b"hello, not a zip", pickle.dumps([1, 2])])
def test_not_an_npz(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "episode.npz"
    path.write_bytes(content)
    with pytest.raises(EpisodeError, match=r"episode\.npz is not an npz file"):
        load_episode(path)


def test_a_single_npy_array_is_not_an_npz(tmp_path: Path) -> None:
    np.save(tmp_path / "episode.npy", np.zeros(3))
    with pytest.raises(EpisodeError, match="is not an npz file"):
        load_episode(tmp_path / "episode.npy")


@given(keep=st.floats(0.01, 0.999))
def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path_factory: pytest.TempPathFactory, keep: float) -> None:
    path = written(tmp_path_factory.mktemp("cut"))
    content = path.read_bytes()
    path.write_bytes(content[: max(4, int(keep * len(content)))])
    with pytest.raises(EpisodeError, match="truncated or damaged"):
        load_episode(path)


@given(data=st.data())
def test_damaged_bytes_never_escape_as_another_error(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = written(tmp_path_factory.mktemp("damaged"))
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        episode = load_episode(path)
    except EpisodeError:
        return
    np.testing.assert_array_equal(episode.actions, valid_arrays()["actions"])


@pytest.mark.parametrize("key", sorted(valid_arrays()))
def test_a_missing_key_is_named(tmp_path: Path, key: str) -> None:
    with pytest.raises(EpisodeError, match=rf"episode\.npz lacks '{key}'"):
        load_episode(written(tmp_path, **{key: None}))


@pytest.mark.parametrize("key", ["actions", "meta", "unrelated"])
def test_a_pickled_object_is_never_loaded(tmp_path: Path, key: str) -> None:
    with pytest.raises(EpisodeError, match=f"'{key}' holds a pickled object"):
        load_episode(written(tmp_path, **{key: np.array([{"a": 1}], dtype=object)}))


def test_a_member_that_is_no_array(tmp_path: Path) -> None:
    path = written(tmp_path, state=None)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("state.npy", b"plain text")
    with pytest.raises(EpisodeError, match="'state'"):
        load_episode(path)


def offsets(*changes: tuple[int, int]) -> np.ndarray:
    values = valid_arrays()["wrist_offsets"].copy()
    for index, value in changes:
        values[index] = value
    return values


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (offsets((1, 10_000)), "'wrist_offsets' does not rise at step 1"),
        (offsets((2, offsets()[1])), "'wrist_offsets' does not rise at step 1"),
        (offsets((1, -5)), "'wrist_offsets' does not rise at step 0"),
        (offsets((3, 10_000)), "'wrist_offsets' runs from 0 to 10000; valid: 0 to"),
        (offsets((0, -1)), "'wrist_offsets' runs from -1 to"),
        (offsets()[:-1], "'wrist_offsets' has 3 entries; 3 steps need 4"),
        (offsets().astype(np.int32), "'wrist_offsets' is int32 with 1 dimensions; valid: int64 with 1"),
    ],
)
def test_wrong_offsets(tmp_path: Path, wrong: np.ndarray, message: str) -> None:
    with pytest.raises(EpisodeError, match=message):
        load_episode(written(tmp_path, wrist_offsets=wrong))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"actions": np.zeros((2, 7), np.float32)}, "'actions' has 2 steps but 'state' has 3"),
        ({"actions": np.zeros((3, 7))}, "'actions' is float64 with 2 dimensions; valid: float32 with 2"),
        ({"state": np.zeros(3, np.float32)}, "'state' is float32 with 1 dimensions"),
        ({"state": np.zeros((0, 8), np.float32)}, "'state' has no steps"),
        ({"state": np.full((3, 8), np.nan, np.float32)}, "'state' holds values that are not finite"),
        ({"actions": np.full((3, 7), np.inf, np.float32)}, "'actions' holds values that are not finite"),
        ({"meta": np.frombuffer(b"{not json", np.uint8)}, "'meta' is not UTF-8 JSON"),
        ({"meta": np.frombuffer(b"\xff\xfe", np.uint8)}, "'meta' is not UTF-8 JSON"),
        ({"meta": np.frombuffer(b"[1]", np.uint8)}, "'meta' is not a JSON object"),
        ({"meta": meta_bytes(instruction=None)}, "'meta' lacks 'instruction'"),
        ({"meta": meta_bytes(instruction=7)}, "'instruction' in 'meta' is not text"),
        ({"meta": meta_bytes(views=None)}, "'meta' lacks 'views'"),
        ({"meta": meta_bytes(views=[])}, "'views' in 'meta' is not a list of camera names"),
        ({"meta": meta_bytes(views="wrist")}, "'views' in 'meta' is not a list of camera names"),
        ({"meta": meta_bytes(views=["primary", "third"])}, "lacks 'third'"),
        ({"meta": meta_bytes(format_version=None)}, "'meta' lacks 'format_version'"),
        ({"meta": meta_bytes(format_version=2)}, "has format version 2; valid: 1"),
    ],
)
def test_wrong_contents(tmp_path: Path, changes: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(EpisodeError, match=message):
        load_episode(written(tmp_path, **changes))


@pytest.mark.parametrize("damage", ["cut", "zeros", "png"])
def test_a_corrupt_jpeg_names_step_and_view(tmp_path: Path, damage: str) -> None:
    files = [jpeg(colour) for colour in COLOURS]
    png = io.BytesIO()
    Image.new("RGB", (16, 8)).save(png, "PNG")
    files[1] = {"cut": files[1][:-40], "zeros": bytes(len(files[1])), "png": png.getvalue()}[damage]
    ends = np.cumsum([0, *map(len, files)]).astype(np.int64)
    changes = {"wrist": np.frombuffer(b"".join(files), np.uint8), "wrist_offsets": ends}
    episode = load_episode(written(tmp_path, **changes))
    assert episode.frame(0, "wrist").shape == (8, 16, 3)
    for read in (lambda: episode.frame(1, "wrist"), lambda: episode.observation(1)):
        with pytest.raises(EpisodeError, match="frame of step 1, view 'wrist' is not a readable JPEG"):
            read()


@given(
    steps=st.integers(1, 5),
    widths=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    views=st.lists(st.text("abcfile_", min_size=1, max_size=8), min_size=1, max_size=3, unique=True),
    instruction=st.text(),
    seed=st.integers(0, 2**32 - 1),
)
def test_round_trip(
    tmp_path_factory: pytest.TempPathFactory,
    steps: int,
    widths: tuple[int, int],
    views: list[str],
    instruction: str,
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    state, actions = (rng.standard_normal((steps, width)).astype(np.float32) for width in widths)
    colours = {view: [tuple(map(int, rng.integers(0, 256, 3))) for _ in range(steps)] for view in views}
    frames = {view: [jpeg(colour) for colour in row] for view, row in colours.items()}
    path = tmp_path_factory.mktemp("round") / "trip.npz"
    save_episode(path, frames, state, actions, {"instruction": instruction, "seed": seed}, more=rng.random(2))
    episode = load_episode(path)
    assert (episode.name, episode.instruction, episode.views) == ("trip", instruction, tuple(views))
    assert episode.meta["seed"] == seed
    np.testing.assert_array_equal(episode.state, state)
    np.testing.assert_array_equal(episode.actions, actions)
    assert state.flags.writeable
    for view in views:
        for step in range(steps):
            expected = np.array(Image.open(io.BytesIO(frames[view][step])))
            np.testing.assert_array_equal(episode.frame(step, view), expected)


def test_saving_a_wrong_episode_writes_nothing(tmp_path: Path) -> None:
    arrays, path = valid_arrays(), tmp_path / "out.npz"
    frames = {"wrist": [jpeg(colour) for colour in COLOURS]}
    with pytest.raises(EpisodeError, match="'actions' has 2 steps"):
        save_episode(path, frames, arrays["state"], arrays["actions"][:2], {"instruction": "x"})
    with pytest.raises(EpisodeError, match="'more' holds Python objects"):
        save_episode(
            path, frames, arrays["state"], arrays["actions"], {"instruction": "x"}, more=np.array([{}], dtype=object)
        )
    assert not path.exists()


def test_reading_an_episode_needs_no_torch() -> None:
    code = "import sys, tokenprune.compare.episode; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
