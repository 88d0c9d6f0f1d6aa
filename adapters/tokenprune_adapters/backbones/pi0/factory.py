"""Makes pi0 and pi0.5 policies, from a preset, a checkpoint, or a model that is already loaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from tokenprune.engine.adapter import Findings
from tokenprune_adapters.backbones.common.factory import Checkpoint, FactoryBase
from tokenprune_adapters.backbones.pi0.backbone import PI0, PI0Setup
from tokenprune_adapters.backbones.pi0.config import PRESETS, Variant, preset, with_options
from tokenprune_adapters.backbones.pi0.live_model import adopt_pi0
from tokenprune_adapters.backbones.pi0.model import PI0Model
from tokenprune_adapters.backbones.pi0.prompt import GemmaTokenizer
from tokenprune_adapters.backbones.pi0.release import load_pi0, read_pi0, verify_pi0
from tokenprune_adapters.backbones.pi0.statistics import identity_statistics
from tokenprune_adapters.weights.untrained import fill_untrained


class PI0Factory(FactoryBase[PI0]):
    """Makes pi0 policies."""

    name = "pi0"
    presets = tuple(PRESETS)
    backbone = PI0
    model = PI0Model
    variant: ClassVar[Variant] = "pi0"

    @classmethod
    def read(cls, checkpoint: Checkpoint) -> PI0Setup:
        """See `read_pi0`."""
        return read_pi0(cls.variant, checkpoint.folder, checkpoint.options)

    @classmethod
    def load(cls, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> PI0:
        """See `load_pi0`."""
        return load_pi0(cls.variant, checkpoint.folder, checkpoint.options, device, dtype)

    @classmethod
    def verify(cls, checkpoint: Path, options: Mapping[str, Any]) -> Findings:
        """See `verify_pi0`."""
        return verify_pi0(cls.variant, Path(checkpoint), options)

    @classmethod
    def adopt(cls, module: nn.Module, options: Mapping[str, Any]) -> PI0:
        """See `adopt_pi0`."""
        return adopt_pi0(cls.variant, module, options)

    @classmethod
    def untrained(cls, name: str, options: Mapping[str, Any]) -> PI0Setup:
        """A preset with options applied."""
        config = with_options(preset(cls.variant, name), options)
        return PI0Setup(config, GemmaTokenizer.bundled(), identity_statistics(config))

    @classmethod
    def fill(cls, model: nn.Module, seed: int, device: torch.device, dtype: torch.dtype) -> None:
        """Random weights, scaled for Gemma's embeddings and norms."""
        assert isinstance(model, PI0Model)
        fill_untrained(model, seed, device, dtype)
        model.rescale_untrained()


class PI05Factory(PI0Factory):
    """Makes pi0.5 policies."""

    name = "pi05"
    variant: ClassVar[Variant] = "pi05"
