"""OpenVLA-OFT (arXiv 2502.19645), native: one bidirectional pass, an L1 head, and hook points along the way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from tokenprune.adapter import Observation
from tokenprune.backbone import BackboneInfo
from tokenprune.errors import ObservationError, nearest
from tokenprune.layout import TokenLayout
from tokenprune.runtime import Query
from tokenprune_adapters.backbones.openvla_oft.config import OFTConfig
from tokenprune_adapters.heads import L1ActionHead, ProprioProjector
from tokenprune_adapters.preprocess import check_image
from tokenprune_adapters.prismatic import LanguageModel, Projector, VisionBackbone
from tokenprune_adapters.prompt import Prompt, PromptTokenizer
from tokenprune_adapters.statistics import Statistics


class OFTModel(nn.Module):
    """The weights, under the names of the released files."""

    def __init__(self, config: OFTConfig) -> None:
        """Build the modules; build on the meta device to take no memory."""
        super().__init__()
        body, width = config.body, config.body.decoder.hidden
        self.vision_backbone = VisionBackbone(body.towers)
        self.projector = Projector(body.vision_width, width)
        self.language_model = LanguageModel(body)
        self.action_head = L1ActionHead(config.action.horizon, config.action.dims, width)
        if config.state_size is not None:
            self.proprio_projector = ProprioProjector(config.state_size, width)


@dataclass(frozen=True)
class OFTInputs:
    """A query's inputs on the device.

    Attributes:
        images: Per view, cropped pixels, uint8 `[B, 3, S, S]`.
        text: Prompt ids `[B, T]`.
        state: Normalised robot state `[B, S]`, None where the policy reads none.
    """

    images: Mapping[str, Tensor]
    text: Tensor
    state: Tensor | None


class OpenVLAOFT:
    """A policy of the OpenVLA-OFT family; implements `tokenprune.adapter.Backbone`."""

    def __init__(
        self, config: OFTConfig, model: OFTModel, tokenizer: PromptTokenizer, statistics: Statistics, info: BackboneInfo
    ) -> None:
        """Keep the parts; the model's device and dtype are the policy's."""
        self.config = config
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.statistics = statistics
        self.info = info
        weight = model.projector.fc1.weight
        self.device, self.dtype = weight.device, weight.dtype
        self.decoder = model.language_model.decoder(config.body)

    def prompt(self, instruction: str) -> Prompt:
        """The instruction as tokens."""
        return self.tokenizer.encode(instruction, self.config.max_text)

    def layout(self, instruction: str, state: object = None) -> TokenLayout:
        """Tokens of a query with this instruction; the state has a token of its own."""
        return self.config.layout(self.prompt(instruction))

    def check(self, observation: Observation) -> None:
        """Refuse an observation with wrong views, images or state."""
        if not isinstance(observation, Mapping) or not isinstance(observation.get("images"), Mapping):
            raise ObservationError("an observation is {'images': {view: uint8 [H, W, 3]}, 'state': [S]}")
        for key in observation:
            if key not in ("images", "state"):
                raise ObservationError(f"an observation has no '{key}'{nearest(str(key), ('images', 'state'))}")
        images = observation["images"]
        for view in self.config.views:
            if view not in images:
                looks, got = ", ".join(self.config.views), ", ".join(map(str, images)) or "none"
                raise ObservationError(f"view '{view}' is missing; this policy looks at {looks}, got {got}")
            check_image(view, images[view])
        for view in images:
            if view not in self.config.views:
                raise ObservationError(f"this policy has no view '{view}'{nearest(str(view), self.config.views)}")
        self._check_state(observation.get("state"))

    def _check_state(self, state: object) -> None:
        size = self.config.state_size
        if size is None:
            return
        if state is None:
            raise ObservationError(f"the state is missing; this policy reads {size} numbers of robot state")
        try:
            values = np.asarray(state, dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise ObservationError(f"the state must be {size} numbers, got {type(state).__name__}") from error
        if values.shape != (size,):
            raise ObservationError(f"the state must be {size} numbers, got shape {list(values.shape)}")
        if not np.isfinite(values).all():
            raise ObservationError(
                f"the state holds NaN or infinite numbers at {np.flatnonzero(~np.isfinite(values)).tolist()}"
            )

    def pixels(self, images: Sequence[Mapping[str, np.ndarray]]) -> Mapping[str, Tensor]:
        """Resize and crop the frames of each view, and upload them, uint8 `[B, 3, S, S]`."""
        return {
            view: torch.stack([self.config.transform.cropped(frames[view]) for frames in images]).to(self.device)
            for view in self.config.views
        }

    def prepare(self, observations: Sequence[Observation], instructions: Sequence[str]) -> OFTInputs:
        """Resize and crop images, tokenise, normalise the state, and upload."""
        prompts = [self.prompt(instruction) for instruction in instructions]
        images = self.pixels([o["images"] for o in observations])
        text = torch.tensor([prompt.ids for prompt in prompts], dtype=torch.int64).to(self.device)
        state = None
        if self.statistics.state is not None:
            raw = np.stack([np.asarray(o["state"], dtype=np.float64) for o in observations])
            state = torch.from_numpy(self.statistics.state.normalise(raw)).to(self.device, self.dtype)
        return OFTInputs(images, text, state)

    def infer(self, inputs: OFTInputs, query: Query) -> Tensor:
        """One pass: towers, projector, decoder with its cuts, head; normalised actions `[B, T, D]`."""
        with query.phase("vision"):
            patches = self._patches(inputs, query)
            embeddings = self.embed(inputs, patches)
        states = query.decode(self.decoder, embeddings)
        with query.phase("head"):
            actions: Tensor = self.model.action_head(states)
        return actions

    def _patches(self, inputs: OFTInputs, query: Query) -> list[Tensor]:
        pixels = torch.cat([inputs.images[view] for view in self.config.views])
        features = self.model.vision_backbone(pixels, self.config.transform, self.dtype).chunk(len(self.config.views))
        changed = [query.transform(view, part) for view, part in zip(self.config.views, features, strict=True)]
        projected: Tensor = self.model.projector(torch.cat(changed))
        return list(projected.chunk(len(self.config.views)))

    def embed(self, inputs: OFTInputs, patches: Sequence[Tensor]) -> Tensor:
        """All tokens `[B, N, D]` in the layout's order; action placeholders are zeros."""
        language, batch = self.model.language_model, len(inputs.text)
        ends = torch.full((batch, 2), self.tokenizer.bos_id, device=self.device)
        ends[:, 1] = self.tokenizer.eos_id
        bos, stop = language.embed(ends).split(1, dim=1)
        proprio = [self.model.proprio_projector(inputs.state)[:, None]] if inputs.state is not None else []
        numbers = self.config.action.horizon * self.config.action.dims
        blank = patches[0].new_zeros(batch, numbers, patches[0].shape[2])
        return torch.cat([bos, *patches, *proprio, language.embed(inputs.text), blank, stop], dim=1)

    def unnormalise(self, actions: np.ndarray) -> np.ndarray:
        """Actions `[B, T, D]` in the environment's units."""
        return self.statistics.action.unnormalise(actions)
