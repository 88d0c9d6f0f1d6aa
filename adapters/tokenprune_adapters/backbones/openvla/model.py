"""The weights of OpenVLA."""

from __future__ import annotations

from torch import nn

from tokenprune_adapters.backbones.openvla.config import OpenVLAConfig
from tokenprune_adapters.backbones.prismatic.model import LanguageModel, Projector, VisionBackbone


class OpenVLAModel(nn.Module):
    """The weights, under the names of the released files."""

    def __init__(self, config: OpenVLAConfig) -> None:
        """Build the modules; build on the meta device to take no memory."""
        super().__init__()
        body = config.body
        self.vision_backbone = VisionBackbone(body.towers)
        self.projector = Projector(body.projector_widths)
        self.language_model = LanguageModel(body, lm_head=True)
