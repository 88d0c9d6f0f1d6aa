"""Renames tensors of pi0 and pi0.5 checkpoints, and of transformers' own model, to the names of `PI0Model`.

openpi's names are the base. lerobot adds the prefix `model.`; transformers writes both, and `model.` within
`language_model` too. Towers have `vision_model.` or not, depending on the version of transformers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from tokenprune.errors import CheckpointError
from tokenprune_adapters.backbones.pi0.config import Variant
from tokenprune_adapters.weights.inventory import Inventory, take_inventory
from tokenprune_adapters.weights.tensor_files import StoredTensor

_FILE = r"(?:model\.)?paligemma_with_expert\."

# Prefixes in files, and in transformers' loaded model.
_VLM = rf"(?:{_FILE}paligemma\.model|model\.vlm)\."

_EXPERT = rf"(?:{_FILE}gemma_expert\.model|model\.dit)\."

_TOWER = _VLM + r"vision_tower\.(?:vision_model\.)?"

_BLOCK = _TOWER + r"encoder\.layers\.(\d+)\."

_POSITIONS = "vision.pos_embed"

_RENAMES = tuple(
    (re.compile(pattern), name)
    for pattern, name in (
        (_TOWER + r"embeddings\.patch_embedding\.(\w+)", r"vision.patch_embed.proj.\1"),
        (_TOWER + r"embeddings\.position_embedding\.weight", _POSITIONS),
        (_BLOCK + r"layer_norm([12])\.(\w+)", r"vision.blocks.\1.norm\2.\3"),
        (_BLOCK + r"self_attn\.([qkv]_proj\.\w+)", r"vision.blocks.\1.attn.\2"),
        (_BLOCK + r"self_attn\.out_proj\.(\w+)", r"vision.blocks.\1.attn.proj.\2"),
        (_BLOCK + r"(mlp\.fc[12]\.\w+)", r"vision.blocks.\1.\2"),
        (_TOWER + r"post_layernorm\.(\w+)", r"vision.norm.\1"),
        (_VLM + r"multi_modal_projector\.linear\.(\w+)", r"projector.\1"),
        (_VLM + r"language_model\.(?:model\.)?(.+)", r"language.\1"),
        (_EXPERT + r"(.+)", r"expert.\1"),
        (r"(?:model\.|embed_action_time\.)?((?:state_proj|action_\w+|time_mlp_\w+)\.\w+)", r"\1"),
    )
)

# The table of word embeddings is tied to the output layer, and a file may hold only one of them.
_EMBEDDINGS, _OUTPUT = "language.embed_tokens.weight", re.compile(_FILE + r"paligemma\.lm_head\.weight")

# The expert has no words as input or output.
_UNUSED = re.compile(rf"{_FILE}gemma_expert\.lm_head\.weight|{_EXPERT}embed_tokens\.weight")

_ONLY: Mapping[Variant, re.Pattern[str]] = {
    "pi0": re.compile(r"(state_proj|action_time_mlp_(in|out))\.\w+"),
    "pi05": re.compile(r"time_mlp_(in|out)\.\w+"),
}


def model_name(key: str) -> str | None:
    """The parameter of `PI0Model` for a key; None if there is none."""
    for pattern, name in _RENAMES:
        found = pattern.fullmatch(key)
        if found is not None:
            return found.expand(name)
    return None


def take_pi0_inventory(
    variant: Variant, wanted: Mapping[str, Tensor], stored: Mapping[str, StoredTensor], where: Path
) -> Inventory:
    """Compare the tensors of a checkpoint, or of a loaded model, with the parameters of `PI0Model`.

    Args:
        variant: The policy that the checkpoint must be of.
        wanted: The `state_dict()` of the `PI0Model`.
        stored: The tensors by their keys.
        where: The checkpoint, for errors.

    Raises:
        CheckpointError: If two tensors are the same parameter, or only the other variant has such a tensor.
    """
    names = {key: model_name(key) for key in stored}
    for key, name in names.items():
        for other, only in _ONLY.items():
            if other != variant and name is not None and only.fullmatch(name):
                file = stored[key].file
                looks = f"which '{variant}' does not have; this looks like a checkpoint of '{other}'"
                raise CheckpointError(f"{file}: has '{key}', {looks}")
    fitting = {
        key: _batched(tensor, wanted[_POSITIONS]) if names[key] == _POSITIONS else tensor
        for key, tensor in stored.items()
    }
    outputs = [key for key in stored if _OUTPUT.fullmatch(key)]
    ties = {_EMBEDDINGS: outputs[0]} if outputs else {}
    return take_inventory(wanted, fitting, where, names.get, _UNUSED, ties)


def _batched(tensor: StoredTensor, wanted: Tensor) -> StoredTensor:
    """Position embeddings, stored as `[N, D]`, as the view `[1, N, D]` that the tower has."""
    if (1, *tensor.shape) != wanted.shape:
        return tensor
    return replace(tensor, shape=(1, *tensor.shape), fetch=lambda: tensor.fetch()[None])
