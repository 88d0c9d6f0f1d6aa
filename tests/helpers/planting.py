"""Properties that can be run twice: as they are, and with a fault planted that they must notice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from tests.helpers import stages
from tokenprune.errors import TokenPruneError
from tokenprune.pipelines.config import PipelineConfig
from tokenprune_plugins.fastv import FastVConfig
from tokenprune_plugins.shared.bases import HalfConfig

REGISTRY = stages.registry()
NOTICED = (AssertionError, ExceptionGroup, TokenPruneError, RuntimeError, IndexError)


class Property:
    """A hypothesis property; `quick` finds a counterexample without making it small."""

    def __init__(
        self, check: Callable[..., None], strategies: tuple[st.SearchStrategy[Any], ...], examples: int
    ) -> None:
        self._full = settings(max_examples=examples)(given(*strategies)(check))
        self.quick = settings(max_examples=examples, phases=(Phase.generate,))(given(*strategies)(check))

    def __call__(self) -> None:
        self._full()

    def notices(self, owner: Any, name: str, fault: Any) -> None:
        """It fails while the fault is in place."""
        with patch.object(owner, name, fault), pytest.raises(NOTICED):
            self.quick()


def prop(*strategies: st.SearchStrategy[Any], examples: int = 50) -> Callable[[Callable[..., None]], Property]:
    """Make a function of drawn values a property."""
    return lambda check: Property(check, strategies, examples)


def pipeline(*stage_configs: Any, **settings_: Any) -> PipelineConfig:
    return PipelineConfig(version=1, name="drawn", stages=stage_configs, **settings_)


@st.composite
def pipelines(draw: st.DrawFn, depth: int) -> PipelineConfig:
    """Random nested cuts by chance and by attention, at any layers, as counts and ratios, singly or together."""
    amounts = st.one_of(st.floats(0.05, 1.0), st.integers(1, 40))
    cuts = draw(st.lists(st.integers(-1, depth - 2), min_size=1, max_size=3, unique=True))
    after = tuple("embedding" if cut < 0 else cut for cut in sorted(cuts))
    chance = HalfConfig(use="random", after=after, keep=draw(amounts))
    if not draw(st.booleans()):
        return pipeline(chance, seed=draw(st.integers(0, 99)))
    attention = FastVConfig(use="fastv", after=(draw(st.integers(0, depth - 2)),), keep=draw(amounts), rows="text")
    return pipeline(chance, attention, seed=draw(st.integers(0, 99)))
