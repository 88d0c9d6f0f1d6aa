"""Everything an adapter is written against: it describes its tokens and runs its model, calling back at hook points."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from tokenprune.engine.inputs import ModelInputs
from tokenprune.engine.observations import check_image, check_observation
from tokenprune.engine.query import Query
from tokenprune.model.decoder import Decoder
from tokenprune.model.device import upload
from tokenprune.model.info import ActionSpec, BackboneInfo, DecoderShape, EncoderAnswer, FollowUp
from tokenprune.model.kv_cache import FrozenKV, KVCache
from tokenprune.model.phase import Phase
from tokenprune.tokens.layout import Role, Segment, TokenLayout
from tokenprune.tokens.prompt import EncodedPrompt

__all__ = [
    "ActionSpec",
    "Adopts",
    "Backbone",
    "BackboneFactory",
    "BackboneInfo",
    "Decoder",
    "DecoderShape",
    "Description",
    "EncodedPrompt",
    "EncoderAnswer",
    "Findings",
    "FollowUp",
    "FrozenKV",
    "KVCache",
    "ModelInputs",
    "Observation",
    "Phase",
    "Query",
    "Role",
    "Segment",
    "TokenLayout",
    "Verifies",
    "check_image",
    "check_observation",
    "upload",
]

Observation = Mapping[str, Any]
"""`{"images": {view: uint8 [H, W, 3]}, "state": float [S]}`; `state` only where the policy has one."""


class Backbone(Protocol):
    """A model with its weights."""

    info: BackboneInfo
    device: torch.device
    dtype: torch.dtype

    def encode(self, instruction: str, state: object = None) -> EncodedPrompt:
        """Tokenise an instruction; called once per reset, and per query where `info.state_in_prompt`.

        Args:
            instruction: What the robot should do.
            state: The observation's robot state, which some prompts spell out; a neutral one when left out.

        Raises:
            ObservationError: If the instruction cannot be given to the policy.
        """
        ...

    def check(self, observation: Observation) -> None:
        """Refuse an observation the policy was not made for, before anything runs.

        Raises:
            ObservationError: Naming the view or field, what was found and what is valid.
        """
        ...

    def pixels(self, images: Sequence[Mapping[str, np.ndarray]]) -> Mapping[str, Tensor]:
        """Crop the frames `{view: uint8 [H, W, 3]}` of several environments and upload them, uint8 `[B, 3, S, S]`."""
        ...

    def prepare(self, observations: Sequence[Observation], prompts: Sequence[EncodedPrompt]) -> ModelInputs:
        """Preprocess checked observations whose prompts have equal layouts, and upload them."""
        ...

    def infer(self, inputs: Any, query: Query) -> Tensor:  # noqa: ANN401 - each adapter's own Inputs
        """Run the model through the query's hook points; returns normalised actions `[B, T, D]` on the device."""
        ...

    def unnormalise(self, actions: np.ndarray, observations: Sequence[Observation]) -> np.ndarray:
        """Normalised actions `[B, T, D]` in the environment's units; some are relative to the state observed."""
        ...


@dataclass(frozen=True)
class Description:
    """What a backbone would be, without its weights.

    Attributes:
        info: Dimensions, cameras, actions.
        layout: The tokens of a query by its instruction.
        pixels: A camera frame `[H, W, 3]` as the policy crops it, uint8 `[3, S, S]`.
        weights: Folder the weights would be read from, or None where there is none yet or they would be random.
    """

    info: BackboneInfo
    layout: Callable[[str], TokenLayout]
    pixels: Callable[[np.ndarray], Tensor]
    weights: Path | None = None


@dataclass(frozen=True)
class Findings:
    """What a checkpoint holds, and what of it does not fit the model; tensors as `file: key`.

    Attributes:
        files: Names of the files with tensors.
        dtypes: Tensors per type they are stored in.
        unused: Known ones that no query needs.
        unmapped: Those that belong to nothing in the model.
        missing: Parameters that are nowhere; a file is named where only that one could hold them.
        misshapen: Those whose shape is not the model's, with both shapes.
        statistics: Datasets whose statistics it holds.
        state_size: Numbers of robot state that a query needs, None where the policy reads none.
    """

    files: tuple[str, ...]
    dtypes: Mapping[str, int]
    unused: tuple[str, ...]
    unmapped: tuple[str, ...]
    missing: tuple[str, ...]
    misshapen: tuple[str, ...]
    statistics: tuple[str, ...]
    state_size: int | None

    @property
    def clean(self) -> bool:
        """Whether every tensor has its place and every parameter its tensor."""
        return not (self.unmapped or self.missing or self.misshapen)


class BackboneFactory(Protocol):
    """What a `BackboneSpec.target` names: makes backbones of one family.

    It may also be one that `Adopts` live models, or that `Verifies` checkpoints; where it is not, `from_module` and
    `tokenprune verify` say so.
    """

    @staticmethod
    def describe(preset: str | None, checkpoint: Path | None, options: Mapping[str, Any]) -> Description:
        """What it would be; no weights are made or read."""
        ...

    @staticmethod
    def build(
        preset: str | None,
        checkpoint: Path | None,
        options: Mapping[str, Any],
        device: torch.device,
        dtype: torch.dtype,
        seed: int,
    ) -> Backbone:
        """Make it: with the checkpoint's weights, a trained preset's own, or random ones."""
        ...


class Adopts(Protocol):
    """A factory that takes a live upstream model."""

    @staticmethod
    def adopt(module: torch.nn.Module, options: Mapping[str, Any]) -> Backbone:
        """Take a live upstream model's weights by reference; its device and dtype are the policy's.

        Args:
            module: The model.
            options: The backbone's options, and what the model itself does not hold.

        Raises:
            ConfigError: If an option is wrong or missing.
            CheckpointError: If the model is not of this family.
        """
        ...


class Verifies(Protocol):
    """A factory of backbones with checkpoints, which it sets against the model."""

    @staticmethod
    def verify(checkpoint: Path, options: Mapping[str, Any]) -> Findings:
        """What a checkpoint holds and what of it does not fit; no weights are read.

        Raises:
            ConfigError: If an option is wrong.
            CheckpointError: If a file is missing, damaged or unsafe.
        """
        ...
