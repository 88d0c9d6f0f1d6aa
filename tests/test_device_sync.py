"""No operation of a query waits for the device: a dispatcher that refuses those that would, on any device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.planting import REGISTRY
from tests.tiny_oft import INSTRUCTION, observation, tiny_config, tiny_policy_parts
from tokenprune.errors import StageError
from tokenprune.loader import load_pipeline
from tokenprune.policy import Policy
from tokenprune_plugins.specprune import signals

WAITING = ("nonzero", "masked_select", "_unique2", "equal")
# On a CPU these do not pass the dispatcher.
READING = ("item", "tolist", "cpu", "numpy", "__int__", "__float__", "__bool__", "__index__")
GRAPH_SAFE = (
    "none", "random", "uniform_grid", "fastv", "divprune", "efficientvla_tokens", "sparsevlm", "pyramiddrop", "dart",
    "vla_adp", "vla_pruner", "fastervlm", "visionzip", "tome", "pool2x2",
    "specprune", "specprune.static", "specprune.dynamic",
)  # fmt: skip


class NoWaiting(TorchDispatchMode):
    """Refuses what copies to or from the host, or makes a shape depend on data."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.split(".")[0]
        masked = name in ("index", "index_put_") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        # A number that fills a tensor goes with the kernel; a list of them is copied.
        uploaded = name == "lift_fresh" and args[0].dim() > 0
        if name in WAITING or masked or uploaded:
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))


def refused(*_: Any) -> Any:
    raise AssertionError("a tensor is read, which waits for the device")


@contextmanager
def watched(backbone: Any) -> Iterator[None]:
    """The model runs under the refusing dispatcher, from after the upload to before the download."""
    real = type(backbone).infer

    def infer(self: Any, inputs: Any, query: Any) -> torch.Tensor:
        with NoWaiting(), ExitStack() as reading:
            for name in READING:
                reading.enter_context(patch.object(torch.Tensor, name, refused))
            return real(self, inputs, query)

    with patch.object(type(backbone), "infer", infer):
        yield


def queries(name: str) -> None:
    config = tiny_config(depth=8)
    backbone = tiny_policy_parts(config)
    policy = Policy(backbone, load_pipeline(name, REGISTRY).config, REGISTRY)
    for slot in range(2):
        policy.reset(INSTRUCTION, slot)
    for query in range(3):
        policy.act_batch({slot: observation(config, slot) for slot in range(2)})
        for step in range(3):
            for slot in range(2):
                pose = np.full(7, float(query * step))
                policy.executed(np.full(7, 0.4), pose, observation=observation(config, 10 + step), slot=slot)
    with watched(backbone):
        policy.act_batch({slot: observation(config, 20 + slot) for slot in range(2)})


@pytest.mark.parametrize("name", GRAPH_SAFE)
def test_no_query_waits_for_the_device(name: str) -> None:
    queries(name)


@pytest.mark.parametrize("name", ["specprune-paper", "specprune-c3", "vla_cache"])
def test_a_union_waits_to_learn_its_count(name: str) -> None:
    with pytest.raises(AssertionError, match="is read"):
        queries(name)


def test_a_planted_wait_is_refused() -> None:
    real = signals.rank_within

    def waiting(score: torch.Tensor, member: torch.Tensor) -> torch.Tensor:
        return real(score, member) if member.any() else real(score, ~member)

    with patch.object(signals, "rank_within", waiting), pytest.raises(StageError, match="is read"):
        queries("specprune")
