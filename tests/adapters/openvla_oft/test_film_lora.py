"""Un-merged LoRA: what is merged computes what the layers with adapters compute; what cannot be merged is refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import conv2d, linear

from tokenprune.errors import CheckpointError
from tokenprune_adapters.backbones.openvla_oft.film_lora import merge_lora, read_film_towers
from tokenprune_adapters.backbones.prismatic.model import VisionBackbone
from tokenprune_adapters.vision.transformer import ViTConfig
from tokenprune_adapters.weights.tensor_files import StoredTensor, stored_pt

CPU = torch.device("cpu")
SCALES = {1: 1.0, 3: 1.0, 15: 1.0, 16: 1.0, 17: 16 / 17, 32: 0.5, 64: 0.25}
State = dict[str, Tensor]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def drawn(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype)


def layer(name: str, out: int, rank: int, *inputs: int) -> State:
    """A layer with bias as PEFT saves it; `inputs` are the channels and, for a convolution, its kernel."""
    ones = (1,) * (len(inputs) - 1)
    return {
        f"{name}.base_layer.weight": drawn(out, *inputs),
        f"{name}.base_layer.bias": drawn(out),
        f"{name}.lora_A.default.weight": drawn(rank, *inputs),
        f"{name}.lora_B.default.weight": drawn(out, rank, *ones),
    }


def written(folder: Path, state: State) -> dict[str, StoredTensor]:
    torch.save(state, folder / "weights.pt")
    return stored_pt(folder / "weights.pt")


def values(stored: dict[str, StoredTensor], dtype: torch.dtype = torch.float64) -> State:
    return {name: tensor.read(CPU, dtype) for name, tensor in stored.items()}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(sorted(SCALES)), st.integers(1, 9), st.integers(1, 9))
def test_a_merged_linear_layer_is_the_adapted_one(tmp_path, rank, wide, out):
    state, x = layer("a.fc", out, rank, wide), drawn(5, wide)
    weight, bias, down, up = state.values()
    found = values(merge_lora(written(tmp_path, state)))
    assert found.keys() == {"a.fc.weight", "a.fc.bias"}
    expected = linear(x, weight, bias) + SCALES[rank] * linear(linear(x, down), up)
    assert torch.allclose(linear(x, found["a.fc.weight"], found["a.fc.bias"]), expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("rank", sorted(SCALES))
def test_a_merged_convolution_is_the_adapted_one(tmp_path, rank):
    state, x = layer("patch_embed.proj", 6, rank, 3, 2, 2), drawn(2, 3, 8, 8)
    weight, bias, down, up = state.values()
    found = values(merge_lora(written(tmp_path, state)))
    expected = conv2d(x, weight, bias, stride=2) + SCALES[rank] * conv2d(conv2d(x, down, stride=2), up)
    ours = conv2d(x, found["patch_embed.proj.weight"], found["patch_embed.proj.bias"], stride=2)
    assert torch.allclose(ours, expected, rtol=0, atol=1e-11)


def test_bfloat16_weights_are_merged_in_float32_and_rounded_once(tmp_path):
    state = {key: value.to(torch.bfloat16) for key, value in layer("fc", 40, 32, 30).items()}
    weight, _, down, up = (value.float() for value in state.values())
    stored = merge_lora(written(tmp_path, state))["fc.weight"]
    once = (weight + 0.5 * (up @ down)).to(torch.bfloat16)
    assert stored.fetch().dtype == torch.bfloat16
    assert torch.equal(stored.fetch(), once)
    narrow = [value.to(torch.bfloat16) for value in (weight, down, up)]
    assert not torch.equal(narrow[0] + 0.5 * (narrow[2] @ narrow[1]), once)


def test_nothing_is_read_before_it_is_fetched_and_the_rest_is_untouched(tmp_path):
    read: list[str] = []

    def watched(key: str, tensor: StoredTensor) -> StoredTensor:
        def fetch() -> Tensor:
            read.append(key)
            return tensor.fetch()

        return replace(tensor, fetch=fetch)

    state = layer("fc", 4, 2, 3) | {"norm.weight": drawn(4)}
    stored = {key: watched(key, tensor) for key, tensor in written(tmp_path, state).items()}
    found = merge_lora(stored)
    assert read == []
    assert found["norm.weight"] is stored["norm.weight"]
    assert found["fc.bias"] is stored["fc.base_layer.bias"]
    found["fc.weight"].fetch()
    assert sorted(read) == ["fc.base_layer.weight", "fc.lora_A.default.weight", "fc.lora_B.default.weight"]
    weight, base = found["fc.weight"], stored["fc.base_layer.weight"]
    assert (weight.file, weight.key, weight.shape) == (base.file, base.key, base.shape)


def test_an_adapter_that_can_no_longer_be_read_is_named(tmp_path):
    def fail() -> Tensor:
        raise OSError("gone")

    stored = written(tmp_path, layer("fc", 4, 2, 3))
    stored["fc.lora_B.default.weight"] = replace(stored["fc.lora_B.default.weight"], fetch=fail)
    with pytest.raises(CheckpointError, match=r"weights\.pt: 'fc\.lora_B\.default\.weight' cannot be read \(gone\)"):
        merge_lora(stored)["fc.weight"].read(CPU, torch.float32)


def without(key: str) -> Callable[[State], State]:
    return lambda state: {name: value for name, value in state.items() if name != key}


def having(key: str, *shape: int) -> Callable[[State], State]:
    return lambda state: {**state, key: drawn(*shape)}


BASE, A, B = "fc.base_layer.weight", "fc.lora_A.default.weight", "fc.lora_B.default.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without(B), f"'{BASE}' is there, but '{B}' is missing"),
        (without(A), f"'{BASE}' is there, but '{A}' is missing"),
        (without(BASE), f"is there, but '{BASE}' is missing"),
        (lambda state: without(A)(without(B)(state)), f"'{A}' is missing"),
        (lambda state: {A: state[A]}, f"'{A}' is there, but '{BASE}' is missing"),
        (having(B, 4, 3), f"'{A}' [2, 3] and '{B}' [4, 3] are no LoRA of one rank for '{BASE}' [4, 3]"),
        (having(A, 2, 5), f"'{A}' [2, 5]"),
        (having(A, 2, 3, 1, 1), f"'{A}' [2, 3, 1, 1]"),
        (having(A), f"'{A}' []"),
        (having(B, 5, 2), f"'{B}' [5, 2]"),
        (having(B, 2, 4), f"'{B}' [2, 4]"),
        (lambda state: {**state, BASE: drawn(4), A: drawn(2), B: drawn(4, 2)}, f"'{BASE}' [4]"),
        (lambda state: {**state, A: drawn(0, 3), B: drawn(4, 0)}, f"'{A}' [0, 3]"),
        (having("fc.lora_magnitude_vector.default.weight", 4), "'fc.lora_magnitude_vector.default.weight' cannot be"),
        (having("fc.lora_B.default.bias", 4), "'fc.lora_B.default.bias' cannot be merged as LoRA; valid: base_layer.w"),
        (having("fc.lora_A.second.weight", 2, 3), "'fc.lora_A.second.weight' cannot be merged"),
        (having("fc.weight", 4, 3), f"'{BASE}' and 'fc.weight' are both 'fc.weight'"),
        (having("fc.bias", 4), "'fc.base_layer.bias' and 'fc.bias' are both 'fc.bias'"),
    ],
)
def test_what_cannot_be_merged_is_refused(tmp_path, change, message):
    stored = written(tmp_path, change(layer("fc", 4, 2, 3)))
    with pytest.raises(CheckpointError, match=re.escape(message)) as error:
        merge_lora(stored)
    assert str(error.value).startswith(str(tmp_path / "weights.pt"))


# Two towers of one block, of widths 8 and 6, that hear language of width 5.
DINO = ViTConfig(
    image_size=4, patch_size=2, hidden_size=8, depth=1, heads=2, mlp_size=12,
    registers=1, cls=True, layer_scale=True, gelu="exact", tap=0, film=5,
)  # fmt: skip

SIGLIP = replace(DINO, hidden_size=6, mlp_size=10, registers=0, cls=False, layer_scale=False)


def upstream_file(prefix: str, layer_scale: str) -> tuple[State, State]:
    """The file's tensors and, under the model's names, what they amount to."""
    file: State = {}
    expected: State = {}

    def adapted(there: str, here: str, out: int, *inputs: int) -> None:
        state = layer(there, out, 32, *inputs)
        weight, bias, down, up = state.values()
        file.update(state)
        change = torch.einsum("or,ri->oi", up.flatten(1), down.flatten(1))
        expected.update({f"{here}.weight": weight + 0.5 * change.reshape(weight.shape), f"{here}.bias": bias})

    def plain(there: str, here: str, *shape: int) -> None:
        file[there] = expected[here] = drawn(*shape)

    for name, width, mlp in (("featurizer", 8, 12), ("fused_featurizer", 6, 10)):
        there, here = f"{prefix}{name}", f"vision_backbone.{name}"
        plain(f"{there}.pos_embed", f"{here}.pos_embed", 1, 4, width)
        adapted(f"{there}.patch_embed.proj", f"{here}.patch_embed.proj", width, 3, 2, 2)
        for part, out, wide in (("attn.qkv", 3 * width, width), ("attn.proj", width, width)):
            adapted(f"{there}.blocks.0.block.{part}", f"{here}.blocks.0.{part}", out, wide)
        for part, out, wide in (("mlp.fc1", mlp, width), ("mlp.fc2", width, mlp)):
            adapted(f"{there}.blocks.0.block.{part}", f"{here}.blocks.0.{part}", out, wide)
        for part in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"):
            plain(f"{there}.blocks.0.block.{part}", f"{here}.blocks.0.{part}", width)
        for part in ("scale", "shift"):
            plain(f"{there}.blocks.0.{part}.weight", f"{here}.blocks.0.{part}.weight", width, 5)
            plain(f"{there}.blocks.0.{part}.bias", f"{here}.blocks.0.{part}.bias", width)
    there, here = f"{prefix}featurizer", "vision_backbone.featurizer"
    plain(f"{there}.cls_token", f"{here}.cls_token", 1, 1, 8)
    plain(f"{there}.reg_token", f"{here}.reg_token", 1, 1, 8)
    for part in ("ls1", "ls2"):
        plain(f"{there}.blocks.0.block.{part}.{layer_scale}", f"{here}.blocks.0.{part}.scale_factor", 8)
    return file, expected


@pytest.mark.parametrize("layer_scale", ["scale_factor", "gamma"])
@pytest.mark.parametrize(
    "prefix",
    ["vision_backbone.", "", "module.vision_backbone.", "base_model.model.vision_backbone.vision_backbone."],
)
def test_the_file_of_a_film_policy_fills_the_towers(tmp_path, prefix, layer_scale):
    file, expected = upstream_file(prefix, layer_scale)
    found = values(read_film_towers(written(tmp_path, file)))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.allclose(found[name], value, rtol=0, atol=1e-12), name
    model = VisionBackbone([DINO, SIGLIP]).double()
    model.load_state_dict({name.removeprefix("vision_backbone."): value for name, value in found.items()}, strict=True)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["projector.fc1.weight"], "'projector.fc1.weight' is a tensor of no tower; valid: featurizer, fused_feat"),
        (["vision_backbone.featurizers.pos_embed"], "'vision_backbone.featurizers.pos_embed' is a tensor of no tower"),
        (["featurizer"], "'featurizer' is a tensor of no tower"),
        (
            ["featurizer.blocks.0.block.ls1.gamma", "featurizer.blocks.0.block.ls1.scale_factor"],
            "'featurizer.blocks.0.block.ls1.scale_factor' and 'featurizer.blocks.0.block.ls1.gamma' are both "
            "'vision_backbone.featurizer.blocks.0.ls1.scale_factor'",
        ),
        (
            ["vision_backbone.featurizer.blocks.0.block.attn.qkv.base_layer.weight"],
            "'vision_backbone.featurizer.blocks.0.block.attn.qkv.lora_A.default.weight' is missing",
        ),
    ],
)
def test_a_film_file_with_something_else_in_it_is_refused(tmp_path, keys, message):
    stored = written(tmp_path, {key: drawn(2, 2) for key in keys})
    with pytest.raises(CheckpointError, match=re.escape(message)) as error:
        read_film_towers(stored)
    assert str(error.value).startswith(str(tmp_path / "weights.pt"))
