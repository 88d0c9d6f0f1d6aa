"""Upstream's own OpenVLA-OFT, already loaded: its modules' weights shared, none copied."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from tokenprune.errors import CheckpointError, ConfigError, nearest
from tokenprune_adapters.backbones.openvla_oft.backbone import OpenVLAOFT
from tokenprune_adapters.backbones.openvla_oft.config import OPTIONS, SEVEN_B, OFTConfig, with_options
from tokenprune_adapters.backbones.openvla_oft.release import (
    TOWERS,
    Parts,
    account,
    check_head,
    configured,
    empty_model,
    read_statistics,
    small_parts,
)
from tokenprune_adapters.backbones.prismatic.live_model import read_module
from tokenprune_adapters.weights.folder import config_mapping
from tokenprune_adapters.weights.inventory import adopt
from tokenprune_adapters.weights.tensor_files import StoredTensor, stored_module

_MODULES = ("action_head", "noisy_action_projector", "proprio_projector", TOWERS)


def adopt_oft(module: nn.Module, options: Mapping[str, Any]) -> OpenVLAOFT:
    """Share the weights of upstream's own model; none is copied, and it stays as it is.

    An exception are layers of FiLM's towers with LoRA that is not merged, as upstream has them: their weights are
    merged into new ones.

    Args:
        module: Upstream's `OpenVLAForActionPrediction`, with its `config` and, where it has them, `norm_stats`.
        options: Those of `with_options`, and what the model does not hold: `tokenizer`, a `PromptTokenizer` or the path
            of its `tokenizer.json`, and upstream's modules `action_head`, `noisy_action_projector`,
            `proprio_projector`, each where the policy has one. `vision_backbone` may be given for towers with FiLM that
            are not the model's own. Prefixes of data-parallel training are dropped.

    Returns:
        The policy's backbone, on the model's device and in its type.

    Raises:
        ConfigError: If an option is wrong or missing.
        CheckpointError: If the model is another one, or has tensors over several devices or of several types.
    """
    for key in options:
        if key not in (*OPTIONS, *_MODULES, "tokenizer"):
            raise ConfigError(f"cannot adopt with '{key}'{nearest(key, (*OPTIONS, *_MODULES, 'tokenizer'))}")
    own = {key: value for key, value in options.items() if key in OPTIONS}
    modules = _modules(with_options(SEVEN_B, own), options)
    where = type(module).__name__
    release = read_module(module, options.get("tokenizer"), causal=False)
    config = configured(release, config_mapping(module.config), own, where)
    statistics = read_statistics(release, config, own)
    model = empty_model(config)
    adopt(model, account(config, model, _parts(config, _stored(module), modules, Path(where))))
    return OpenVLAOFT(config, model, release.tokenizer, statistics, config.info(where, untrained=False))


def _modules(config: OFTConfig, options: Mapping[str, Any]) -> dict[str, nn.Module]:
    """The modules beside the model, each checked to be needed, and all that are needed to be there."""
    found = {part: options[part] for part in _MODULES if part in options}
    needed = small_parts(config)
    for part, value in found.items():
        if not isinstance(value, nn.Module):
            raise ConfigError(f"{part} is a {type(value).__name__}; valid: upstream's module")
        if part not in (*needed, *([TOWERS] if config.film else [])):
            raise ConfigError(f"{part} has no use with these options; valid: {', '.join(needed) or 'none'}")
    for part in needed:
        if part not in found:
            raise ConfigError(f"{part} is missing; valid: upstream's module, which is not part of the model")
    return found


def _parts(
    config: OFTConfig, stored: Mapping[str, StoredTensor], modules: Mapping[str, nn.Module], where: Path
) -> Parts:
    small = {part: (Path(type(value).__name__), _stored(value)) for part, value in modules.items() if part != TOWERS}
    for part, found in small.items():
        check_head(config, part, *found)
    own = {key: tensor for key, tensor in stored.items() if key.startswith(f"{TOWERS}.")}
    if not config.film:
        if any(key.endswith(".scale.weight") for key in own):
            raise CheckpointError(f"{where}: its towers use FiLM; set the option film to true")
        return Parts(where, stored, small)
    rest = {key: tensor for key, tensor in stored.items() if key not in own}
    if TOWERS in modules:
        return Parts(where, rest, small, (Path(type(modules[TOWERS]).__name__), _stored(modules[TOWERS])))
    return Parts(where, rest, small, (where, own))


def _stored(module: nn.Module) -> dict[str, StoredTensor]:
    stored = stored_module(module.state_dict(), type(module).__name__)
    parallel = all(key.startswith("module.") for key in stored)
    return {key.removeprefix("module.") if parallel else key: tensor for key, tensor in stored.items()}
