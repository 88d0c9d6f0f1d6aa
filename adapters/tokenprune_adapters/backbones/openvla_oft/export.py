"""Writes OpenVLA-OFT checkpoints in the format of the release, for `load_oft`."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from tokenprune.errors import CheckpointError, ConfigError
from tokenprune_adapters.backbones.openvla_oft.config import OFTConfig
from tokenprune_adapters.backbones.openvla_oft.model import OFTModel
from tokenprune_adapters.backbones.openvla_oft.tensors import OFTTensors, separate_modules, take_oft_inventory
from tokenprune_adapters.backbones.prismatic.config import PrismaticConfig
from tokenprune_adapters.backbones.prismatic.release import (
    TIMM_TOWERS,
    fitting_tokenizer,
    image_transform,
    malformed,
    parse_config,
    prismatic_body,
)
from tokenprune_adapters.inputs.statistics import Statistics
from tokenprune_adapters.vision.transformer import ViTConfig
from tokenprune_adapters.weights.loading import empty_model
from tokenprune_adapters.weights.tensor_files import SINGLE, stored_module

_CPU = torch.device("cpu")


def export_oft(
    folder: Path,
    config: OFTConfig,
    model: OFTModel,
    tokenizer_path: Path,
    statistics: Mapping[str, Any],
    dtype: torch.dtype = torch.float16,
    card: str = "",
) -> None:
    """Write a policy in the format of the release: one `model.safetensors`, head and projectors as `.pt` beside it.

    Tensors that no query needs are not written: the towers' blocks after the tap and, unless the head is discrete,
    `lm_head`. Settings that are in no file of a release are not written either: they are options when the policy is
    loaded; see `with_options`. Everything is checked before the first file is written; `config.json` is the last.

    Args:
        folder: A new or an empty folder.
        config: The model's configuration. Its towers must be of DINOv2's or SigLIP's kind, with the tap at their second
            to last block, without FiLM.
        model: The weights.
        tokenizer_path: The `tokenizer.json` the policy was trained with.
        statistics: Content of `dataset_statistics.json`; see `Statistics.read`.
        dtype: Type the weights are stored in.
        card: Content of `README.md`; no file if empty.

    Raises:
        ConfigError: If the folder is not empty, or the format cannot express the configuration.
        CheckpointError: If the model does not fit the configuration or has values that are not finite in `dtype`, or if
            the tokenizer or the statistics do not fit.
    """
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ConfigError(f"{folder}: there is something already; valid: a new or an empty folder")
    raw, preprocessor = _config(config, dtype), _preprocessor(config)
    _check_described(config, raw, preprocessor)
    fitting_tokenizer(tokenizer_path, config.body.vocab)
    with malformed("statistics"):
        for key in statistics or [None]:
            Statistics.read(statistics, key, config.action.dims, config.state_size, "statistics", config.bounds)
        bounds = json.dumps(statistics, indent=2, allow_nan=False)
    body, separate = _weights(config, model, dtype)

    folder.mkdir(parents=True, exist_ok=True)
    # Not `save_file`, which makes a file that only its owner can read.
    (folder / SINGLE).write_bytes(save(body, metadata={"format": "pt"}))
    for module, tensors in separate.items():
        torch.save(tensors, folder / f"{module}--checkpoint.pt")
    shutil.copyfile(tokenizer_path, folder / "tokenizer.json")
    if card:
        (folder / "README.md").write_text(card, encoding="utf-8")
    (folder / "dataset_statistics.json").write_text(bounds, encoding="utf-8")
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=2), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(raw, indent=2), encoding="utf-8")


def _weights(
    config: OFTConfig, model: OFTModel, dtype: torch.dtype
) -> tuple[dict[str, torch.Tensor], dict[str, dict[str, torch.Tensor]]]:
    """Tensors of the body, and by module the tensors of each module that has a file of its own."""
    where = Path(type(model).__name__)
    values = {name: stored.read(_CPU, dtype) for name, stored in stored_module(model.state_dict(), where).items()}
    separate = {
        module: {name.removeprefix(f"{module}."): v for name, v in values.items() if name.startswith(f"{module}.")}
        for module in separate_modules(config)
    }
    body = {name: value for name, value in values.items() if name.partition(".")[0] not in separate}
    files = {module: (where, stored_module(tensors, where)) for module, tensors in separate.items()}
    stored = OFTTensors(where, stored_module(body, where), files)
    take_oft_inventory(config, empty_model(OFTModel, config), stored).check()
    for name, value in values.items():
        if not value.isfinite().all():
            raise CheckpointError(f"{where}: '{name}' has values that are not finite in {dtype}")
    return body, separate


def _check_described(config: OFTConfig, raw: Mapping[str, Any], preprocessor: Mapping[str, Any]) -> None:
    """Refuse a configuration that reading the files would not restore."""
    found = prismatic_body(parse_config(raw, "config.json"), "config.json", causal=False)
    for field in fields(PrismaticConfig):
        wanted, read = getattr(config.body, field.name), getattr(found, field.name)
        if wanted != read:
            raise ConfigError(f"body.{field.name} is {wanted}; in the release's format it would be read as {read}")
    image_transform(preprocessor, raw, found.towers, "preprocessor_config.json")


def _config(config: OFTConfig, dtype: torch.dtype) -> dict[str, Any]:
    body, shape = config.body, config.body.decoder
    dino, siglip = TIMM_TOWERS
    return {
        "model_type": "openvla",
        "architectures": ["OpenVLAForActionPrediction"],
        "use_fused_vision_backbone": len(body.towers) > 1,
        "timm_model_ids": [dino if tower.cls else siglip for tower in body.towers],
        "timm_override_act_layers": [None] * len(body.towers),
        "timm_override_args": [_timm_args(tower) for tower in body.towers],
        "image_sizes": [tower.image_size for tower in body.towers],
        "image_resize_strategy": config.transform.resize,
        "n_action_bins": config.n_bins,
        "pad_to_multiple_of": config.padding,
        "text_config": {
            "model_type": "llama",
            "hidden_size": shape.hidden,
            "num_hidden_layers": shape.depth,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.kv_heads,
            "head_dim": shape.head_dim,
            "intermediate_size": shape.mlp,
            "vocab_size": body.vocab,
            "max_position_embeddings": body.max_positions,
            "rms_norm_eps": body.eps,
            "rope_theta": body.rope_theta,
        },
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


def _timm_args(tower: ViTConfig) -> dict[str, Any]:
    width, ratio = tower.hidden_size, tower.mlp_size / tower.hidden_size
    return {
        "embed_dim": width,
        "depth": tower.depth,
        "num_heads": tower.heads,
        # timm truncates width * ratio, and the rounding of the ratio may bring that below the MLP's size.
        "mlp_ratio": ratio if int(width * ratio) == tower.mlp_size else math.nextafter(ratio, math.inf),
        "patch_size": tower.patch_size,
        "reg_tokens": tower.registers,
    }


def _preprocessor(config: OFTConfig) -> dict[str, Any]:
    transform, towers = config.transform, config.body.towers
    return {
        "image_processor_type": "PrismaticImageProcessor",
        "use_fused_vision_backbone": len(towers) > 1,
        "image_resize_strategy": transform.resize,
        "input_sizes": [[3, transform.size, transform.size]] * len(towers),
        "interpolations": ["bicubic"] * len(towers),
        "tvf_normalize_params": [
            {"mean": list(mean), "std": list(std)} for mean, std in zip(transform.means, transform.stds, strict=True)
        ],
    }
