"""OpenVLA-OFT checkpoints in the format of the release: OpenVLA's, and small `.pt` files beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from tokenprune.engine.adapter import Findings
from tokenprune.errors import CheckpointError
from tokenprune_adapters.backbones.openvla_oft.backbone import OFTModel, OpenVLAOFT
from tokenprune_adapters.backbones.openvla_oft.config import SEVEN_B, OFTConfig, with_options
from tokenprune_adapters.backbones.prismatic.lora import film_backbone
from tokenprune_adapters.backbones.prismatic.prompt import PromptTokenizer
from tokenprune_adapters.backbones.prismatic.release import PrismaticRelease, read_bins, read_release, unused_keys
from tokenprune_adapters.inputs.statistics import Statistics
from tokenprune_adapters.weights.folder import JSON_FILES, local_folder
from tokenprune_adapters.weights.inventory import Inventory, fill, take_inventory
from tokenprune_adapters.weights.tensor_files import StoredTensor, read_json, stored_pt, stored_safetensors

_SMALL = ("action_head", "noisy_action_projector", "proprio_projector")
TOWERS = "vision_backbone"
"""The module that with FiLM is stored by itself."""
_FILES = (*JSON_FILES, "*.safetensors", *(f"{part}--*" for part in (*_SMALL, TOWERS)))
_LM_HEAD = r"language_model\.lm_head\.weight"
# Keys by which a head's file tells which head it is.
_HEADS = {"l1": "model.", "diffusion": "noise_predictor."}
_HINTS = {
    "action_head": "it holds the L1 head, or with head=diffusion the noise predictor; a checkpoint of discrete tokens "
    "has none and takes the option head=discrete, but a folder without a head also looks like OpenVLA's",
    "noisy_action_projector": "the option head=diffusion needs it",
    "proprio_projector": "set the option proprio to false where the policy reads no robot state",
    TOWERS: "the option film needs the towers that hear the instruction; set it to false where they do not",
}


@dataclass(frozen=True)
class Parts:
    """What a checkpoint holds.

    Attributes:
        where: The folder, for errors.
        body: Tensors of the body.
        small: Those of the action head and the projectors, by the model's name of the module, with what errors call it.
        film: Those of towers with FiLM, in place of the body's.
    """

    where: Path
    body: Mapping[str, StoredTensor]
    small: Mapping[str, tuple[Path, Mapping[str, StoredTensor]]] = field(default_factory=dict)
    film: tuple[Path, Mapping[str, StoredTensor]] | None = None


def read_config(folder: Path, options: Mapping[str, Any]) -> tuple[OFTConfig, PromptTokenizer]:
    """Read a release's configuration and tokenizer; no weights are read or downloaded.

    Args:
        folder: A folder in the release's format, or a hub id `owner/name`; see `read_release`.
        options: See `with_options`; no file states what they say, and without them it is LIBERO's with the L1 head.
            `unnorm_key` may be left out where the checkpoint has one dataset only.

    Returns:
        The configuration and the tokenizer.

    Raises:
        CheckpointError: If a file is missing, malformed, or asks for something that is not supported.
        ConfigError: If an option is wrong.
    """
    release, config = _read(local_folder(folder, JSON_FILES), options)
    read_statistics(release, config, options)
    return config, release.tokenizer


def load_oft(
    folder: Path, options: Mapping[str, Any], device: torch.device, dtype: torch.dtype, source: str | None = None
) -> OpenVLAOFT:
    """Load a release.

    Every tensor of every file is accounted for before the first is read. Left out by name are only those that no
    query needs: `lm_head` where a head replaces it, the towers' blocks after the tap, their final norms and their
    pooling heads, and the plain towers where there are some with FiLM. They need not be there. Tensors are read one by
    one into a model that holds no memory until then.

    Args:
        folder: See `read_config`.
        options: See `read_config`.
        device: Where the weights go.
        dtype: Their type, whatever the files hold.
        source: What the policy is called; the folder where it is left out.

    Returns:
        The policy's backbone.

    Raises:
        CheckpointError: If a file is missing, damaged or unsafe, or does not fit the configuration.
        ConfigError: If an option is wrong.
    """
    local = local_folder(folder, _FILES)
    release, config = _read(local, options)
    statistics = read_statistics(release, config, options)
    model = empty_model(config)
    fill(model, account(config, model, _parts(local, config)), device, dtype)
    info = config.info(source or str(folder), untrained=False)
    return OpenVLAOFT(config, model, release.tokenizer, statistics, info)


def verify_oft(folder: Path, options: Mapping[str, Any]) -> Findings:
    """Say what a release holds and what of it does not fit; no weights are read.

    Raises:
        CheckpointError: If a file is missing, damaged or unsafe.
        ConfigError: If an option is wrong.
    """
    local = local_folder(folder, _FILES)
    release, config = _read(local, options)
    found = account(config, empty_model(config), _parts(local, config))
    return found.findings(release.statistics, config.state_size)


def configured(release: PrismaticRelease, raw: Mapping[str, Any], options: Mapping[str, Any], where: str) -> OFTConfig:
    """The configuration of a release with these options.

    Args:
        release: The release.
        raw: The fields of its `config.json`, in which discrete actions are described.
        options: See `with_options`.
        where: The file, or what to call the model, for errors.

    Raises:
        CheckpointError: If the vocabulary has no room for discrete actions.
        ConfigError: If an option is wrong.
    """
    # Fine-tunes are trained with random crops; no file says so.
    transform = replace(release.transform, center_crop_area=SEVEN_B.transform.center_crop_area)
    config = with_options(replace(SEVEN_B, body=release.body, transform=transform), options)
    if config.head != "discrete":
        return config
    padding, n_bins = read_bins(raw, config.body.vocab, where)
    return replace(config, padding=padding, n_bins=n_bins)


def read_statistics(release: PrismaticRelease, config: OFTConfig, options: Mapping[str, Any]) -> Statistics:
    """Statistics of the dataset that is meant, with the bounds that the configuration names.

    Raises:
        CheckpointError: If the dataset is unknown or not given, or its statistics are incomplete.
    """
    size, key = config.state_size, options.get("unnorm_key")
    return release.read_statistics(key, config.action.dims, size, config.bounds, epsilon=1e-8)


def empty_model(config: OFTConfig) -> OFTModel:
    """The model without memory for its weights."""
    with torch.device("meta"):
        model = OFTModel(config)
    return model


def account(config: OFTConfig, model: OFTModel, parts: Parts) -> Inventory:
    """Set a checkpoint against the model.

    Raises:
        CheckpointError: If two tensors are one parameter.
    """
    own_file = {*parts.small, *([TOWERS] if parts.film else [])}
    body = {name: values for name, values in model.state_dict().items() if name.partition(".")[0] not in own_file}
    # Unused where the model has no place for them.
    more = [_LM_HEAD, rf"{TOWERS}\.(fused_)?featurizer\..+"] if parts.film else [_LM_HEAD]
    found = take_inventory(body, parts.body, parts.where, unused=unused_keys(config.body.towers, *more))
    for part, (where, stored) in parts.small.items():
        found += take_inventory(model.get_submodule(part).state_dict(), stored, where).under(f"{part}.")
    if parts.film:
        where, stored = parts.film
        towers = {name: values for name, values in model.state_dict().items() if name.partition(".")[0] == TOWERS}
        found += take_inventory(towers, film_backbone(stored), where, unused=unused_keys(config.body.towers))
    return found


def small_parts(config: OFTConfig) -> tuple[str, ...]:
    """The modules beside the body, each with a file of its own."""
    needed = {
        "action_head": config.head != "discrete",
        "noisy_action_projector": config.head == "diffusion",
        "proprio_projector": config.state_size is not None,
    }
    return tuple(part for part in _SMALL if needed[part])


def check_head(config: OFTConfig, part: str, where: Path, stored: Mapping[str, StoredTensor]) -> None:
    """Refuse the action head of another kind of policy; anything else that does not fit is found by the inventory.

    Raises:
        CheckpointError: Naming the option that fits.
    """
    for other, prefix in _HEADS.items():
        if part == "action_head" and other != config.head and all(key.startswith(prefix) for key in stored):
            raise CheckpointError(f"{where}: holds another head; head is '{config.head}', the option head={other} fits")


def _read(folder: Path, options: Mapping[str, Any]) -> tuple[PrismaticRelease, OFTConfig]:
    release = read_release(folder, causal=False)
    path = folder / "config.json"
    config = configured(release, read_json(path), options, str(path))
    film = sorted(folder.glob(f"{TOWERS}--*"))
    if film and not config.film:
        raise CheckpointError(f"{film[0]}: the checkpoint's towers use FiLM; set the option film to true")
    return release, config


def _parts(folder: Path, config: OFTConfig) -> Parts:
    heads = sorted(folder.glob("action_head--*"))
    if heads and config.head == "discrete":
        raise CheckpointError(f"{heads[0]}: the checkpoint has an action head; head=discrete is for those without one")
    small = {}
    for part in small_parts(config):
        path = _only(folder, part)
        small[part] = path, stored_pt(path)
        check_head(config, part, *small[part])
    film = _only(folder, TOWERS) if config.film else None
    return Parts(folder, stored_safetensors(folder), small, (film, stored_pt(film)) if film else None)


def _only(folder: Path, part: str) -> Path:
    found = sorted(folder.glob(f"{part}--*.pt"))
    if not found:
        raise CheckpointError(f"{folder}: there is no {part}--*.pt; {_HINTS[part]}")
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise CheckpointError(f"{folder}: there are several {part}--*.pt; keep the one that is meant of {names}")
    return found[0]
