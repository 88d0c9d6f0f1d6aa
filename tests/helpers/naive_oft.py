"""OpenVLA-OFT as a specification, written out token by token; shares no decoder or layout code with the adapter."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from tokenprune_adapters.backbones.openvla_oft.backbone import OpenVLAOFT

Weights = dict[str, torch.Tensor]


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
    # Of the diffusion head.
    timestep: str | None = "after proprio"
    noisy_placeholders: bool = True
    clipped: bool = True
    ascending: bool = False
    # Of discrete tokens.
    padding: int = 64
    # Of FiLM.
    film_bos: bool = True
    film_stop: bool = True
    film_placeholders: bool = False
    film_place: str = "between"
    film_one: bool = True


def naive_actions(
    backbone: OpenVLAOFT,
    obs: dict[str, Any],
    instruction: str,
    spec: Spec = Spec(),
    kept: dict[int, set[int]] | None = None,
    noise: torch.Tensor | None = None,
) -> torch.Tensor:
    """Normalised actions `[T, D]` by explicit loops over tokens, heads and layers.

    `kept` maps the layer a cut follows (-1 before layer 0) to the original ids that stay; tokens that left are not
    removed here but masked as keys of every later layer. `noise` `[T, D]` is what a diffusion head begins with.
    """
    weights = backbone.model.state_dict()
    config = backbone.config
    horizon, dims = config.action.horizon, config.action.dims
    table = weights["language_model.model.embed_tokens.weight"]
    bos, eos = table[1], table[2]

    tokenizer = backbone.tokenizer
    ids = list(tokenizer.encode(instruction).ids)
    assert ids[-1] == tokenizer.empty_id
    if not spec.empty_token:
        ids.pop()
    text = [table[i] for i in ids]

    words = [*text]
    if spec.film_bos:
        words.insert(0, bos)
    if spec.film_placeholders:
        words += [table[1]] * (horizon * dims)
    if spec.film_stop:
        words.append(eos)
    heard = sum(words) / len(words)

    patches = []
    for view in config.views:
        pixels = config.transform.cropped(obs["images"][view])[None]
        features = []
        for number, name in enumerate(("featurizer", "fused_featurizer")[: len(config.body.towers)]):
            image = config.transform.normalise(pixels, number, torch.float64)[0]
            tower = f"vision_backbone.{name}"
            features.append(naive_tower(weights, tower, config.body.towers[number], image, heard, spec))
        x = torch.cat(features if spec.dino_first else features[::-1], dim=-1)
        x = naive_linear(weights, "projector.fc2", naive_gelu(naive_linear(weights, "projector.fc1", x)))
        if len(features) == 2:
            x = naive_linear(weights, "projector.fc3", naive_gelu(x))
        patches += list(x)

    proprio = []
    if config.state_size is not None:
        bounds = backbone.statistics.state
        state = np.clip(2 * (obs["state"] - bounds.low) / (bounds.high - bounds.low + 1e-8) - 1, -1, 1)
        hidden = naive_gelu(naive_linear(weights, "proprio_projector.fc1", torch.from_numpy(state)))
        proprio = [naive_linear(weights, "proprio_projector.fc2", hidden)]

    def states(placeholders: list[torch.Tensor], timestep: torch.Tensor | None = None) -> torch.Tensor:
        """Hidden states of the rows where the chunk is read, after one pass of the decoder."""
        image = [bos, *patches] if spec.bos_first else [*patches, bos]
        time = [] if timestep is None else [timestep]
        before = time if spec.timestep == "before proprio" else []
        after = time if spec.timestep == "after proprio" else []
        behind = time if spec.timestep == "after the prompt" else []
        state = [*before, *proprio, *after]
        sequence = [*image, *text, *state] if spec.proprio_last else [*image, *state, *text, *behind]
        first = len(sequence)
        sequence += placeholders
        if spec.stop_token:
            sequence.append(eos)
        x = torch.stack(sequence)
        alive = set(range(len(sequence)))
        for layer in range(config.body.decoder.depth):
            alive = alive & (kept or {}).get(layer - 1, alive)
            gone = sorted(set(range(len(sequence))) - alive)
            x = naive_layer(weights, f"language_model.model.layers.{layer}", x, config, spec, gone)
        x = naive_rms(x, weights["language_model.model.norm.weight"], spec.eps)
        return x[first - spec.readout_shift : first - spec.readout_shift + horizon * dims]

    blank = torch.zeros(table.shape[1], dtype=table.dtype) if spec.zero_placeholders else table[1]
    if config.head == "l1":
        return naive_mlp(weights, "action_head.model", states([blank] * (horizon * dims)), horizon, dims)

    if config.head == "discrete":
        actions = []
        for state in states([blank] * (horizon * dims)):
            scores = weights["language_model.lm_head.weight"] @ state
            n_tokens = len(scores) - spec.padding
            candidates = range(n_tokens - 256, n_tokens) if config.restrict else range(len(scores))
            token = candidates[int(scores[candidates.start : candidates.stop].argmax())]
            place = min(max(n_tokens - token - 1, 0), 254)
            actions.append(-1 + (2 * place + 1) / 255)
        return torch.tensor(actions, dtype=torch.float64).view(horizon, dims)

    sample = noise.double()
    left = naive_signal(50)
    stride = 50 // config.steps
    timesteps = [stride * step for step in reversed(range(config.steps))]
    for at, t in enumerate(timesteps[::-1] if spec.ascending else timesteps):
        hidden = [
            naive_gelu(naive_linear(weights, "noisy_action_projector.fc1", number[None])) for number in sample.flatten()
        ]
        chunk = [naive_linear(weights, "noisy_action_projector.fc2", h) for h in hidden]
        if not spec.noisy_placeholders:
            chunk = [blank] * len(chunk)
        rows = states(chunk, None if spec.timestep is None else naive_time(t, table.shape[1]))
        noisy = naive_mlp(weights, "action_head.noise_predictor.mlp_resnet", rows, horizon, dims)
        clean = (sample - (1 - left[t]).sqrt() * noisy) / left[t].sqrt()
        if spec.clipped:
            clean = clean.clamp(-1, 1)
        later = left[timesteps[at + 1]] if at + 1 < len(timesteps) else torch.tensor(1.0)
        sample = later.sqrt() * clean + (1 - later).sqrt() * noisy
    return sample


def naive_linear(weights: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
    y = x @ weights[f"{name}.weight"].T
    return y + weights[f"{name}.bias"] if f"{name}.bias" in weights else y


def naive_gelu(x: torch.Tensor) -> torch.Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def naive_norm(weights: Weights, name: str, x: torch.Tensor, eps: float) -> torch.Tensor:
    centred = x - x.mean(-1, keepdim=True)
    spread = (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    return centred / spread * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def naive_mlp(weights: Weights, name: str, states: torch.Tensor, horizon: int, dims: int) -> torch.Tensor:
    """The residual MLP of the L1 and the diffusion head, `[horizon, dims]` of `[horizon * dims, D]`."""
    h = torch.stack([torch.cat(list(states[dims * step : dims * step + dims])) for step in range(horizon)])
    h = torch.relu(naive_linear(weights, f"{name}.fc1", naive_norm(weights, f"{name}.layer_norm1", h, 1e-5)))
    for block in range(2):
        ffn = f"{name}.mlp_resnet_blocks.{block}.ffn"
        h = h + torch.relu(naive_linear(weights, f"{ffn}.1", naive_norm(weights, f"{ffn}.0", h, 1e-5)))
    return naive_linear(weights, f"{name}.fc2", naive_norm(weights, f"{name}.layer_norm2", h, 1e-5))


def naive_signal(steps: int) -> torch.Tensor:
    """Share of signal left at each timestep under squared-cosine betas; float32 in every implementation."""
    bars = [math.cos((t / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(steps + 1)]
    betas = [min(1 - after / before, 0.999) for before, after in pairwise(bars)]
    return torch.cumprod(1 - torch.tensor(betas), 0)


def naive_time(t: int, width: int) -> torch.Tensor:
    """Sines, then cosines, of the timestep times falling frequencies; float32 in every implementation."""
    half = width // 2
    angles = torch.tensor(float(t)) * torch.exp(torch.arange(half) * -math.log(10000) / (half - 1))
    return torch.cat([angles.sin(), angles.cos()]).double()


def naive_tower(
    weights: Weights, name: str, config: Any, image: torch.Tensor, heard: torch.Tensor, spec: Spec
) -> torch.Tensor:
    """Patch features `[N, D]` of the second to last block, for an image `[3, S, S]` and what FiLM hears `[L]`."""
    size, width = config.patch_size, config.hidden_size // config.heads
    kernel = weights[f"{name}.patch_embed.proj.weight"].flatten(1)
    patches = []
    for row in range(0, config.image_size, size):
        for col in range(0, config.image_size, size):
            patches.append(kernel @ image[:, row : row + size, col : col + size].flatten())
    x = torch.stack(patches) + weights[f"{name}.patch_embed.proj.bias"] + weights[f"{name}.pos_embed"][0]
    prefix = [weights[f"{name}.{token}"][0] for token in ("cls_token", "reg_token") if f"{name}.{token}" in weights]
    x = torch.cat([*prefix, x])

    def scaled(part: str, y: torch.Tensor) -> torch.Tensor:
        return y * weights[f"{part}.scale_factor"] if f"{part}.scale_factor" in weights else y

    for n in range(config.depth - 1):
        block = f"{name}.blocks.{n}"

        def film(y: torch.Tensor, place: str, block: str = block) -> torch.Tensor:
            if f"{block}.scale.weight" not in weights or place != spec.film_place:
                return y
            scale, shift = (naive_linear(weights, f"{block}.{part}", heard) for part in ("scale", "shift"))
            return y * (scale + 1 if spec.film_one else scale) + shift

        x = film(x, "before")
        q, k, v = naive_linear(weights, f"{block}.attn.qkv", naive_norm(weights, f"{block}.norm1", x, 1e-6)).chunk(
            3, dim=-1
        )
        heads = []
        for head in range(config.heads):
            part = slice(head * width, head * width + width)
            heads.append(torch.softmax(q[:, part] @ k[:, part].T / math.sqrt(width), dim=-1) @ v[:, part])
        x = x + scaled(f"{block}.ls1", naive_linear(weights, f"{block}.attn.proj", torch.cat(heads, dim=-1)))
        x = film(x, "between")
        h = naive_gelu(naive_linear(weights, f"{block}.mlp.fc1", naive_norm(weights, f"{block}.norm2", x, 1e-6)))
        x = film(x + scaled(f"{block}.ls2", naive_linear(weights, f"{block}.mlp.fc2", h)), "after")
    return x[sum(map(len, prefix)) :]


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


@contextmanager
def entering(layer: Any) -> Iterator[list[torch.Tensor]]:
    """Inputs `[n, D]` of a decoder layer in the queries run meanwhile, first batch row."""
    seen: list[torch.Tensor] = []
    handle = layer.input_layernorm.register_forward_hook(lambda _module, given, _out: seen.append(given[0][0]))
    try:
        yield seen
    finally:
        handle.remove()


def attention_map(backbone: OpenVLAOFT, layer: int, inputs: torch.Tensor) -> torch.Tensor:
    """The whole attention map `[heads, n, n]` of a layer that no token left before, from its input `[n, D]`."""
    weights, shape = backbone.model.state_dict(), backbone.config.body.decoder
    name = f"language_model.model.layers.{layer}"
    normed, dim = naive_rms(inputs, weights[f"{name}.input_layernorm.weight"], 1e-6), shape.head_dim
    q, k = (normed @ weights[f"{name}.self_attn.{part}_proj.weight"].T for part in "qk")
    maps = []
    for head in range(shape.heads):
        group = head // (shape.heads // shape.kv_heads)
        logits = naive_rope(q[:, head * dim : (head + 1) * dim]) @ naive_rope(k[:, group * dim : (group + 1) * dim]).T
        maps.append(torch.softmax(logits / dim**0.5, dim=-1))
    return torch.stack(maps)
