"""A tape of torch's operations, which stands for a CUDA graph where there is no GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from tokenprune.engine.query import DeviceOutcome
from tokenprune.engine.tensor_tree import map_tensors, tensors_in


class Tape(TorchDispatchMode):
    """Every operation with what it was given; running them again takes what is there by then.

    Whatever Python decided, and every number that it read, is as fixed as in a CUDA graph.
    """

    def __init__(self) -> None:
        """Nothing is recorded yet."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._operations: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        """Run and record."""
        made = operation(*args, **(kwargs or {}))
        self._operations.append((operation, args, kwargs or {}, made))
        return made

    def again(self) -> dict[int, torch.Tensor]:
        """Run all of it again; what each tensor that was made is this time, by its identity."""
        now: dict[int, torch.Tensor] = {}

        def current(value: Any) -> Any:  # noqa: ANN401
            return now.get(id(value), value)

        for operation, args, kwargs, made in self._operations:
            new = operation(*tree_map(current, args), **tree_map(current, kwargs))
            for old, value in zip(tree_leaves(made), tree_leaves(new), strict=True):
                if isinstance(old, torch.Tensor):
                    now[id(old)] = value
        return now


def taped(run: Callable[[], DeviceOutcome]) -> tuple[DeviceOutcome, Callable[[], None]]:
    """A `Capture` for any device."""
    with Tape() as tape:
        made = run()
    outcome = map_tensors(torch.clone, made)

    def again() -> None:
        now = tape.again()
        for place, old in zip(tensors_in(outcome), tensors_in(made), strict=True):
            place.copy_(now.get(id(old), old))

    return outcome, again
