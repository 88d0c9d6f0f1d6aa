"""OpenVLA-OFT checkpoints in the format of the release: OpenVLA's, and small `.pt` files beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tokenprune.engine.adapter import Findings
from tokenprune.errors import CheckpointError
from tokenprune_adapters.backbones.openvla_oft.backbone import OFTSetup, OpenVLAOFT
from tokenprune_adapters.backbones.openvla_oft.config import SEVEN_B, OFTConfig, with_options
from tokenprune_adapters.backbones.openvla_oft.model import OFTModel
from tokenprune_adapters.backbones.openvla_oft.tensors import SEPARATE, TOWERS, read_tensors, take_oft_inventory
from tokenprune_adapters.backbones.prismatic.image_transform import CENTER_CROP_AREA
from tokenprune_adapters.backbones.prismatic.release import PrismaticRelease, read_bins, read_release
from tokenprune_adapters.weights.folder import JSON_FILES, local_folder
from tokenprune_adapters.weights.loading import empty_model, load_weights
from tokenprune_adapters.weights.tensor_files import read_json

_FILES = (*JSON_FILES, "*.safetensors", *(f"{module}--*" for module in (*SEPARATE, TOWERS)))


def read_oft(folder: Path, options: Mapping[str, Any]) -> OFTSetup:
    """Read a release's configuration, tokenizer and statistics; no weights are read or downloaded.

    Args:
        folder: A folder in the release's format, or a hub id `owner/name`; see `read_release`.
        options: See `with_options`. What they set is in no file; without options the policy is LIBERO's with the L1
            head. `unnorm_key` may be left out if the checkpoint has only one dataset.

    Raises:
        CheckpointError: If a file is missing, malformed, or asks for something that is not supported.
        ConfigError: If an option is wrong.
    """
    release, config = _read(local_folder(folder, JSON_FILES), options)
    return with_statistics(release, config, options)


def load_oft(
    folder: Path, options: Mapping[str, Any], device: torch.device, dtype: torch.dtype, source: str | None = None
) -> OpenVLAOFT:
    """Load a release.

    Every tensor of every file is accounted for before the first is read. Only tensors that no query needs are left
    out, by name: `lm_head` if another head replaces it, the towers' blocks after the tap, their final norms and their
    pooling heads, and the plain towers if there are towers with FiLM. The files need not hold them. Tensors are read
    one by one into a model on the meta device.

    Args:
        folder: See `read_oft`.
        options: See `read_oft`.
        device: Where the weights go.
        dtype: Their type, whatever the files hold.
        source: What the policy is called; the folder by default.

    Raises:
        CheckpointError: If a file is missing, damaged or unsafe, or does not fit the configuration.
        ConfigError: If an option is wrong.
    """
    local = local_folder(folder, _FILES)
    release, config = _read(local, options)
    setup = with_statistics(release, config, options)
    model = empty_model(OFTModel, config)
    load_weights(model, take_oft_inventory(config, model, read_tensors(local, config)), device, dtype)
    return OpenVLAOFT(setup, model, config.info(source or str(folder), untrained=False))


def verify_oft(folder: Path, options: Mapping[str, Any]) -> Findings:
    """List what a release holds and what of it does not fit the model; no weights are read.

    Raises:
        CheckpointError: If a file is missing, damaged or unsafe.
        ConfigError: If an option is wrong.
    """
    local = local_folder(folder, _FILES)
    release, config = _read(local, options)
    inventory = take_oft_inventory(config, empty_model(OFTModel, config), read_tensors(local, config))
    return inventory.findings(release.statistics, config.state_size)


def configure(release: PrismaticRelease, raw: Mapping[str, Any], options: Mapping[str, Any], where: str) -> OFTConfig:
    """Apply options to a release.

    Args:
        release: The release.
        raw: The fields of its `config.json`, which describe discrete action tokens.
        options: See `with_options`.
        where: The file, or what to call the model, for errors.

    Raises:
        CheckpointError: If the vocabulary has no room for discrete actions.
        ConfigError: If an option is wrong.
    """
    # Fine-tunes are trained with random crops; no file states it.
    transform = replace(release.transform, center_crop_area=CENTER_CROP_AREA)
    config = with_options(replace(SEVEN_B, body=release.body, transform=transform), options)
    if config.head != "discrete":
        return config
    padding, n_bins = read_bins(raw, config.body.vocab, where)
    return replace(config, padding=padding, n_bins=n_bins)


def with_statistics(release: PrismaticRelease, config: OFTConfig, options: Mapping[str, Any]) -> OFTSetup:
    """Add the statistics of the chosen dataset, with the bounds that the configuration names.

    Raises:
        CheckpointError: If the dataset is unknown or not given, or its statistics are incomplete.
    """
    size, key = config.state_size, options.get("unnorm_key")
    statistics = release.read_statistics(key, config.action.dims, size, config.bounds, epsilon=1e-8)
    return OFTSetup(config, release.tokenizer, statistics)


def _read(folder: Path, options: Mapping[str, Any]) -> tuple[PrismaticRelease, OFTConfig]:
    release = read_release(folder, causal=False)
    path = folder / "config.json"
    config = configure(release, read_json(path), options, str(path))
    film = sorted(folder.glob(f"{TOWERS}--*"))
    if film and not config.film:
        raise CheckpointError(f"{film[0]}: the checkpoint's towers use FiLM; set the option film to true")
    return release, config
