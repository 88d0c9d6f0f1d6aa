"""OpenVLA-OFT's forward pass (arXiv 2502.19645): a bidirectional prefill and one of three action heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tokenprune.engine.adapter import BackboneInfo, EncodedPrompt, Observation, Phase, Query, upload
from tokenprune_adapters.backbones.common.backbone import BackboneBase, PolicySetup
from tokenprune_adapters.backbones.openvla_oft.config import TRAIN_STEPS, OFTConfig
from tokenprune_adapters.backbones.openvla_oft.diffusion import DDIM, timestep_encodings
from tokenprune_adapters.backbones.openvla_oft.model import OFTModel
from tokenprune_adapters.backbones.prismatic.action_bins import ActionBins
from tokenprune_adapters.backbones.prismatic.prompt import PromptTokenizer
from tokenprune_adapters.vision.attention import AttentionCapture

OFTSetup = PolicySetup[OFTConfig, PromptTokenizer]


@dataclass(frozen=True)
class OFTInputs:
    """A query's inputs on the device.

    Attributes:
        images: Per view, cropped pixels, uint8 `[B, 3, S, S]`.
        text: Prompt ids `[B, T]`.
        state: Normalised robot state `[B, S]`, None if the policy reads none.
    """

    images: Mapping[str, Tensor]
    text: Tensor
    state: Tensor | None


@dataclass(frozen=True)
class OFTTokens:
    """Embedded tokens that are the same in every decoder pass of a query.

    Attributes:
        context: BOS, the patches of each view and the proprio token `[B, C, D]`.
        text: The prompt `[B, T, D]`.
        stop: The stop token `[B, 1, D]`.
    """

    context: Tensor
    text: Tensor
    stop: Tensor

    def with_chunk(self, chunk: Tensor, *timestep: Tensor) -> Tensor:
        """All tokens `[B, N, D]` in the layout's order, with the chunk's `[B, C, D]` and any timestep token."""
        return torch.cat([self.context, *timestep, self.text, chunk, self.stop], dim=1)


class OpenVLAOFT(BackboneBase[OFTConfig, PromptTokenizer, OFTModel]):
    """A policy of the OpenVLA-OFT family; implements `tokenprune.engine.adapter.Backbone`."""

    def __init__(self, setup: OFTSetup, model: OFTModel, info: BackboneInfo) -> None:
        """Make the decoder loop and what the head needs; for the arguments see `BackboneBase`."""
        super().__init__(setup, model, info)
        config = self.config
        self.decoder = model.language_model.decoder(config.body)
        if config.head == "discrete":
            self.bins = ActionBins(config.vocab, config.n_bins, self.device)
        if config.head == "diffusion":
            self.sampler = DDIM(TRAIN_STEPS, config.steps)
            encodings = timestep_encodings(self.sampler.timesteps, config.body.decoder.hidden)
            self.encodings = encodings.to(self.device, self.dtype)

    def prepare(self, observations: Sequence[Observation], prompts: Sequence[EncodedPrompt]) -> OFTInputs:
        """Resize and crop images, normalise the state, and upload."""
        images = self.pixels([o["images"] for o in observations])
        text = upload(torch.tensor([prompt.tokens.ids for prompt in prompts], dtype=torch.int64), self.device)
        state = None
        if self.statistics.state is not None:
            raw = np.stack([np.asarray(o["state"], dtype=np.float64) for o in observations])
            state = upload(torch.from_numpy(self.statistics.state.normalise(raw)).to(self.dtype), self.device)
        return OFTInputs(images, text, state)

    def infer(self, inputs: OFTInputs, query: Query) -> Tensor:
        """Towers, projector, pruned prefill, head; normalised actions `[B, T, D]`."""
        with query.phase(Phase.VISION):
            tokens = self.embed(inputs, query)
        if self.config.head == "diffusion":
            return self._denoise(tokens, query)
        numbers = self.config.action.horizon * self.config.action.dims
        blank = tokens.stop.new_zeros(len(inputs.text), numbers, tokens.stop.shape[2])
        states = query.decode(self.decoder, tokens.with_chunk(blank))
        with query.phase(Phase.HEAD):
            if self.config.head == "discrete":
                return self._discrete_actions(states)
            actions: Tensor = self.model.action_head(states)
            return actions

    def embed(self, inputs: OFTInputs, query: Query) -> OFTTokens:
        """Run the towers and embed all tokens but the chunk's."""
        language = self.model.language_model
        ends = torch.full((len(inputs.text), 2), self.tokenizer.bos_id, device=self.device)
        ends[:, 1] = self.tokenizer.eos_id
        (bos, stop), text = language.embed(ends).split(1, dim=1), language.embed(inputs.text)
        language_mean = torch.cat([bos, text, stop], dim=1).mean(1) if self.config.film else None
        patches = self._patches(inputs, query, language_mean)
        proprio = [self.model.proprio_projector(inputs.state)[:, None]] if inputs.state is not None else []
        return OFTTokens(torch.cat([bos, *patches, *proprio], dim=1), text, stop)

    def _patches(self, inputs: OFTInputs, query: Query, language: Tensor | None) -> list[Tensor]:
        """Projected patches `[B, N, D]` of each view."""
        views = self.config.views
        pixels = torch.cat([inputs.images[view] for view in views])
        if language is not None:
            language = language.repeat(len(views), 1)
        capture = AttentionCapture(self.config.body.towers, query.encoder_kinds)
        features = self.model.vision_backbone(pixels, self.config.transform, self.dtype, language, capture)
        query.note_encoder(views, capture.captured)
        parts = zip(views, features.chunk(len(views)), strict=True)
        changed = [query.transform(view, part) for view, part in parts]
        projected: Tensor = self.model.projector(torch.cat(changed))
        return list(projected.chunk(len(views)))

    def _denoise(self, tokens: OFTTokens, query: Query) -> Tensor:
        """Actions from noise, in one pass of the decoder per step (upstream OpenVLA-OFT).

        Stages choose tokens once per query, in the first pass, in which the chunk is noise; later passes keep them.
        """
        action, model = self.config.action, self.model
        # Upstream samples in the model's type; here the sample is wider, since rounding errors of each step add up.
        wide = torch.promote_types(self.dtype, torch.float32)
        sample = query.noise(action.horizon, action.dims).to(wide)
        for step, encoding in enumerate(self.encodings):
            with query.phase(Phase.HEAD):
                chunk = model.noisy_action_projector(sample.to(self.dtype))
                embeddings = tokens.with_chunk(chunk, encoding.expand(len(chunk), 1, -1))
            states = (query.repeat if step else query.decode)(self.decoder, embeddings)
            with query.phase(Phase.HEAD):
                noise: Tensor = model.action_head(states)
                sample = self.sampler.step(noise.to(wide), step, sample)
        return sample

    def _discrete_actions(self, states: Tensor) -> Tensor:
        """Actions `[B, T, D]` of the most likely token at each number's state `[B, T * D, W]`."""
        logits = self.model.language_model.logits(states.flatten(0, 1))
        actions = self.bins.actions(self.bins.choose(logits, self.config.restrict))
        # Logits with NaN or infinity have an argmax too, and its token would be taken for an action.
        finite = actions.where(logits.amax(-1).isfinite(), torch.nan)
        return finite.view(len(states), self.config.action.horizon, -1)
