"""Makes operations that would wait for a GPU fail, on any device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tokenprune.engine.adapter import Backbone

WAITING = ("nonzero", "masked_select", "_unique2", "equal")
# On a CPU these bypass the dispatcher.
READING = ("item", "tolist", "cpu", "numpy", "__int__", "__float__", "__bool__", "__index__")


class NoWaiting(TorchDispatchMode):
    """Refuses operations that copy to or from the host, or make a shape depend on data."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        """Run an operation that does not wait.

        Raises:
            AssertionError: If the operation waits; names it.
        """
        name = func.__name__.split(".")[0]
        masked = name in ("index", "index_put_") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        # A scalar is a kernel argument; a list of numbers is copied to the device.
        uploaded = name == "lift_fresh" and args[0].dim() > 0
        if name in WAITING or masked or uploaded:
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))


def _refused(*_: object) -> None:
    raise AssertionError("a tensor is read, which waits for the device")


@contextmanager
def refusing() -> Iterator[None]:
    """Make operations and tensor methods that wait for the device raise AssertionError."""
    with NoWaiting(), ExitStack() as reading:  # type: ignore[no-untyped-call]
        for name in READING:
            reading.enter_context(patch.object(torch.Tensor, name, _refused))
        yield


@contextmanager
def no_waiting(backbone: Backbone) -> Iterator[None]:
    """Refuse waiting inside `Backbone.infer`: after the upload of observations, before the download of actions."""
    real = type(backbone).infer

    def infer(self: Backbone, inputs: Any, query: Any) -> torch.Tensor:  # noqa: ANN401
        with refusing():
            return real(self, inputs, query)

    with patch.object(type(backbone), "infer", infer):
        yield
