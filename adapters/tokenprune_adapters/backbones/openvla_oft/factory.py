"""Makes OpenVLA-OFT policies, from a preset, a checkpoint, or a model that is already loaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

import tokenprune_adapters
from tokenprune.engine.adapter import Findings
from tokenprune_adapters import OFT_TRAINED
from tokenprune_adapters.backbones.common.factory import Checkpoint, FactoryBase
from tokenprune_adapters.backbones.openvla_oft.backbone import OFTSetup, OpenVLAOFT
from tokenprune_adapters.backbones.openvla_oft.config import PRESETS, TRAINED_OPTIONS, preset, with_options
from tokenprune_adapters.backbones.openvla_oft.live_model import adopt_oft
from tokenprune_adapters.backbones.openvla_oft.model import OFTModel
from tokenprune_adapters.backbones.openvla_oft.release import load_oft, read_oft, verify_oft
from tokenprune_adapters.backbones.prismatic.prompt import PromptTokenizer
from tokenprune_adapters.inputs.statistics import Statistics

_CHECKPOINTS = Path(tokenprune_adapters.__file__).parent / "checkpoints"


class OFTFactory(FactoryBase[OpenVLAOFT]):
    """Makes OpenVLA-OFT policies."""

    name = "openvla-oft"
    presets = (*OFT_TRAINED, *PRESETS)
    backbone = OpenVLAOFT
    model = OFTModel

    @classmethod
    def read(cls, checkpoint: Checkpoint) -> OFTSetup:
        """See `read_oft`."""
        return read_oft(checkpoint.folder, checkpoint.options)

    @classmethod
    def load(cls, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> OpenVLAOFT:
        """See `load_oft`."""
        return load_oft(checkpoint.folder, checkpoint.options, device, dtype, checkpoint.name)

    @classmethod
    def verify(cls, checkpoint: Path, options: Mapping[str, Any]) -> Findings:
        """See `verify_oft`."""
        return verify_oft(Path(checkpoint), options)

    @classmethod
    def adopt(cls, module: nn.Module, options: Mapping[str, Any]) -> OpenVLAOFT:
        """See `adopt_oft`."""
        return adopt_oft(module, options)

    @classmethod
    def untrained(cls, name: str, options: Mapping[str, Any]) -> OFTSetup:
        """A preset with options applied."""
        config = with_options(preset(name), options)
        statistics = Statistics.identity(config.action.dims, config.state_size)
        return OFTSetup(config, PromptTokenizer.bundled(), statistics)

    @classmethod
    def trained(cls, name: str) -> tuple[Path, Mapping[str, Any]] | None:
        """The shipped checkpoint of a preset in `OFT_TRAINED`, and its options."""
        return (_CHECKPOINTS / name, TRAINED_OPTIONS[name]) if name in OFT_TRAINED else None
