"""pi0 against transformers' own: features, keys and values of the prefix, and actions from the same noise."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from transformers import PI0Config as HFConfig
from transformers import PI0ForConditionalGeneration

from tests.helpers.tiny_pi0 import (
    HORIZON,
    INSTRUCTION,
    VIEWS,
    noise_for,
    observation,
    query,
    tiny_backbone,
    tiny_config,
)
from tokenprune.model.kv_cache import KVCache
from tokenprune_adapters.backbones.pi0 import backbone as adapter
from tokenprune_adapters.backbones.pi0.backbone import PI0

VOCAB, IMAGE, PAD = 700, 699, 0
GEMMA = {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 8}
TOWER = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40}


def peer(seed: int = 0) -> PI0ForConditionalGeneration:
    """transformers' pi0 in float64, every parameter random."""
    text = {"model_type": "gemma", "hidden_size": 32, "intermediate_size": 64, "vocab_size": VOCAB, **GEMMA}
    vision = {
        "model_type": "siglip_vision_model",
        "image_size": 56,
        "patch_size": 14,
        "vision_use_head": False,
        **TOWER,
    }
    vlm = {
        "model_type": "paligemma", "text_config": text, "vision_config": vision,
        "projection_dim": 32, "image_token_id": IMAGE,
    }  # fmt: skip
    dit = {"model_type": "gemma", "hidden_size": 16, "intermediate_size": 32, **GEMMA}
    made = PI0ForConditionalGeneration(HFConfig(vlm_config=vlm, dit_config=dit, chunk_size=HORIZON)).eval().double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            size = 0.3 if parameter.dim() < 2 or "embed" in name else 1.5 * parameter[0].numel() ** -0.5
            parameter.copy_(size * torch.randn(parameter.shape, generator=generator))
    # Built as a float32 number, which would set a limit to the comparison.
    made.model.vlm.language_model.embed_tokens.embed_scale = torch.tensor(32**0.5, dtype=torch.float64)
    return made


def same(model: PI0ForConditionalGeneration, views: tuple[str, ...] = VIEWS[:2]) -> PI0:
    """A backbone with the peer's weights."""
    config = replace(tiny_config("pi0", views), vocab=VOCAB)
    made = tiny_backbone(config, exact=False)
    vlm = model.model.vlm
    # Before transformers 5.8 the tower is wrapped once more.
    tower = getattr(vlm.vision_tower, "vision_model", vlm.vision_tower)
    weights = {
        "vision.patch_embed.proj": tower.embeddings.patch_embedding,
        "vision.norm": tower.post_layernorm,
        "projector": vlm.multi_modal_projector.linear,
        "language.embed_tokens": vlm.language_model.embed_tokens,
        "language.norm": vlm.language_model.norm,
        "language.layers": vlm.language_model.layers,
        "expert.norm": model.model.dit.norm,
        "expert.layers": model.model.dit.layers,
        "action_out_proj": model.action_out_proj,
    }
    for name in ("state_proj", "action_in_proj", "action_time_mlp_in", "action_time_mlp_out"):
        weights[name] = getattr(model.embed_action_time, name)
    for number, layer in enumerate(tower.encoder.layers):
        block, attention = f"vision.blocks.{number}", layer.self_attn
        weights |= {f"{block}.norm1": layer.layer_norm1, f"{block}.norm2": layer.layer_norm2}
        weights |= {f"{block}.mlp.fc1": layer.mlp.fc1, f"{block}.mlp.fc2": layer.mlp.fc2}
        weights |= {f"{block}.attn.{part}_proj": getattr(attention, f"{part}_proj") for part in "qkv"}
        weights[f"{block}.attn.proj"] = attention.out_proj
    state = {f"{ours}.{key}": value for ours, part in weights.items() for key, value in part.state_dict().items()}
    state["vision.pos_embed"] = tower.embeddings.position_embedding.weight[None]
    made.model.load_state_dict(state)
    return made


def inputs(backbone: PI0, obs: dict[str, Any], slots: tuple[str | None, ...], pads: int) -> dict[str, Tensor]:
    """What transformers' processor would make, with empty slots and pads; an empty slot has no tokens."""
    config, ids = backbone.config, backbone.prompt(INSTRUCTION).ids
    black = torch.full((1, 3, 56, 56), -1.0, dtype=torch.float64)
    images = []
    for view in slots:
        pixels = None if view is None else config.transform.cropped(obs["images"][view])[None]
        images.append(black if pixels is None else config.transform.normalise(pixels, 0, torch.float64))
    patches = 16 * sum(view is not None for view in slots)
    tokens = [IMAGE] * patches + list(ids) + [PAD] * pads
    state = torch.zeros(1, 32, dtype=torch.float64)
    state[0, :8] = torch.from_numpy((obs["state"] - backbone.statistics.state.mean) / backbone.statistics.state.std)
    return {
        "state": state,
        "input_ids": torch.tensor([tokens]),
        "pixel_values": torch.stack(images, dim=1),
        "attention_mask": torch.tensor([[1] * (patches + len(ids)) + [0] * pads]),
        "pixel_attention_mask": torch.tensor([[view is not None for view in slots]]),
    }


def sharpen(model: PI0ForConditionalGeneration) -> None:
    """Give the time embedding the precision that openpi and lerobot compute it with."""
    embedding = model.embed_action_time.sinusoid_embeds
    periods = [4e-3 * 1000 ** (i / 7) for i in range(8)]
    embedding.sinusoid_freq = torch.tensor([2 * math.pi / period for period in periods], dtype=torch.float64)


def unpadded(backbone: PI0) -> PI0:
    """transformers' statistics would have no epsilon here."""
    state = replace(backbone.statistics.state, epsilon=0.0)
    backbone.statistics = replace(backbone.statistics, state=state)
    return backbone


def sampled(model: PI0ForConditionalGeneration, given: dict[str, Tensor], noise: Tensor) -> Tensor:
    with torch.no_grad():
        return model.sample_actions(noise=noise.double()[None], **given)[0, :, :7]


def test_features_of_the_tower() -> None:
    model = peer()
    backbone = same(model)
    pixels = torch.rand(2, 3, 56, 56, dtype=torch.float64) * 2 - 1
    expected = model.model.vlm.get_image_features(pixels).pooler_output
    found = backbone.model.projector(backbone.model.vision(pixels))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("pads", [0, 5])
def test_keys_and_values_of_the_prefix(pads: int) -> None:
    model = peer()
    backbone = unpadded(same(model))
    obs = observation(backbone.config)
    given = inputs(backbone, obs, VIEWS[:2], pads)
    caches = []

    def noted() -> KVCache:
        caches.append(KVCache())
        return caches[-1]

    with patch.object(adapter, "KVCache", noted):
        query(backbone, obs, noise_for(backbone.config))
    with torch.no_grad():
        mask = given["attention_mask"]
        embeddings = model.model.embed_prefix(
            *(given[k] for k in ("input_ids", "pixel_values", "pixel_attention_mask"))
        )
        expected = model.model.vlm(
            inputs_embeds=embeddings, attention_mask=mask, position_ids=mask.cumsum(-1) - 1,
            token_type_ids=torch.zeros_like(mask), use_cache=True,
        ).past_key_values  # fmt: skip
    length = int(mask.sum())
    assert len(caches[0].layers) == len(expected.layers) == 3
    for ours, theirs in zip(caches[0].layers, expected.layers, strict=True):
        # The state token stands behind the prefix.
        assert ours.ids.tolist() == [list(range(length + 1))]
        torch.testing.assert_close(ours.k[:, :, :length], theirs.keys[:, :, :length], rtol=0, atol=1e-6)
        torch.testing.assert_close(ours.v[:, :, :length], theirs.values[:, :, :length], rtol=0, atol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_actions_from_the_same_noise(seed: int) -> None:
    model = peer(seed)
    backbone = unpadded(same(model))
    obs, noise = observation(backbone.config, seed), noise_for(backbone.config, seed)
    found, given = query(backbone, obs, noise), inputs(backbone, obs, VIEWS[:2], 0)
    assert (found - noise[:, :7]).abs().mean() > 0.1
    coarse = sampled(model, given, noise)
    torch.testing.assert_close(found, coarse, rtol=0, atol=5e-4)
    sharpen(model)
    torch.testing.assert_close(found, sampled(model, given, noise), rtol=0, atol=1e-6)


@pytest.mark.parametrize("slots", [("primary", None, None), ("primary", "wrist", None), (None, "wrist", "left")])
def test_pads_and_empty_slots_change_nothing(slots: tuple[str | None, ...]) -> None:
    model = peer()
    sharpen(model)
    backbone = unpadded(same(model, tuple(view for view in slots if view is not None)))
    obs, noise = observation(backbone.config), noise_for(backbone.config)
    given = inputs(backbone, obs, slots, pads=48 - len(backbone.prompt(INSTRUCTION).ids))
    torch.testing.assert_close(query(backbone, obs, noise), sampled(model, given, noise), rtol=0, atol=1e-6)


def test_the_coarse_time_embedding_of_the_peer_shows() -> None:
    model = peer()
    backbone = unpadded(same(model))
    obs, noise = observation(backbone.config), noise_for(backbone.config)
    difference = query(backbone, obs, noise) - sampled(model, inputs(backbone, obs, VIEWS[:2], 0), noise)
    assert difference.abs().max() > 1e-6
