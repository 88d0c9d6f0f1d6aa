"""OpenVLA checkpoints in the format of the release, and upstream's own model where it is already loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tokenprune.engine.adapter import Findings
from tokenprune.errors import CheckpointError, ConfigError, nearest
from tokenprune_adapters.backbones.openvla.backbone import OpenVLA, OpenVLAModel
from tokenprune_adapters.backbones.openvla.config import CROP, OPTIONS, SEVEN_B, OpenVLAConfig, with_options
from tokenprune_adapters.backbones.prismatic.config import PrismaticConfig
from tokenprune_adapters.backbones.prismatic.live_model import read_module
from tokenprune_adapters.backbones.prismatic.prompt import PromptTokenizer
from tokenprune_adapters.backbones.prismatic.release import PrismaticRelease, read_bins, read_release, unused_keys
from tokenprune_adapters.inputs.statistics import Statistics
from tokenprune_adapters.weights.folder import JSON_FILES, config_mapping, local_folder
from tokenprune_adapters.weights.inventory import Inventory, adopt, fill, take_inventory
from tokenprune_adapters.weights.tensor_files import StoredTensor, read_json, stored_module, stored_safetensors

# An action head is fetched only to be noticed: with it, the decoder was trained to see in both directions.
_FILES = (*JSON_FILES, "*.safetensors", "action_head--*")
_LIBERO = "libero"


def read_config(folder: Path, options: Mapping[str, Any]) -> tuple[OpenVLAConfig, PromptTokenizer]:
    """Read a release's configuration and tokenizer; no weights are read or downloaded.

    Two things no file states follow from the dataset. Where its name begins with `libero`, images are cropped at the
    centre, since LIBERO's fine-tunes are trained with random crops, and actions are in LIBERO's units. Otherwise
    images are not cropped, as upstream's `openvla-7b` wants it, and the actions' units are not known.

    Args:
        folder: A folder in the release's format, or a hub id `owner/name`; see `read_release`.
        options: See `with_options`. `unnorm_key`, the dataset whose statistics are used, may be left out where the
            checkpoint has one only; `prompt: vicuna` must be given for the v0.1 releases, which no file says they are.

    Returns:
        The configuration and the tokenizer.

    Raises:
        CheckpointError: If a file is missing, malformed, or asks for something that is not supported.
        ConfigError: If an option is wrong.
    """
    local = local_folder(folder, JSON_FILES)
    release = _release(local, options)
    return _of_folder(local, release, options)[0], release.tokenizer


def load_openvla(folder: Path, options: Mapping[str, Any], device: torch.device, dtype: torch.dtype) -> OpenVLA:
    """Load a release.

    Every tensor of every file is accounted for before the first is read. Left out by name are only those that no
    query needs: the towers' blocks after the tap, their final norms and their pooling heads. Tensors are read one by
    one into a model that holds no memory until then.

    Args:
        folder: See `read_config`.
        options: See `read_config`.
        device: Where the weights go.
        dtype: Their type, whatever the files hold.

    Returns:
        The policy's backbone.

    Raises:
        CheckpointError: If a file is missing, damaged or unsafe, or does not fit the configuration.
        ConfigError: If an option is wrong.
    """
    local = local_folder(folder, _FILES)
    release = _release(local, options)
    config, statistics = _of_folder(local, release, options)
    model = _model(config)
    fill(model, _inventory(config.body, model, stored_safetensors(local), local), device, dtype)
    return OpenVLA(config, model, release.tokenizer, statistics, config.info(str(folder), untrained=False))


def verify_openvla(folder: Path, options: Mapping[str, Any]) -> Findings:
    """Say what a release holds and what of it does not fit; no weights are read.

    Raises:
        CheckpointError: If a file is missing, damaged or unsafe.
        ConfigError: If an option is wrong.
    """
    local = local_folder(folder, _FILES)
    release = _release(local, options)
    model = _model(replace(SEVEN_B, body=release.body))
    return _inventory(release.body, model, stored_safetensors(local), local).findings(release.statistics, None)


def adopt_openvla(module: nn.Module, options: Mapping[str, Any]) -> OpenVLA:
    """Share the weights of upstream's own model, which is already loaded; none is copied, and it stays as it is.

    Its image preprocessing is the release's; upstream keeps it in the processor, not in the model.

    Args:
        module: Upstream's `OpenVLAForActionPrediction`, with its `config`; `norm_stats`, where it has any, stands
            before those of the config.
        options: See `read_config`; and `tokenizer`, which the model does not hold either: a `PromptTokenizer`, or the
            path of a `tokenizer.json`.

    Returns:
        The policy's backbone, on the model's device and in its type.

    Raises:
        CheckpointError: If the model is another one, or has tensors over several devices or of several types.
        ConfigError: If an option is wrong, or the tokenizer is not given.
    """
    for key in options:
        if key not in (*OPTIONS, "tokenizer"):
            raise ConfigError(f"cannot adopt with '{key}'{nearest(key, (*OPTIONS, 'tokenizer'))}")
    own = {key: value for key, value in options.items() if key in OPTIONS}
    with_options(SEVEN_B, own)
    where = type(module).__name__
    release = read_module(module, options.get("tokenizer"), causal=True)
    config, statistics = _configured(release, config_mapping(module.config), where, own)
    model = _model(config)
    adopt(model, _inventory(config.body, model, stored_module(module.state_dict(), where), Path(where)))
    return OpenVLA(config, model, release.tokenizer, statistics, config.info(where, untrained=False))


def _release(folder: Path, options: Mapping[str, Any]) -> PrismaticRelease:
    with_options(SEVEN_B, options)
    heads = sorted(path.name for path in folder.glob("action_head--*"))
    if heads:
        raise CheckpointError(f"{folder / heads[0]}: the checkpoint has an action head; its backbone is openvla-oft")
    return read_release(folder, causal=True)


def _of_folder(folder: Path, release: PrismaticRelease, options: Mapping[str, Any]) -> tuple[OpenVLAConfig, Statistics]:
    path = folder / "config.json"
    return _configured(release, read_json(path), str(path), options)


def _configured(
    release: PrismaticRelease, raw: Mapping[str, Any], where: str, options: Mapping[str, Any]
) -> tuple[OpenVLAConfig, Statistics]:
    """The configuration and the statistics of a release with these options; `raw` are the fields of `config.json`."""
    action, transform = SEVEN_B.action, release.transform
    statistics = release.read_statistics(options.get("unnorm_key"), action.dims, None, ("q01", "q99"), epsilon=0.0)
    padding, n_bins = read_bins(raw, release.body.vocab, where)
    if statistics.key.startswith(_LIBERO):
        transform = replace(transform, center_crop_area=CROP)
    else:
        action = replace(action, metric={})
    config = replace(SEVEN_B, body=release.body, action=action, transform=transform, padding=padding, n_bins=n_bins)
    return with_options(config, options), statistics


def _model(config: OpenVLAConfig) -> OpenVLAModel:
    """The model without memory for its weights."""
    with torch.device("meta"):
        model = OpenVLAModel(config)
    return model


def _inventory(
    body: PrismaticConfig, model: OpenVLAModel, stored: Mapping[str, StoredTensor], where: Path
) -> Inventory:
    return take_inventory(model.state_dict(), stored, where, unused=unused_keys(body.towers))
