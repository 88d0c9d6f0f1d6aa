"""The base of all backbones, and a policy without its weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
from torch import Tensor, nn

from tokenprune.engine.adapter import BackboneInfo, EncodedPrompt, Observation, TokenLayout, check_observation
from tokenprune_adapters.inputs.observations import FrameTransform, upload_frames
from tokenprune_adapters.inputs.statistics import Statistics
from tokenprune_adapters.inputs.tokenizer import Prompt


class PolicyConfig(Protocol):
    """What every family's configuration has."""

    @property
    def transform(self) -> FrameTransform:
        """Image preprocessing."""
        ...

    def encode(self, tokenizer: Any, instruction: str) -> Prompt:  # noqa: ANN401 - each family's own tokenizer
        """The prompt of an instruction."""
        ...

    def layout(self, prompt: Prompt) -> TokenLayout:
        """Tokens of a query with this prompt."""
        ...

    def info(self, source: str, untrained: bool) -> BackboneInfo:
        """The description of the backbone for the core.

        Args:
            source: The preset, or the checkpoint.
            untrained: Whether the weights are random.
        """
        ...


ConfigT = TypeVar("ConfigT", bound=PolicyConfig)
TokenizerT = TypeVar("TokenizerT")
ModelT = TypeVar("ModelT", bound=nn.Module)


@dataclass(frozen=True)
class PolicySetup(Generic[ConfigT, TokenizerT]):
    """A policy without its weights.

    Attributes:
        config: Dimensions, cameras, actions, image preprocessing.
        tokenizer: Makes prompts.
        statistics: Map actions and robot state to the environment's units and back.
    """

    config: ConfigT
    tokenizer: TokenizerT
    statistics: Statistics

    def layout(self, instruction: str) -> TokenLayout:
        """Tokens of a query with this instruction."""
        return self.config.layout(self.config.encode(self.tokenizer, instruction))


class BackboneBase(Generic[ConfigT, TokenizerT, ModelT]):
    """What the backbones of all families share: everything but the forward pass.

    Attributes:
        config: The configuration.
        model: The weights, in evaluation mode and without gradients.
        tokenizer: Makes prompts.
        statistics: Map actions and robot state to the environment's units and back.
        info: What the core knows about the backbone.
        device: Where the weights are.
        dtype: Their type.
    """

    def __init__(self, setup: PolicySetup[ConfigT, TokenizerT], model: ModelT, info: BackboneInfo) -> None:
        self.config = setup.config
        self.tokenizer = setup.tokenizer
        self.statistics = setup.statistics
        self.model = model.eval().requires_grad_(False)
        self.info = info
        weight = next(model.parameters())
        self.device, self.dtype = weight.device, weight.dtype

    def prompt(self, instruction: str, state: object = None) -> Prompt:
        """The prompt of an instruction; it does not depend on the robot state."""
        return self.config.encode(self.tokenizer, instruction)

    def encode(self, instruction: str, state: object = None) -> EncodedPrompt:
        """Tokenise an instruction and, if the prompt spells it, a robot state."""
        prompt = self.prompt(instruction, state)
        return EncodedPrompt(self.config.layout(prompt), prompt)

    def layout(self, instruction: str, state: object = None) -> TokenLayout:
        """Tokens of a query with this instruction and, if the prompt spells it, this robot state."""
        return self.encode(instruction, state).layout

    def check(self, observation: Observation) -> None:
        """Refuse an observation with wrong views, images or state."""
        check_observation(observation, self.info.views, self.info.state_size)

    def pixels(self, images: Sequence[Mapping[str, np.ndarray]]) -> Mapping[str, Tensor]:
        """Resize and crop or pad the frames of each view, and upload them, uint8 `[B, 3, S, S]`."""
        return upload_frames(images, self.info.views, self.config.transform, self.device)

    def unnormalise(self, actions: np.ndarray, observations: Sequence[Observation]) -> np.ndarray:
        """Actions `[B, T, D]` in the environment's units."""
        return self.statistics.action.unnormalise(actions)
