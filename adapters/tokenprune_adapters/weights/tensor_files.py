"""Tensors in files, read without running code from a file, and tensors of a loaded model."""

from __future__ import annotations

import json
import pickle
import re
import reprlib
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tokenprune.errors import CheckpointError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file, or in a model that is already loaded.

    Attributes:
        file: The file; for a loaded model, its name in errors.
        key: Its key in the file.
        shape: Its shape.
        dtype: The type it is stored in.
        fetch: Reads the values; for a loaded model, returns its own tensor and no copy.
    """

    file: Path
    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    fetch: Callable[[], Tensor]

    def read(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Copy the values to a device in a dtype; the file's own copy is freed.

        Raises:
            CheckpointError: If the file can no longer be read.
        """
        try:
            values = self.fetch()
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.file}: '{self.key}' cannot be read ({error})") from error
        return values.to(device, dtype, copy=True, memory_format=torch.contiguous_format)


def read_json(path: Path) -> dict[str, Any]:
    """The content of a JSON file that holds an object.

    Raises:
        CheckpointError: If the file is missing, is not JSON, or holds something else.
    """
    try:
        data = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: holds a {type(data).__name__}; valid: a JSON object")
    return data


def stored_safetensors(folder: Path) -> dict[str, StoredTensor]:
    """Find the tensors of a folder's `model.safetensors`, or of the shards its index names; reads headers only.

    Args:
        folder: A folder as `save_pretrained` writes it.

    Returns:
        Key to tensor.

    Raises:
        CheckpointError: If there are no weights, a file is missing or truncated, or index and shards disagree.
    """
    single, index = folder / SINGLE, folder / INDEX
    if single.exists() and index.exists():
        raise CheckpointError(f"{folder}: holds both {SINGLE} and {INDEX}; keep only one of them")
    if index.exists():
        return _sharded(index)
    if not single.exists():
        raise CheckpointError(f"{folder}: holds no weights; valid: {SINGLE}, or {INDEX} and the shards it names")
    return _headers(single)


def _sharded(index: Path) -> dict[str, StoredTensor]:
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise CheckpointError(f"{index}: 'weight_map' must map each key to the file of its shard")
    for key, name in places.items():
        # A name with a folder in it could lead out of the checkpoint.
        if not isinstance(name, str) or re.fullmatch(r"[\w.-]+\.safetensors", name) is None:
            raise CheckpointError(f"{index}: weight_map['{key}'] is {name!r}; valid: a .safetensors file beside it")
        if not (index.parent / name).is_file():
            raise CheckpointError(f"{index}: names '{name}' for '{key}', and there is no such file")
    found: dict[str, StoredTensor] = {}
    for name in sorted(set(places.values())):
        for key, tensor in _headers(index.parent / name).items():
            if key in found:
                raise CheckpointError(f"{tensor.file}: '{key}' is also in {found[key].file.name}")
            if key not in places:
                raise CheckpointError(f"{tensor.file}: '{key}' is not listed in {INDEX}")
            found[key] = tensor
    for key, name in places.items():
        if key not in found or found[key].file.name != name:
            raise CheckpointError(f"{index.parent / name}: '{key}' is missing; {INDEX} says it is there")
    return found


def _headers(path: Path) -> dict[str, StoredTensor]:
    found = {}
    try:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - not a mapping
                part = file.get_slice(key)
                dtype = _DTYPES.get(part.get_dtype())
                if dtype is None:
                    valid = ", ".join(_DTYPES)
                    raise CheckpointError(f"{path}: '{key}' is stored as {part.get_dtype()}; valid: {valid}")
                found[key] = StoredTensor(path, key, tuple(part.get_shape()), dtype, partial(_fetch, path, key))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: truncated, or not a safetensors file ({error})") from error
    return found


def _fetch(path: Path, key: str) -> Tensor:
    # One mapping for the whole file would keep every page that was read resident beside the copies.
    with safe_open(path, framework="pt") as file:
        values: Tensor = file.get_tensor(key)
        return values


def stored_pt(path: Path) -> dict[str, StoredTensor]:
    """Read a state dict that `torch.save` wrote, refusing anything but tensors.

    A prefix `module.` on every key, which data-parallel training leaves, is dropped.

    Args:
        path: The file.

    Returns:
        Key to tensor.

    Raises:
        CheckpointError: If the file is truncated, or holds more or something else than a dict of tensors.
    """
    if not zipfile.is_zipfile(path):
        raise CheckpointError(f"{path}: missing, truncated, or not a file of torch.save")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        what = f" ({named[1]})" if named else ""
        # torch's own message is left out, because it says how to load such an unsafe file.
        raise CheckpointError(f"{path}: refused, because it holds more than tensors{what}") from None
    except Exception as error:  # damaged archives raise many types
        raise CheckpointError(f"{path}: cannot be read ({error})") from error
    if not isinstance(state, dict) or not state:
        raise CheckpointError(f"{path}: holds {reprlib.repr(state)}; valid: a dict of tensors")
    found = stored_module(state, path)
    parallel = all(key.startswith("module.") for key in found)
    return {key.removeprefix("module.") if parallel else key: tensor for key, tensor in found.items()}


def stored_module(state: Mapping[str, Tensor], where: str | Path) -> dict[str, StoredTensor]:
    """Describe the tensors of a model that is already loaded; none is copied.

    Args:
        state: Its `state_dict()`.
        where: Its name in errors.

    Returns:
        Key to tensor.

    Raises:
        CheckpointError: If a value has no name, is no dense floating-point tensor, or is on the meta device.
    """
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise CheckpointError(f"{where}: {key!r} is a {type(value).__name__}; valid: a tensor with a name")
        if value.dtype not in _DTYPES.values() or value.layout != torch.strided or value.is_meta:
            valid = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES.values())
            found = f"{value.dtype}, {value.layout}, on {value.device}"
            raise CheckpointError(f"{where}: '{key}' is {found}; valid: dense {valid}, with values")
    return {
        key: StoredTensor(Path(where), key, tuple(value.shape), value.dtype, value.detach)
        for key, value in state.items()
    }
