"""Makes OpenVLA-OFT policies, from a preset, a checkpoint, or a model that is already loaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

import tokenprune_adapters
from tokenprune.engine.adapter import Description, Findings
from tokenprune.errors import CheckpointError
from tokenprune_adapters import OFT_TRAINED
from tokenprune_adapters.backbones.openvla_oft.backbone import OFTModel, OpenVLAOFT
from tokenprune_adapters.backbones.openvla_oft.config import (
    PRESETS,
    TRAINED_OPTIONS,
    OFTConfig,
    preset,
    with_options,
)
from tokenprune_adapters.backbones.openvla_oft.live_model import adopt_oft
from tokenprune_adapters.backbones.openvla_oft.release import load_oft, read_config, verify_oft
from tokenprune_adapters.backbones.prismatic.prompt import PromptTokenizer
from tokenprune_adapters.inputs.statistics import Statistics
from tokenprune_adapters.weights.sources import existing, one_source, preset_of
from tokenprune_adapters.weights.untrained import fill_untrained

_CHECKPOINTS = Path(tokenprune_adapters.__file__).parent / "checkpoints"


class _Weights(NamedTuple):
    """Where weights are, with the options to read them with and what to call them."""

    folder: Path
    options: Mapping[str, Any]
    source: str


class OFTFactory:
    """Makes OpenVLA-OFT policies; implements `tokenprune.engine.adapter.BackboneFactory`."""

    @staticmethod
    def describe(name: str | None, checkpoint: Path | None, options: Mapping[str, Any]) -> Description:
        """What would be built; nothing is allocated."""
        one_source(name, checkpoint)
        weights = _weights(name, checkpoint, options)
        if weights is not None:
            config, tokenizer = read_config(weights.folder, weights.options)
            info = config.info(weights.source, untrained=False)
        else:
            config, tokenizer = _untrained_config(name, options), PromptTokenizer.bundled()
            info = config.info(name or "", untrained=True)
        return Description(
            info,
            lambda instruction: config.layout(tokenizer.encode(instruction, config.max_text)),
            config.transform.cropped,
            existing(None if weights is None else weights.folder),
        )

    @staticmethod
    def build(
        name: str | None,
        checkpoint: Path | None,
        options: Mapping[str, Any],
        device: torch.device,
        dtype: torch.dtype,
        seed: int,
    ) -> OpenVLAOFT:
        """A policy from a checkpoint, which some presets come with, or with untrained weights.

        Raises:
            ConfigError: If neither or both of preset and checkpoint are given, or an option is wrong.
            CheckpointError: If the checkpoint cannot be used.
        """
        one_source(name, checkpoint)
        weights = _weights(name, checkpoint, options)
        if weights is not None:
            return load_oft(weights.folder, weights.options, device, dtype, weights.source)
        config, tokenizer = _untrained_config(name, options), PromptTokenizer.bundled()
        if tokenizer.vocab_size > config.body.vocab:
            raise CheckpointError(
                f"the tokenizer has {tokenizer.vocab_size} tokens, the embedding table {config.body.vocab} rows"
            )
        with torch.device("meta"):
            model = OFTModel(config)
        fill_untrained(model, seed, device, dtype)
        statistics = Statistics.identity(config.action.dims, config.state_size)
        return OpenVLAOFT(config, model, tokenizer, statistics, config.info(name or "", untrained=True))

    @staticmethod
    def adopt(module: nn.Module, options: Mapping[str, Any]) -> OpenVLAOFT:
        """A policy that shares the weights of upstream's own model, which is already loaded; see `adopt_oft`.

        Raises:
            ConfigError: If an option is wrong or missing.
            CheckpointError: If the model is not OpenVLA-OFT's, or cannot be shared.
        """
        return adopt_oft(module, options)

    @staticmethod
    def verify(checkpoint: Path, options: Mapping[str, Any]) -> Findings:
        """What a checkpoint holds and what of it does not fit; no weights are read.

        Raises:
            ConfigError: If an option is wrong.
            CheckpointError: If a file is missing, damaged or unsafe.
        """
        return verify_oft(checkpoint, options)


def _weights(name: str | None, checkpoint: Path | None, options: Mapping[str, Any]) -> _Weights | None:
    """Those of a checkpoint or of a trained preset, None for an untrained one."""
    if checkpoint is not None:
        return _Weights(Path(checkpoint), options, str(checkpoint))
    if name is not None and name in OFT_TRAINED:
        return _Weights(_CHECKPOINTS / name, {**TRAINED_OPTIONS[name], **options}, name)
    return None


def _untrained_config(name: str | None, options: Mapping[str, Any]) -> OFTConfig:
    return with_options(preset(preset_of("openvla-oft", name, (*OFT_TRAINED, *PRESETS), options)), options)
