"""The mini policy during training: everything after the tower, and an auxiliary head."""

from __future__ import annotations

import torch
from samples import Batch
from torch import Tensor, nn
from torch.nn import functional

from tokenprune.tokens.selection import TokenSelection
from tokenprune_adapters.backbones.openvla_oft.config import MINI
from tokenprune_adapters.backbones.openvla_oft.model import OFTModel
from tokenprune_adapters.backbones.prismatic.prompt import PromptTokenizer
from tokenprune_adapters.inputs.tokenizer import Prompt


class Learner(nn.Module):
    """The policy without its tower, with the auxiliary head that predicts the positions of item and target."""

    def __init__(self) -> None:
        """Initialise at random; the caller seeds torch."""
        super().__init__()
        self.model = OFTModel(MINI)
        del self.model.vision_backbone
        for name, parameter in self.model.named_parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02 if "embed" in name else parameter.shape[1] ** -0.5)
        # Residual branches are initialised small.
        for layer in self.model.language_model.model.layers:
            for branch in (layer.self_attn.o_proj, layer.mlp.down_proj):
                branch.weight.data /= (2 * MINI.body.decoder.depth) ** 0.5
        self.decoder = self.model.language_model.decoder(MINI.body)
        self.places = nn.Linear(MINI.body.decoder.hidden, 6)
        tokenizer = PromptTokenizer.bundled()
        self.ends = torch.tensor([tokenizer.bos_id, tokenizer.eos_id])

    def forward(self, batch: Batch, pool: int) -> tuple[Tensor, Tensor]:
        """Normalised actions `[B, 8, 7]` and places `[B, 6]`; `pool` is the side of the patches that share a token."""
        model, size = self.model, len(batch.text)
        layout = MINI.layout(Prompt(tuple(batch.text[0].tolist()), range(1)))
        rows, cols = MINI.body.towers[0].grid
        features = batch.features
        kept = torch.ones(layout.n_tokens, dtype=torch.bool)
        if pool > 1:
            grid = features.flatten(0, 1).transpose(1, 2).unflatten(2, (rows, cols))
            features = functional.avg_pool2d(grid, pool).flatten(2).transpose(1, 2).unflatten(0, (size, -1))
            first = torch.zeros(rows, cols, dtype=torch.bool)
            first[::pool, ::pool] = True
            for view in layout.views.values():
                kept[view.start : view.start + view.length] = first.flatten()
        patches = model.projector(features).flatten(1, 2)
        bos, stop = model.language_model.embed(self.ends.expand(size, 2)).split(1, dim=1)
        text = model.language_model.embed(batch.text)
        proprio = model.proprio_projector(batch.state)[:, None]
        blank = stop.new_zeros(size, len(layout.span("action")), stop.shape[2])
        hidden = torch.cat([bos, patches, proprio, text, blank, stop], dim=1)
        ids = kept.nonzero()[:, 0]
        tokens = TokenSelection(ids.expand(size, -1), layout.n_tokens)
        read = torch.tensor(list(layout.readout)).expand(size, -1)
        states = self.decoder.run(hidden, tokens, read=read).hidden
        return model.action_head(states), self.places(states.mean(1))
