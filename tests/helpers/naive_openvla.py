"""OpenVLA as a specification, written out token by token without a cache; shares no decoder or layout code."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokenprune.model.info import DecoderShape
from tokenprune_adapters.backbones.openvla.backbone import OpenVLA


@dataclass(frozen=True)
class Spec:
    """The specification; each field away from its default is one known trap."""

    eps: float = 1e-6
    dino_first: bool = True
    bos_first: bool = True
    empty_token: bool = True
    stop_token: bool = False
    sees_image: bool = True
    padding: int = 64
    clipped: bool = True
    passes_gripper: bool = True
    decodes_from: int | None = None
    """Position of the first action token, where it is not the length of the unpruned sequence."""


@dataclass
class Answer:
    """What a query gives.

    Attributes:
        ids: The action's seven tokens.
        hidden: What each was chosen from `[7, D]`.
        logits: Over all rows of the embedding table `[7, V]`.
        attention: Per layer, of the six action tokens that are fed back, to everything `[H, 6, N + 6]`.
        normalised: The action in [-1, 1] `[7]`.
        action: In the environment's units `[7]`.
    """

    ids: list[int]
    hidden: Tensor
    logits: Tensor
    attention: list[Tensor]
    normalised: list[float]
    action: list[float]


def naive_query(
    backbone: OpenVLA,
    obs: dict[str, Any],
    instruction: str,
    spec: Spec = Spec(),
    kept: dict[int, set[int]] | None = None,
) -> Answer:
    """The action by explicit loops: the whole sequence runs again for each of its seven tokens.

    `kept` maps the layer a cut follows (-1 before layer 0) to the original ids that stay; tokens that left are not
    removed here but masked as keys of every later layer.
    """
    weights = backbone.model.state_dict()
    shape = backbone.config.body.decoder
    table = weights["language_model.model.embed_tokens.weight"]
    sequence = naive_prompt(backbone, obs, instruction, spec)
    prompt = len(sequence)
    ids: list[int] = []
    hidden, logits, attention = [], [], []
    for _ in range(7):
        x = torch.stack([*sequence, *(table[i] for i in ids)])
        start = prompt if spec.decodes_from is None else spec.decodes_from
        positions = [*range(prompt), *range(start, start + len(ids))]
        alive = set(range(prompt))
        attention = []
        for layer in range(shape.depth):
            alive = alive & (kept or {}).get(layer - 1, alive)
            gone = [i for i in range(prompt) if i not in alive]
            x, weight = naive_layer(weights, f"language_model.model.layers.{layer}", shape, x, positions, gone, spec)
            attention.append(weight[:, prompt:])
        last = naive_rms(x, weights["language_model.model.norm.weight"], spec)[-1]
        scores = weights["language_model.lm_head.weight"] @ last
        hidden.append(last)
        logits.append(scores)
        actions = range(len(scores) - 64 - 256, len(scores) - 64)
        ids.append(max(actions if backbone.config.restrict else range(len(scores)), key=scores.tolist().__getitem__))
    normalised = [naive_centre(token, len(table) - spec.padding, spec.clipped) for token in ids]
    action = []
    bounds = backbone.statistics.action
    for value, low, high, scaled in zip(normalised, bounds.low, bounds.high, bounds.mask, strict=True):
        scaled = scaled or not spec.passes_gripper
        action.append((value + 1) / 2 * (high - low) + low if scaled else value)
    return Answer(ids, torch.stack(hidden), torch.stack(logits), attention, normalised, action)


def naive_centre(token: int, vocab: int, clipped: bool) -> float:
    """255 centres between 256 values from -1 to 1, counted from the last token down."""
    index = vocab - 1 - token
    if clipped:
        index = min(max(index, 0), 254)
    return -1 + (2 * index + 1) / 255


def naive_prompt(backbone: OpenVLA, obs: dict[str, Any], instruction: str, spec: Spec) -> list[Tensor]:
    """Embeddings of BOS, the patches and the prompt."""
    weights, config, tokenizer = backbone.model.state_dict(), backbone.config, backbone.tokenizer

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def gelu(x: Tensor) -> Tensor:
        return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))

    table = weights["language_model.model.embed_tokens.weight"]
    (image,) = obs["images"].values()
    pixels = config.transform.cropped(image)[None]
    vision, dtype = backbone.model.vision_backbone, table.dtype
    dino = vision.featurizer(config.transform.normalise(pixels, 0, dtype))[0]
    siglip = vision.fused_featurizer(config.transform.normalise(pixels, 1, dtype))[0]
    x = torch.cat([dino, siglip] if spec.dino_first else [siglip, dino], dim=-1)
    patches = list(linear("projector.fc3", gelu(linear("projector.fc2", gelu(linear("projector.fc1", x))))))
    if not spec.sees_image:
        patches = [torch.zeros_like(patch) for patch in patches]
    ids = list(tokenizer.encode(instruction, style=config.prompt).ids)
    assert ids[-1] == tokenizer.empty_id
    if not spec.empty_token:
        ids.pop()
    if spec.stop_token:
        ids.append(2)
    bos = table[1]
    return [*([bos, *patches] if spec.bos_first else [*patches, bos]), *(table[i] for i in ids)]


def naive_rms(x: Tensor, weight: Tensor, spec: Spec) -> Tensor:
    return weight * x / (x.pow(2).mean(-1, keepdim=True) + spec.eps).sqrt()


def naive_layer(
    weights: dict[str, Tensor], name: str, shape: DecoderShape, x: Tensor, positions: list[int], gone: list[int],
    spec: Spec,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """A layer's output, and its attention `[H, n, n]` under an n x n mask."""
    normed = naive_rms(x, weights[f"{name}.input_layernorm.weight"], spec)
    n, dim = len(x), shape.head_dim
    q, k, v = (
        (normed @ weights[f"{name}.self_attn.{part}_proj.weight"].T).reshape(n, -1, dim).transpose(0, 1)
        for part in "qkv"
    )
    q, k = naive_rope(q, positions), naive_rope(k, positions)
    mask = torch.full((n, n), -torch.inf, dtype=x.dtype).triu(1)
    mask[:, gone] = -torch.inf
    # A token that left still sees itself, so that its row stays finite; nobody reads it.
    mask.fill_diagonal_(0)
    outputs, weight = [], []
    for head in range(shape.heads):
        group = head // (shape.heads // shape.kv_heads)
        weight.append(torch.softmax(q[head] @ k[group].T / math.sqrt(dim) + mask, dim=-1))
        outputs.append(weight[-1] @ v[group])
    x = x + torch.cat(outputs, dim=-1) @ weights[f"{name}.self_attn.o_proj.weight"].T
    normed = naive_rms(x, weights[f"{name}.post_attention_layernorm.weight"], spec)
    gate = normed @ weights[f"{name}.mlp.gate_proj.weight"].T
    up = normed @ weights[f"{name}.mlp.up_proj.weight"].T
    return x + (gate / (1 + torch.exp(-gate)) * up) @ weights[f"{name}.mlp.down_proj.weight"].T, torch.stack(weight)


def naive_rope(x: Tensor, positions: list[int]) -> Tensor:
    """Rotate pairs (i, i + d/2) of row r of each head by positions[r] * 10000^(-2i/d)."""
    out = x.clone()
    half = x.shape[2] // 2
    at = torch.tensor(positions, dtype=torch.float32)
    for i in range(half):
        # The frequencies are float32 in every implementation; the specification follows.
        angle = at * (1 / torch.tensor(10000.0) ** (i / half))
        cos, sin = angle.cos().double(), angle.sin().double()
        out[:, :, i] = x[:, :, i] * cos - x[:, :, i + half] * sin
        out[:, :, i + half] = x[:, :, i + half] * cos + x[:, :, i] * sin
    return out
