"""Recorded episodes: camera frames, robot state and executed actions of one run, in one `.npz` file.

Format, version 1 (numpy arrays only, no pickled objects):

| key | array | meaning |
| --- | --- | --- |
| `<view>` | uint8 `[bytes]` | the JPEG files of one camera, back to back |
| `<view>_offsets` | int64 `[T + 1]` | frame `t` is `bytes[offsets[t]:offsets[t + 1]]` |
| `state` | float32 `[T, S]` | proprioceptive state before the action |
| `actions` | float32 `[T, D]` | the action given to the environment |
| `meta` | uint8 `[bytes]` | UTF-8 JSON object with `format_version`, `instruction`, `views` and free-form provenance |

Other keys are ignored, so a recording may carry more than a policy needs.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from tokenprune.errors import EpisodeError, nearest

FORMAT_VERSION = 1


@dataclass(frozen=True, eq=False)
class Episode:
    """One recorded episode; frames are decoded on access.

    Attributes:
        name: The file's name without its suffix.
        instruction: The language instruction.
        views: Camera names.
        state: Proprioceptive state before each action, float32 `[T, S]`, read-only.
        actions: Executed actions, float32 `[T, D]`, read-only.
        meta: What its file says of its origin.
    """

    name: str
    instruction: str
    views: tuple[str, ...]
    state: npt.NDArray[np.float32]
    actions: npt.NDArray[np.float32]
    meta: Mapping[str, object]
    _jpegs: Mapping[str, tuple[bytes, npt.NDArray[np.int64]]] = field(repr=False)

    def __len__(self) -> int:
        """Return the number of control steps."""
        return len(self.state)

    def frame(self, step: int, view: str) -> npt.NDArray[np.uint8]:
        """Decode one camera frame.

        Args:
            step: Control step, `0 <= step < len(self)`.
            view: One of `self.views`.

        Returns:
            The picture before the action of `step`, uint8 RGB `[H, W, 3]`.

        Raises:
            EpisodeError: The step or view does not exist, or its JPEG is damaged.
        """
        self._check_step(step)
        if view not in self.views:
            raise EpisodeError(f"episode '{self.name}' has no view '{view}'{nearest(view, self.views)}")
        data, offsets = self._jpegs[view]
        try:
            with Image.open(io.BytesIO(data[offsets[step] : offsets[step + 1]]), formats=["JPEG"]) as image:
                return np.array(image.convert("RGB"))
        except Exception as error:  # Pillow's decoder raises many types on damaged bytes
            raise EpisodeError(
                f"episode '{self.name}': the frame of step {step}, view '{view}' is not a readable JPEG: {error}"
            ) from error

    def observation(self, step: int) -> dict[str, Any]:
        """Return the observation before the action of `step`.

        Args:
            step: Control step, `0 <= step < len(self)`.

        Returns:
            `{"images": {view: uint8 [H, W, 3]}, "state": float32 [S]}`.

        Raises:
            EpisodeError: The step does not exist, or a JPEG is damaged.
        """
        self._check_step(step)
        return {"images": {view: self.frame(step, view) for view in self.views}, "state": self.state[step].copy()}

    def _check_step(self, step: int) -> None:
        # A negative index would silently read from the end.
        if not 0 <= step < len(self):
            raise EpisodeError(f"episode '{self.name}' has no step {step}; valid: 0 to {len(self) - 1}")


def load_episode(path: str | Path) -> Episode:
    """Read a recorded episode.

    Args:
        path: An `.npz` file in the format this module describes.

    Returns:
        The episode. Its frames are not decoded yet, so a damaged JPEG raises in `Episode.frame`.

    Raises:
        EpisodeError: The file is missing, is not an npz file, is truncated, lacks a key, holds a pickled object, has
            arrays of the wrong type or length, or has an unknown format version.
    """
    path = Path(path)
    try:
        file = path.open("rb")
    except OSError as error:
        raise EpisodeError(f"cannot open episode {path}: {error.strerror}") from error
    with file:
        if file.read(4) != b"PK\x03\x04":
            raise EpisodeError(f"{path} is not an npz file (it does not start like a zip archive)")
        file.seek(0)
        try:
            # An open file, not the path: numpy leaves a path's file open when the archive is damaged.
            with np.load(file, allow_pickle=False) as archive:
                arrays = {key: _read(archive, key, path) for key in archive.files}
        except EpisodeError:
            raise
        except Exception as error:  # the zip reader raises many types on damaged bytes
            raise EpisodeError(f"{path} is truncated or damaged: {error}") from error
    return _build(arrays, path)


def save_episode(
    path: str | Path,
    frames: Mapping[str, Sequence[bytes]],
    state: npt.NDArray[np.float32],
    actions: npt.NDArray[np.float32],
    meta: Mapping[str, object],
    **extra: npt.NDArray[Any],
) -> Episode:
    """Write an episode after checking it as `load_episode` would.

    Args:
        path: The file to write.
        frames: JPEG files of each view, one per control step.
        state: float32 `[T, S]`.
        actions: float32 `[T, D]`.
        meta: JSON-serialisable provenance; must hold `instruction`. `format_version` and `views` are added.
        **extra: More arrays to store.

    Returns:
        The episode as written.

    Raises:
        EpisodeError: The parts do not make a valid episode; nothing is written.
    """
    path = Path(path)
    full_meta = {**meta, "format_version": FORMAT_VERSION, "views": list(frames)}
    arrays: dict[str, npt.NDArray[Any]] = {"state": state, "actions": actions, **extra}
    arrays["meta"] = np.frombuffer(json.dumps(full_meta).encode(), np.uint8)
    for view, jpegs in frames.items():
        arrays[view] = np.frombuffer(b"".join(jpegs), np.uint8)
        arrays[f"{view}_offsets"] = np.cumsum([0, *map(len, jpegs)], dtype=np.int64)
    episode = _build(arrays, path)
    for key, array in arrays.items():
        if array.dtype.hasobject:
            raise EpisodeError(f"cannot save {path}: '{key}' holds Python objects")
    # Not numpy.savez: it takes names such as 'file' for its own arguments.
    with zipfile.ZipFile(path, "w") as archive:
        for key, array in arrays.items():
            with archive.open(zipfile.ZipInfo(f"{key}.npy"), "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)
    return episode


def _read(archive: Mapping[str, Any], key: str, path: Path) -> npt.NDArray[Any]:
    try:
        array = archive[key]
    except Exception as error:  # numpy's and zipfile's readers raise many types on damaged bytes
        if "allow_pickle" in str(error):
            raise EpisodeError(f"{path}: '{key}' holds a pickled object, which is never loaded") from error
        raise EpisodeError(f"{path} is truncated or damaged at '{key}': {error}") from error
    if not isinstance(array, np.ndarray):
        raise EpisodeError(f"{path}: '{key}' is not a numpy array")
    return array


def _build(arrays: Mapping[str, npt.NDArray[Any]], path: Path) -> Episode:
    meta = _meta(arrays, path)
    views = tuple(meta["views"])
    state = _array(arrays, "state", np.float32, 2, path).copy()
    actions = _array(arrays, "actions", np.float32, 2, path).copy()
    if not len(state):
        raise EpisodeError(f"{path}: 'state' has no steps")
    if len(actions) != len(state):
        raise EpisodeError(f"{path}: 'actions' has {len(actions)} steps but 'state' has {len(state)}")
    for key, values in (("state", state), ("actions", actions)):
        if not np.isfinite(values).all():
            raise EpisodeError(f"{path}: '{key}' holds values that are not finite")
        values.flags.writeable = False
    jpegs = {view: _jpegs(arrays, view, len(state), path) for view in views}
    return Episode(path.stem, meta["instruction"], views, state, actions, meta, jpegs)


def _meta(arrays: Mapping[str, npt.NDArray[Any]], path: Path) -> dict[str, Any]:
    try:
        meta = json.loads(_array(arrays, "meta", np.uint8, 1, path).tobytes().decode())
    except (ValueError, RecursionError) as error:
        raise EpisodeError(f"{path}: 'meta' is not UTF-8 JSON: {error}") from error
    if not isinstance(meta, dict):
        raise EpisodeError(f"{path}: 'meta' is not a JSON object")
    for key in ("format_version", "instruction", "views"):
        if key not in meta:
            raise EpisodeError(f"{path}: 'meta' lacks '{key}'")
    if meta["format_version"] != FORMAT_VERSION:
        raise EpisodeError(f"{path} has format version {meta['format_version']!r}; valid: {FORMAT_VERSION}")
    if not isinstance(meta["instruction"], str):
        raise EpisodeError(f"{path}: 'instruction' in 'meta' is not text")
    views = meta["views"]
    if not isinstance(views, list) or not views or not all(isinstance(view, str) for view in views):
        raise EpisodeError(f"{path}: 'views' in 'meta' is not a list of camera names")
    return meta


def _jpegs(
    arrays: Mapping[str, npt.NDArray[Any]], view: str, steps: int, path: Path
) -> tuple[bytes, npt.NDArray[np.int64]]:
    data = _array(arrays, view, np.uint8, 1, path)
    key = f"{view}_offsets"
    offsets = _array(arrays, key, np.int64, 1, path)
    if len(offsets) != steps + 1:
        raise EpisodeError(f"{path}: '{key}' has {len(offsets)} entries; {steps} steps need {steps + 1}")
    if offsets[0] != 0 or offsets[-1] != len(data):
        raise EpisodeError(f"{path}: '{key}' runs from {offsets[0]} to {offsets[-1]}; valid: 0 to {len(data)}")
    if (offsets[1:] <= offsets[:-1]).any():
        raise EpisodeError(f"{path}: '{key}' does not rise at step {int((offsets[1:] <= offsets[:-1]).argmax())}")
    return data.tobytes(), offsets


def _array(
    arrays: Mapping[str, npt.NDArray[Any]], key: str, dtype: npt.DTypeLike, ndim: int, path: Path
) -> npt.NDArray[Any]:
    if key not in arrays:
        raise EpisodeError(f"{path} lacks '{key}'{nearest(key, arrays)}")
    array = arrays[key]
    if array.dtype != dtype or array.ndim != ndim:
        raise EpisodeError(
            f"{path}: '{key}' is {array.dtype} with {array.ndim} dimensions; valid: {np.dtype(dtype)} with {ndim}"
        )
    return array
