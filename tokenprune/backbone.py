"""What an adapter is to the core: it describes its tokens and runs its model, calling back at the hook points."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from tokenprune.layout import TokenLayout

if TYPE_CHECKING:
    from tokenprune.runtime import Query

Observation = Mapping[str, Any]
"""`{"images": {view: uint8 [H, W, 3]}, "state": float [S]}`; `state` only where the policy has one."""


@dataclass(frozen=True, slots=True)
class DecoderShape:
    """The decoder's dimensions, enough to count its FLOPs."""

    depth: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    causal: bool


@dataclass(frozen=True, slots=True)
class ActionSpec:
    """The actions a policy returns.

    Attributes:
        horizon: Actions per chunk.
        groups: Dimensions of each action by what they move, such as `translation: (0, 1, 2)`.
        gripper: Dimension of the gripper command, and the value at which it changes sign of meaning; None without one.
    """

    horizon: int
    groups: Mapping[str, tuple[int, ...]]
    gripper: tuple[int, float] | None = None

    @property
    def dims(self) -> int:
        """Numbers per action."""
        return sum(len(dims) for dims in self.groups.values())


@dataclass(frozen=True)
class BackboneInfo:
    """Everything known about a backbone before any weight exists.

    Attributes:
        name: Registered name.
        source: Preset name or checkpoint path.
        untrained: True where the weights are random; shown wherever results are.
        decoder: Its dimensions.
        views: Cameras in sequence order.
        action: What it returns.
        capabilities: Names from `specs.CAPABILITIES` it offers.
        other_flops: FLOPs per query outside the decoder, by part (2 per multiply-add).
    """

    name: str
    source: str
    untrained: bool
    decoder: DecoderShape
    views: tuple[str, ...]
    action: ActionSpec
    capabilities: frozenset[str] = frozenset()
    other_flops: Mapping[str, int] = field(default_factory=dict)


class Inputs(Protocol):
    """Observations made ready; adapters keep more in their own type.

    Attributes:
        layout: Tokens of the query, the same for every batch row.
        images: Per view, the cropped pixels the patches align to, uint8 `[B, 3, S, S]`.
    """

    layout: TokenLayout
    images: Mapping[str, Tensor]


class Backbone(Protocol):
    """A model with its weights."""

    info: BackboneInfo
    device: torch.device

    def layout(self, instruction: str) -> TokenLayout:
        """Tokens of a query with this instruction.

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

    def prepare(self, observations: Sequence[Observation], instructions: Sequence[str]) -> Inputs:
        """Preprocess checked observations whose layouts are equal, and upload them."""
        ...

    def infer(self, inputs: Any, query: Query) -> Tensor:  # noqa: ANN401 - each adapter's own Inputs
        """Run the model through the query's hook points; returns normalised actions `[B, T, D]` on the device."""
        ...

    def unnormalise(self, actions: np.ndarray) -> np.ndarray:
        """Normalised actions `[B, T, D]` in the environment's units."""
        ...


class BackboneFactory(Protocol):
    """What a `BackboneSpec.target` names: makes backbones of one family."""

    @staticmethod
    def describe(preset: str | None, checkpoint: Path | None, options: Mapping[str, Any]) -> tuple[BackboneInfo, Any]:
        """What it would be, and a function from instruction to layout; no weights are made or read."""
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
        """Make it: random weights for a preset, the checkpoint's otherwise."""
        ...
