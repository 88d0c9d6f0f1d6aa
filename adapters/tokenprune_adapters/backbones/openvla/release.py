"""OpenVLA checkpoints in the format of the release."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tokenprune.engine.adapter import Findings
from tokenprune.errors import CheckpointError
from tokenprune_adapters.backbones.openvla.backbone import OpenVLA, OpenVLASetup
from tokenprune_adapters.backbones.openvla.config import SEVEN_B, with_options
from tokenprune_adapters.backbones.openvla.model import OpenVLAModel
from tokenprune_adapters.backbones.prismatic.config import PrismaticConfig
from tokenprune_adapters.backbones.prismatic.image_transform import CENTER_CROP_AREA
from tokenprune_adapters.backbones.prismatic.release import PrismaticRelease, read_bins, read_release, unused_keys
from tokenprune_adapters.weights.folder import JSON_FILES, local_folder
from tokenprune_adapters.weights.inventory import Inventory, take_inventory
from tokenprune_adapters.weights.loading import empty_model, load_weights
from tokenprune_adapters.weights.tensor_files import StoredTensor, read_json, stored_safetensors

# An action head is fetched only to be noticed: a decoder with one was trained with bidirectional attention.
_FILES = (*JSON_FILES, "*.safetensors", "action_head--*")
_LIBERO = "libero"


def read_openvla(folder: Path, options: Mapping[str, Any]) -> OpenVLASetup:
    """Read a release's configuration, tokenizer and statistics; no weights are read or downloaded.

    Two things are in no file and follow from the name of the dataset. If it begins with `libero`, images are cropped
    at the centre, since LIBERO's fine-tunes are trained with random crops, and actions are in LIBERO's units.
    Otherwise images are not cropped, which upstream's `openvla-7b` needs, and the units of actions are not known.

    Args:
        folder: A folder in the release's format, or a hub id `owner/name`; see `read_release`.
        options: See `with_options`. `unnorm_key`, the dataset whose statistics are used, may be left out if the
            checkpoint has only one. `prompt: vicuna` must be given for the v0.1 releases, since no file states it.

    Raises:
        CheckpointError: If a file is missing, malformed, or asks for something that is not supported.
        ConfigError: If an option is wrong.
    """
    return _read(local_folder(folder, JSON_FILES), options)


def load_openvla(folder: Path, options: Mapping[str, Any], device: torch.device, dtype: torch.dtype) -> OpenVLA:
    """Load a release.

    Every tensor of every file is accounted for before the first is read. Only tensors that no query needs are left
    out, by name: the towers' blocks after the tap, their final norms and their pooling heads. Tensors are read one by
    one into a model on the meta device.

    Args:
        folder: See `read_openvla`.
        options: See `read_openvla`.
        device: Where the weights go.
        dtype: Their type, whatever the files hold.

    Raises:
        CheckpointError: If a file is missing, damaged or unsafe, or does not fit the configuration.
        ConfigError: If an option is wrong.
    """
    local = local_folder(folder, _FILES)
    setup = _read(local, options)
    model = empty_model(OpenVLAModel, setup.config)
    inventory = take_openvla_inventory(setup.config.body, model, stored_safetensors(local), local)
    load_weights(model, inventory, device, dtype)
    return OpenVLA(setup, model, setup.config.info(str(folder), untrained=False))


def verify_openvla(folder: Path, options: Mapping[str, Any]) -> Findings:
    """List what a release holds and what of it does not fit the model; no weights are read.

    Raises:
        CheckpointError: If a file is missing, damaged or unsafe.
        ConfigError: If an option is wrong.
    """
    local = local_folder(folder, _FILES)
    release = _release(local, options)
    model = empty_model(OpenVLAModel, replace(SEVEN_B, body=release.body))
    inventory = take_openvla_inventory(release.body, model, stored_safetensors(local), local)
    return inventory.findings(release.statistics, None)


def configure(
    release: PrismaticRelease, raw: Mapping[str, Any], options: Mapping[str, Any], where: str
) -> OpenVLASetup:
    """Apply options to a release.

    Args:
        release: The release.
        raw: The fields of its `config.json`, which describe the action tokens.
        options: See `read_openvla`.
        where: The file, or what to call the model, for errors.

    Raises:
        CheckpointError: If the statistics do not fit, or the vocabulary has no room for the actions.
        ConfigError: If an option is wrong.
    """
    action, transform = SEVEN_B.action, release.transform
    statistics = release.read_statistics(options.get("unnorm_key"), action.dims, None, ("q01", "q99"), epsilon=0.0)
    padding, n_bins = read_bins(raw, release.body.vocab, where)
    if statistics.key.startswith(_LIBERO):
        transform = replace(transform, center_crop_area=CENTER_CROP_AREA)
    else:
        action = replace(action, metric={})
    config = replace(SEVEN_B, body=release.body, action=action, transform=transform, padding=padding, n_bins=n_bins)
    return OpenVLASetup(with_options(config, options), release.tokenizer, statistics)


def take_openvla_inventory(
    body: PrismaticConfig, model: OpenVLAModel, stored: Mapping[str, StoredTensor], where: Path
) -> Inventory:
    """Compare stored tensors with the model's parameters.

    Args:
        body: Sizes of the model.
        model: The model.
        stored: The tensors by their keys.
        where: The checkpoint, for errors.
    """
    return take_inventory(model.state_dict(), stored, where, unused=unused_keys(body.towers))


def _read(folder: Path, options: Mapping[str, Any]) -> OpenVLASetup:
    path = folder / "config.json"
    return configure(_release(folder, options), read_json(path), options, str(path))


def _release(folder: Path, options: Mapping[str, Any]) -> PrismaticRelease:
    with_options(SEVEN_B, options)
    heads = sorted(path.name for path in folder.glob("action_head--*"))
    if heads:
        raise CheckpointError(f"{folder / heads[0]}: the checkpoint has an action head; its backbone is openvla-oft")
    return read_release(folder, causal=True)
