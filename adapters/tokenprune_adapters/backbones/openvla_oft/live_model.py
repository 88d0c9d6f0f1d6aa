"""OpenVLA-OFT from upstream's own modules, which are already loaded: their weights are shared, none is copied."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from tokenprune.errors import CheckpointError, ConfigError, nearest
from tokenprune_adapters.backbones.openvla_oft.backbone import OpenVLAOFT
from tokenprune_adapters.backbones.openvla_oft.config import OPTIONS, SEVEN_B, OFTConfig, with_options
from tokenprune_adapters.backbones.openvla_oft.model import OFTModel
from tokenprune_adapters.backbones.openvla_oft.release import configure, with_statistics
from tokenprune_adapters.backbones.openvla_oft.tensors import (
    TOWERS,
    OFTTensors,
    check_head,
    separate_modules,
    take_oft_inventory,
)
from tokenprune_adapters.backbones.prismatic.live_model import read_live_model
from tokenprune_adapters.weights.folder import config_mapping
from tokenprune_adapters.weights.loading import empty_model, share_weights
from tokenprune_adapters.weights.tensor_files import StoredTensor, stored_module

_MODULES = ("action_head", "noisy_action_projector", "proprio_projector", TOWERS)


def adopt_oft(module: nn.Module, options: Mapping[str, Any]) -> OpenVLAOFT:
    """Share the weights of upstream's own model; none is copied, and the model stays as it is.

    There is one exception: upstream's towers with FiLM carry LoRA that is not merged; merged weights are new tensors.

    Args:
        module: Upstream's `OpenVLAForActionPrediction`, with its `config` and, if it has any, `norm_stats`.
        options: See `with_options`, and what the model does not hold: `tokenizer`, a `PromptTokenizer` or the path of
            its `tokenizer.json`, and upstream's modules `action_head`, `noisy_action_projector` and
            `proprio_projector`, as far as the policy has them. `vision_backbone` may be given for towers with FiLM that
            are not part of the model. Prefixes of data-parallel training are dropped.

    Returns:
        The backbone, on the model's device and in its type.

    Raises:
        ConfigError: If an option is wrong or missing.
        CheckpointError: If the model is another one, or has tensors over several devices or of several types.
    """
    valid = (*OPTIONS, *_MODULES, "tokenizer")
    for key in options:
        if key not in valid:
            raise ConfigError(f"cannot adopt with '{key}'{nearest(key, valid)}")
    own = {key: value for key, value in options.items() if key in OPTIONS}
    modules = _modules(with_options(SEVEN_B, own), options)
    where = type(module).__name__
    release = read_live_model(module, options.get("tokenizer"), causal=False)
    config = configure(release, config_mapping(module.config), own, where)
    setup = with_statistics(release, config, own)
    model = empty_model(OFTModel, config)
    share_weights(model, take_oft_inventory(config, model, _tensors(config, _stored(module), modules, Path(where))))
    return OpenVLAOFT(setup, model, config.info(where, untrained=False))


def _modules(config: OFTConfig, options: Mapping[str, Any]) -> dict[str, nn.Module]:
    """The modules beside the model, after a check that none is missing and none superfluous."""
    found = {name: options[name] for name in _MODULES if name in options}
    needed = separate_modules(config)
    for name, value in found.items():
        if not isinstance(value, nn.Module):
            raise ConfigError(f"{name} is a {type(value).__name__}; valid: upstream's module")
        if name not in (*needed, *([TOWERS] if config.film else [])):
            raise ConfigError(f"{name} has no use with these options; valid: {', '.join(needed) or 'none'}")
    for name in needed:
        if name not in found:
            raise ConfigError(f"{name} is missing; valid: upstream's module, which is not part of the model")
    return found


def _tensors(
    config: OFTConfig, stored: Mapping[str, StoredTensor], modules: Mapping[str, nn.Module], where: Path
) -> OFTTensors:
    """The tensors of the model and of the modules beside it."""
    separate = {name: (Path(type(value).__name__), _stored(value)) for name, value in modules.items() if name != TOWERS}
    for name, found in separate.items():
        check_head(config, name, *found)
    own = {key: tensor for key, tensor in stored.items() if key.startswith(f"{TOWERS}.")}
    if not config.film:
        if any(key.endswith(".scale.weight") for key in own):
            raise CheckpointError(f"{where}: its towers use FiLM; set the option film to true")
        return OFTTensors(where, stored, separate)
    rest = {key: tensor for key, tensor in stored.items() if key not in own}
    if TOWERS in modules:
        film = Path(type(modules[TOWERS]).__name__), _stored(modules[TOWERS])
        return OFTTensors(where, rest, separate, film)
    return OFTTensors(where, rest, separate, (where, own))


def _stored(module: nn.Module) -> dict[str, StoredTensor]:
    """Tensors of a module, without the prefix of data-parallel training."""
    stored = stored_module(module.state_dict(), type(module).__name__)
    parallel = all(key.startswith("module.") for key in stored)
    return {key.removeprefix("module.") if parallel else key: tensor for key, tensor in stored.items()}
