"""OpenVLA-OFT (arXiv 2502.19645), native: bidirectional passes, one of three heads, and hook points along the way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from tokenprune.engine.adapter import Observation, check_observation
from tokenprune.engine.query import Query
from tokenprune.model.device import upload
from tokenprune.model.info import BackboneInfo
from tokenprune.model.phase import Phase
from tokenprune.tokens.layout import TokenLayout
from tokenprune_adapters.backbones.openvla_oft.config import TRAIN_STEPS, OFTConfig
from tokenprune_adapters.backbones.openvla_oft.diffusion import DDIM, timestep_encodings
from tokenprune_adapters.backbones.openvla_oft.heads import (
    DiffusionActionHead,
    L1ActionHead,
    NoisyActionProjector,
    ProprioProjector,
)
from tokenprune_adapters.backbones.prismatic.action_bins import ActionBins
from tokenprune_adapters.backbones.prismatic.model import LanguageModel, Projector, VisionBackbone
from tokenprune_adapters.backbones.prismatic.prompt import PromptTokenizer
from tokenprune_adapters.inputs.observations import upload_frames
from tokenprune_adapters.inputs.statistics import Statistics
from tokenprune_adapters.inputs.tokenizer import Prompt
from tokenprune_adapters.vision.attention import EncoderLook


class OFTModel(nn.Module):
    """The weights, under the names of the released files."""

    def __init__(self, config: OFTConfig) -> None:
        """Build the modules; build on the meta device to take no memory."""
        super().__init__()
        body, width = config.body, config.body.decoder.hidden
        horizon, dims = config.action.horizon, config.action.dims
        self.vision_backbone = VisionBackbone(body.towers)
        self.projector = Projector(body.projector_widths)
        self.language_model = LanguageModel(body, lm_head=config.head == "discrete")
        if config.head == "l1":
            self.action_head: nn.Module = L1ActionHead(horizon, dims, width)
        elif config.head == "diffusion":
            self.action_head = DiffusionActionHead(horizon, dims, width)
            self.noisy_action_projector = NoisyActionProjector(width)
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


@dataclass(frozen=True)
class OFTTokens:
    """The embedded tokens that all passes of a query share.

    Attributes:
        context: BOS, the patches of each view and the proprio token `[B, C, D]`.
        text: The prompt `[B, T, D]`.
        stop: The stop token `[B, 1, D]`.
    """

    context: Tensor
    text: Tensor
    stop: Tensor

    def around(self, chunk: Tensor, *timestep: Tensor) -> Tensor:
        """All tokens `[B, N, D]` in the layout's order, with the chunk's `[B, C, D]` and perhaps a timestep's."""
        return torch.cat([self.context, *timestep, self.text, chunk, self.stop], dim=1)


class OpenVLAOFT:
    """A policy of the OpenVLA-OFT family; implements `tokenprune.engine.adapter.Backbone`."""

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
        if config.head == "discrete":
            self.bins = ActionBins(config.vocab, config.n_bins, self.device)
        if config.head == "diffusion":
            self.sampler = DDIM(TRAIN_STEPS, config.steps)
            encodings = timestep_encodings(self.sampler.timesteps, config.body.decoder.hidden)
            self.encodings = encodings.to(self.device, self.dtype)

    def prompt(self, instruction: str) -> Prompt:
        """The instruction as tokens."""
        return self.tokenizer.encode(instruction, self.config.max_text)

    def layout(self, instruction: str, state: object = None) -> TokenLayout:
        """Tokens of a query with this instruction; the state has a token of its own."""
        return self.config.layout(self.prompt(instruction))

    def check(self, observation: Observation) -> None:
        """Refuse an observation with wrong views, images or state."""
        check_observation(observation, self.config.views, self.config.state_size)

    def pixels(self, images: Sequence[Mapping[str, np.ndarray]]) -> Mapping[str, Tensor]:
        """Resize and crop the frames of each view, and upload them, uint8 `[B, 3, S, S]`."""
        return upload_frames(images, self.config.views, self.config.transform, self.device)

    def prepare(self, observations: Sequence[Observation], instructions: Sequence[str]) -> OFTInputs:
        """Resize and crop images, tokenise, normalise the state, and upload."""
        prompts = [self.prompt(instruction) for instruction in instructions]
        images = self.pixels([o["images"] for o in observations])
        text = upload(torch.tensor([prompt.ids for prompt in prompts], dtype=torch.int64), self.device)
        state = None
        if self.statistics.state is not None:
            raw = np.stack([np.asarray(o["state"], dtype=np.float64) for o in observations])
            state = upload(torch.from_numpy(self.statistics.state.normalise(raw)).to(self.dtype), self.device)
        return OFTInputs(images, text, state)

    def infer(self, inputs: OFTInputs, query: Query) -> Tensor:
        """Towers, projector, decoder with its cuts, head; normalised actions `[B, T, D]`."""
        with query.phase(Phase.VISION):
            tokens = self.embed(inputs, query)
        if self.config.head == "diffusion":
            return self._denoise(tokens, query)
        numbers = self.config.action.horizon * self.config.action.dims
        blank = tokens.stop.new_zeros(len(inputs.text), numbers, tokens.stop.shape[2])
        states = query.decode(self.decoder, tokens.around(blank))
        with query.phase(Phase.HEAD):
            if self.config.head == "discrete":
                return self._spell(states)
            actions: Tensor = self.model.action_head(states)
            return actions

    def embed(self, inputs: OFTInputs, query: Query) -> OFTTokens:
        """Run the towers and embed everything but the chunk."""
        language = self.model.language_model
        ends = torch.full((len(inputs.text), 2), self.tokenizer.bos_id, device=self.device)
        ends[:, 1] = self.tokenizer.eos_id
        (bos, stop), text = language.embed(ends).split(1, dim=1), language.embed(inputs.text)
        heard = torch.cat([bos, text, stop], dim=1).mean(1) if self.config.film else None
        patches = self._patches(inputs, query, heard)
        proprio = [self.model.proprio_projector(inputs.state)[:, None]] if inputs.state is not None else []
        return OFTTokens(torch.cat([bos, *patches, *proprio], dim=1), text, stop)

    def _patches(self, inputs: OFTInputs, query: Query, heard: Tensor | None) -> list[Tensor]:
        views = self.config.views
        pixels = torch.cat([inputs.images[view] for view in views])
        if heard is not None:
            heard = heard.repeat(len(views), 1)
        look = EncoderLook(self.config.body.towers, query.encoder_kinds)
        features = self.model.vision_backbone(pixels, self.config.transform, self.dtype, heard, look).chunk(len(views))
        query.note_encoder(views, look.seen)
        changed = [query.transform(view, part) for view, part in zip(views, features, strict=True)]
        projected: Tensor = self.model.projector(torch.cat(changed))
        return list(projected.chunk(len(views)))

    def _denoise(self, tokens: OFTTokens, query: Query) -> Tensor:
        """Actions from noise, in one pass of the decoder per step (upstream OpenVLA-OFT).

        Stages are asked once per query, in the first pass, where the chunk is noise; what they choose holds for all.
        """
        action, model = self.config.action, self.model
        # Upstream samples in the model's type; rounding the sample to it at every step would add up.
        wide = torch.promote_types(self.dtype, torch.float32)
        sample = query.noise(action.horizon, action.dims).to(wide)
        for step, encoding in enumerate(self.encodings):
            with query.phase(Phase.HEAD):
                chunk = model.noisy_action_projector(sample.to(self.dtype))
                embeddings = tokens.around(chunk, encoding.expand(len(chunk), 1, -1))
            states = (query.repeat if step else query.decode)(self.decoder, embeddings)
            with query.phase(Phase.HEAD):
                noise: Tensor = model.action_head(states)
                sample = self.sampler.step(noise.to(wide), step, sample)
        return sample

    def _spell(self, states: Tensor) -> Tensor:
        """Actions `[B, T, D]` of the token that each number's state `[B, T * D, W]` prefers."""
        logits = self.model.language_model.logits(states.flatten(0, 1))
        actions = self.bins.actions(self.bins.choose(logits, self.config.restrict))
        # Of logits that are not finite one is still the largest, and its token would pass for an action.
        sound = actions.where(logits.amax(-1).isfinite(), torch.nan)
        return sound.view(len(states), self.config.action.horizon, -1)

    def unnormalise(self, actions: np.ndarray, observations: Sequence[Observation]) -> np.ndarray:
        """Actions `[B, T, D]` in the environment's units."""
        return self.statistics.action.unnormalise(actions)
