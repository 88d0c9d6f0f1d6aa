"""The forward pass of pi0 and pi0.5: a pruned prefill of the prefix, then flow steps of the action expert."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tokenprune.engine.adapter import BackboneInfo, EncodedPrompt, FrozenKV, KVCache, Observation, Phase, Query, upload
from tokenprune_adapters.backbones.common.backbone import BackboneBase, PolicySetup
from tokenprune_adapters.backbones.pi0.config import PI0Config
from tokenprune_adapters.backbones.pi0.model import PI0Model, time_embeddings
from tokenprune_adapters.backbones.pi0.prompt import GemmaTokenizer
from tokenprune_adapters.inputs.tokenizer import Prompt
from tokenprune_adapters.vision.attention import AttentionCapture

PI0Setup = PolicySetup[PI0Config, GemmaTokenizer]


@dataclass(frozen=True)
class PI0Inputs:
    """A query's inputs on the device.

    Attributes:
        images: Per view, scaled and padded pixels, uint8 `[B, 3, S, S]`.
        text: Prompt ids `[B, T]`.
        state: Normalised robot state, padded with zeros, `[B, width]`; None if it has no token.
    """

    images: Mapping[str, Tensor]
    text: Tensor
    state: Tensor | None


class PI0(BackboneBase[PI0Config, GemmaTokenizer, PI0Model]):
    """A policy of pi0's family; implements `tokenprune.engine.adapter.Backbone`."""

    def __init__(self, setup: PI0Setup, model: PI0Model, info: BackboneInfo) -> None:
        """Make the decoder loops and the time embeddings; for the arguments see `BackboneBase`."""
        super().__init__(setup, model, info)
        self.prefix, self.expert = model.language.decoder(), model.expert.decoder()
        times = time_embeddings(self.config.steps, self.config.expert.hidden)
        self._times = times.to(self.device, self.dtype)

    def prompt(self, instruction: str, state: object = None) -> Prompt:
        """The prompt of an instruction and, if the prompt spells it, of a robot state."""
        return self.config.encode(self.tokenizer, instruction, self._normalised(state))

    def prepare(self, observations: Sequence[Observation], prompts: Sequence[EncodedPrompt]) -> PI0Inputs:
        """Scale and pad images, normalise the state, and upload."""
        states = [observation.get("state") for observation in observations]
        images = self.pixels([observation["images"] for observation in observations])
        text = upload(torch.tensor([prompt.tokens.ids for prompt in prompts], dtype=torch.int64), self.device)
        token = None
        if self.config.has_state_token:
            padded = np.zeros((len(states), self.config.width))
            padded[:, : self.config.state_size] = [self._normalised(state) for state in states]
            token = upload(torch.from_numpy(padded).to(self.dtype), self.device)
        return PI0Inputs(images, text, token)

    def _normalised(self, state: object) -> np.ndarray | None:
        if state is None or self.statistics.state is None:
            return None
        return self.statistics.state.normalise(np.asarray(state, dtype=np.float64))

    def infer(self, inputs: PI0Inputs, query: Query) -> Tensor:
        """Tower, projector, pruned prefill of the prefix, flow steps; normalised actions `[B, T, D]`."""
        with query.phase(Phase.VISION):
            embeddings = self.embed(inputs, self._patches(inputs, query))
        cache = KVCache()
        query.decode(self.prefix, embeddings, cache)
        with query.phase(Phase.FLOW):
            behind = 0
            if inputs.state is not None:
                # It attends to no action, so its keys and values are the same at every step.
                token = self.model.state_proj(inputs.state)[:, None]
                query.follow(self.expert, token, behind, cache, actions=False)
                behind = 1
            return self._denoise(query, behind, cache.frozen())[..., : self.config.action.dims]

    def _denoise(self, query: Query, behind: int, cache: FrozenKV) -> Tensor:
        """Normalised actions `[B, T, width]`, from noise."""
        model, steps = self.model, self.config.steps
        noise = query.noise(self.config.action.horizon, self.config.width)
        # Many small steps add up, so the sum has at least float32 (upstream openpi).
        actions = noise.to(torch.promote_types(self.dtype, noise.dtype))
        for time in self._times:
            tokens, condition = model.action_in_proj(actions.to(self.dtype)), None
            if self.config.variant == "pi0":
                tokens = model.action_time_tokens(tokens, time)
            else:
                condition = model.condition(time)[None]
            hidden = query.follow(self.expert, tokens, behind, cache, condition)
            actions = actions - model.action_out_proj(hidden) / steps
        return actions

    def _patches(self, inputs: PI0Inputs, query: Query) -> list[Tensor]:
        """Projected patches `[B, N, D]` of each view."""
        views = self.config.views
        pixels = torch.cat([inputs.images[view] for view in views])
        capture = AttentionCapture((self.config.tower,), query.encoder_kinds)
        normalised = self.config.transform.normalise(pixels, 0, self.dtype)
        features = self.model.vision(normalised, on_attention=capture.callback(0)).chunk(len(views))
        query.note_encoder(views, capture.captured)
        changed = [query.transform(view, part) for view, part in zip(views, features, strict=True)]
        projected: Tensor = self.model.projector(torch.cat(changed))
        return list(projected.chunk(len(views)))

    def embed(self, inputs: PI0Inputs, patches: Sequence[Tensor]) -> Tensor:
        """All tokens of the prefix `[B, N, D]` in the layout's order."""
        return torch.cat([*patches, self.model.language.embed(inputs.text)], dim=1)

    def unnormalise(self, actions: np.ndarray, observations: Sequence[Observation]) -> np.ndarray:
        """Actions `[B, T, D]` in the environment's units; the observation's state is added to relative numbers."""
        values, relative = super().unnormalise(actions, observations), self.config.relative
        if relative:
            states = np.stack([np.asarray(o["state"], dtype=np.float64)[:relative] for o in observations])
            values[..., :relative] += states[:, None]
        return values
