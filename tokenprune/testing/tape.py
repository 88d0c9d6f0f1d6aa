"""A tape of torch operations that stands in for a CUDA graph on machines without a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from tokenprune.engine.query import DeviceOutcome
from tokenprune.engine.tensor_tree import map_tensors, tensors_in


class Tape(TorchDispatchMode):
    """Records operations with their arguments, and replays them on the current content of their inputs.

    As in a CUDA graph, Python's decisions and the numbers it read are fixed.
    """

    def __init__(self) -> None:
        """Start an empty tape."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._operations: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        """Run and record one operation."""
        made = operation(*args, **(kwargs or {}))
        self._operations.append((operation, args, kwargs or {}, made))
        return made

    def replay(self) -> dict[int, torch.Tensor]:
        """Run all operations again; return the new tensors by the `id` of the recorded ones."""
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
    """Capture on a tape: a `Capture` for any device."""
    with Tape() as tape:
        made = run()
    outcome = map_tensors(torch.clone, made)

    def replay() -> None:
        now = tape.replay()
        for place, old in zip(tensors_in(outcome), tensors_in(made), strict=True):
            place.copy_(now.get(id(old), old))

    return outcome, replay
