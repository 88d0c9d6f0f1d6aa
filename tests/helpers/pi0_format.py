"""Writes a tiny pi0 or pi0.5 as openpi, lerobot and transformers would, with every key written out by hand."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from tokenprune.pipelines.config import DENSE
from tokenprune.policy import ActionChunk, Policy
from tokenprune.registry.discovery import Registry
from tokenprune_adapters import backbones
from tokenprune_adapters.backbones.pi0 import config_files
from tokenprune_adapters.backbones.pi0.backbone import PI0, PI0Setup
from tokenprune_adapters.backbones.pi0.config import TINY, PI0Config, Variant
from tokenprune_adapters.backbones.pi0.model import PI0Model
from tokenprune_adapters.backbones.pi0.prompt import GemmaTokenizer
from tokenprune_adapters.backbones.pi0.release import load_pi0
from tokenprune_adapters.inputs.statistics import Quantiles, Standard, Statistics
from tokenprune_adapters.weights.untrained import fill_untrained

TOKENIZER = Path(backbones.__file__).parents[1] / "assets" / "tokenizer.json"
WEIGHTS, CONFIG = "model.safetensors", "config.json"
INSTRUCTION = "put the bowl on the plate"
VARIANTS: tuple[Variant, ...] = ("pi0", "pi05")
SLOTS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
HORIZON, STEPS, DIMS, STATE = 4, 3, 7, 8
ASSET = "physical-intelligence/libero"
PALIGEMMA, EXPERT = "paligemma_with_expert.paligemma", "paligemma_with_expert.gemma_expert"
TOWER, LANGUAGE = f"{PALIGEMMA}.model.vision_tower", f"{PALIGEMMA}.model.language_model"
EMBEDDINGS, OUTPUT = f"{LANGUAGE}.embed_tokens.weight", f"{PALIGEMMA}.lm_head.weight"

# What follows the block's or layer's number: the file's name, and the model's.
BLOCK = {
    "layer_norm1.weight": "norm1.weight", "layer_norm1.bias": "norm1.bias",
    "self_attn.q_proj.weight": "attn.q_proj.weight", "self_attn.q_proj.bias": "attn.q_proj.bias",
    "self_attn.k_proj.weight": "attn.k_proj.weight", "self_attn.k_proj.bias": "attn.k_proj.bias",
    "self_attn.v_proj.weight": "attn.v_proj.weight", "self_attn.v_proj.bias": "attn.v_proj.bias",
    "self_attn.out_proj.weight": "attn.proj.weight", "self_attn.out_proj.bias": "attn.proj.bias",
    "layer_norm2.weight": "norm2.weight", "layer_norm2.bias": "norm2.bias",
    "mlp.fc1.weight": "mlp.fc1.weight", "mlp.fc1.bias": "mlp.fc1.bias",
    "mlp.fc2.weight": "mlp.fc2.weight", "mlp.fc2.bias": "mlp.fc2.bias",
}  # fmt: skip

LAYER = (
    "self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight", "self_attn.o_proj.weight",
    "mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight",
)  # fmt: skip

NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight")

ADAPTIVE_NORMS = (
    "input_layernorm.dense.weight", "input_layernorm.dense.bias",
    "post_attention_layernorm.dense.weight", "post_attention_layernorm.dense.bias",
)  # fmt: skip

# The tower has two blocks, the decoders have three layers.
VISION_NAMES = {
    f"{TOWER}.embeddings.patch_embedding.weight": "vision.patch_embed.proj.weight",
    f"{TOWER}.embeddings.patch_embedding.bias": "vision.patch_embed.proj.bias",
    f"{TOWER}.embeddings.position_embedding.weight": "vision.pos_embed",
    **{f"{TOWER}.encoder.layers.{n}.{k}": f"vision.blocks.{n}.{name}" for n in (0, 1) for k, name in BLOCK.items()},
    f"{TOWER}.post_layernorm.weight": "vision.norm.weight",
    f"{TOWER}.post_layernorm.bias": "vision.norm.bias",
}

PREFIX_NAMES = {
    f"{PALIGEMMA}.model.multi_modal_projector.linear.weight": "projector.weight",
    f"{PALIGEMMA}.model.multi_modal_projector.linear.bias": "projector.bias",
    EMBEDDINGS: "language.embed_tokens.weight",
    **{f"{LANGUAGE}.layers.{n}.{key}": f"language.layers.{n}.{key}" for n in (0, 1, 2) for key in (*LAYER, *NORMS)},
    f"{LANGUAGE}.norm.weight": "language.norm.weight",
}

EXPERT_NAMES: dict[Variant, dict[str, str]] = {
    "pi0": {
        **{f"{EXPERT}.model.layers.{n}.{key}": f"expert.layers.{n}.{key}" for n in (0, 1, 2) for key in LAYER},
        **{f"{EXPERT}.model.layers.{n}.{key}": f"expert.layers.{n}.{key}" for n in (0, 1, 2) for key in NORMS},
        f"{EXPERT}.model.norm.weight": "expert.norm.weight",
        **{
            f"{layer}.{kind}": f"{layer}.{kind}"
            for layer in (
                "state_proj",
                "action_in_proj",
                "action_out_proj",
                "action_time_mlp_in",
                "action_time_mlp_out",
            )
            for kind in ("weight", "bias")
        },
    },
    "pi05": {
        **{f"{EXPERT}.model.layers.{n}.{key}": f"expert.layers.{n}.{key}" for n in (0, 1, 2) for key in LAYER},
        **{f"{EXPERT}.model.layers.{n}.{key}": f"expert.layers.{n}.{key}" for n in (0, 1, 2) for key in ADAPTIVE_NORMS},
        f"{EXPERT}.model.norm.dense.weight": "expert.norm.dense.weight",
        f"{EXPERT}.model.norm.dense.bias": "expert.norm.dense.bias",
        **{
            f"{layer}.{kind}": f"{layer}.{kind}"
            for layer in ("action_in_proj", "action_out_proj", "time_mlp_in", "time_mlp_out")
            for kind in ("weight", "bias")
        },
    },
}


def names(variant: Variant) -> dict[str, str]:
    """openpi's name of each tensor, with the tower as newer transformers has it, to the model's."""
    return VISION_NAMES | PREFIX_NAMES | EXPERT_NAMES[variant]


def tiny_config(variant: Variant, views: tuple[str, ...] = SLOTS[:2]) -> PI0Config:
    """The preset `tiny` with a shorter chunk and fewer flow steps."""
    config = replace(TINY, variant=variant, views=views, steps=STEPS, action=replace(TINY.action, horizon=HORIZON))
    return config if variant == "pi0" else replace(config, prompt_state=STATE)


@cache
def tiny_pi0(
    variant: Variant,
    epsilon: float = 1e-6,
    dtype: torch.dtype = torch.float32,
    views: tuple[str, ...] = SLOTS[:2],
    seed: int = 0,
) -> PI0:
    """A policy whose every parameter matters; made once."""
    config = tiny_config(variant, views)
    with torch.device("meta"):
        model = PI0Model(config)
    fill_untrained(model, seed, torch.device("cpu"), dtype)
    model.rescale_untrained()
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(dtype))
    statistics = tiny_statistics(variant, epsilon)
    setup = PI0Setup(config, GemmaTokenizer.bundled(), statistics)
    return PI0(setup, model, config.info("tiny", untrained=True))


def tiny_statistics(variant: Variant, epsilon: float) -> Statistics:
    """Single-precision numbers that differ from each other, of the kind the release has."""
    low, high = (np.float32(ends).astype(np.float64) for ends in (np.linspace(-2, -0.3, STATE), np.linspace(0.5, 3, 8)))
    if variant == "pi05":
        return Statistics("tiny", Quantiles(low[:DIMS], high[:DIMS], epsilon), Quantiles(low, high, epsilon))
    return Statistics("tiny", Standard(low[:DIMS], high[:DIMS], epsilon), Standard(low, high, epsilon))


def observation(views: tuple[str, ...] = SLOTS[:2]) -> dict[str, Any]:
    """Random images and state."""
    rng = np.random.default_rng(3)
    images = {view: rng.integers(0, 256, (80, 100, 3), dtype=np.uint8) for view in views}
    return {"images": images, "state": rng.normal(size=STATE)}


def shrink_releases(monkeypatch: Any) -> None:
    """Let the releases' dimensions, which openpi's and lerobot's files only name, be the tiny ones."""
    monkeypatch.setattr(config_files, "BASE", TINY)
    monkeypatch.setattr(config_files, "_GEMMA", {"gemma_2b": TINY.decoder, "gemma_300m": TINY.expert})


def stored_dtype(key: str, precision: str) -> torch.dtype:
    """The type a tensor is stored in; `mixed` is as openpi keeps its models."""
    if precision != "mixed":
        return getattr(torch, precision)
    whole = "norm" in key or "embedding" in key
    return torch.float32 if whole else torch.bfloat16


def tensors(
    backbone: PI0, prefix: str = "", tower: str = "vision_model.", language: str = "", precision: str = "float32"
) -> dict[str, Tensor]:
    """What the weights' file holds, both word embeddings and output layers included."""
    state, generator = backbone.model.state_dict(), torch.Generator().manual_seed(5)
    found = {}
    for key, name in names(backbone.config.variant).items():
        values = state[name][0] if name == "vision.pos_embed" else state[name]
        spelled = key.replace("vision_tower.", f"vision_tower.{tower}")
        spelled = spelled.replace("language_model.", f"language_model.{language}")
        found[prefix + spelled] = values.to(stored_dtype(key, precision)).contiguous().clone()
    vocab, width = backbone.config.vocab, backbone.config.expert.hidden
    found[f"{prefix}{EXPERT}.lm_head.weight"] = torch.randn(vocab, width, generator=generator)
    found[f"{prefix}{OUTPUT}"] = state["language.embed_tokens.weight"].to(stored_dtype(OUTPUT, precision)).clone()
    return found


def write_weights(folder: Path, held: dict[str, Tensor], shards: int = 0) -> None:
    """One file, or several and their index."""
    folder.mkdir(parents=True, exist_ok=True)
    if not shards:
        save_file(held, folder / WEIGHTS, metadata={"format": "pt"})
        return
    keys = sorted(held)
    places = {key: f"model-{1 + at * shards // len(keys):05}-of-{shards:05}.safetensors" for at, key in enumerate(keys)}
    for name in sorted(set(places.values())):
        save_file({key: held[key] for key in keys if places[key] == name}, folder / name, metadata={"format": "pt"})
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def numbers(backbone: PI0, part: str, pad: int = 0) -> dict[str, list[float]]:
    """Statistics of one part under the names of files; those of the other kind are there too, and wrong."""
    found = getattr(backbone.statistics, part)
    own = ("q01", "q99") if backbone.config.variant == "pi05" else ("mean", "std")
    first, second = (found.low, found.high) if own[0] == "q01" else (found.mean, found.std)
    other = [9.0] * len(first)
    entries = {"mean": other, "std": other, "q01": other, "q99": other}
    entries |= {own[0]: first.tolist(), own[1]: second.tolist()}
    return {name: values + [0.0] * (pad - len(values)) for name, values in entries.items()}


def write_openpi(
    folder: Path, backbone: PI0, *, precision: str = "float32", shards: int = 0, asset: str = ASSET, pad: int = 0
) -> Path:
    """As openpi's conversion writes it, without the `config.json` that its training does not write."""
    held = tensors(backbone, precision=precision)
    # safetensors' save_model keeps of tied tensors the one whose name comes first.
    del held[EMBEDDINGS]
    write_weights(folder, held, shards)
    stats = {"state": numbers(backbone, "state", pad), "actions": numbers(backbone, "action", pad)}
    (folder / "assets" / asset).mkdir(parents=True)
    (folder / "assets" / asset / "norm_stats.json").write_text(json.dumps({"norm_stats": stats}))
    shutil.copy(TOKENIZER, folder)
    return folder


def write_lerobot(folder: Path, backbone: PI0, *, precision: str = "float32", shards: int = 0) -> Path:
    """As lerobot 0.6.1 writes it."""
    variant, config = backbone.config.variant, backbone.config
    write_weights(folder, tensors(backbone, "model.", precision=precision), shards)
    mode = "QUANTILES" if variant == "pi05" else "MEAN_STD"
    norm_map = {"VISUAL": "IDENTITY", "STATE": mode, "ACTION": mode}
    camera = {"type": "VISUAL", "shape": [3, 256, 256]}
    cameras = {f"observation.images.{view}": camera for view in config.views}
    features = {
        **cameras,
        "observation.images.empty_camera_0": {"type": "VISUAL", "shape": [3, 224, 224]},
        "observation.state": {"type": "STATE", "shape": [STATE]},
    }
    outputs = {"action": {"type": "ACTION", "shape": [DIMS]}}
    raw = {
        "type": variant, "n_obs_steps": 1, "input_features": features, "output_features": outputs, "device": "cuda",
        "use_amp": False, "push_to_hub": True, "paligemma_variant": "gemma_2b", "action_expert_variant": "gemma_300m",
        "dtype": "bfloat16", "chunk_size": HORIZON, "n_action_steps": HORIZON, "max_state_dim": config.width,
        "max_action_dim": config.width, "num_inference_steps": STEPS, "min_period": 0.004, "max_period": 4.0,
        "use_relative_actions": False, "rtc_config": None, "image_resolution": [56, 56], "empty_cameras": 1,
        "tokenizer_max_length": 48 if variant == "pi0" else 200, "normalization_mapping": norm_map,
        "compile_model": False, "use_peft": False,
    }  # fmt: skip
    (folder / CONFIG).write_text(json.dumps(raw, indent=4))
    norm = {"eps": 1e-8, "features": features | outputs, "norm_map": norm_map}
    stats = {
        f"{feature}.{name}": torch.tensor(values)
        for feature, part in (("observation.state", "state"), ("action", "action"))
        for name, values in numbers(backbone, part).items()
    }
    prompt = "pi05_prepare_state_tokenizer_processor_step" if variant == "pi05" else "pi0_new_line_processor"
    steps = {
        "policy_preprocessor": [
            ("rename_observations_processor", {"rename_map": {}}),
            ("to_batch_processor", {}),
            ("relative_actions_processor", {"enabled": False}),
            ("normalizer_processor", norm),
            (prompt, {}),
            ("tokenizer_processor", {"tokenizer_name": "google/paligemma-3b-pt-224"}),
            ("device_processor", {"device": "cuda"}),
        ],
        "policy_postprocessor": [
            ("unnormalizer_processor", norm),
            ("absolute_actions_processor", {"enabled": False}),
            ("device_processor", {"device": "cpu"}),
        ],
    }
    for name, kinds in steps.items():
        entries = []
        for at, (kind, settings) in enumerate(kinds):
            entries.append({"registry_name": kind, "config": settings})
            if "norm_map" in settings:
                entries[-1]["state_file"] = f"{name}_step_{at}_{kind}.safetensors"
                save_file(stats, folder / entries[-1]["state_file"])
        (folder / f"{name}.json").write_text(json.dumps({"name": name, "steps": entries}))
    shutil.copy(TOKENIZER, folder)
    return folder


def transformers_config(config: PI0Config) -> dict[str, Any]:
    """The fields of transformers' `config.json` that matter, and some that do not."""

    def gemma(shape: Any) -> dict[str, Any]:
        return {
            "model_type": "gemma", "hidden_size": shape.hidden, "num_hidden_layers": shape.depth,
            "intermediate_size": shape.mlp, "num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads,
            "head_dim": shape.head_dim, "vocab_size": config.vocab, "rms_norm_eps": 1e-06,
            "hidden_act": "gelu_pytorch_tanh", "attention_bias": False, "use_bidirectional_attention": True,
            "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        }  # fmt: skip

    tower = config.tower
    vision = {
        "model_type": "siglip_vision_model", "hidden_size": tower.hidden_size, "intermediate_size": tower.mlp_size,
        "num_hidden_layers": tower.depth, "num_attention_heads": tower.heads, "image_size": tower.image_size,
        "patch_size": tower.patch_size, "num_channels": 3, "layer_norm_eps": 1e-06, "vision_use_head": False,
        "hidden_act": "gelu_pytorch_tanh", "projection_dim": config.decoder.hidden,
    }  # fmt: skip
    vlm = {"model_type": "paligemma", "text_config": gemma(config.decoder), "vision_config": vision}
    vlm["projection_dim"] = config.decoder.hidden
    return {
        "architectures": ["PI0ForConditionalGeneration"], "model_type": "pi0", "chunk_size": HORIZON,
        "max_state_dim": config.width, "max_action_dim": config.width, "num_inference_steps": STEPS,
        "min_period": 0.004, "max_period": 4.0, "dit_config": gemma(config.expert), "vlm_config": vlm,
        "transformers_version": "5.23.0",
    }  # fmt: skip


def write_transformers(folder: Path, backbone: PI0, *, precision: str = "float32", shards: int = 0) -> Path:
    """As transformers 5.23 writes a pi0 that it built itself."""
    held = tensors(backbone, tower="", language="model.", precision=precision)
    del held[OUTPUT]
    write_weights(folder, held, shards)
    (folder / CONFIG).write_text(json.dumps(transformers_config(backbone.config)))
    shutil.copy(TOKENIZER, folder)
    return folder


# What no file of the formats states.
TRANSFORMERS = {"dims": DIMS, "state_size": STATE, "relative": 0, "views": list(SLOTS[:2])}
OPENPI = {**TRANSFORMERS, "horizon": HORIZON, "steps": STEPS}


def write_every(root: Path) -> dict[tuple[Variant, str], Path]:
    """One checkpoint of every variant and format."""
    folders: dict[tuple[Variant, str], Path] = {}
    folders["pi0", "transformers"] = write_transformers(root / "transformers", tiny_pi0("pi0"))
    for variant in VARIANTS:
        folders[variant, "openpi"] = write_openpi(root / f"{variant}-openpi", tiny_pi0(variant))
        folders[variant, "lerobot"] = write_lerobot(root / f"{variant}-lerobot", tiny_pi0(variant, 1e-8))
    return folders


def needed(kind: str) -> dict[str, Any]:
    """Options without which a format says too little."""
    return {"openpi": OPENPI, "lerobot": {}, "transformers": {**TRANSFORMERS, "statistics": "none"}}[kind]


def loaded(variant: Variant, folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> PI0:
    """A checkpoint, loaded."""
    return load_pi0(variant, folder, options, torch.device("cpu"), dtype)


def chunk(backbone: PI0, **changes: Any) -> ActionChunk:
    """The first query of an episode."""
    policy = Policy(backbone, DENSE, Registry())
    policy.reset(INSTRUCTION)
    return policy.act({**observation(backbone.config.views), **changes})


def actions(backbone: PI0) -> np.ndarray:
    """Its actions."""
    return chunk(backbone).actions


def same_weights(found: PI0, expected: PI0) -> None:
    """Every parameter has the expected values, cast to its type."""
    left, right = found.model.state_dict(), expected.model.state_dict()
    assert left.keys() == right.keys()
    assert [name for name, value in left.items() if not torch.equal(value, right[name].to(value.dtype))] == []
