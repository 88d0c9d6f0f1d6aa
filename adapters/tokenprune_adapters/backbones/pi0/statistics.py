"""Dataset statistics in the files of pi0 and pi0.5: openpi's `norm_stats.json`, lerobot's processor files."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load_file

from tokenprune.errors import CheckpointError, nearest
from tokenprune_adapters.backbones.pi0.config import PI0Config
from tokenprune_adapters.inputs.statistics import (
    Normaliser,
    Quantiles,
    Standard,
    Statistics,
    check_ascending,
    json_object,
    numbers,
)
from tokenprune_adapters.weights.tensor_files import read_json

_OPENPI = "norm_stats.json"

_PREPROCESSOR, _POSTPROCESSOR = "policy_preprocessor.json", "policy_postprocessor.json"

_QUANTILES = ("q01", "q99")

_MODES = ("MEAN_STD", "QUANTILES", "IDENTITY")

# Steps of lerobot's pi0 and pi0.5 that change no number, or that the adapter does itself.
_STEPS = (
    "rename_observations_processor",
    "to_batch_processor",
    "device_processor",
    "tokenizer_processor",
    "pi0_new_line_processor",
    "pi05_prepare_state_tokenizer_processor_step",
    "normalizer_processor",
    "unnormalizer_processor",
)

# Steps that change actions unless they are disabled.
_RELATIVE = ("relative_actions_processor", "absolute_actions_processor")


def identity_statistics(config: PI0Config) -> Statistics:
    """Statistics of no dataset, of the release's kind: everything is already normalised."""

    def unit(size: int) -> Normaliser:
        if config.variant == "pi0":
            return Standard(np.zeros(size), np.ones(size), 0.0)
        return Quantiles(-np.ones(size), np.ones(size), 0.0)

    state = None if config.state_size is None else unit(config.state_size)
    return Statistics("(none)", unit(config.action.dims), state)


def read_openpi(
    assets: Path, asset_id: str | None, dims: int, state_size: int | None, *, quantiles: bool
) -> Statistics:
    """Read `<asset_id>/norm_stats.json` of an openpi checkpoint.

    Some of these files are padded to the width of the model's actions; only the first numbers are used.

    Args:
        assets: The checkpoint's folder `assets`.
        asset_id: Folder of the dataset in it, such as `physical-intelligence/libero`; may be None if there is only one.
        dims: Numbers per action.
        state_size: Numbers of robot state, None if the policy reads none.
        quantiles: Whether quantiles are used (pi0.5) or mean and standard deviation (pi0); no file states it.

    Returns:
        The statistics; their key is the asset id.

    Raises:
        CheckpointError: If a file is missing or incomplete.
    """
    found = {path.parent.relative_to(assets).as_posix(): path for path in sorted(assets.glob(f"**/{_OPENPI}"))}
    if not found:
        raise CheckpointError(f"{assets}: holds no <asset_id>/{_OPENPI}")
    if asset_id is None:
        if len(found) != 1:
            raise CheckpointError(f"{assets}: holds statistics of several datasets; give one of {', '.join(found)}")
        asset_id = next(iter(found))
    if asset_id not in found:
        raise CheckpointError(f"{assets}: no {_OPENPI} for '{asset_id}'{nearest(asset_id, found)}")
    path = found[asset_id]
    entries = json_object(read_json(path), "norm_stats", str(path))
    mode = "QUANTILES" if quantiles else "MEAN_STD"

    def part(name: str, size: int) -> Normaliser:
        entry = json_object(entries, name, f"{path}: norm_stats")
        return _normaliser(entry, mode, size, 1e-6, f"{path}: norm_stats.{name}")

    return Statistics(asset_id, part("actions", dims), None if state_size is None else part("state", state_size))


def read_lerobot(folder: Path, dims: int, state_size: int | None) -> Statistics:
    """Read `policy_preprocessor.json` and `policy_postprocessor.json` of a lerobot checkpoint.

    The files state how state and actions are normalised. With `IDENTITY`, or without a mode, numbers pass through.
    If they need statistics that are absent, lerobot lets numbers pass through; here it is an error.

    Args:
        folder: The checkpoint.
        dims: Numbers per action.
        state_size: Numbers of robot state, None if the policy reads none.

    Returns:
        The statistics; the files name no dataset.

    Raises:
        CheckpointError: If a file is missing or incomplete, or asks for something that is not supported.
    """
    action = _lerobot(folder / _POSTPROCESSOR, "unnormalizer_processor", "action", "ACTION", dims)
    state = None
    if state_size is not None:
        state = _lerobot(folder / _PREPROCESSOR, "normalizer_processor", "observation.state", "STATE", state_size)
    return Statistics("(unnamed)", action, state)


def _lerobot(path: Path, step_name: str, feature: str, kind: str, size: int) -> Normaliser:
    steps = _steps(path)
    at = [index for index, (name, _) in enumerate(steps) if name == step_name]
    if len(at) != 1:
        raise CheckpointError(f"{path}: has {len(at)} steps '{step_name}'; valid: one")
    step = steps[at[0]][1]
    where = f"{path}: steps[{at[0]}]"
    config = json_object(step, "config", where)
    mode = json_object(config, "norm_map", f"{where}.config").get(kind, "IDENTITY")
    if mode not in _MODES:
        raise CheckpointError(f"{where}.config.norm_map.{kind} is '{mode}'{nearest(str(mode), _MODES)}")
    keys = config.get("normalize_observation_keys")
    left_out = kind == "STATE" and isinstance(keys, list) and feature not in keys
    if mode == "IDENTITY" or left_out:
        return Standard(np.zeros(size), np.ones(size), epsilon=0.0)
    # lerobot adds epsilon only when it divides, and to a range only if that is 0; in float32 there is no difference.
    epsilon = config.get("eps", 1e-8)
    if not isinstance(epsilon, float) or not 0 < epsilon <= 1e-6:
        raise CheckpointError(f"{where}.config.eps is {epsilon!r}; valid: a number above 0 and up to 1e-6")
    file = _state_file(path, step, where)
    prefix = f"{feature}."
    stored = {name.removeprefix(prefix): values for name, values in _tensors(file).items() if name.startswith(prefix)}
    return _normaliser(stored, str(mode), size, epsilon, f"{file}: {feature}")


def _steps(path: Path) -> list[tuple[str, Mapping[str, Any]]]:
    """The steps by name; an unknown step is refused, since it could change numbers."""
    steps = read_json(path).get("steps")
    if not isinstance(steps, list):
        raise CheckpointError(f"{path}: 'steps' must be a list of steps")
    found = []
    for index, step in enumerate(steps):
        name = step.get("registry_name") if isinstance(step, Mapping) else None
        if name not in (*_STEPS, *_RELATIVE):
            known = nearest(str(name), (*_STEPS, *_RELATIVE))
            raise CheckpointError(f"{path}: steps[{index}] is '{name}', which is not supported{known}")
        if name in _RELATIVE and json_object(step, "config", f"{path}: steps[{index}]").get("enabled") is not False:
            raise CheckpointError(
                f"{path}: steps[{index}] '{name}' is enabled: the policy's actions are relative to the state, which is "
                "not supported; valid: enabled false"
            )
        found.append((name, step))
    return found


def _state_file(path: Path, step: Mapping[str, Any], where: str) -> Path:
    name = step.get("state_file")
    if name is None:
        raise CheckpointError(f"{where} has no 'state_file': the checkpoint holds no statistics")
    # A name with a folder in it could lead out of the checkpoint.
    if not isinstance(name, str) or re.fullmatch(r"[\w.-]+\.safetensors", name) is None:
        raise CheckpointError(f"{where}.state_file is {name!r}; valid: a .safetensors file beside it")
    return path.parent / name


def _tensors(file: Path) -> dict[str, np.ndarray]:
    try:
        return {name: tensor.double().numpy() for name, tensor in load_file(file).items()}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: missing, truncated, or not a safetensors file ({error})") from error


def _normaliser(entry: Mapping[str, Any], mode: str, size: int, epsilon: float, where: str) -> Normaliser:
    """The normaliser of a mode, from the statistics of actions or of the state."""
    if mode == "QUANTILES":
        low, high = (numbers(entry, name, size, where, longer=True) for name in _QUANTILES)
        check_ascending(low, high, _QUANTILES, where)
        return Quantiles(low, high, epsilon)
    mean, std = (numbers(entry, name, size, where, longer=True) for name in ("mean", "std"))
    if (std < 0).any():
        raise CheckpointError(f"{where}.std is negative at {np.flatnonzero(std < 0).tolist()}; valid: 0 and above")
    return Standard(mean, std, epsilon)
