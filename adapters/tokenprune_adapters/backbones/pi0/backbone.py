"""pi0 and pi0.5, native: a prefix that is cut on its way, and flow steps behind what is left of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tokenprune.engine.adapter import Observation, check_observation
from tokenprune.engine.query import Query
from tokenprune.model.device import upload
from tokenprune.model.info import BackboneInfo
from tokenprune.model.kv_cache import FrozenKV, KVCache
from tokenprune.model.phase import Phase
from tokenprune.tokens.layout import TokenLayout
from tokenprune_adapters.backbones.pi0.config import PI0Config
from tokenprune_adapters.backbones.pi0.model import PI0Model, time_embeddings
from tokenprune_adapters.backbones.pi0.prompt import GemmaTokenizer
from tokenprune_adapters.inputs.observations import upload_frames
from tokenprune_adapters.inputs.statistics import Statistics
from tokenprune_adapters.inputs.tokenizer import Prompt
from tokenprune_adapters.vision.attention import EncoderLook


@dataclass(frozen=True)
class PI0Inputs:
    """A query's inputs on the device.

    Attributes:
        images: Per view, scaled and padded pixels, uint8 `[B, 3, S, S]`.
        text: Prompt ids `[B, T]`.
        state: Normalised robot state with zeros behind it `[B, width]`, None where it has no token.
    """

    images: Mapping[str, Tensor]
    text: Tensor
    state: Tensor | None


class PI0:
    """A policy of pi0's family; implements `tokenprune.engine.adapter.Backbone`."""

    def __init__(
        self,
        config: PI0Config,
        model: PI0Model,
        tokenizer: GemmaTokenizer,
        statistics: Statistics,
        info: BackboneInfo,
    ) -> None:
        """Keep the parts; the model's device and dtype are the policy's."""
        self.config = config
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.statistics = statistics
        self.info = info
        weight = model.projector.weight
        self.device, self.dtype = weight.device, weight.dtype
        self.prefix, self.expert = model.language.decoder(), model.expert.decoder()
        times = time_embeddings(config.steps, config.expert.hidden)
        self._times = times.to(self.device, self.dtype)

    def prompt(self, instruction: str, state: object = None) -> Prompt:
        """The instruction as tokens, and the robot state where the prompt spells it."""
        return self.tokenizer.encode(instruction, self.config.max_text, self.config.spelled(self._normalised(state)))

    def layout(self, instruction: str, state: object = None) -> TokenLayout:
        """Tokens of a query with this instruction and, for pi0.5, this state."""
        return self.config.layout(self.prompt(instruction, state))

    def check(self, observation: Observation) -> None:
        """Refuse an observation with wrong views, images or state."""
        check_observation(observation, self.config.views, self.config.state_size)

    def pixels(self, images: Sequence[Mapping[str, np.ndarray]]) -> Mapping[str, Tensor]:
        """Scale and pad the frames of each view, and upload them, uint8 `[B, 3, S, S]`."""
        return upload_frames(images, self.config.views, self.config.transform, self.device)

    def prepare(self, observations: Sequence[Observation], instructions: Sequence[str]) -> PI0Inputs:
        """Scale and pad images, tokenise, normalise the state, and upload."""
        states = [observation.get("state") for observation in observations]
        prompts = [self.prompt(*given) for given in zip(instructions, states, strict=True)]
        images = self.pixels([observation["images"] for observation in observations])
        text = upload(torch.tensor([prompt.ids for prompt in prompts], dtype=torch.int64), self.device)
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
        """Tower, projector, prefix with its cuts, flow steps; normalised actions `[B, T, D]`."""
        with query.phase(Phase.VISION):
            embeddings = self.embed(inputs, self._patches(inputs, query))
        cache = KVCache()
        query.decode(self.prefix, embeddings, cache)
        with query.phase(Phase.FLOW):
            behind = 0
            if inputs.state is not None:
                # It sees no action, so what it leaves in the cache is the same at every step.
                token = self.model.state_proj(inputs.state)[:, None]
                query.follow(self.expert, token, behind, cache, actions=False)
                behind = 1
            return self._denoise(query, behind, cache.frozen())[..., : self.config.action.dims]

    def _denoise(self, query: Query, behind: int, memory: FrozenKV) -> Tensor:
        model, steps = self.model, self.config.steps
        noise = query.noise(self.config.action.horizon, self.config.width)
        # Small steps add up, so the sum is kept in no less than float32 (upstream openpi).
        actions = noise.to(torch.promote_types(self.dtype, noise.dtype))
        for time in self._times:
            tokens, condition = model.action_in_proj(actions.to(self.dtype)), None
            if self.config.variant == "pi0":
                tokens = model.timed(tokens, time)
            else:
                condition = model.condition(time)[None]
            hidden = query.follow(self.expert, tokens, behind, memory, condition)
            actions = actions - model.action_out_proj(hidden) / steps
        return actions

    def _patches(self, inputs: PI0Inputs, query: Query) -> list[Tensor]:
        views = self.config.views
        pixels = torch.cat([inputs.images[view] for view in views])
        look = EncoderLook((self.config.tower,), query.encoder_kinds)
        normalised = self.config.transform.normalise(pixels, 0, self.dtype)
        features = self.model.vision(normalised, look=look.at(0)).chunk(len(views))
        query.note_encoder(views, look.seen)
        changed = [query.transform(view, part) for view, part in zip(views, features, strict=True)]
        projected: Tensor = self.model.projector(torch.cat(changed))
        return list(projected.chunk(len(views)))

    def embed(self, inputs: PI0Inputs, patches: Sequence[Tensor]) -> Tensor:
        """All tokens of the prefix `[B, N, D]` in the layout's order."""
        return torch.cat([*patches, self.model.language.embed(inputs.text)], dim=1)

    def unnormalise(self, actions: np.ndarray, observations: Sequence[Observation]) -> np.ndarray:
        """Actions `[B, T, D]` in the environment's units, the relative ones added to the state of the observation."""
        values, relative = self.statistics.action.unnormalise(actions), self.config.relative
        if relative:
            states = np.stack([np.asarray(o["state"], dtype=np.float64)[:relative] for o in observations])
            values[..., :relative] += states[:, None]
        return values
