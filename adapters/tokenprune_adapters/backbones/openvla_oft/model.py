"""The weights of OpenVLA-OFT."""

from __future__ import annotations

from torch import nn

from tokenprune_adapters.backbones.openvla_oft.config import OFTConfig
from tokenprune_adapters.backbones.openvla_oft.heads import (
    DiffusionActionHead,
    L1ActionHead,
    NoisyActionProjector,
    ProprioProjector,
)
from tokenprune_adapters.backbones.prismatic.model import LanguageModel, Projector, VisionBackbone


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
