"""OpenVLA (arXiv 2406.09246), native: a causal pass over image and prompt, then one cached step per further number."""

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
from tokenprune.model.kv_cache import KVCache
from tokenprune.model.phase import Phase
from tokenprune.tokens.layout import TokenLayout
from tokenprune_adapters.backbones.openvla.config import OpenVLAConfig
from tokenprune_adapters.backbones.prismatic.action_bins import ActionBins
from tokenprune_adapters.backbones.prismatic.model import LanguageModel, Projector, VisionBackbone
from tokenprune_adapters.backbones.prismatic.prompt import PromptTokenizer
from tokenprune_adapters.inputs.observations import upload_frames
from tokenprune_adapters.inputs.statistics import Statistics
from tokenprune_adapters.inputs.tokenizer import Prompt
from tokenprune_adapters.vision.attention import EncoderLook


class OpenVLAModel(nn.Module):
    """The weights, under the names of the released files."""

    def __init__(self, config: OpenVLAConfig) -> None:
        """Build the modules; build on the meta device to take no memory."""
        super().__init__()
        body = config.body
        self.vision_backbone = VisionBackbone(body.towers)
        self.projector = Projector(body.projector_widths)
        self.language_model = LanguageModel(body, lm_head=True)


@dataclass(frozen=True)
class OpenVLAInputs:
    """A query's inputs on the device.

    Attributes:
        images: The view's cropped pixels, uint8 `[B, 3, S, S]`.
        text: Prompt ids `[B, T]`.
    """

    images: Mapping[str, Tensor]
    text: Tensor


class OpenVLA:
    """A policy of the OpenVLA family; implements `tokenprune.engine.adapter.Backbone`."""

    def __init__(
        self,
        config: OpenVLAConfig,
        model: OpenVLAModel,
        tokenizer: PromptTokenizer,
        statistics: Statistics,
        info: BackboneInfo,
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
        self.bins = ActionBins(config.vocab, config.n_bins, self.device)

    def prompt(self, instruction: str) -> Prompt:
        """The instruction as tokens."""
        return self.tokenizer.encode(instruction, self.config.max_text, self.config.prompt)

    def layout(self, instruction: str, state: object = None) -> TokenLayout:
        """Tokens of a query with this instruction; the policy reads no state."""
        return self.config.layout(self.prompt(instruction))

    def check(self, observation: Observation) -> None:
        """Refuse an observation with wrong views or images."""
        check_observation(observation, self.config.views, None)

    def pixels(self, images: Sequence[Mapping[str, np.ndarray]]) -> Mapping[str, Tensor]:
        """Resize and crop the frames, and upload them, uint8 `[B, 3, S, S]`."""
        return upload_frames(images, self.config.views, self.config.transform, self.device)

    def prepare(self, observations: Sequence[Observation], instructions: Sequence[str]) -> OpenVLAInputs:
        """Resize and crop images, tokenise, and upload."""
        text = torch.tensor([self.prompt(instruction).ids for instruction in instructions], dtype=torch.int64)
        return OpenVLAInputs(self.pixels([o["images"] for o in observations]), upload(text, self.device))

    def infer(self, inputs: OpenVLAInputs, query: Query) -> Tensor:
        """Towers, projector, decoder with its cuts, then the action token by token; normalised actions `[B, 1, D]`."""
        with query.phase(Phase.VISION):
            embeddings = self.embed(inputs, query)
        cache = KVCache()
        hidden = query.decode(self.decoder, embeddings, cache)
        with query.phase(Phase.DECODE):
            ids, sound = self._generate(hidden, cache, query)
        with query.phase(Phase.HEAD):
            return self.bins.actions(ids).where(sound, torch.nan)[:, None]

    def embed(self, inputs: OpenVLAInputs, query: Query) -> Tensor:
        """All tokens `[B, N, D]` in the layout's order."""
        (view,) = self.config.views
        language = self.model.language_model
        look = EncoderLook(self.config.body.towers, query.encoder_kinds)
        features = self.model.vision_backbone(inputs.images[view], self.config.transform, self.dtype, look=look)
        query.note_encoder(self.config.views, look.seen)
        patches = self.model.projector(query.transform(view, features))
        bos = language.embed(torch.full((len(inputs.text), 1), self.tokenizer.bos_id, device=self.device))
        return torch.cat([bos, patches, language.embed(inputs.text)], dim=1)

    def _generate(self, hidden: Tensor, cache: KVCache, query: Query) -> tuple[Tensor, Tensor]:
        """The action's ids `[B, D]`, greedily, from the readout `[B, 1, D]`; and whether each was really preferred."""
        language = self.model.language_model
        chosen = [self._choose(hidden)]
        for behind in range(self.config.action.dims - 1):
            last = language.embed(chosen[-1][0])[:, None]
            chosen.append(self._choose(query.follow(self.decoder, last, behind, cache)))
        ids, sound = zip(*chosen, strict=True)
        return torch.stack(ids, dim=1), torch.stack(sound, dim=1)

    def _choose(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.model.language_model.logits(hidden[:, -1])
        # Of logits that are not finite one is still the largest, and its token would pass for an action.
        return self.bins.choose(logits, self.config.restrict), logits.amax(-1).isfinite()

    def unnormalise(self, actions: np.ndarray, observations: Sequence[Observation]) -> np.ndarray:
        """Actions `[B, 1, D]` in the environment's units."""
        return self.statistics.action.unnormalise(actions)
