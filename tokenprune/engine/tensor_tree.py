"""Functions over all tensors in nested mappings, sequences and dataclasses."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def map_tensors(change: Callable[[Tensor], Tensor], value: T) -> T:
    """Return a copy of the value with `change` applied to every tensor in it."""
    return _mapped(change, value)  # type: ignore[no-any-return]


def _mapped(change: Callable[[Tensor], Tensor], value: Any) -> Any:  # noqa: ANN401
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {name: _mapped(change, inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_mapped(change, inner) for inner in value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{field.name: _mapped(change, getattr(value, field.name)) for field in fields(value)})
    return value


def tensors_in(value: object) -> list[Tensor]:
    """All tensors in a value, always in the same order."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_tensors(note, value)
    return found


def copy_tensors(places: object, values: object) -> None:
    """Copy every tensor of `values` into its counterpart in `places`, with one kernel launch per dtype."""
    by_dtype: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
    for place, tensor in zip(tensors_in(places), tensors_in(values), strict=True):
        into, source = by_dtype.setdefault(place.dtype, ([], []))
        into.append(place)
        source.append(tensor)
    for into, source in by_dtype.values():
        torch._foreach_copy_(into, source, non_blocking=True)


def structure(value: object) -> Hashable:
    """Names, shapes, dtypes and devices of a value; `copy_tensors` needs them to be equal."""
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype, value.device
    if isinstance(value, Mapping):
        return tuple((name, structure(inner)) for name, inner in value.items())
    if isinstance(value, list | tuple):
        return tuple(structure(inner) for inner in value)
    if is_dataclass(value) and not isinstance(value, type):
        return type(value), tuple((field.name, structure(getattr(value, field.name))) for field in fields(value))
    return value
