"""The vision tower against transformers' own SigLIP and DINOv2-with-registers, in float64 with the same weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    PreTrainedModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from tokenprune.errors import CheckpointError
from tokenprune_adapters.vision.transformer import (
    DINOV2_L_REG4_224,
    SIGLIP_SO400M_224,
    SIGLIP_SO400M_224_PALIGEMMA,
    VisionTower,
    ViTConfig,
    flops,
)

TOLERANCE = 1e-10

SIGLIP = ViTConfig(
    image_size=28,
    patch_size=7,
    hidden_size=24,
    depth=4,
    heads=4,
    mlp_size=40,
    registers=0,
    cls=False,
    layer_scale=False,
    gelu="exact",
    tap=2,
)

DINO = replace(SIGLIP, registers=4, cls=True, layer_scale=True, mlp_size=96)
PALIGEMMA = replace(SIGLIP, gelu="tanh", tap=3, split_qkv=True, final_norm=True)
State = dict[str, Tensor]


def randomise(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)


def siglip_peer(gelu: str = "gelu") -> tuple[PreTrainedModel, State]:
    config = SiglipVisionConfig(
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=28,
        patch_size=7,
        hidden_act=gelu,
        layer_norm_eps=1e-6,
    )
    peer = SiglipVisionModel(config).double().eval()
    randomise(peer)
    theirs = {name.removeprefix("vision_model."): value for name, value in peer.state_dict().items()}
    ours = {
        "patch_embed.proj.weight": theirs["embeddings.patch_embedding.weight"],
        "patch_embed.proj.bias": theirs["embeddings.patch_embedding.bias"],
        "pos_embed": theirs["embeddings.position_embedding.weight"][None],
    }
    for n in range(SIGLIP.tap + 1):
        layer = f"encoder.layers.{n}"
        for kind in ("weight", "bias"):
            qkv = [theirs[f"{layer}.self_attn.{x}_proj.{kind}"] for x in "qkv"]
            ours[f"blocks.{n}.attn.qkv.{kind}"] = torch.cat(qkv)
            ours[f"blocks.{n}.attn.proj.{kind}"] = theirs[f"{layer}.self_attn.out_proj.{kind}"]
            ours[f"blocks.{n}.norm1.{kind}"] = theirs[f"{layer}.layer_norm1.{kind}"]
            ours[f"blocks.{n}.norm2.{kind}"] = theirs[f"{layer}.layer_norm2.{kind}"]
            ours[f"blocks.{n}.mlp.fc1.{kind}"] = theirs[f"{layer}.mlp.fc1.{kind}"]
            ours[f"blocks.{n}.mlp.fc2.{kind}"] = theirs[f"{layer}.mlp.fc2.{kind}"]
    return peer, ours


def paligemma_peer() -> tuple[PreTrainedModel, State]:
    peer, _ = siglip_peer("gelu_pytorch_tanh")
    theirs = {name.removeprefix("vision_model."): value for name, value in peer.state_dict().items()}
    names = {
        "patch_embed.proj": "embeddings.patch_embedding",
        "norm": "post_layernorm",
        **{f"blocks.{n}.norm{i}": f"encoder.layers.{n}.layer_norm{i}" for n in range(4) for i in (1, 2)},
        **{f"blocks.{n}.mlp.fc{i}": f"encoder.layers.{n}.mlp.fc{i}" for n in range(4) for i in (1, 2)},
        **{f"blocks.{n}.attn.{x}_proj": f"encoder.layers.{n}.self_attn.{x}_proj" for n in range(4) for x in "qkv"},
        **{f"blocks.{n}.attn.proj": f"encoder.layers.{n}.self_attn.out_proj" for n in range(4)},
    }
    ours = {f"{a}.{kind}": theirs[f"{b}.{kind}"] for a, b in names.items() for kind in ("weight", "bias")}
    return peer, ours | {"pos_embed": theirs["embeddings.position_embedding.weight"][None]}


def attention_of(state: State, prefix: str, kind: str) -> list[Tensor]:
    """Projections under the names of transformers 5.23, or of its earlier releases."""
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    if f"{prefix}.q_proj.weight" not in state:
        names = ("attention.query", "attention.key", "attention.value", "output.dense")
    return [state[f"{prefix}.{name}.{kind}"] for name in names]


def dino_peer() -> tuple[PreTrainedModel, State]:
    config = Dinov2WithRegistersConfig(
        hidden_size=24,
        mlp_ratio=4,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=28,
        patch_size=7,
        num_register_tokens=4,
        hidden_act="gelu",
        layer_norm_eps=1e-6,
    )
    peer = Dinov2WithRegistersModel(config).double().eval()
    randomise(peer)
    theirs = peer.state_dict()
    positions = theirs["embeddings.position_embeddings"]
    ours = {
        "patch_embed.proj.weight": theirs["embeddings.patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": theirs["embeddings.patch_embeddings.projection.bias"],
        # Transformers keeps a position for the class token; timm's checkpoints carry it inside the token.
        "cls_token": theirs["embeddings.cls_token"] + positions[:, :1],
        "reg_token": theirs["embeddings.register_tokens"],
        "pos_embed": positions[:, 1:],
    }
    for n in range(DINO.tap + 1):
        layer = f"encoder.layer.{n}"
        for kind in ("weight", "bias"):
            q, k, v, out = attention_of(theirs, f"{layer}.attention", kind)
            ours[f"blocks.{n}.attn.qkv.{kind}"] = torch.cat([q, k, v])
            ours[f"blocks.{n}.attn.proj.{kind}"] = out
            for name in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
                ours[f"blocks.{n}.{name}.{kind}"] = theirs[f"{layer}.{name}.{kind}"]
        ours[f"blocks.{n}.ls1.scale_factor"] = theirs[f"{layer}.layer_scale1.lambda1"]
        ours[f"blocks.{n}.ls2.scale_factor"] = theirs[f"{layer}.layer_scale2.lambda1"]
    return peer, ours


def tower(config: ViTConfig, state: State) -> VisionTower:
    model = VisionTower(config).double().eval()
    model.load_state_dict(state, strict=True)
    return model


def features(peer: PreTrainedModel, pixels: Tensor, block: int, prefix: int) -> Tensor:
    hidden = peer(pixel_values=pixels, output_hidden_states=True).hidden_states
    assert len(hidden) == 5  # the embeddings and four blocks
    return hidden[block + 1][:, prefix:]


def gap(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


@pytest.fixture
def pixels() -> Tensor:
    return torch.randn(2, 3, 28, 28, dtype=torch.float64)


def test_siglip_equals_transformers_at_the_tap(pixels):
    peer, state = siglip_peer()
    out = tower(SIGLIP, state)(pixels)
    assert out.shape == (2, 16, 24)
    assert gap(out, features(peer, pixels, SIGLIP.tap, 0)) < TOLERANCE


def test_dino_equals_transformers_at_the_tap(pixels):
    peer, state = dino_peer()
    out = tower(DINO, state)(pixels)
    assert out.shape == (2, 16, 24)
    assert gap(out, features(peer, pixels, DINO.tap, 5)) < TOLERANCE


def test_tanh_gelu_is_another_function(pixels):
    exact_peer, state = siglip_peer()
    tanh = tower(replace(SIGLIP, gelu="tanh"), state)(pixels)
    assert gap(tanh, features(exact_peer, pixels, SIGLIP.tap, 0)) > 1e-5

    tanh_peer, state = siglip_peer("gelu_pytorch_tanh")
    tanh = tower(replace(SIGLIP, gelu="tanh"), state)(pixels)
    assert gap(tanh, features(tanh_peer, pixels, SIGLIP.tap, 0)) < TOLERANCE


def test_paligemma_equals_the_last_hidden_state_of_transformers(pixels):
    peer, state = paligemma_peer()
    out = tower(PALIGEMMA, state)(pixels)
    assert out.shape == (2, 16, 24)
    assert gap(out, peer(pixel_values=pixels).last_hidden_state) < TOLERANCE


def test_exact_gelu_in_paligemma_would_show(pixels):
    peer, state = paligemma_peer()
    out = tower(replace(PALIGEMMA, gelu="exact"), state)(pixels)
    assert gap(out, peer(pixel_values=pixels).last_hidden_state) > 1e-5


def test_missing_final_norm_would_show(pixels):
    peer, state = paligemma_peer()
    plain = {name: value for name, value in state.items() if not name.startswith("norm.")}
    out = tower(replace(PALIGEMMA, final_norm=False), plain)(pixels)
    assert gap(out, peer(pixel_values=pixels).last_hidden_state) > 1e-3


def test_split_projections_are_the_fused_ones(pixels):
    _, state = paligemma_peer()
    fused = dict(state)
    for n in range(4):
        for kind in ("weight", "bias"):
            parts = [fused.pop(f"blocks.{n}.attn.{x}_proj.{kind}") for x in "qkv"]
            fused[f"blocks.{n}.attn.qkv.{kind}"] = torch.cat(parts)
    assert gap(tower(PALIGEMMA, state)(pixels), tower(replace(PALIGEMMA, split_qkv=False), fused)(pixels)) < TOLERANCE


def test_a_live_siglip_is_adopted_without_a_copy(pixels):
    peer, state = paligemma_peer()
    with torch.device("meta"):
        model = VisionTower(PALIGEMMA)
    model.load_state_dict(state, strict=True, assign=True)
    theirs = {value.untyped_storage().data_ptr() for value in peer.parameters()}
    assert {value.untyped_storage().data_ptr() for value in model.parameters()} <= theirs
    assert gap(model(pixels), peer(pixel_values=pixels).last_hidden_state) < TOLERANCE


def test_tap_is_a_block_index(pixels):
    peer, state = siglip_peer()
    out = tower(SIGLIP, state)(pixels)
    for other in (SIGLIP.tap - 1, SIGLIP.tap + 1):
        assert gap(out, features(peer, pixels, other, 0)) > 1e-3


def test_positions_reach_patches_but_not_the_prefix(pixels):
    _, state = dino_peer()
    model = tower(DINO, state)
    embedded = model.embed(pixels)
    prefix = torch.cat([state["cls_token"], state["reg_token"]], dim=1).expand(2, -1, -1)
    assert torch.equal(embedded[:, :5], prefix)

    model.pos_embed.add_(1.0)
    moved = model.embed(pixels)
    assert torch.equal(moved[:, :5], embedded[:, :5])
    assert gap(moved[:, 5:], embedded[:, 5:] + 1.0) < TOLERANCE


def test_positions_on_the_prefix_would_show(pixels, monkeypatch):
    peer, state = dino_peer()
    embed = VisionTower.embed

    def faulty(self: VisionTower, pixels: Tensor) -> Tensor:
        tokens = embed(self, pixels)
        tokens[:, :5] += self.pos_embed[:, :5]
        return tokens

    monkeypatch.setattr(VisionTower, "embed", faulty)
    assert gap(tower(DINO, state)(pixels), features(peer, pixels, DINO.tap, 5)) > 1e-3


def test_missing_layer_scale_would_show(pixels):
    peer, state = dino_peer()
    plain = {name: value for name, value in state.items() if "scale_factor" not in name}
    out = tower(replace(DINO, layer_scale=False), plain)(pixels)
    assert gap(out, features(peer, pixels, DINO.tap, 5)) > 1e-3


def test_norm_epsilon_would_show(pixels):
    peer, state = siglip_peer()
    out = tower(replace(SIGLIP, eps=1e-5), state)(pixels)
    assert gap(out, features(peer, pixels, SIGLIP.tap, 0)) > 1e-8


@pytest.mark.parametrize("config", [SIGLIP, DINO, replace(DINO, registers=0), replace(DINO, cls=False), PALIGEMMA])
def test_flops_equal_what_torch_counts(config):
    model = VisionTower(config)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(torch.randn(1, 3, 28, 28))
    assert flops(config) == counter.get_total_flops()


def test_release_towers_are_the_published_ones():
    assert DINOV2_L_REG4_224.grid == SIGLIP_SO400M_224.grid == (16, 16)
    assert (DINOV2_L_REG4_224.prefix_tokens, SIGLIP_SO400M_224.prefix_tokens) == (5, 0)
    with torch.device("meta"):
        dino, siglip = VisionTower(DINOV2_L_REG4_224), VisionTower(SIGLIP_SO400M_224)
    assert (len(dino.blocks), len(siglip.blocks)) == (23, 26)

    block = {
        "norm1": (1024,), "norm2": (1024,), "attn.qkv": (3072, 1024), "attn.proj": (1024, 1024),
        "mlp.fc1": (4096, 1024), "mlp.fc2": (1024, 4096),
    }  # fmt: skip
    shapes = {
        "patch_embed.proj.weight": (1024, 3, 14, 14),
        "patch_embed.proj.bias": (1024,),
        "pos_embed": (1, 256, 1024),
        "cls_token": (1, 1, 1024),
        "reg_token": (1, 4, 1024),
    }
    for n in range(23):
        for name, shape in block.items():
            shapes |= {f"blocks.{n}.{name}.weight": shape, f"blocks.{n}.{name}.bias": shape[:1]}
        shapes |= {f"blocks.{n}.ls1.scale_factor": (1024,), f"blocks.{n}.ls2.scale_factor": (1024,)}
    assert {name: tuple(value.shape) for name, value in dino.state_dict().items()} == shapes

    assert tuple(siglip.pos_embed.shape) == (1, 256, 1152)
    assert not {"cls_token", "reg_token"} & siglip.state_dict().keys()
    # Whole towers are published as 0.165 and 0.219 TFLOP an image; the last block is never run.
    assert flops(replace(DINOV2_L_REG4_224, tap=23)) == pytest.approx(0.165e12, rel=0.005)
    assert flops(replace(SIGLIP_SO400M_224, tap=26)) == pytest.approx(0.219e12, rel=0.005)


def test_the_tower_of_pi0_is_the_published_one():
    config = SIGLIP_SO400M_224_PALIGEMMA
    assert (config.grid, config.prefix_tokens, config.gelu, config.eps) == ((16, 16), 0, "tanh", 1e-6)
    with torch.device("meta"):
        model = VisionTower(config)
    block = {
        "norm1": (1152,), "attn.q_proj": (1152, 1152), "attn.k_proj": (1152, 1152), "attn.v_proj": (1152, 1152),
        "attn.proj": (1152, 1152), "norm2": (1152,), "mlp.fc1": (4304, 1152), "mlp.fc2": (1152, 4304),
    }  # fmt: skip
    layers = {"patch_embed.proj": (1152, 3, 14, 14), "norm": (1152,)}
    layers |= {f"blocks.{n}.{part}": shape for n in range(27) for part, shape in block.items()}
    shapes = {"pos_embed": (1, 256, 1152)}
    for name, shape in layers.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    assert {name: tuple(value.shape) for name, value in model.state_dict().items()} == shapes
    assert flops(config) == pytest.approx(0.219e12, rel=0.005)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": 30}, "image_size 30 is not a multiple of patch_size 7"),
        ({"heads": 5}, "hidden_size 24 is not a multiple of heads 5"),
        ({"tap": 4}, "tap 4 is not a block; valid: 0 to 3"),
        ({"tap": -1}, "tap -1 is not a block"),
        ({"final_norm": True}, "the final norm follows the last block; tap 2, valid: 3"),
        ({"film": 0}, "film is 0; valid: a width of 1 or more, or None"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(change, message):
    with pytest.raises(CheckpointError, match=message):
        replace(SIGLIP, **change)
