"""Writes a tiny OpenVLA in the format of the releases, and stands in for upstream's model once it is loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.helpers import release_format
from tests.helpers.release_format import BODY_KEYS, PREPROCESSOR, TOKENIZER
from tokenprune_adapters.backbones.openvla.backbone import OpenVLA

LM_HEAD = "language_model.lm_head.weight"
KEYS = (*BODY_KEYS, LM_HEAD)
UNUSED_KEYS = tuple(key for key in release_format.UNUSED_KEYS if key != LM_HEAD)
DATASET = "libero_spatial"

CONFIG: dict[str, Any] = {
    **release_format.CONFIG,
    "timm_override_args": [
        {"embed_dim": 24, "depth": 3, "num_heads": 3, "mlp_ratio": 2.0, "patch_size": 14},
        {"embed_dim": 16, "depth": 3, "num_heads": 2, "mlp_ratio": 2.0, "reg_tokens": 0},
    ],
}


def statistics(backbone: OpenVLA, *datasets: str) -> dict[str, Any]:
    """`dataset_statistics.json`, or `norm_stats` of the configuration."""
    bounds = backbone.statistics.action
    action = {"q01": bounds.low.tolist(), "q99": bounds.high.tolist(), "mask": bounds.mask.tolist()}
    return {name: {"action": action, "num_trajectories": 432} for name in datasets}


def tensors(backbone: OpenVLA, dtype: torch.dtype) -> dict[str, Tensor]:
    """What the safetensors hold."""
    generator = torch.Generator().manual_seed(7)
    found = {key: backbone.model.get_parameter(key).detach() for key in KEYS}
    for key in UNUSED_KEYS:
        like = key.replace(".blocks.2.", ".blocks.0.")
        found[key] = torch.randn(found[like].shape if like in found else (3, 5), generator=generator)
    return {key: value.to(dtype).clone() for key, value in found.items()}


def write_openvla(folder: Path, backbone: OpenVLA, dtype: torch.dtype = torch.float32, shards: int = 0) -> Path:
    """Write a backbone as a release of a fine-tune: sharded unless `shards` is 0."""
    folder.mkdir(parents=True)
    body = tensors(backbone, dtype)
    if shards:
        keys = sorted(body)
        names = {
            key: f"model-{1 + at * shards // len(keys):05}-of-{shards:05}.safetensors" for at, key in enumerate(keys)
        }
        for name in sorted(set(names.values())):
            save_file({key: body[key] for key in keys if names[key] == name}, folder / name, metadata={"format": "pt"})
        index = {"metadata": {"total_size": sum(t.nbytes for t in body.values())}, "weight_map": names}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        save_file(body, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    (folder / "dataset_statistics.json").write_text(json.dumps(statistics(backbone, DATASET)))
    shutil.copy(TOKENIZER, folder / "tokenizer.json")
    return folder


class UpstreamConfig:
    """As transformers' configurations are."""

    def __init__(self, **fields: Any) -> None:
        self.fields = {**CONFIG, **fields}

    def to_dict(self) -> dict[str, Any]:
        return self.fields


class OpenVLAForActionPrediction(nn.Module):
    """Upstream's model as far as anyone may look at it: parameters under its names, `config` and `norm_stats`."""

    def __init__(self, weights: dict[str, Tensor], own_stats: dict[str, Any] | None, **fields: Any) -> None:
        super().__init__()
        self.config = UpstreamConfig(**fields)
        if own_stats is not None:
            self.norm_stats = own_stats
        for key, value in weights.items():
            *path, leaf = key.split(".")
            owner: nn.Module = self
            for name in path:
                if name not in dict(owner.named_children()):
                    owner.add_module(name, nn.Module())
                owner = owner.get_submodule(name)
            owner.register_parameter(leaf, nn.Parameter(value))
