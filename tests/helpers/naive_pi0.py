"""pi0 and pi0.5 as a specification: every slot and pad laid out, one mask over all tokens, everything again each step.

It has no cache and shares no decoder, layout, norm or tower code with the adapter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from tokenprune_adapters.backbones.pi0.backbone import PI0

SLOTS, PADS = 3, 4


@dataclass(frozen=True)
class Spec:
    """The specification; each field away from its default is one known trap, but for `norms` and `absent_slots`.

    In releases, norms are taken in float32.
    """

    scales_language: bool = True
    scales_images: bool = False
    suffix_begins: Literal["valid", "kept", "padded"] = "valid"
    pads_advance: bool = False
    exact_gelu: bool = False
    tower_norm: bool = True
    attention_gate: bool = True
    mlp_gate: bool = True
    final_norm_adapts: bool = True
    state_sees_actions: bool = False
    prefix_sees_state: bool = False
    causal_actions: bool = False
    nested: bool = True
    state_in_prompt: bool = True
    time: torch.dtype = torch.float64
    norms: torch.dtype = torch.float64
    absent_slots: int = 1


@dataclass
class Naive:
    """What the specification makes.

    Attributes:
        actions: Normalised `[T, width]`.
        attention: Of the action tokens, by layer `[H, T, N]` over all valid tokens, averaged over the steps.
    """

    actions: Tensor
    attention: dict[int, Tensor] = field(default_factory=dict)


def naive(
    backbone: PI0,
    obs: dict[str, Any],
    instruction: str,
    noise: Tensor,
    spec: Spec = Spec(),
    kept: Mapping[int, Set[int]] | None = None,
) -> Naive:
    """One query by explicit loops.

    `kept` maps the layer a cut follows (-1 before layer 0) to the ids of valid tokens that stay; tokens that left are
    masked as keys of every later layer, for the prefix and for whatever follows it.
    """
    model = _Model(backbone, spec)
    config = backbone.config
    tokens = _prefix(model, obs, instruction)
    suffix = config.action.horizon + (config.variant == "pi0")
    blocks = [0] * len(tokens) + [1] * (config.variant == "pi0") + [2] * config.action.horizon
    valid = [token is not None for token in tokens] + [True] * suffix
    rotation = rope_tables(_positions(valid, len(tokens), spec, kept), config.decoder.head_dim)
    ids = np.cumsum(valid) - 1
    masks: list[Tensor] = []
    for layer in range(config.decoder.depth):
        cut = layer == 0 or layer - 1 in (kept or {})
        masks.append(_mask(valid, blocks, ids, len(tokens), spec, kept or {}, layer) if cut else masks[-1])

    blank = torch.zeros(config.decoder.hidden, dtype=torch.float64)
    prefix = torch.stack([blank if token is None else token for token in tokens])
    state = _padded(_state(backbone, obs), config.width) if config.variant == "pi0" else None
    x, made = noise.double(), Naive(noise)
    for step in range(config.steps):
        embedded = model.time(step / config.steps)
        rows, condition = model.linear("action_in_proj", x), None
        if state is not None:
            both = torch.stack([torch.cat([row, embedded]) for row in rows])
            rows = model.linear("action_time_mlp_out", silu(model.linear("action_time_mlp_in", both)))
            rows = torch.cat([model.linear("state_proj", state)[None], rows])
        else:
            condition = silu(model.linear("time_mlp_out", silu(model.linear("time_mlp_in", embedded))))
        hidden, attention = model.decode(prefix, rows, rotation, masks, condition)
        x = x - model.linear("action_out_proj", hidden[-config.action.horizon :]) / config.steps
        for layer, weights in enumerate(attention):
            seen = weights[:, -config.action.horizon :][:, :, valid] / config.steps
            made.attention[layer] = made.attention.get(layer, 0) + seen
    made.actions = x
    return made


def _prefix(model: _Model, obs: dict[str, Any], instruction: str) -> list[Tensor | None]:
    """Embeddings in upstream's order; None for the tokens of an empty slot and for pads."""
    backbone, spec, config = model.backbone, model.spec, model.backbone.config
    tokens: list[Tensor | None] = []
    for view in config.views:
        tokens += list(model.tower((config.transform.cropped(obs["images"][view]).float() / 255 * 2 - 1).double()))
    rows, cols = config.tower.grid
    empty = max(0, min(spec.absent_slots, SLOTS - len(config.views)))
    tokens += [None] * (rows * cols * empty)
    spelled = None
    if config.prompt_state and spec.state_in_prompt:
        state = _state(backbone, obs)
        spelled = np.concatenate([state, np.zeros(config.prompt_state - len(state))])
    scale = math.sqrt(config.decoder.hidden) if spec.scales_language else 1.0
    table = model.weights["language.embed_tokens.weight"]
    tokens += [table[i] * scale for i in backbone.tokenizer.encode(instruction, 200, spelled).ids]
    return tokens + [None] * PADS


def _state(backbone: PI0, obs: dict[str, Any]) -> np.ndarray:
    statistics = backbone.statistics.state
    if backbone.config.variant == "pi0":
        return (obs["state"] - statistics.mean) / (statistics.std + 1e-6)
    return (obs["state"] - statistics.low) / (statistics.high - statistics.low + 1e-6) * 2 - 1


def _padded(values: np.ndarray, size: int) -> Tensor:
    return torch.from_numpy(np.concatenate([values, np.zeros(size - len(values))]))


def _positions(valid: list[bool], prefix: int, spec: Spec, kept: Mapping[int, Set[int]] | None) -> list[int]:
    """A token's position is the number of valid tokens before it."""
    at = list(range(len(valid))) if spec.pads_advance else [max(0, sum(valid[: i + 1]) - 1) for i in range(len(valid))]
    if spec.suffix_begins == "valid":
        return at
    first = prefix if spec.suffix_begins == "padded" else len(set.intersection(*map(set, (kept or {}).values())))
    return at[:prefix] + [first + i for i in range(len(valid) - prefix)]


def _mask(
    valid: list[bool],
    blocks: list[int],
    ids: np.ndarray,
    prefix: int,
    spec: Spec,
    kept: Mapping[int, Set[int]],
    layer: int,
) -> Tensor:
    """Whether query i sees key j, `[N, N]`."""
    cuts = [kept[after] for after in sorted(kept) if after < layer]
    if not spec.nested and len(cuts) > 1:
        # As if the mask of the last cut only knew what that cut found.
        cuts = [cuts[-1] | (set(range(sum(valid))) - cuts[-2])]
    alive = [valid[j] and (j >= prefix or all(int(ids[j]) in cut for cut in cuts)) for j in range(len(valid))]

    def sees(i: int, j: int) -> bool:
        if spec.state_sees_actions and blocks[i] == 1:
            return True
        if spec.prefix_sees_state and blocks[i] == 0 and blocks[j] == 1:
            return True
        if spec.causal_actions and blocks[i] == blocks[j] == 2:
            return j <= i
        return blocks[j] <= blocks[i]

    return torch.tensor([[alive[j] and sees(i, j) for j in range(len(valid))] for i in range(len(valid))])


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def tanh_gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def erf_gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


class _Model:
    """The weights and what is done with them."""

    def __init__(self, backbone: PI0, spec: Spec) -> None:
        self.backbone, self.spec = backbone, spec
        self.weights = {name: value.double() for name, value in backbone.model.state_dict().items()}

    def linear(self, name: str, x: Tensor) -> Tensor:
        y = x @ self.weights[f"{name}.weight"].T
        return y + self.weights[f"{name}.bias"] if f"{name}.bias" in self.weights else y

    def time(self, done: float) -> Tensor:
        """Sines, then cosines, of the time that is left."""
        left = float(np.float32(1 - done))
        half = self.backbone.config.expert.hidden // 2
        if self.spec.time is torch.float32:
            period = 4e-3 * (4.0 / 4e-3) ** torch.linspace(0, 1, half, dtype=torch.float32)
            angle = 1 / period * 2 * math.pi * torch.tensor(left, dtype=torch.float32)
            return torch.cat([angle.sin(), angle.cos()]).double()
        angles = [2 * math.pi * left / (4e-3 * (4.0 / 4e-3) ** (i / (half - 1))) for i in range(half)]
        return torch.tensor([math.sin(a) for a in angles] + [math.cos(a) for a in angles], dtype=torch.float64)

    def tower(self, pixels: Tensor) -> Tensor:
        """Projected patches `[N, D]` of one image `[3, S, S]` in [-1, 1]."""
        config, weights = self.backbone.config.tower, self.weights
        size, side = config.patch_size, config.image_size // config.patch_size
        kernel = weights["vision.patch_embed.proj.weight"].flatten(1)
        patches = []
        for row in range(side):
            for col in range(side):
                cut = pixels[:, row * size : (row + 1) * size, col * size : (col + 1) * size]
                patches.append(kernel @ cut.flatten() + weights["vision.patch_embed.proj.bias"])
        x = torch.stack(patches) + weights["vision.pos_embed"][0]
        dim = config.hidden_size // config.heads
        for block in range(config.depth):
            name = f"vision.blocks.{block}"
            normed = self.layer_norm(f"{name}.norm1", x)
            q, k, v = (self.linear(f"{name}.attn.{part}_proj", normed) for part in "qkv")
            mixed = []
            for head in range(config.heads):
                at = slice(head * dim, (head + 1) * dim)
                mixed.append(torch.softmax(q[:, at] @ k[:, at].T / math.sqrt(dim), dim=-1) @ v[:, at])
            x = x + self.linear(f"{name}.attn.proj", torch.cat(mixed, dim=-1))
            gelu = erf_gelu if self.spec.exact_gelu else tanh_gelu
            inner = self.linear(f"{name}.mlp.fc1", self.layer_norm(f"{name}.norm2", x))
            x = x + self.linear(f"{name}.mlp.fc2", gelu(inner))
        if self.spec.tower_norm:
            x = self.layer_norm("vision.norm", x)
        x = self.linear("projector", x)
        return x * math.sqrt(self.backbone.config.decoder.hidden) if self.spec.scales_images else x

    def layer_norm(self, name: str, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        unit = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return unit * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def norm(self, name: str, x: Tensor, condition: Tensor | None) -> tuple[Tensor, Tensor | float]:
        """The normalised tokens, and the gate of the branch."""
        if self.spec.norms is torch.float32 and condition is None:
            narrow = x.float()
            unit = narrow * torch.rsqrt(narrow.pow(2).mean(-1, keepdim=True) + 1e-6)
            return (unit * (1 + self.weights[f"{name}.weight"].float())).double(), 1.0
        mean = x.to(self.spec.norms).square().mean(-1, keepdim=True)
        unit = x * torch.rsqrt(mean + 1e-6)
        if condition is None:
            return unit * (1 + self.weights[f"{name}.weight"]), 1.0
        modulation = self.linear(f"{name}.dense", condition)
        width = x.shape[-1]
        scale, shift, gate = modulation[:width], modulation[width : 2 * width], modulation[2 * width :]
        return unit * (1 + scale) + shift, gate

    def decode(
        self,
        prefix: Tensor,
        suffix: Tensor,
        rotation: tuple[Tensor, Tensor],
        masks: list[Tensor],
        condition: Tensor | None,
    ) -> tuple[Tensor, list[Tensor]]:
        """All layers over both experts' tokens together; the suffix's hidden states, and attention `[H, N, N]`."""
        streams = {"language": prefix, "expert": suffix}
        conditions = {"language": None, "expert": condition}
        config, recorded = self.backbone.config, []
        heads, dim, groups = config.decoder.heads, config.decoder.head_dim, config.decoder.kv_heads
        for layer, mask in enumerate(masks):
            projected: dict[str, list[Tensor]] = {"q": [], "k": [], "v": []}
            gates = {}
            for name, x in streams.items():
                normed, gates[name] = self.norm(f"{name}.layers.{layer}.input_layernorm", x, conditions[name])
                for part, tokens in projected.items():
                    tokens.append(self.linear(f"{name}.layers.{layer}.self_attn.{part}_proj", normed))
            q, k, v = (torch.cat(projected[part]) for part in "qkv")
            outputs, weights = [], []
            for head in range(heads):
                group = head // (heads // groups)
                qh = rope(q[:, head * dim : (head + 1) * dim], rotation)
                kh = rope(k[:, group * dim : (group + 1) * dim], rotation)
                logits = (qh @ kh.T / math.sqrt(dim)).masked_fill(~mask, -2.3819763e38)
                weights.append(torch.softmax(logits, dim=-1))
                outputs.append(weights[-1] @ v[:, group * dim : (group + 1) * dim])
            recorded.append(torch.stack(weights))
            mixed, at = torch.cat(outputs, dim=-1), len(prefix)
            for name, rows in (("language", mixed[:at]), ("expert", mixed[at:])):
                where = f"{name}.layers.{layer}"
                gate = gates[name] if self.spec.attention_gate else 1.0
                x = streams[name] + gate * self.linear(f"{where}.self_attn.o_proj", rows)
                normed, gate = self.norm(f"{where}.post_attention_layernorm", x, conditions[name])
                inner = tanh_gelu(self.linear(f"{where}.mlp.gate_proj", normed))
                inner = inner * self.linear(f"{where}.mlp.up_proj", normed)
                gate = gate if self.spec.mlp_gate else 1.0
                streams[name] = x + gate * self.linear(f"{where}.mlp.down_proj", inner)
        if self.spec.final_norm_adapts:
            return self.norm("expert.norm", streams["expert"], condition)[0], recorded
        return streams["expert"], recorded


def rope_tables(positions: list[int], dim: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine `[N, dim / 2]` of p * 10000^(-2i/dim) for the token at position p."""
    columns = []
    for i in range(dim // 2):
        # Angles are float32 in every implementation; the specification follows.
        frequency = torch.tensor(1.0) / torch.tensor(10000.0) ** (torch.tensor(2.0 * i) / dim)
        columns.append(torch.tensor(positions, dtype=torch.float32) * frequency)
    angles = torch.stack(columns, dim=1)
    return angles.cos().double(), angles.sin().double()


def rope(x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate each pair (i, i + d/2)."""
    cos, sin = tables
    low, high = x[:, : x.shape[1] // 2], x[:, x.shape[1] // 2 :]
    return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=1)
