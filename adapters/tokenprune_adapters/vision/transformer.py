"""The vision transformer of every tower; its features are the output of one inner block, the tap."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from tokenprune.errors import CheckpointError
from tokenprune_adapters.vision.film import FiLM

AttentionCallback = Callable[[Tensor, Tensor], None]
"""Called with a block's queries and keys, `[B, H, N, d]` each."""


@dataclass(frozen=True)
class ViTConfig:
    """Shape of a tower; blocks are numbered as in its checkpoint.

    Attributes:
        image_size: Side of the square input in pixels.
        patch_size: Side of a patch in pixels.
        hidden_size: Width `D` of the residual stream.
        depth: Blocks in the checkpoint, including those after the tap.
        heads: Attention heads.
        mlp_size: Width of the hidden layer of each block's MLP.
        registers: Register tokens after the class token.
        cls: Whether a class token leads the sequence.
        layer_scale: Whether each residual branch is multiplied by a learned vector.
        gelu: `exact` (erf) for towers run under timm, `tanh` for SigLIP under PaliGemma.
        tap: Index of the block whose output is the feature; later blocks are neither built nor run.
        eps: Epsilon of every LayerNorm.
        split_qkv: Whether queries, keys and values have a projection each (transformers) or share one (timm).
        final_norm: Whether the feature is the last block's output after the tower's final norm.
        film: Width of the language embeddings that modulate every block, None for a tower without FiLM.

    Raises:
        CheckpointError: If the sizes do not fit together.
    """

    image_size: int
    patch_size: int
    hidden_size: int
    depth: int
    heads: int
    mlp_size: int
    registers: int
    cls: bool
    layer_scale: bool
    gelu: Literal["exact", "tanh"]
    tap: int
    eps: float = 1e-6
    split_qkv: bool = False
    final_norm: bool = False
    film: int | None = None

    def __post_init__(self) -> None:
        """Refuse sizes that do not fit together."""
        for name, part in (("image_size", "patch_size"), ("hidden_size", "heads")):
            whole, unit = getattr(self, name), getattr(self, part)
            if whole % unit:
                raise CheckpointError(f"vision tower: {name} {whole} is not a multiple of {part} {unit}")
        if not 0 <= self.tap < self.depth:
            raise CheckpointError(f"vision tower: tap {self.tap} is not a block; valid: 0 to {self.depth - 1}")
        if self.final_norm and self.tap != self.depth - 1:
            last = self.depth - 1
            raise CheckpointError(f"vision tower: the final norm follows the last block; tap {self.tap}, valid: {last}")
        if self.film is not None and self.film < 1:
            raise CheckpointError(f"vision tower: film is {self.film}; valid: a width of 1 or more, or None")

    @property
    def grid(self) -> tuple[int, int]:
        """Patches as `(rows, cols)`."""
        side = self.image_size // self.patch_size
        return side, side

    @property
    def prefix_tokens(self) -> int:
        """Tokens in front of the patches, which the tower strips at the tap."""
        return int(self.cls) + self.registers


# The two towers of `dinosiglip-vit-so-224px`, each tapped at its second to last block (upstream OpenVLA).
DINOV2_L_REG4_224 = ViTConfig(
    image_size=224, patch_size=14, hidden_size=1024, depth=24, heads=16, mlp_size=4096,
    registers=4, cls=True, layer_scale=True, gelu="exact", tap=22,
)  # fmt: skip

SIGLIP_SO400M_224 = ViTConfig(
    image_size=224, patch_size=14, hidden_size=1152, depth=27, heads=16, mlp_size=4304,
    registers=0, cls=False, layer_scale=False, gelu="exact", tap=25,
)  # fmt: skip

# SigLIP of PaliGemma and pi0 (upstream openpi): all blocks, then the final norm; no pooling head.
SIGLIP_SO400M_224_PALIGEMMA = ViTConfig(
    image_size=224, patch_size=14, hidden_size=1152, depth=27, heads=16, mlp_size=4304,
    registers=0, cls=False, layer_scale=False, gelu="tanh", tap=26, split_qkv=True, final_norm=True,
)  # fmt: skip


class PatchEmbed(nn.Module):
    """Cut an image into patches and project each."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, config.hidden_size, config.patch_size, stride=config.patch_size)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return `[B, patches, D]` in raster order for `[B, 3, S, S]`."""
        return cast(Tensor, self.proj(pixels)).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Full self-attention, its projections fused in (q, k, v) order or split."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.heads, self.split = config.heads, config.split_qkv
        if config.split_qkv:
            self.q_proj = nn.Linear(width, width)
            self.k_proj = nn.Linear(width, width)
            self.v_proj = nn.Linear(width, width)
        else:
            self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, on_attention: AttentionCallback | None = None) -> Tensor:
        """Attend, `[B, N, D]` to `[B, N, D]`; `on_attention` is called with queries and keys `[B, H, N, d]`."""
        parts = (self.q_proj(x), self.k_proj(x), self.v_proj(x)) if self.split else self.qkv(x).chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        if on_attention is not None:
            on_attention(q, k)
        mixed = functional.scaled_dot_product_attention(q, k, v)
        return cast(Tensor, self.proj(mixed.transpose(1, 2).flatten(2)))


class Mlp(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.mlp_size)
        self.act = nn.GELU("tanh" if config.gelu == "tanh" else "none")
        self.fc2 = nn.Linear(config.mlp_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Transform each token: `[B, N, D]` to `[B, N, D]`."""
        return cast(Tensor, self.fc2(self.act(self.fc1(x))))


class LayerScale(nn.Module):
    """Multiply each channel by a learned factor, named `scale_factor` in OpenVLA's files and `gamma` in timm."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.scale_factor = nn.Parameter(torch.ones(config.hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        """Scale `[B, N, D]`."""
        return x * self.scale_factor


class Block(FiLM):
    """A pre-norm transformer block, modulated by language if the configuration has FiLM."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__(config.film, config.hidden_size)
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.eps)
        self.attn = Attention(config)
        self.ls1 = LayerScale(config) if config.layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.eps)
        self.mlp = Mlp(config)
        self.ls2 = LayerScale(config) if config.layer_scale else nn.Identity()

    def forward(self, x: Tensor, language: Tensor | None, on_attention: AttentionCallback | None = None) -> Tensor:
        """Return the residual stream after the block, `[B, N, D]`, for language `[B, L]` or none."""
        x = self.modulate(x + self.ls1(self.attn(self.norm1(x), on_attention)), language)
        return cast(Tensor, x + self.ls2(self.mlp(self.norm2(x))))


class VisionTower(nn.Module):
    """A vision transformer that stops at its tap, with timm's parameter names.

    A timm tower's tensors load without renaming; blocks after the tap, the pooling head and, without `final_norm`, the
    final norm are left out. With split projections, `attn.qkv` is `attn.q_proj`, `attn.k_proj` and `attn.v_proj`, so
    that each tensor of transformers' `SiglipVisionModel` is one parameter and can be shared without a copy. With FiLM,
    each block also has `scale` and `shift`. Initial values are those of torch's layers; class, register and position
    parameters start at zero.

    Args:
        config: Shape of the tower.
    """

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        rows, cols = config.grid
        self.patch_embed = PatchEmbed(config)
        self.pos_embed = nn.Parameter(torch.zeros(1, rows * cols, config.hidden_size))
        if config.cls:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        if config.registers:
            self.reg_token = nn.Parameter(torch.zeros(1, config.registers, config.hidden_size))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.tap + 1))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.eps) if config.final_norm else nn.Identity()

    def embed(self, pixels: Tensor) -> Tensor:
        """Return `[B, prefix + patches, D]`: positions are added to the patches only, then the prefix is prepended."""
        tokens = [self.patch_embed(pixels) + self.pos_embed]
        if self.config.registers:
            tokens.insert(0, self.reg_token.expand(len(pixels), -1, -1))
        if self.config.cls:
            tokens.insert(0, self.cls_token.expand(len(pixels), -1, -1))
        return torch.cat(tokens, dim=1)

    def forward(
        self,
        pixels: Tensor,
        language: Tensor | None = None,
        on_attention: AttentionCallback | None = None,
    ) -> Tensor:
        """Encode normalised images: the tapped block's output without the prefix (upstream OpenVLA: not normed).

        Args:
            pixels: `[B, 3, S, S]`, normalised for this tower.
            language: `[B, L]`, for a tower with FiLM only; a row per image, hence repeated for each view of a query.
            on_attention: Called with the last block's queries and keys `[B, H, prefix + patches, d]`.

        Returns:
            `[B, rows * cols, D]` in raster order.

        Raises:
            ValueError: If a tower with FiLM gets no language or one of another shape, or a tower without FiLM gets any.
        """
        valid = None if self.config.film is None else (len(pixels), self.config.film)
        shape = None if language is None else tuple(language.shape)
        if shape != valid:
            raise ValueError(f"vision tower: language of shape {shape}; valid: {valid}")
        x = self.embed(pixels)
        for block in self.blocks[:-1]:
            x = block(x, language)
        x = self.blocks[-1](x, language, on_attention)
        return cast(Tensor, self.norm(x))[:, self.config.prefix_tokens :]


def flops(config: ViTConfig) -> int:
    """Count the floating-point operations of one image through the tapped tower, 2 per multiply-accumulate.

    Args:
        config: Shape of the tower.

    Returns:
        Operations of the convolution, the linear layers (FiLM's included) and the two attention products; norms,
        activations and softmax are not counted.
    """
    patches = config.grid[0] * config.grid[1]
    tokens, width = patches + config.prefix_tokens, config.hidden_size
    embed = patches * 3 * config.patch_size**2 * width
    attention = tokens * 4 * width * width + 2 * tokens * tokens * width
    mlp = 2 * tokens * width * config.mlp_size
    film = 2 * width * (config.film or 0)
    return 2 * (embed + (config.tap + 1) * (attention + mlp + film))


def weights(config: ViTConfig) -> int:
    """Numbers in the matrices of the tapped tower, FiLM's included; positions and biases are not counted."""
    width = config.hidden_size
    block = 4 * width * width + 2 * width * config.mlp_size + 2 * width * (config.film or 0)
    return 3 * config.patch_size**2 * width + (config.tap + 1) * block
