"""Simulated episodes for the presets of SpecPrune in which pictures and attention are said outright."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.helpers.planting import REGISTRY
from tests.helpers.simulated_episode import DEPTH, HEADS, SIDE, VIEWS, WIDTH, SimulatedDecoder, SimulatedOFT, layout_of
from tokenprune.engine.query import Query
from tokenprune.engine.trace import QueryTrace
from tokenprune.pipelines.config import PipelineConfig
from tokenprune.pipelines.loader import load_pipeline
from tokenprune.policy import Policy
from tokenprune_plugins.specprune import signals

PRESETS = ("specprune-paper", "specprune-c3", "specprune")
STILL, FAST = (0.0, 0.0, 0.0), (1.0, 0.0, 0.0)
THERE_AND_BACK = (FAST, (-1.0, 0.0, 0.0)) * 6
PRIMARY, WRIST, LEFT = (range(1 + 256 * number, 257 + 256 * number) for number in range(3))
BOTH = [*chain(*zip(PRIMARY, WRIST, strict=True))]
Looks = dict[int, Sequence[int]]
"""By layer, the tokens that every row attends to, most of all to the first."""


def attention(n: int, looks: Looks) -> Callable[[int], tuple[np.ndarray, np.ndarray]]:
    """Queries and keys by layer; layers that are not mentioned attend to everything alike."""

    def qk(layer: int) -> tuple[np.ndarray, np.ndarray]:
        q, k = np.zeros((2, HEADS, n, WIDTH))
        tokens = looks.get(layer, ())
        q[..., 0] = WIDTH**0.5
        k[:, list(tokens), 0] = 40 - 0.05 * np.arange(len(tokens))
        return q, k

    return qk


def looks_at(tokens: Sequence[int], layers: Sequence[int] = range(DEPTH)) -> Looks:
    """The same tokens at some layers."""
    return dict.fromkeys(layers, tokens)


def picture(patches: Mapping[int, int], grey: int) -> np.ndarray:
    """A grey image in which two of the twelve numbers of some patches have another value."""
    image = np.full((2 * SIDE, 2 * SIDE, 3), grey, np.uint8)
    for patch, value in patches.items():
        image[patch // SIDE * 2, patch % SIDE * 2, :2] = value
    return image


class Reading(SimulatedOFT):
    """Every token's hidden state is its id; `given` is what the action head last got."""

    def infer(self, inputs: Any, query: Query) -> Tensor:
        embeddings = torch.arange(inputs.layout.n_tokens, dtype=self.dtype)[None, :, None]
        self.given = query.decode(SimulatedDecoder(inputs.attentions), embeddings)[0, :, 0].tolist()
        return torch.zeros(1, 8, 7, dtype=self.dtype)


@cache
def loaded(preset: str, *overrides: str) -> PipelineConfig:
    return load_pipeline(preset, REGISTRY, overrides).config


class Host:
    """An episode. Pictures are grey unless patches of a view are named; prompts of 25 tokens are 514 to 538."""

    def __init__(self, preset: str, *overrides: str, views: int = 2, prompt: int = 25) -> None:
        self.backbone = Reading(VIEWS[:views])
        self.policy = Policy(self.backbone, loaded(preset, *overrides), REGISTRY)
        self.pipeline = self.policy.pipeline
        self.layout = layout_of(VIEWS[:views], prompt)
        self.prompt = str(prompt)
        self.policy.reset(self.prompt)

    def ask(self, looks: Looks | None = None, grey: int = 100, **patches: Any) -> QueryTrace:
        seen = self._see(grey, patches)
        return self.policy.act({"images": seen, "attention": attention(self.layout.n_tokens, looks or {})}).trace

    def step(self, *actions: Sequence[float], grey: int = 100, **patches: Any) -> list[bool]:
        """Execute actions, of which zeros at the end may be left out; what the policy answered to each."""
        seen = {"images": self._see(grey, patches)}
        return [self.policy.executed(np.array([*a, *[0.0] * (7 - len(a))]), observation=seen) for a in actions]

    def rows(self, stage: int) -> dict[int, str]:
        """Rows that a stage looks at in a coarse query, by layer."""
        looked = self.pipeline.stages[stage].probes(self.pipeline.info, self.layout, "coarse")
        return {layer: rows if isinstance(rows, str) else f"{rows.start}-{rows.stop - 1}" for layer, rows, _ in looked}

    def counts(self, *unions: int, mode: str = "coarse") -> list[int]:
        """Planned visual tokens after each cut, for unions of these sizes."""
        return [cut.keep for cut in self.pipeline.plan(self.layout, mode, unions).cuts]

    def _see(self, grey: int, patches: Mapping[str, Mapping[int, int]]) -> dict[str, np.ndarray]:
        return {view: picture(patches.get(view, {}), grey) for view in self.layout.views}


def kept(trace: QueryTrace, after: int) -> list[int]:
    """Original ids kept at a cut."""
    ids: list[int] = trace.kept[after][0].tolist()
    return ids


def wanted(trace: QueryTrace, reason: str) -> list[int]:
    """What the last static cut that dropped anything kept for a reason."""
    cut = max(after for after in trace.reasons if after <= 1)
    ids: list[int] = trace.kept[cut][0][trace.reasons[cut][reason][0]].tolist()
    return ids


def looked_back(trace: QueryTrace) -> int | None:
    """How many control steps old the frame is that the query was compared with."""
    ((steps,),) = trace.looked_back.values()
    return steps


def _after(actions: Sequence[Sequence[float]]) -> list[QueryTrace]:
    """The query of each preset that follows a query and some actions."""
    hosts = [Host(preset) for preset in PRESETS]
    for host in hosts:
        host.ask()
        host.step(*actions)
    return [host.ask() for host in hosts]


def looks_back_after(*actions: Sequence[float]) -> list[int | None]:
    """How far each preset looks back at the query that follows some actions."""
    return [looked_back(answer) for answer in _after(actions)]


def modes_after(*actions: Sequence[float], before: Sequence[Sequence[float]] = (FAST,) * 10) -> list[str]:
    """Mode of each preset's query that follows some actions."""
    return [answer.mode for answer in _after([*before, *actions])]


def changed(preset: str, values: Mapping[int, int], views: int = 2, grey: int = 100) -> list[int]:
    """What counts as changed after all patches were as grey as said, and some came to have these values."""
    host = Host(preset, views=views)
    host.ask(grey=grey)
    host.step(*THERE_AND_BACK, grey=grey)
    return wanted(host.ask(primary=values, wrist=values, left=values), "dynamic")


def counted(monkeypatch: pytest.MonkeyPatch, name: str) -> list[Any]:
    """Arguments of every call of a function of `signals` from now on."""
    calls: list[Any] = []
    real = getattr(signals, name)

    def noted(*args: Any) -> Any:
        calls.append(args)
        return real(*args)

    monkeypatch.setattr(signals, name, noted)
    return calls


def stop_the_clock(monkeypatch: pytest.MonkeyPatch, host: Host) -> None:
    """Let no time pass but a second whenever pictures are made pixels."""
    seconds, real = [], host.backbone.pixels

    def pixels(images: Any) -> Any:
        seconds.append(1)
        return real(images)

    monkeypatch.setattr(host.backbone, "pixels", pixels)
    monkeypatch.setattr("time.perf_counter", lambda: len(seconds))
