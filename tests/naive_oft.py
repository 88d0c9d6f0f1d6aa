"""OpenVLA-OFT as a specification, written out token by token; shares no decoder or layout code with the adapter."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tokenprune_adapters.backbones.openvla_oft.backbone import OpenVLAOFT


@dataclass(frozen=True)
class Spec:
    """The specification; each field away from its default is one known trap."""

    eps: float = 1e-6
    causal: bool = False
    readout_shift: int = 1
    stop_token: bool = True
    zero_placeholders: bool = True
    dino_first: bool = True
    bos_first: bool = True
    empty_token: bool = True
    proprio_last: bool = False


def naive_actions(
    backbone: OpenVLAOFT,
    obs: dict[str, Any],
    instruction: str,
    spec: Spec = Spec(),
    kept: dict[int, set[int]] | None = None,
) -> torch.Tensor:
    """Normalised actions `[T, D]` by explicit loops over tokens, heads and layers.

    `kept` maps the layer a cut follows (-1 before layer 0) to the original ids that stay; tokens that left are not
    removed here but masked as keys of every later layer.
    """
    weights = backbone.model.state_dict()
    config = backbone.config
    sequence: list[torch.Tensor] = []

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        y = x @ weights[f"{name}.weight"].T
        return y + weights[f"{name}.bias"] if f"{name}.bias" in weights else y

    def layer_norm(name: str, x: torch.Tensor) -> torch.Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return (
            centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weights[f"{name}.weight"]
            + weights[f"{name}.bias"]
        )

    def gelu(x: torch.Tensor) -> torch.Tensor:
        return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))

    table = weights["language_model.model.embed_tokens.weight"]
    bos, eos = table[1], table[2]
    patches = []
    for view in config.views:
        pixels = config.transform.cropped(obs["images"][view])[None]
        dino = backbone.model.vision_backbone.featurizer(config.transform.normalise(pixels, 0, torch.float64))[0]
        siglip = backbone.model.vision_backbone.fused_featurizer(config.transform.normalise(pixels, 1, torch.float64))[
            0
        ]
        pair = [dino, siglip] if spec.dino_first else [siglip, dino]
        x = torch.cat(pair, dim=-1)
        patches += list(linear("projector.fc3", gelu(linear("projector.fc2", gelu(linear("projector.fc1", x))))))
    sequence += [bos, *patches] if spec.bos_first else [*patches, bos]

    proprio = []
    if config.state_size is not None:
        bounds = backbone.statistics.state
        state = np.clip(2 * (obs["state"] - bounds.low) / (bounds.high - bounds.low + 1e-8) - 1, -1, 1)
        proprio = [linear("proprio_projector.fc2", gelu(linear("proprio_projector.fc1", torch.from_numpy(state))))]

    tokenizer = backbone.tokenizer
    ids = list(tokenizer.encode(instruction).ids)
    assert ids[-1] == tokenizer.empty_id
    if not spec.empty_token:
        ids.pop()
    text = [table[i] for i in ids]
    sequence += [*text, *proprio] if spec.proprio_last else [*proprio, *text]
    first = len(sequence)
    for _ in range(56):
        sequence.append(torch.zeros(table.shape[1], dtype=table.dtype) if spec.zero_placeholders else table[1])
    if spec.stop_token:
        sequence.append(eos)

    x = torch.stack(sequence)
    alive = set(range(len(sequence)))
    for layer in range(config.body.decoder.depth):
        alive = alive & (kept or {}).get(layer - 1, alive)
        gone = sorted(set(range(len(sequence))) - alive)
        x = naive_layer(weights, f"language_model.model.layers.{layer}", x, config, spec, gone)
    x = naive_rms(x, weights["language_model.model.norm.weight"], spec.eps)

    states = x[first - spec.readout_shift : first - spec.readout_shift + 56]
    h = torch.stack([torch.cat(list(states[7 * step : 7 * step + 7])) for step in range(8)])
    h = torch.relu(linear("action_head.model.fc1", layer_norm("action_head.model.layer_norm1", h)))
    for block in range(2):
        name = f"action_head.model.mlp_resnet_blocks.{block}.ffn"
        h = h + torch.relu(linear(f"{name}.1", layer_norm(f"{name}.0", h)))
    return linear("action_head.model.fc2", layer_norm("action_head.model.layer_norm2", h))


def naive_rms(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Llama's norm is taken in float32 in every implementation; the specification follows."""
    narrow = x.float()
    return weight * (narrow * torch.rsqrt(narrow.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def naive_layer(
    weights: dict[str, torch.Tensor], name: str, x: torch.Tensor, config: Any, spec: Spec, gone: list[int]
) -> torch.Tensor:
    shape = config.body.decoder
    normed = naive_rms(x, weights[f"{name}.input_layernorm.weight"], spec.eps)
    q, k, v = (normed @ weights[f"{name}.self_attn.{part}_proj.weight"].T for part in "qkv")
    n, dim = len(x), shape.head_dim
    outputs = []
    for head in range(shape.heads):
        group = head // (shape.heads // shape.kv_heads)
        qh = naive_rope(q[:, head * dim : (head + 1) * dim])
        kh = naive_rope(k[:, group * dim : (group + 1) * dim])
        logits = qh @ kh.T / math.sqrt(dim)
        if spec.causal:
            logits = logits + torch.full((n, n), -torch.inf, dtype=x.dtype).triu(1)
        logits[:, gone] = -torch.inf
        outputs.append(torch.softmax(logits, dim=-1) @ v[:, group * dim : (group + 1) * dim])
    x = x + torch.cat(outputs, dim=-1) @ weights[f"{name}.self_attn.o_proj.weight"].T
    normed = naive_rms(x, weights[f"{name}.post_attention_layernorm.weight"], spec.eps)
    gate = normed @ weights[f"{name}.mlp.gate_proj.weight"].T
    up = normed @ weights[f"{name}.mlp.up_proj.weight"].T
    return x + (gate / (1 + torch.exp(-gate)) * up) @ weights[f"{name}.mlp.down_proj.weight"].T


def naive_rope(x: torch.Tensor) -> torch.Tensor:
    """Rotate pairs (i, i + d/2) of row p by p * 10000^(-2i/d)."""
    out = x.clone()
    n, dim = x.shape
    for i in range(dim // 2):
        # The frequencies are float32 in every implementation; the specification follows.
        frequency = torch.tensor(1.0) / torch.tensor(10000.0) ** (torch.tensor(2.0 * i) / dim)
        angle = torch.arange(n, dtype=torch.float32) * frequency
        cos, sin = angle.cos().double(), angle.sin().double()
        out[:, i] = x[:, i] * cos - x[:, i + dim // 2] * sin
        out[:, i + dim // 2] = x[:, i + dim // 2] * cos + x[:, i] * sin
    return out
