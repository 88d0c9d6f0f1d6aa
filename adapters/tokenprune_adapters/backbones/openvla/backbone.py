"""OpenVLA's forward pass (arXiv 2406.09246): causal prefill of image and prompt, then one decode step per number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenprune.engine.adapter import BackboneInfo, EncodedPrompt, KVCache, Observation, Phase, Query, upload
from tokenprune_adapters.backbones.common.backbone import BackboneBase, PolicySetup
from tokenprune_adapters.backbones.openvla.config import OpenVLAConfig
from tokenprune_adapters.backbones.openvla.model import OpenVLAModel
from tokenprune_adapters.backbones.prismatic.action_bins import ActionBins
from tokenprune_adapters.backbones.prismatic.prompt import PromptTokenizer
from tokenprune_adapters.vision.attention import AttentionCapture

OpenVLASetup = PolicySetup[OpenVLAConfig, PromptTokenizer]


@dataclass(frozen=True)
class OpenVLAInputs:
    """A query's inputs on the device.

    Attributes:
        images: The view's cropped pixels, uint8 `[B, 3, S, S]`.
        text: Prompt ids `[B, T]`.
    """

    images: Mapping[str, Tensor]
    text: Tensor


class OpenVLA(BackboneBase[OpenVLAConfig, PromptTokenizer, OpenVLAModel]):
    """A policy of the OpenVLA family; implements `tokenprune.engine.adapter.Backbone`."""

    def __init__(self, setup: OpenVLASetup, model: OpenVLAModel, info: BackboneInfo) -> None:
        """Make the decoder loop and the action bins; for the arguments see `BackboneBase`."""
        super().__init__(setup, model, info)
        self.decoder = model.language_model.decoder(self.config.body)
        self.bins = ActionBins(self.config.vocab, self.config.n_bins, self.device)

    def prepare(self, observations: Sequence[Observation], prompts: Sequence[EncodedPrompt]) -> OpenVLAInputs:
        """Resize and crop images, and upload."""
        text = torch.tensor([prompt.tokens.ids for prompt in prompts], dtype=torch.int64)
        return OpenVLAInputs(self.pixels([o["images"] for o in observations]), upload(text, self.device))

    def infer(self, inputs: OpenVLAInputs, query: Query) -> Tensor:
        """Towers, projector, pruned prefill, then decode steps; normalised actions `[B, 1, D]`."""
        with query.phase(Phase.VISION):
            embeddings = self.embed(inputs, query)
        cache = KVCache()
        hidden = query.decode(self.decoder, embeddings, cache)
        with query.phase(Phase.DECODE):
            ids, finite = self._generate(hidden, cache, query)
        with query.phase(Phase.HEAD):
            return self.bins.actions(ids).where(finite, torch.nan)[:, None]

    def embed(self, inputs: OpenVLAInputs, query: Query) -> Tensor:
        """All tokens `[B, N, D]` in the layout's order."""
        (view,) = self.config.views
        language = self.model.language_model
        capture = AttentionCapture(self.config.body.towers, query.encoder_kinds)
        features = self.model.vision_backbone(inputs.images[view], self.config.transform, self.dtype, capture=capture)
        query.note_encoder(self.config.views, capture.captured)
        patches = self.model.projector(query.transform(view, features))
        bos = language.embed(torch.full((len(inputs.text), 1), self.tokenizer.bos_id, device=self.device))
        return torch.cat([bos, patches, language.embed(inputs.text)], dim=1)

    def _generate(self, hidden: Tensor, cache: KVCache, query: Query) -> tuple[Tensor, Tensor]:
        """Greedy ids of the action `[B, D]` from the readout `[B, 1, D]`, and whether each one's logits were finite."""
        language = self.model.language_model
        chosen = [self._choose(hidden)]
        for behind in range(self.config.action.dims - 1):
            last = language.embed(chosen[-1][0])[:, None]
            chosen.append(self._choose(query.follow(self.decoder, last, behind, cache)))
        ids, finite = zip(*chosen, strict=True)
        return torch.stack(ids, dim=1), torch.stack(finite, dim=1)

    def _choose(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.model.language_model.logits(hidden[:, -1])
        # Logits with NaN or infinity have an argmax too, and its token would be taken for an action.
        return self.bins.choose(logits, self.config.restrict), logits.amax(-1).isfinite()
