"""Whole episodes without a model: attention is drawn, frames and motion are scripted, everything else is real."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.helpers.naive_specprune import QK, Frame, Scene
from tokenprune.engine.query import Query
from tokenprune.model.decoder import Decoded, Decoder, Pruner
from tokenprune.model.info import ActionSpec, BackboneInfo, DecoderShape
from tokenprune.model.kv_cache import LayerKV
from tokenprune.policy import ActionChunk, Policy
from tokenprune.tokens.layout import Role, Segment, TokenLayout
from tokenprune.tokens.prompt import EncodedPrompt
from tokenprune.tokens.selection import TokenSelection, rows_at

VIEWS = ("primary", "wrist", "left")
SIDE, PATCH, DEPTH, HEADS, WIDTH = 16, 2, 32, 2, 8
ACTION = ActionSpec(8, {"translation": (0, 1, 2), "rotation": (3, 4, 5), "gripper": (6,)}, gripper=(6, 0.5))


def layout_of(views: Sequence[str], prompt: int) -> TokenLayout:
    """OpenVLA-OFT's tokens; a prompt is 9 tokens, the instruction (one token at least), and up to 5 more."""
    start = 2 + SIDE * SIDE * len(views)
    stop = start + prompt
    rows = {
        "text": range(start, stop),
        "instruction": range(start + 9, start + max(10, prompt - 5)),
        "action": range(stop, stop + 56),
        "readout": range(stop - 1, stop + 55),
    }
    patches = [Segment(Role.VISION, 0, SIDE * SIDE, view, (SIDE, SIDE), prunable=True) for view in views]
    parts = [Segment(Role.BOS, 0, 1), *patches, Segment(Role.PROPRIO, 0, 1), Segment(Role.TEXT, 0, prompt)]
    return TokenLayout.build([*parts, Segment(Role.ACTION, 0, 56), Segment(Role.STOP, 0, 1)], rows)


def scene_of(layout: TokenLayout) -> Scene:
    """The same for the reference."""
    views = {name: segment.span for name, segment in layout.views.items()}
    text, instruction, action = (layout.span(name) for name in ("text", "instruction", "action"))
    return Scene(layout.n_tokens, views, (SIDE, SIDE), text, instruction, action)


@dataclass(frozen=True)
class Attention:
    """Queries and keys of one query, drawn anew for every layer.

    Attributes:
        n_tokens: Length of the unpruned sequence.
        seed: Of this query.
        lasting: What is added to every row's logit of a token in all queries of an episode `[n]`.
        bonus: The same at single layers.
    """

    n_tokens: int
    seed: tuple[int, ...]
    lasting: np.ndarray
    bonus: Mapping[int, np.ndarray] = field(default_factory=dict)

    def __call__(self, layer: int) -> tuple[np.ndarray, np.ndarray]:
        """Queries and keys `[H, n, d]`; logits vary by about 2.5 within a row."""
        q, k = np.random.default_rng((*self.seed, layer)).normal(scale=1.6, size=(2, HEADS, self.n_tokens, WIDTH))
        q[..., -1] = WIDTH**0.5
        k[..., -1] = self.lasting + self.bonus.get(layer, 0.0)
        return q, k


class SimulatedDecoder(Decoder):
    """Computes nothing; each layer shows the pruner the queries and keys of what it holds."""

    def __init__(self, attentions: Sequence[QK]) -> None:
        super().__init__([], nn.Identity(), head_dim=WIDTH, rope_theta=10000.0, causal=False)
        self.attentions = attentions

    def run(
        self, hidden: Tensor, tokens: TokenSelection, pruner: Pruner | None = None, cache: object = None, **how: Any
    ) -> Decoded:
        assert pruner is not None
        held = []
        for layer in range(DEPTH):
            held.append(hidden.shape[1])
            if pruner.acts_after(layer):
                drawn = [attention(layer) for attention in self.attentions]
                ids = tokens.ids.numpy()
                q, k = (
                    torch.from_numpy(np.stack([pair[which][:, row] for pair, row in zip(drawn, ids, strict=True)]))
                    for which in (0, 1)
                )
                hidden, tokens = pruner.after_layer(layer, hidden, tokens, q, LayerKV(k, k, tokens.ids))
        read = rows_at(hidden, tokens.to_current(how["read"]))
        return Decoded(read, read, tokens, tuple(held))


@dataclass(frozen=True)
class SimulatedInputs:
    """What a query is given."""

    images: Mapping[str, Tensor]
    attentions: tuple[QK, ...]
    layout: TokenLayout


class SimulatedOFT:
    """A backbone of 32 layers for runtime tests; an instruction is the number of prompt tokens, in digits."""

    device, dtype = torch.device("cpu"), torch.float64

    def __init__(self, views: Sequence[str] = VIEWS[:2]) -> None:
        self.views = tuple(views)
        shape = DecoderShape(DEPTH, 1, HEADS, HEADS, WIDTH, 1, causal=False)
        offers = frozenset({"action_rows", "batch"})
        self.info = BackboneInfo("simulated", "test", True, shape, self.views, ACTION, capabilities=offers)

    def layout(self, instruction: str) -> TokenLayout:
        return layout_of(self.views, int(instruction))

    def encode(self, instruction: str, state: object = None) -> EncodedPrompt:
        return EncodedPrompt(self.layout(instruction), instruction)

    def check(self, observation: Mapping[str, Any]) -> None:
        assert tuple(observation["images"]) == self.views

    def pixels(self, images: Sequence[Mapping[str, np.ndarray]]) -> dict[str, Tensor]:
        return {
            view: torch.from_numpy(np.stack([frame[view] for frame in images])).permute(0, 3, 1, 2).contiguous()
            for view in self.views
        }

    def prepare(self, observations: Sequence[Mapping[str, Any]], prompts: Sequence[EncodedPrompt]) -> SimulatedInputs:
        images = self.pixels([observation["images"] for observation in observations])
        attentions = tuple(observation["attention"] for observation in observations)
        return SimulatedInputs(images, attentions, prompts[0].layout)

    def infer(self, inputs: SimulatedInputs, query: Query) -> Tensor:
        embeddings = torch.zeros(len(inputs.attentions), inputs.layout.n_tokens, 1, dtype=self.dtype)
        query.decode(SimulatedDecoder(inputs.attentions), embeddings)
        return torch.zeros(len(inputs.attentions), ACTION.horizon, ACTION.dims, dtype=self.dtype)

    def unnormalise(self, actions: np.ndarray, observations: object) -> np.ndarray:
        return actions


@dataclass(frozen=True)
class Ask:
    """A query with what the camera sees at this control step."""

    images: Frame
    attention: Attention

    @property
    def observation(self) -> dict[str, Any]:
        return {"images": self.images, "attention": self.attention}


@dataclass(frozen=True)
class Step:
    """An executed action; what the camera saw after it, if the host says."""

    action: np.ndarray
    images: Frame | None


@dataclass(frozen=True)
class Script:
    """One episode as a host would live it."""

    views: tuple[str, ...]
    prompt: int
    events: tuple[Ask | Step, ...]

    @property
    def layout(self) -> TokenLayout:
        return layout_of(self.views, self.prompt)


def live(policy: Policy, script: Script, slot: int = 0) -> Iterable[ActionChunk | bool]:
    """Give a policy the events one by one; what it returns to each."""
    policy.reset(str(script.prompt), slot)
    for event in script.events:
        if isinstance(event, Ask):
            yield policy.act(event.observation, slot)
        else:
            yield tell(policy, event, slot)


def tell(policy: Policy, step: Step, slot: int = 0) -> bool:
    """Give a policy one executed action."""
    seen = None if step.images is None else {"images": step.images}
    return policy.executed(step.action, observation=seen, slot=slot)


# Two patches whose cosine is the published threshold to the last bit: 493 / 500 and 49 / 50.
_AT_THRESHOLD = (
    ((22, 3, 2, 1, 1, 1, 0, 0, 0, 0, 0, 0), (22, 3, 0, 0, 0, 0, 2, 1, 1, 1, 0, 0)),
    ((7, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0), (7, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0)),
)

FRAMES = ("static", "part", "part black", "jitter", "all", "black", "darker", "brighter", "threshold")


def first_frame(rng: np.random.Generator) -> np.ndarray:
    """Noise, with patches here and there that a change may take to a threshold."""
    patches = rng.integers(0, 256, (SIDE * SIDE, PATCH * PATCH * 3))
    for token in (*range(0, SIDE * SIDE, 16), *range(1, SIDE * SIDE, 16)):
        patches[token] = _AT_THRESHOLD[token % 2][0]
    return _image(patches)


def next_frame(frame: np.ndarray, kind: str, rng: np.random.Generator) -> np.ndarray:
    """The image `[S, S, 3]` one control step later."""
    patches = _patches(frame)
    some = rng.random(len(patches)) < rng.choice([0.03, 0.1, 0.5])
    if kind == "part":
        noise = rng.integers(-rng.integers(5, 120), 120, patches[some].shape)
        patches[some] = (patches[some] + noise).clip(0, 255)
    elif kind == "part black":
        patches[some] = 0
    elif kind == "jitter":
        patches = (patches + rng.integers(-12, 13, patches.shape)).clip(0, 255)
    elif kind == "all":
        patches = rng.integers(0, 256, patches.shape)
    elif kind == "black":
        patches[:] = 0
    elif kind == "darker":
        patches = patches // 2
    elif kind == "brighter":
        patches = (patches * 2).clip(0, 255)
    elif kind == "threshold":
        for token in np.flatnonzero(some):
            pair = np.array(_AT_THRESHOLD[token % 2])
            patches[token] = pair[1] if (patches[token] == pair[0]).all() else pair[0]
    return _image(patches)


def _patches(frame: np.ndarray) -> np.ndarray:
    blocks = frame.reshape(SIDE, PATCH, SIDE, PATCH, 3).transpose(0, 2, 1, 3, 4)
    return blocks.reshape(SIDE * SIDE, PATCH * PATCH * 3).astype(np.int64)


def _image(patches: np.ndarray) -> np.ndarray:
    blocks = patches.astype(np.uint8).reshape(SIDE, SIDE, PATCH, PATCH, 3).transpose(0, 2, 1, 3, 4)
    return blocks.reshape(SIDE * PATCH, SIDE * PATCH, 3)


# Sums of up to eight of these are exact, and reach the bounds at which the look-back changes.
_STEADY = (0.125, 0.25, 0.5, 0.609375, 0.75, 0.875, 0.890625, 1.0, 1.03125, 1.171875, 1.3125, 1.453125, 2.0)

# Where controllers turn.
BOUNDS = (0.0, 1e-6, 0.1, 0.2, 0.3, 0.35, 0.5)


def _motion(kind: str, rng: np.random.Generator) -> Callable[[], np.ndarray]:
    """A generator of actions `[7]` of one chunk."""
    steady = np.zeros(7)
    steady[rng.integers(3)] = rng.choice(_STEADY) * rng.choice([-1, 1])

    def edge() -> np.ndarray:
        """One quantity at a bound."""
        action = np.zeros(7)
        action[rng.integers(6)] = rng.choice(BOUNDS)
        return action

    return {
        "zero": lambda: np.zeros(7),
        "slow": lambda: rng.uniform(-0.1, 0.1, 7),
        "fast": lambda: rng.uniform(-2, 2, 7),
        "rising": lambda: np.array([0, 0, 0.4, 0, 0, 0.1, 1]) * rng.uniform(0.3, 1.5),
        "steady": lambda: steady,
        "edge": edge,
    }[kind]


@dataclass(frozen=True)
class Chunk:
    """A query and what follows it until the next."""

    length: int
    motion: str
    frames: tuple[str, ...]
    given: str


chunks = st.builds(
    Chunk,
    length=st.one_of(st.just(8), st.integers(0, 8)),
    motion=st.sampled_from(["zero", "slow", "slow", "fast", "rising", "steady", "steady", "edge"]),
    frames=st.one_of(
        st.sampled_from([("static",), ("part",), ("threshold",), ("static", "threshold")]),
        st.lists(st.sampled_from(FRAMES), min_size=1, max_size=3).map(tuple),
    ),
    given=st.sampled_from(["all", "all", "none", "some"]),
)


@dataclass(frozen=True)
class Recipe:
    """What an episode is made of; short enough to be read in a report.

    Attributes:
        views: Number of cameras.
        prompt: Number of prompt tokens.
        parts: Queries with what follows them; after the last of them there is one more query.
        seed: Of everything drawn.
        lasting: How much the attention to a token has in common in all layers and queries.
    """

    views: int
    prompt: int
    parts: Sequence[Chunk]
    seed: int = 0
    lasting: float = 1.5

    def script(self) -> Script:
        """The events."""
        views, rng = VIEWS[: self.views], np.random.default_rng(self.seed)
        layout = layout_of(views, self.prompt)
        n_tokens = layout.n_tokens
        salience = rng.normal(scale=self.lasting, size=n_tokens)
        for segment in layout.views.values():
            salience[segment.start : segment.start + segment.length] += rng.normal(scale=self.lasting)
        images = {view: first_frame(rng) for view in views}
        events: list[Ask | Step] = []
        for number, chunk in enumerate((*self.parts, Chunk(0, "zero", ("static",), "none"))):
            # Now and then a layer looks at a few tokens almost alone, and is sure of it.
            peaks = {int(layer): np.where(rng.random(n_tokens) < 0.02, 12.0, 0.0) for layer in rng.integers(32, size=6)}
            events.append(Ask(images, Attention(n_tokens, (self.seed, number), salience, peaks)))
            motion = _motion(chunk.motion, rng)
            for _ in range(chunk.length):
                images = {view: next_frame(image, rng.choice(chunk.frames), rng) for view, image in images.items()}
                told = chunk.given == "all" or (chunk.given == "some" and rng.random() < 0.5)
                events.append(Step(motion(), images if told else None))
        return Script(views, self.prompt, tuple(events))


recipes = st.builds(
    Recipe,
    views=st.integers(1, 3),
    prompt=st.sampled_from([12, 34, 70]),
    parts=st.lists(chunks, min_size=1, max_size=4),
    seed=st.integers(0, 2**31 - 1),
    lasting=st.sampled_from([0.0, 1.5, 3.0]),
)
