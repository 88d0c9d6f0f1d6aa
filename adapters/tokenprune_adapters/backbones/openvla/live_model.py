"""OpenVLA from upstream's own model, which is already loaded: its weights are shared, none is copied."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from tokenprune.errors import ConfigError, nearest
from tokenprune_adapters.backbones.openvla.backbone import OpenVLA
from tokenprune_adapters.backbones.openvla.config import OPTIONS, SEVEN_B, with_options
from tokenprune_adapters.backbones.openvla.model import OpenVLAModel
from tokenprune_adapters.backbones.openvla.release import configure, take_openvla_inventory
from tokenprune_adapters.backbones.prismatic.live_model import read_live_model
from tokenprune_adapters.weights.folder import config_mapping
from tokenprune_adapters.weights.loading import empty_model, share_weights
from tokenprune_adapters.weights.tensor_files import stored_module


def adopt_openvla(module: nn.Module, options: Mapping[str, Any]) -> OpenVLA:
    """Share the weights of upstream's own model; none is copied, and the model stays as it is.

    Its image preprocessing is the release's; upstream keeps it in the processor, not in the model.

    Args:
        module: Upstream's `OpenVLAForActionPrediction`, with its `config`. Its `norm_stats`, if it has any, take
            precedence over those of the config.
        options: See `read_openvla`; and `tokenizer`, which the model does not hold either: a `PromptTokenizer`, or the
            path of a `tokenizer.json`.

    Returns:
        The backbone, on the model's device and in its type.

    Raises:
        CheckpointError: If the model is another one, or has tensors over several devices or of several types.
        ConfigError: If an option is wrong, or the tokenizer is not given.
    """
    valid = (*OPTIONS, "tokenizer")
    for key in options:
        if key not in valid:
            raise ConfigError(f"cannot adopt with '{key}'{nearest(key, valid)}")
    own = {key: value for key, value in options.items() if key in OPTIONS}
    with_options(SEVEN_B, own)
    where = type(module).__name__
    release = read_live_model(module, options.get("tokenizer"), causal=True)
    setup = configure(release, config_mapping(module.config), own, where)
    model = empty_model(OpenVLAModel, setup.config)
    stored = stored_module(module.state_dict(), where)
    share_weights(model, take_openvla_inventory(setup.config.body, model, stored, Path(where)))
    return OpenVLA(setup, model, setup.config.info(where, untrained=False))
