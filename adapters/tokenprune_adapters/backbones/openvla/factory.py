"""Makes OpenVLA policies, from a preset, a checkpoint, or a model that is already loaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tokenprune.engine.adapter import Findings
from tokenprune_adapters.backbones.common.factory import Checkpoint, FactoryBase
from tokenprune_adapters.backbones.openvla.backbone import OpenVLA, OpenVLASetup
from tokenprune_adapters.backbones.openvla.config import PRESETS, preset, with_options
from tokenprune_adapters.backbones.openvla.live_model import adopt_openvla
from tokenprune_adapters.backbones.openvla.model import OpenVLAModel
from tokenprune_adapters.backbones.openvla.release import load_openvla, read_openvla, verify_openvla
from tokenprune_adapters.backbones.prismatic.prompt import PromptTokenizer
from tokenprune_adapters.inputs.statistics import Statistics


class OpenVLAFactory(FactoryBase[OpenVLA]):
    """Makes OpenVLA policies."""

    name = "openvla"
    presets = tuple(PRESETS)
    backbone = OpenVLA
    model = OpenVLAModel

    @classmethod
    def read(cls, checkpoint: Checkpoint) -> OpenVLASetup:
        """See `read_openvla`."""
        return read_openvla(checkpoint.folder, checkpoint.options)

    @classmethod
    def load(cls, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> OpenVLA:
        """See `load_openvla`."""
        return load_openvla(checkpoint.folder, checkpoint.options, device, dtype)

    @classmethod
    def verify(cls, checkpoint: Path, options: Mapping[str, Any]) -> Findings:
        """See `verify_openvla`."""
        return verify_openvla(Path(checkpoint), options)

    @classmethod
    def adopt(cls, module: nn.Module, options: Mapping[str, Any]) -> OpenVLA:
        """See `adopt_openvla`."""
        return adopt_openvla(module, options)

    @classmethod
    def untrained(cls, name: str, options: Mapping[str, Any]) -> OpenVLASetup:
        """A preset with options applied."""
        config = with_options(preset(name), options)
        return OpenVLASetup(config, PromptTokenizer.bundled(), Statistics.identity(config.action.dims, None))
