"""Makes OpenVLA policies, from a preset, a checkpoint, or a model that is already loaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tokenprune.engine.adapter import Description, Findings
from tokenprune_adapters.backbones.openvla.backbone import OpenVLA, OpenVLAModel
from tokenprune_adapters.backbones.openvla.config import PRESETS, OpenVLAConfig, preset, with_options
from tokenprune_adapters.backbones.openvla.release import adopt_openvla, load_openvla, read_config, verify_openvla
from tokenprune_adapters.backbones.prismatic.prompt import PromptTokenizer
from tokenprune_adapters.inputs.statistics import Statistics
from tokenprune_adapters.weights.sources import existing, one_source, preset_of
from tokenprune_adapters.weights.untrained import fill_untrained


class OpenVLAFactory:
    """Makes OpenVLA policies; implements `tokenprune.engine.adapter.BackboneFactory`."""

    @staticmethod
    def describe(name: str | None, checkpoint: Path | None, options: Mapping[str, Any]) -> Description:
        """What would be built; nothing is allocated."""
        one_source(name, checkpoint)
        if checkpoint is not None:
            config, tokenizer = read_config(Path(checkpoint), options)
            info = config.info(str(checkpoint), untrained=False)
        else:
            config, tokenizer = _untrained_config(name, options), PromptTokenizer.bundled()
            info = config.info(name or "", untrained=True)
        return Description(
            info,
            lambda instruction: config.layout(tokenizer.encode(instruction, config.max_text, config.prompt)),
            config.transform.cropped,
            existing(checkpoint),
        )

    @staticmethod
    def build(
        name: str | None,
        checkpoint: Path | None,
        options: Mapping[str, Any],
        device: torch.device,
        dtype: torch.dtype,
        seed: int,
    ) -> OpenVLA:
        """A policy from a checkpoint, or with untrained weights from a preset.

        Raises:
            ConfigError: If neither or both of preset and checkpoint are given, or an option is wrong.
            CheckpointError: If the checkpoint cannot be used.
        """
        one_source(name, checkpoint)
        if checkpoint is not None:
            return load_openvla(Path(checkpoint), options, device, dtype)
        config = _untrained_config(name, options)
        with torch.device("meta"):
            model = OpenVLAModel(config)
        fill_untrained(model, seed, device, dtype)
        statistics = Statistics.identity(config.action.dims, None)
        info = config.info(name or "", untrained=True)
        return OpenVLA(config, model, PromptTokenizer.bundled(), statistics, info)

    @staticmethod
    def verify(checkpoint: Path, options: Mapping[str, Any]) -> Findings:
        """What a checkpoint holds and what of it does not fit; no weights are read.

        Raises:
            ConfigError: If an option is wrong.
            CheckpointError: If a file is missing, damaged or unsafe.
        """
        return verify_openvla(Path(checkpoint), options)

    @staticmethod
    def adopt(module: nn.Module, options: Mapping[str, Any]) -> OpenVLA:
        """A policy that shares the weights of upstream's own model, which is already loaded; see `adopt_openvla`.

        Raises:
            ConfigError: If an option is wrong, or the tokenizer is not given.
            CheckpointError: If the model is not OpenVLA's, or cannot be shared.
        """
        return adopt_openvla(module, options)


def _untrained_config(name: str | None, options: Mapping[str, Any]) -> OpenVLAConfig:
    return with_options(preset(preset_of("openvla", name, PRESETS, options)), options)
