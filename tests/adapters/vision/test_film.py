"""FiLM: language reaches every block between attention and MLP, and leaves a tower without it untouched."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tokenprune_adapters.backbones.prismatic.image_transform import ImageTransform
from tokenprune_adapters.backbones.prismatic.model import VisionBackbone
from tokenprune_adapters.vision.transformer import VisionTower, ViTConfig, flops

DINO = ViTConfig(
    image_size=28, patch_size=14, hidden_size=12, depth=4, heads=3, mlp_size=20,
    registers=2, cls=True, layer_scale=True, gelu="exact", tap=2, film=10,
)  # fmt: skip

SIGLIP = replace(DINO, hidden_size=8, heads=2, registers=0, cls=False, layer_scale=False)
State = dict[str, Tensor]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def tower(config: ViTConfig) -> VisionTower:
    model = VisionTower(config).double().eval()
    for parameter in model.parameters():
        parameter.normal_(std=0.4)
    return model


def pixels(batch: int) -> Tensor:
    return torch.randn(batch, 3, 28, 28, dtype=torch.float64)


def language(batch: int) -> Tensor:
    return torch.randn(batch, 10, dtype=torch.float64)


def gap(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


def naive(config: ViTConfig, weights: State, image: Tensor, words: Tensor, where: str = "between") -> Tensor:
    """One image's features, token by token; `where` other than `between` is one known trap."""

    def linear(name: str, x: Tensor) -> Tensor:
        return weights[f"{name}.weight"] @ x + weights[f"{name}.bias"]

    def norm(name: str, x: Tensor) -> Tensor:
        centred = x - x.mean()
        return centred / (centred.square().mean() + 1e-6).sqrt() * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def scaled(name: str, x: Tensor) -> Tensor:
        return x * weights[f"{name}.scale_factor"] if config.layer_scale else x

    def film(block: str, tokens: list[Tensor]) -> list[Tensor]:
        scale, shift = linear(f"{block}.scale", words), linear(f"{block}.shift", words)
        if where == "no one":
            return [scale * x + shift for x in tokens]
        if where == "patches":
            return [*tokens[:first], *((1 + scale) * x + shift for x in tokens[first:])]
        return [(1 + scale) * x + shift for x in tokens]

    tokens = [weights["cls_token"][0, 0], *weights["reg_token"][0]] if config.cls else []
    first = len(tokens)
    kernel = weights["patch_embed.proj.weight"].flatten(1)
    for number, (row, col) in enumerate([(0, 0), (0, 14), (14, 0), (14, 14)]):
        patch = image[:, row : row + 14, col : col + 14].flatten()
        tokens.append(kernel @ patch + weights["patch_embed.proj.bias"] + weights["pos_embed"][0, number])

    width = config.hidden_size // config.heads
    for n in range(config.tap + 1):
        block = f"blocks.{n}"
        if where == "before":
            tokens = film(block, tokens)
        q, k, v = zip(*(linear(f"{block}.attn.qkv", norm(f"{block}.norm1", x)).chunk(3) for x in tokens), strict=True)
        mixed = []
        for query in q:
            heads = []
            for h in range(config.heads):
                part = slice(h * width, (h + 1) * width)
                weight = torch.stack([(query[part] * key[part]).sum() / math.sqrt(width) for key in k]).softmax(0)
                heads.append(sum(w * value[part] for w, value in zip(weight, v, strict=True)))
            mixed.append(scaled(f"{block}.ls1", linear(f"{block}.attn.proj", torch.cat(heads))))
        tokens = [x + change for x, change in zip(tokens, mixed, strict=True)]
        if where not in ("before", "after"):
            tokens = film(block, tokens)
        for at, x in enumerate(tokens):
            hidden = linear(f"{block}.mlp.fc1", norm(f"{block}.norm2", x))
            hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
            tokens[at] = x + scaled(f"{block}.ls2", linear(f"{block}.mlp.fc2", hidden))
        if where == "after":
            tokens = film(block, tokens)
    return torch.stack(tokens[first:])


@pytest.mark.parametrize("config", [DINO, SIGLIP])
def test_film_equals_the_token_by_token_reference(config):
    model, images, words = tower(config), pixels(3), language(3)
    out, weights = model(images, words), model.state_dict()
    for image in range(3):
        assert gap(out[image], naive(config, weights, images[image], words[image])) < 1e-10


@pytest.mark.parametrize("where", ["before", "after", "patches", "no one"])
def test_film_anywhere_else_would_show(where):
    model, images, words = tower(DINO), pixels(1), language(1)
    assert gap(model(images, words)[0], naive(DINO, model.state_dict(), images[0], words[0], where)) > 1e-3


@pytest.mark.parametrize("config", [DINO, SIGLIP])
@pytest.mark.parametrize("block", [0, 1, 2])
def test_every_block_hears_the_language(config, block):
    model, images, words = tower(config), pixels(2), language(2)
    for n in range(3):
        if n != block:
            for part in (model.blocks[n].scale, model.blocks[n].shift):
                part.weight.zero_()
    assert gap(model(images, words), model(images, 2 * words)) > 1e-3


@pytest.mark.parametrize("config", [DINO, SIGLIP])
def test_zero_film_is_the_plain_tower(config):
    model, images = tower(config), pixels(2)
    for block in model.blocks:
        for part in (block.scale, block.shift):
            part.weight.zero_()
            part.bias.zero_()
    plain = VisionTower(replace(config, film=None)).double()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if ".scale." not in k and ".shift." not in k})
    assert torch.equal(model(images, language(2)), plain(images))


@pytest.mark.parametrize("config", [DINO, SIGLIP])
def test_film_adds_two_linear_layers_a_block_and_nothing_else(config):
    def shapes(config: ViTConfig) -> dict[str, tuple[int, ...]]:
        return {name: tuple(value.shape) for name, value in VisionTower(config).state_dict().items()}

    width, added = config.hidden_size, {}
    for n in range(3):
        for name in ("scale", "shift"):
            added |= {f"blocks.{n}.{name}.weight": (width, 10), f"blocks.{n}.{name}.bias": (width,)}
    assert shapes(config) == shapes(replace(config, film=None)) | added


def test_language_of_the_wrong_shape_is_refused():
    model, plain = tower(DINO), tower(replace(DINO, film=None))
    with pytest.raises(ValueError, match=r"language of shape None; valid: \(2, 10\)"):
        model(pixels(2))
    for wrong in (language(1), language(4), language(2)[0], language(2)[:, :9], language(2)[:, None]):
        with pytest.raises(ValueError, match=r"valid: \(2, 10\)"):
            model(pixels(2), wrong)
    with pytest.raises(ValueError, match=r"language of shape \(2, 10\); valid: None"):
        plain(pixels(2), language(2))


@pytest.mark.parametrize("config", [DINO, SIGLIP])
def test_flops_equal_what_torch_counts(config):
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        VisionTower(config)(torch.randn(1, 3, 28, 28), torch.randn(1, 10))
    assert flops(config) == counter.get_total_flops()


def test_the_backbone_gives_both_towers_the_language_of_each_view():
    backbone = VisionBackbone([DINO, SIGLIP]).double()
    for parameter in backbone.parameters():
        parameter.normal_(std=0.4)
    transform = ImageTransform(size=28)
    views = [torch.randint(0, 256, (2, 3, 28, 28), dtype=torch.uint8) for _ in range(2)]
    words = language(2)
    out = backbone(torch.cat(views), transform, torch.float64, words.repeat(2, 1))
    assert out.shape == (4, 4, 20)
    for view, part in zip(views, out.chunk(2), strict=True):
        dino = backbone.featurizer(transform.normalise(view, 0, torch.float64), words)
        siglip = backbone.fused_featurizer(transform.normalise(view, 1, torch.float64), words)
        assert gap(part, torch.cat([dino, siglip], dim=-1)) < 1e-12
    other = backbone(torch.cat(views), transform, torch.float64, words.flip(0).repeat(2, 1))
    assert min(gap(a, b) for a, b in zip(out.split(12, -1), other.split(12, -1), strict=True)) > 1e-3
