"""The file of towers with FiLM, in which LoRA is not merged: renamed and merged tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from tokenprune.errors import CheckpointError
from tokenprune_adapters.backbones.prismatic.config import TOWERS
from tokenprune_adapters.weights.tensor_files import StoredTensor

_BASE, _A, _B = "base_layer.weight", "lora_A.default.weight", "lora_B.default.weight"

_PARTS = (_BASE, "base_layer.bias", _A, _B)

_LAYER = re.compile(r"(.+)\.((?:base_layer|lora_\w+)\..+)")

_TOWER = re.compile(rf"(?:(?:base_model\.model|module|vision_backbone)\.)*((?:{'|'.join(TOWERS)})\..+)")

_LARGEST_ALPHA = 16


def merge_lora(stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Merge LoRA into the layers that carry it; every other tensor stays as it is.

    PEFT saves such a layer as `base_layer.weight`, `lora_A.default.weight` and `lora_B.default.weight`, and its bias as
    `base_layer.bias`. The merged layer has `weight` and `bias`. Its weight is `W + s * B A`, computed when it is
    fetched, in float32 or more, and returned in the base's dtype. The file does not state `s`; upstream OpenVLA-OFT
    trains at any rank r with `lora_alpha = min(r, 16)`, hence `s = min(r, 16) / r`.

    Args:
        stored: Key to tensor. Linear layers have A `[r, in]` and B `[out, r]`, convolutions A `[r, in, k, k]` and
            B `[out, r, 1, 1]`.

    Returns:
        Merged key to tensor; a merged weight has the file and key of its base.

    Raises:
        CheckpointError: If a layer lacks its base, A or B, if their shapes do not fit, if it has tensors of another
            PEFT method, or if two tensors would have the same name.
    """
    found: dict[str, StoredTensor] = {}
    layers: dict[str, dict[str, StoredTensor]] = {}
    for key, tensor in stored.items():
        match = _LAYER.fullmatch(key)
        if match is None:
            found[key] = tensor
            continue
        layer, part = match.groups()
        if part not in _PARTS:
            valid = ", ".join(_PARTS)
            raise CheckpointError(f"{tensor.file}: '{tensor.key}' cannot be merged as LoRA; valid: {valid}")
        layers.setdefault(layer, {})[part] = tensor
    for layer, parts in layers.items():
        _add(found, f"{layer}.weight", _weight(parts))
        if "base_layer.bias" in parts:
            _add(found, f"{layer}.bias", parts["base_layer.bias"])
    return found


def _weight(parts: Mapping[str, StoredTensor]) -> StoredTensor:
    for name in (_BASE, _A, _B):
        if name not in parts:
            part, other = next(iter(parts.items()))
            missing = other.key.removesuffix(part) + name
            raise CheckpointError(f"{other.file}: '{other.key}' is there, but '{missing}' is missing")
    base, a, b = parts[_BASE], parts[_A], parts[_B]
    rank = a.shape[0] if a.shape else 0
    wanted_a = (rank, *base.shape[1:])
    wanted_b = (*base.shape[:1], rank, *(1 for _ in base.shape[2:]))
    if len(base.shape) < 2 or rank == 0 or (a.shape, b.shape) != (wanted_a, wanted_b):
        shapes = " and ".join(f"'{tensor.key}' {list(tensor.shape)}" for tensor in (a, b))
        raise CheckpointError(f"{base.file}: {shapes} are no LoRA of one rank for '{base.key}' {list(base.shape)}")
    return replace(base, fetch=partial(_merge, base, a, b))


def _merge(base: StoredTensor, a: StoredTensor, b: StoredTensor) -> Tensor:
    weight, rank = base.fetch(), a.shape[0]
    wide = torch.promote_types(weight.dtype, torch.float32)
    down, up = (tensor.read(weight.device, wide).flatten(1) for tensor in (a, b))
    change = (up @ down).reshape(weight.shape)
    return (weight.to(wide) + change * (min(rank, _LARGEST_ALPHA) / rank)).to(weight.dtype)


def read_film_towers(stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Read the towers of a FiLM policy, `vision_backbone--*.pt`, under the model's names and with LoRA merged.

    Upstream OpenVLA-OFT saves the state dict of the wrapped vision backbone, with LoRA that is not merged:
    `featurizer.blocks.0.block.attn.qkv...` in place of `blocks.0.attn.qkv`, and `featurizer.blocks.0.scale` and
    `.shift`. Each key begins with `vision_backbone.`, and with prefixes of PEFT and data-parallel training if used. The
    names follow upstream's wrapper; they were not checked against a released file.

    Args:
        stored: The file's tensors.

    Returns:
        `vision_backbone.featurizer.blocks.0.attn.qkv.weight` and so on, including blocks after the tap, final norms and
        pooling heads.

    Raises:
        CheckpointError: If a tensor belongs to no tower, two would have the same name, or LoRA cannot be merged.
    """
    renamed: dict[str, StoredTensor] = {}
    for key, tensor in stored.items():
        match = _TOWER.fullmatch(key)
        if match is None:
            valid = ", ".join(TOWERS)
            raise CheckpointError(f"{tensor.file}: '{tensor.key}' is a tensor of no tower; valid: {valid}")
        name = re.sub(r"(\.blocks\.\d+)\.block\.", r"\1.", match[1])
        # timm's own name for `scale_factor` of OpenVLA's files.
        name = re.sub(r"(\.ls[12])\.gamma$", r"\1.scale_factor", name)
        _add(renamed, f"vision_backbone.{name}", tensor)
    return merge_lora(renamed)


def _add(found: dict[str, StoredTensor], name: str, tensor: StoredTensor) -> None:
    if name in found:
        raise CheckpointError(f"{tensor.file}: '{tensor.key}' and '{found[name].key}' are both '{name}'")
    found[name] = tensor
