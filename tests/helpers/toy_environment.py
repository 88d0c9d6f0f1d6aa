"""A plugin file with a tiny environment, and a policy for it that is ready as soon as torch is.

Actions push a point over a table, and cameras look at it. An episode succeeds after a number of steps that its start
decides, so that untrained policies succeed now and then; what is seen depends on the actions. The environment can be
told to crash in the first attempts at some episodes.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tokenprune.engine.adapter import Description
from tokenprune.engine.query import Query
from tokenprune.errors import ConfigError, ObservationError, SimulatorError
from tokenprune.evaluation.environment import Step, Suite, Task
from tokenprune.model.decoder import Decoder
from tokenprune.model.info import ActionSpec, BackboneInfo, DecoderShape
from tokenprune.model.phase import Phase
from tokenprune.registry.hookspecs import hookimpl
from tokenprune.registry.specs import BackboneSpec, EnvironmentSpec, StageSpec
from tokenprune.stages.config import CutConfig, Keep
from tokenprune.stages.control_context import ControlContext, ControlDecision
from tokenprune.stages.needs import StageNeeds
from tokenprune.stages.stage import Stage
from tokenprune.stages.token_context import SelectContext
from tokenprune.tokens.layout import Role, Segment, TokenLayout
from tokenprune.tokens.prompt import EncodedPrompt
from tokenprune.tokens.proposal import Proposal

SIDE = 64
HORIZON = 20
TASKS = ("push the point to the left", "push the point to the right", "push the point to the right")


@hookimpl
def tokenprune_register() -> list[EnvironmentSpec | BackboneSpec | StageSpec]:
    return [
        *(EnvironmentSpec(name, "a point on a table", ":Factory") for name in ("toy", "toy_two")),
        BackboneSpec("toy-policy", "three small layers", ":PolicyFactory", {"tiny": "milliseconds a query"}),
        StageSpec("toy.moody", "selector", "keeps the brightest, and interferes", ":Moody"),
    ]


def needed(task: int, init_state: int, seed: int) -> int:
    """Steps to success; more than the horizon allows is a failure."""
    return 3 + (7 * task + 5 * init_state + 11 * seed) % 24


class Factory:
    """Its options: `crash`, `raise` and `hang` give how often an episode `task-init_state` ends the process, fails or
    never ends, `count` a folder where the attempts are counted; `log` a file to which each reset and close is
    written.
    """

    @staticmethod
    def describe(name: str, options: Mapping[str, Any]) -> Suite:
        for key in options:
            if key not in ("crash", "raise", "count", "hang", "log", "seeded", "views"):
                raise ConfigError(f"the toy has no option '{key}'")
        tasks = tuple(Task(i, f"task_{i}", instruction, 4) for i, instruction in enumerate(TASKS))
        views = tuple(options.get("views", ("primary", "wrist")))
        return Suite(name, tasks, views, HORIZON, 20.0, {"side": SIDE}, bool(options.get("seeded", True)))

    @staticmethod
    def build(name: str, options: Mapping[str, Any]) -> Toy:
        return Toy(Factory.describe(name, options), options)


class Toy:
    """One table."""

    def __init__(self, suite: Suite, options: Mapping[str, Any]) -> None:
        self.suite, self.options = suite, options
        # Rendered into again and again, as simulators do.
        self.canvas = {view: np.zeros((SIDE, SIDE, 3), np.uint8) for view in suite.views}
        self.log("open", suite.name)

    def log(self, *words: object) -> None:
        if "log" in self.options:
            with open(self.options["log"], "a") as file:
                file.write(json.dumps([os.getpid(), *words]) + "\n")

    def reset(self, task: int, init_state: int, seed: int) -> None:
        if not 0 <= init_state < self.suite.tasks[task].init_states:
            raise SimulatorError(f"no initial state {init_state}")
        self.log("reset", task, init_state, seed)
        self.rng = np.random.default_rng((task, init_state, seed))
        self.place = self.rng.uniform(0.2, 0.8, 3)
        self.steps, self.needed = 0, needed(task, init_state, seed)
        self.fails = self._fails(f"{task}-{init_state}")

    def _fails(self, episode: str) -> str:
        for how in ("crash", "raise", "hang"):
            times = self.options.get(how, {}).get(episode, 0)
            attempts = Path(self.options["count"], f"{episode}-{how}") if times else None
            if attempts is not None:
                with attempts.open("a") as file:
                    file.write("x")
                if attempts.stat().st_size <= times:
                    return how
        return ""

    def draw(self, place: np.ndarray, steps: int) -> dict[str, np.ndarray]:
        """A square at the place, in a colour of the time; the wrist camera sees it from its own place."""
        for number, (view, canvas) in enumerate(self.canvas.items()):
            canvas[:] = 40 + 30 * number
            row, column = (int(x) for x in np.clip(place[number : number + 2] * SIDE, 8, SIDE - 8))
            canvas[row - 8 : row + 8, column - 8 : column + 8] = (200, 9 * steps % 256, len(view))
        return self.canvas

    def observe(self) -> dict[str, Any]:
        state = np.concatenate([self.place, [self.steps / HORIZON], np.zeros(4)])
        return {"images": self.draw(self.place, self.steps), "state": state}

    def frames(self) -> Callable[[], Mapping[str, np.ndarray]]:
        place, steps = self.place.copy(), self.steps
        return lambda: self.draw(place, steps)

    def step(self, action: np.ndarray) -> Step:
        if self.fails and self.steps == 1:
            if self.fails == "crash":
                os._exit(7)
            if self.fails == "hang":
                threading.Event().wait()
            raise SimulatorError("the table fell over")
        self.place = np.clip(self.place + 0.02 * action[:3] + self.rng.normal(0, 0.01, 3), 0, 1)
        self.steps += 1
        return Step(self.steps >= self.needed, np.concatenate([self.place, [0, 0, 0, 1]]))

    def close(self) -> None:
        self.log("close", self.suite.name)


class MoodyConfig(CutConfig):
    keep: Keep = 0.5
    fails: tuple[int, ...] = ()
    asks: tuple[int, ...] = ()
    back: int = 0


class Moody(Stage[MoodyConfig]):
    """Fails in some queries, asks for new ones after some control steps, and looks back as far as it is told."""

    Config = MoodyConfig

    def requirements(self, info: BackboneInfo) -> StageNeeds:
        return replace(super().requirements(info), look_back_frames=self.config.back)

    @hookimpl
    def look_back(self, ctx: ControlContext) -> int | None:
        return self.config.back or None

    @hookimpl
    def control(self, ctx: ControlContext) -> ControlDecision | None:
        asked = ctx.event == "executed" and len(ctx.executed) in self.config.asks
        return ControlDecision("default", True) if asked else None

    @hookimpl
    def select_tokens(self, ctx: SelectContext) -> Proposal:
        if ctx.slots[0].queries in self.config.fails:
            raise ZeroDivisionError("not in the mood")
        score = ctx.patches.float().mean(-1)
        if self.config.back:
            for view in ctx.layout.views:
                past, had = ctx.past_images(view)
                score = score + torch.where(had[:, None], past.float().mean((1, 2, 3))[:, None], 0) * score.sin()
        return Proposal(score=score)


ACTION = ActionSpec(4, {"translation": (0, 1, 2), "gripper": (3,)}, gripper=(3, 1.3))
SHAPE = DecoderShape(depth=3, hidden=16, heads=2, kv_heads=2, head_dim=8, mlp=24, causal=False)


class Layer(nn.Module):
    """What the core's decoder wants of a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attn, self.mlp = nn.Module(), nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16))
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self.self_attn, name, nn.Linear(16, 16))
        self.input_layernorm, self.post_attention_layernorm = nn.LayerNorm(16), nn.LayerNorm(16)


class ToyPolicy:
    """Means of 16 patches a view, a word or more, and a token for each number of the chunk."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, views: tuple[str, ...], seed: int) -> None:
        self.info = BackboneInfo(
            "toy-policy", "tiny", True, SHAPE, views, ACTION, 8, frozenset({"action_rows", "batch"})
        )
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(seed)
            self.layers = nn.ModuleList(Layer() for _ in range(3))
            self.patch, self.state, self.head = nn.Linear(3, 16), nn.Linear(8, 16), nn.Linear(16, 1)
            self.words = torch.randn(64, 16)
        self.decoder = Decoder(list(self.layers), nn.LayerNorm(16), head_dim=8, rope_theta=10000.0, causal=False)

    def encode(self, instruction: str, state: object = None) -> EncodedPrompt:
        return EncodedPrompt(self.layout(instruction), instruction)

    def layout(self, instruction: str) -> TokenLayout:
        words, views = len(instruction.split()), self.info.views
        patches = [Segment(Role.VISION, 0, 16, view, (4, 4), prunable=True) for view in views]
        text = 1 + 16 * len(views)
        rows = {"text": range(text, text + words), "action": range(text + words, text + words + 16)}
        rows |= {"readout": rows["action"], "instruction": rows["text"]}
        segments = [Segment(Role.PROPRIO, 0, 1), *patches, Segment(Role.TEXT, 0, words), Segment(Role.ACTION, 0, 16)]
        return TokenLayout.build(segments, rows)

    def check(self, observation: Mapping[str, Any]) -> None:
        if tuple(observation["images"]) != self.info.views:
            raise ObservationError(f"the toy looks at {self.info.views}, got {tuple(observation['images'])}")

    def pixels(self, images: Any) -> dict[str, Tensor]:
        return {v: torch.from_numpy(np.stack([i[v] for i in images])).permute(0, 3, 1, 2) for v in self.info.views}

    def prepare(self, observations: Any, prompts: Any) -> Any:
        inputs = nn.Module()
        inputs.images = self.pixels([observation["images"] for observation in observations])
        inputs.state = torch.tensor(np.stack([o["state"] for o in observations]), dtype=self.dtype)
        inputs.ids = torch.tensor([[sum(map(ord, word)) % 64 for word in prompt.tokens.split()] for prompt in prompts])
        return inputs

    def infer(self, inputs: Any, query: Query) -> Tensor:
        with query.phase(Phase.VISION):
            means = {v: nn.functional.avg_pool2d(p.float() / 255, 16) for v, p in inputs.images.items()}
            patches = [query.transform(v, self.patch(m.flatten(2).transpose(1, 2))) for v, m in means.items()]
        blank = self.words[:16].expand(len(inputs.ids), -1, -1)
        tokens = [self.state(inputs.state)[:, None], *patches, self.words[inputs.ids], blank]
        return self.head(query.decode(self.decoder, torch.cat(tokens, 1))).view(-1, 4, 4)

    def unnormalise(self, actions: np.ndarray, observations: object) -> np.ndarray:
        return 3 * actions


class PolicyFactory:
    """Makes it."""

    @staticmethod
    def describe(preset: str, checkpoint: None, options: Mapping[str, Any]) -> Description:
        toy = ToyPolicy(tuple(options.get("views", ("primary", "wrist"))), 0)
        return Description(toy.info, toy.layout, lambda image: torch.from_numpy(image).permute(2, 0, 1))

    @staticmethod
    def build(
        preset: str, checkpoint: None, options: Mapping[str, Any], device: object, dtype: object, seed: int
    ) -> ToyPolicy:
        return ToyPolicy(tuple(options.get("views", ("primary", "wrist"))), seed)
