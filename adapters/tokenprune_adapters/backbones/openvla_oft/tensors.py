"""Tensors of an OpenVLA-OFT checkpoint: the body's, and each module's that has a file of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tokenprune.errors import CheckpointError
from tokenprune_adapters.backbones.openvla_oft.config import OFTConfig
from tokenprune_adapters.backbones.openvla_oft.film_lora import read_film_towers
from tokenprune_adapters.backbones.openvla_oft.model import OFTModel
from tokenprune_adapters.backbones.prismatic.release import unused_keys
from tokenprune_adapters.weights.inventory import Inventory, take_inventory
from tokenprune_adapters.weights.tensor_files import StoredTensor, stored_pt, stored_safetensors

TOWERS = "vision_backbone"
"""The module that has a file of its own in checkpoints with FiLM."""

SEPARATE = ("action_head", "noisy_action_projector", "proprio_projector")
"""The other modules that have a file of their own."""

_LM_HEAD = r"language_model\.lm_head\.weight"

# The keys in a head's file begin with a prefix that tells which head it is.
_HEAD_PREFIXES = {"l1": "model.", "diffusion": "noise_predictor."}

_HINTS = {
    "action_head": "it holds the L1 head, or with head=diffusion the noise predictor; a checkpoint of discrete tokens "
    "has none and takes the option head=discrete, but a folder without a head also looks like OpenVLA's",
    "noisy_action_projector": "the option head=diffusion needs it",
    "proprio_projector": "set the option proprio to false if the policy reads no robot state",
    TOWERS: "the option film needs towers with FiLM; set it to false if the policy has none",
}


@dataclass(frozen=True)
class OFTTensors:
    """The tensors of a checkpoint.

    Attributes:
        where: The folder, for errors.
        body: Tensors of the body.
        separate: File and tensors of each module with a file of its own, by the model's name of the module.
        film: File and tensors of towers with FiLM, which replace the body's towers; None without FiLM.
    """

    where: Path
    body: Mapping[str, StoredTensor]
    separate: Mapping[str, tuple[Path, Mapping[str, StoredTensor]]] = field(default_factory=dict)
    film: tuple[Path, Mapping[str, StoredTensor]] | None = None


def read_tensors(folder: Path, config: OFTConfig) -> OFTTensors:
    """Find the tensors of a release; headers only, except for the small `.pt` files.

    Raises:
        CheckpointError: If a file is missing, damaged or unsafe, or belongs to another kind of policy.
    """
    heads = sorted(folder.glob("action_head--*"))
    if heads and config.head == "discrete":
        raise CheckpointError(f"{heads[0]}: the checkpoint has an action head; head=discrete is for those without one")
    separate = {}
    for name in separate_modules(config):
        path = _single_file(folder, name)
        separate[name] = path, stored_pt(path)
        check_head(config, name, *separate[name])
    film = _single_file(folder, TOWERS) if config.film else None
    return OFTTensors(folder, stored_safetensors(folder), separate, (film, stored_pt(film)) if film else None)


def separate_modules(config: OFTConfig) -> tuple[str, ...]:
    """The modules of this policy that have a file of their own, the towers excepted."""
    needed = {
        "action_head": config.head != "discrete",
        "noisy_action_projector": config.head == "diffusion",
        "proprio_projector": config.state_size is not None,
    }
    return tuple(name for name in SEPARATE if needed[name])


def check_head(config: OFTConfig, module: str, where: Path, stored: Mapping[str, StoredTensor]) -> None:
    """Refuse the action head of another kind of policy; the inventory finds everything else that does not fit.

    Raises:
        CheckpointError: Naming the option that fits.
    """
    for other, prefix in _HEAD_PREFIXES.items():
        if module == "action_head" and other != config.head and all(key.startswith(prefix) for key in stored):
            raise CheckpointError(f"{where}: holds another head; head is '{config.head}', the option head={other} fits")


def take_oft_inventory(config: OFTConfig, model: OFTModel, tensors: OFTTensors) -> Inventory:
    """Compare a checkpoint's tensors with the model's parameters.

    Raises:
        CheckpointError: If two tensors are the same parameter.
    """
    own_file = {*tensors.separate, *([TOWERS] if tensors.film else [])}
    body = {name: values for name, values in model.state_dict().items() if name.partition(".")[0] not in own_file}
    # Unused only if the model has no parameter of that name.
    more = [_LM_HEAD, rf"{TOWERS}\.(fused_)?featurizer\..+"] if tensors.film else [_LM_HEAD]
    found = take_inventory(body, tensors.body, tensors.where, unused=unused_keys(config.body.towers, *more))
    for module, (where, stored) in tensors.separate.items():
        found += take_inventory(model.get_submodule(module).state_dict(), stored, where).under(f"{module}.")
    if tensors.film:
        where, stored = tensors.film
        towers = {name: values for name, values in model.state_dict().items() if name.partition(".")[0] == TOWERS}
        found += take_inventory(towers, read_film_towers(stored), where, unused=unused_keys(config.body.towers))
    return found


def _single_file(folder: Path, module: str) -> Path:
    """The one file of a module."""
    found = sorted(folder.glob(f"{module}--*.pt"))
    if not found:
        raise CheckpointError(f"{folder}: there is no {module}--*.pt; {_HINTS[module]}")
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise CheckpointError(f"{folder}: there are several {module}--*.pt; keep only one of {names}")
    return found[0]
