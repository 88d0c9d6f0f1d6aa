"""Writes a tiny checkpoint folder in the format of the OpenVLA-OFT releases, with every key written out by hand."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tokenprune_adapters import backbones
from tokenprune_adapters.backbones.openvla_oft.backbone import OpenVLAOFT

TOKENIZER = Path(backbones.__file__).parents[1] / "assets" / "tokenizer.json"
DINO, SIGLIP = "vision_backbone.featurizer", "vision_backbone.fused_featurizer"
LLAMA = "language_model.model"

BLOCK = (
    "norm1.weight", "norm1.bias", "attn.qkv.weight", "attn.qkv.bias", "attn.proj.weight", "attn.proj.bias",
    "norm2.weight", "norm2.bias", "mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight", "mlp.fc2.bias",
)  # fmt: skip

LAYER_SCALE = ("ls1.scale_factor", "ls2.scale_factor")

LAYER = (
    "input_layernorm.weight", "self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight",
    "self_attn.o_proj.weight", "post_attention_layernorm.weight", "mlp.gate_proj.weight", "mlp.up_proj.weight",
    "mlp.down_proj.weight",
)  # fmt: skip

HEAD = (
    "model.layer_norm1.weight", "model.layer_norm1.bias", "model.fc1.weight", "model.fc1.bias",
    "model.mlp_resnet_blocks.0.ffn.0.weight", "model.mlp_resnet_blocks.0.ffn.0.bias",
    "model.mlp_resnet_blocks.0.ffn.1.weight", "model.mlp_resnet_blocks.0.ffn.1.bias",
    "model.mlp_resnet_blocks.1.ffn.0.weight", "model.mlp_resnet_blocks.1.ffn.0.bias",
    "model.mlp_resnet_blocks.1.ffn.1.weight", "model.mlp_resnet_blocks.1.ffn.1.bias",
    "model.layer_norm2.weight", "model.layer_norm2.bias", "model.fc2.weight", "model.fc2.bias",
)  # fmt: skip

PROPRIO = ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")

POOL = (
    "latent", "q.weight", "q.bias", "kv.weight", "kv.bias", "proj.weight", "proj.bias", "norm.weight", "norm.bias",
    "mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight", "mlp.fc2.bias",
)  # fmt: skip

# Towers of three blocks are read after the second, number 1; the decoder has three layers.
BODY_KEYS = (
    f"{DINO}.cls_token", f"{DINO}.reg_token", f"{DINO}.pos_embed",
    f"{DINO}.patch_embed.proj.weight", f"{DINO}.patch_embed.proj.bias",
    *(f"{DINO}.blocks.{n}.{name}" for n in (0, 1) for name in (*BLOCK, *LAYER_SCALE)),
    f"{SIGLIP}.pos_embed", f"{SIGLIP}.patch_embed.proj.weight", f"{SIGLIP}.patch_embed.proj.bias",
    *(f"{SIGLIP}.blocks.{n}.{name}" for n in (0, 1) for name in BLOCK),
    *(f"projector.fc{n}.{kind}" for n in (1, 2, 3) for kind in ("weight", "bias")),
    f"{LLAMA}.embed_tokens.weight", f"{LLAMA}.norm.weight",
    *(f"{LLAMA}.layers.{n}.{name}" for n in (0, 1, 2) for name in LAYER),
)  # fmt: skip

UNUSED_KEYS = (
    "language_model.lm_head.weight",
    *(f"{DINO}.blocks.2.{name}" for name in (*BLOCK, *LAYER_SCALE)),
    *(f"{SIGLIP}.blocks.2.{name}" for name in BLOCK),
    *(f"{tower}.norm.{kind}" for tower in (DINO, SIGLIP) for kind in ("weight", "bias")),
    *(f"{SIGLIP}.attn_pool.{name}" for name in POOL),
)

CONFIG: dict[str, Any] = {
    "architectures": ["OpenVLAForActionPrediction"],
    "arch_specifier": "no-align+fused-gelu-mlp",
    "auto_map": {
        "AutoConfig": "configuration_prismatic.OpenVLAConfig",
        "AutoModelForVision2Seq": "modeling_prismatic.OpenVLAForActionPrediction",
    },
    "image_resize_strategy": "resize-naive",
    "image_sizes": [56, 56],
    "llm_backbone_id": "llama2-7b-pure",
    "model_type": "openvla",
    "n_action_bins": 256,
    "norm_stats": {},
    "pad_to_multiple_of": 64,
    "pad_token_id": 32000,
    "text_config": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "max_position_embeddings": 512,
        "model_type": "llama",
        "num_attention_heads": 4,
        "num_hidden_layers": 3,
        "num_key_value_heads": 2,
        "pad_token_id": 32000,
        "torch_dtype": "bfloat16",
        "vocab_size": 2048,
    },
    "timm_model_ids": ["vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_224"],
    "timm_override_act_layers": [None, None],
    "timm_override_args": [
        {"embed_dim": 24, "depth": 3, "num_heads": 3, "mlp_ratio": 1.6667, "patch_size": 14},
        {"embed_dim": 16, "depth": 3, "num_heads": 2, "mlp_ratio": 2.5, "reg_tokens": 0},
    ],
    "torch_dtype": "bfloat16",
    "use_fused_vision_backbone": True,
    "vision_backbone_id": "dinosiglip-vit-so-224px",
}

PREPROCESSOR: dict[str, Any] = {
    "image_processor_type": "PrismaticImageProcessor",
    "image_resize_strategy": "resize-naive",
    "input_sizes": [[3, 56, 56], [3, 56, 56]],
    "interpolations": ["bicubic", "bicubic"],
    "tvf_do_letterbox": False,
    "tvf_normalize_params": [
        {"inplace": False, "mean": [0.484375, 0.455078125, 0.40625], "std": [0.228515625, 0.2236328125, 0.224609375]},
        {"inplace": False, "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]},
    ],
    "tvf_resize_params": [
        {"antialias": True, "interpolation": 3, "max_size": None, "size": [56, 56]},
        {"antialias": True, "interpolation": 3, "max_size": None, "size": [56, 56]},
    ],
    "use_fused_vision_backbone": True,
}


def statistics(backbone: OpenVLAOFT) -> dict[str, Any]:
    """`dataset_statistics.json`; as in the releases, only the actions have a mask."""
    action, state = backbone.statistics.action, backbone.statistics.state
    entry = {"action": {"q01": action.low.tolist(), "q99": action.high.tolist(), "mask": action.mask.tolist()}}
    if state is not None:
        entry["proprio"] = {"q01": state.low.tolist(), "q99": state.high.tolist()}
    return {"libero_spatial_no_noops": {**entry, "num_trajectories": 432, "num_transitions": 52970}}


def tensors(backbone: OpenVLAOFT, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """What the safetensors, the head's and the projector's file hold."""
    model, generator = backbone.model, torch.Generator().manual_seed(7)
    body = {key: model.get_parameter(key) for key in BODY_KEYS}
    for key in UNUSED_KEYS:
        like = key.replace(".blocks.2.", ".blocks.0.")
        shape = body[like].shape if like in body else torch.Size([3, 5])
        body[key] = torch.randn(shape, generator=generator)
    head = {key: model.get_parameter(f"action_head.{key}") for key in HEAD}
    has_state = backbone.config.state_size is not None
    proprio = {key: model.get_parameter(f"proprio_projector.{key}") for key in PROPRIO if has_state}
    body, head, proprio = (
        {key: value.detach().to(dtype).clone() for key, value in part.items()} for part in (body, head, proprio)
    )
    return body, head, proprio


def write_release(
    folder: Path,
    backbone: OpenVLAOFT,
    dtype: torch.dtype = torch.float32,
    shards: int = 0,
    prefix: str = "module.",
    config: dict[str, Any] = CONFIG,
) -> Path:
    """Write a backbone as a release: sharded unless `shards` is 0, `.pt` keys behind `prefix`."""
    folder.mkdir(parents=True)
    body, head, proprio = tensors(backbone, dtype)
    if shards:
        keys = sorted(body)
        numbers = {key: 1 + at * shards // len(keys) for at, key in enumerate(keys)}
        names = {key: f"model-{number:05}-of-{shards:05}.safetensors" for key, number in numbers.items()}
        for name in sorted(set(names.values())):
            save_file({key: body[key] for key in keys if names[key] == name}, folder / name, metadata={"format": "pt"})
        index = {"metadata": {"total_size": sum(t.nbytes for t in body.values())}, "weight_map": names}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        save_file(body, folder / "model.safetensors", metadata={"format": "pt"})
    torch.save({prefix + key: value for key, value in head.items()}, folder / "action_head--150000_checkpoint.pt")
    if proprio:
        file = folder / "proprio_projector--150000_checkpoint.pt"
        torch.save({prefix + key: value for key, value in proprio.items()}, file)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    (folder / "dataset_statistics.json").write_text(json.dumps(statistics(backbone)))
    shutil.copy(TOKENIZER, folder / "tokenizer.json")
    (folder / "lora_adapter").mkdir()
    (folder / "lora_adapter" / "adapter_model.safetensors").write_bytes(b"not read")
    return folder
