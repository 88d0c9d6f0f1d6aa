"""Tensors inside mappings, sequences and dataclasses, wherever they are."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

from torch import Tensor

T = TypeVar("T")


def map_tensors(change: Callable[[Tensor], Tensor], value: T) -> T:
    """The same value with every tensor in it changed."""
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
    """Every tensor in it, always in the same order."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_tensors(note, value)
    return found


def structure(value: object) -> Hashable:
    """What must be alike for tensors of one value to be copied into those of another: names, shapes and types."""
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype, value.device
    if isinstance(value, Mapping):
        return tuple((name, structure(inner)) for name, inner in value.items())
    if isinstance(value, list | tuple):
        return tuple(structure(inner) for inner in value)
    if is_dataclass(value) and not isinstance(value, type):
        return type(value), tuple((field.name, structure(getattr(value, field.name))) for field in fields(value))
    return value
