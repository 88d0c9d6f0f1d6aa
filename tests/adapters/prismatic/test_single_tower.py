"""Releases with one tower, DINOv2 or SigLIP: what was written is what runs, and what does not fit is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.helpers import openvla_format, release_format, tiny_oft, tiny_openvla
from tests.helpers.checkpoint_faults import CONFIG, PREPROCESSOR, STATISTICS, WEIGHTS, changed, drop, put, rename, top
from tests.helpers.naive_oft import Spec, naive_actions, naive_gelu, naive_linear, naive_tower
from tests.helpers.oft_release import OpenVLAForActionPrediction
from tests.helpers.planting import REGISTRY
from tests.helpers.release_format import BODY_KEYS, DINO, HEAD, PROPRIO, SIGLIP, TOKENIZER, UNUSED_KEYS
from tokenprune.errors import CheckpointError
from tokenprune.pipelines.config import DENSE
from tokenprune.policy import Policy
from tokenprune_adapters.backbones.openvla.factory import OpenVLAFactory
from tokenprune_adapters.backbones.openvla_oft.config import with_options
from tokenprune_adapters.backbones.openvla_oft.factory import OFTFactory
from tokenprune_adapters.weights.tensor_files import StoredTensor

CPU, DOUBLE = torch.device("cpu"), torch.float64
IDS = {"dinov2": "vit_large_patch14_reg4_dinov2.lvd142m", "siglip": "vit_so400m_patch14_siglip_224"}
FACTORIES: dict[str, Any] = {"openvla": OpenVLAFactory, "openvla-oft": OFTFactory}
KINDS = [(family, kind) for family in FACTORIES for kind in IDS]


def of_one_tower(config: Any, kind: str) -> Any:
    at = list(IDS).index(kind)
    transform = replace(config.transform, means=(config.transform.means[at],), stds=(config.transform.stds[at],))
    return replace(config, body=replace(config.body, towers=(config.body.towers[at],)), transform=transform)


def made(family: str, kind: str, **options: Any) -> Any:
    if family == "openvla":
        return tiny_openvla.tiny_openvla(of_one_tower(tiny_openvla.tiny_config(), kind), exact=False)
    return tiny_oft.tiny_policy_parts(with_options(of_one_tower(tiny_oft.tiny_config(), kind), options))


def write(folder: Path, family: str, kind: str) -> Path:
    """A release of one tower, which has the first tower's name whichever it is, and no third layer in its projector."""
    folder.mkdir()
    backbone, at = made(family, kind), list(IDS).index(kind)
    own, other = (SIGLIP, DINO) if kind == "siglip" else (DINO, SIGLIP)
    named = [key for key in (*BODY_KEYS, *UNUSED_KEYS) if not key.startswith((f"{other}.", "projector.fc3."))]
    state, generator = dict(backbone.model.named_parameters()), torch.Generator().manual_seed(7)
    body = {}
    for key in (key.replace(own, DINO) for key in named):
        like = state.get(key.replace(".blocks.2.", ".blocks.0."), torch.zeros(3, 5))
        unused = torch.randn(like.shape, generator=generator, dtype=DOUBLE)
        body[key] = state[key].detach().clone() if key in state else unused
    save_file(body, folder / WEIGHTS, metadata={"format": "pt"})
    form: Any = openvla_format if family == "openvla" else release_format
    config = {
        **form.CONFIG,
        "use_fused_vision_backbone": False,
        "vision_backbone_id": {"dinov2": "dinov2-vit-l", "siglip": "siglip-vit-so400m"}[kind],
        "timm_model_ids": [IDS[kind]],
        "timm_override_act_layers": [None],
        "timm_override_args": [form.CONFIG["timm_override_args"][at]],
        "image_sizes": [56],
    }
    preprocessor = {**release_format.PREPROCESSOR, "use_fused_vision_backbone": False}
    for name in ("input_sizes", "interpolations", "tvf_normalize_params", "tvf_resize_params"):
        preprocessor[name] = [preprocessor[name][at]]
    if family == "openvla":
        statistics = openvla_format.statistics(backbone, "libero_spatial")
    else:
        statistics = release_format.statistics(backbone)
        for part, keys in (("action_head", HEAD), ("proprio_projector", PROPRIO)):
            tensors = {f"module.{key}": state[f"{part}.{key}"].detach() for key in keys}
            torch.save(tensors, folder / f"{part}--150000_checkpoint.pt")
    for name, data in (("config", config), ("preprocessor_config", preprocessor), ("dataset_statistics", statistics)):
        (folder / f"{name}.json").write_text(json.dumps(data))
    shutil.copy(TOKENIZER, folder / "tokenizer.json")
    return folder


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    root = tmp_path_factory.mktemp("releases")
    folders = {(family, kind): write(root / f"{family}-{kind}", family, kind) for family, kind in KINDS}
    return lambda family, kind: folders[family, kind]


@pytest.fixture
def release(written: Callable[[str, str], Path], tmp_path: Path) -> Callable[[str, str], Path]:
    return lambda family, kind: shutil.copytree(written(family, kind), tmp_path / "release")


def loaded(family: str, folder: Path) -> Any:
    return FACTORIES[family].build(None, folder, {}, CPU, DOUBLE, 0)


def query(config: Any) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    images = {view: rng.integers(0, 256, (80, 80, 3), dtype=np.uint8) for view in config.views}
    return {"images": images, "state": rng.normal(size=8)}


def actions(backbone: Any) -> np.ndarray:
    policy = Policy(backbone, DENSE, REGISTRY)
    policy.reset(tiny_oft.INSTRUCTION)
    return policy.act(query(backbone.config)).normalised


@pytest.mark.parametrize(("family", "kind"), KINDS)
def test_round_trip(family: str, kind: str, written: Callable[[str, str], Path]) -> None:
    expected, found = made(family, kind), loaded(family, written(family, kind))
    assert found.config == expected.config
    state = expected.model.state_dict()
    assert found.model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in found.model.state_dict().items())
    assert np.array_equal(actions(found), actions(expected))
    described = FACTORIES[family].describe(None, written(family, kind), {})
    assert described.info == found.info
    assert described.layout(tiny_oft.INSTRUCTION) == expected.layout(tiny_oft.INSTRUCTION)


@pytest.mark.parametrize(("family", "kind"), KINDS)
def test_every_tensor_is_accounted_for(family: str, kind: str, written: Callable[[str, str], Path]) -> None:
    found = FACTORIES[family].verify(written(family, kind), {})
    assert found.clean
    assert f"{WEIGHTS}: {DINO}.blocks.2.attn.qkv.weight" in found.unused
    assert (f"{WEIGHTS}: {DINO}.attn_pool.latent" in found.unused) == (kind == "siglip")


@pytest.mark.parametrize("options", [{}, {"film": True}, {"head": "diffusion", "steps": 2}])
@pytest.mark.parametrize("kind", IDS)
def test_openvla_oft_equals_the_specification(kind: str, options: dict[str, Any]) -> None:
    backbone = made("openvla-oft", kind, **options)
    noise = torch.randn(8, 7, generator=torch.Generator().manual_seed(3), dtype=DOUBLE)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("tokenprune.engine.query.Query.noise", lambda *_: noise[None])
        found = torch.from_numpy(actions(backbone))
    expected = naive_actions(backbone, query(backbone.config), tiny_oft.INSTRUCTION, noise=noise)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9 if not options else 1e-6)


@pytest.mark.parametrize(("family", "kind"), KINDS)
def test_the_projector_of_one_tower_has_two_layers(family: str, kind: str) -> None:
    backbone = made(family, kind)
    model, transform, (tower,) = backbone.model, backbone.config.transform, backbone.config.body.towers
    pixels = torch.randint(0, 256, (1, 3, 56, 56), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    mean, std = {
        "dinov2": ((0.484375, 0.455078125, 0.40625), (0.228515625, 0.2236328125, 0.224609375)),
        "siglip": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    }[kind]
    image = torch.stack([(pixels[0, c] / 255 - mean[c]) / std[c] for c in range(3)]).double()
    weights = model.state_dict()
    features = naive_tower(weights, "vision_backbone.featurizer", tower, image, torch.zeros(1), Spec())
    expected = naive_linear(weights, "projector.fc2", naive_gelu(naive_linear(weights, "projector.fc1", features)))
    found = model.projector(model.vision_backbone(pixels, transform, DOUBLE))[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("family", "kind"), KINDS)
def test_flops_equal_what_torch_counts(family: str, kind: str) -> None:
    backbone = made(family, kind)
    model, told = backbone.model, backbone.config.body.vision_flops(3)
    pixels = torch.zeros(3, 3, 56, 56, dtype=torch.uint8)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as vision:
        features = model.vision_backbone(pixels, backbone.config.transform, DOUBLE)
    with FlopCounterMode(display=False) as projector:
        model.projector(features)
    assert told == {"vision": vision.get_total_flops(), "projector": projector.get_total_flops()}


def constants_of_two(data: dict[str, Any]) -> None:
    data["tvf_normalize_params"] *= 2


FC3 = torch.zeros(32, 32)

FAULTS: dict[str, tuple[Any, ...]] = {
    "fused": (top(use_fused_vision_backbone=True), CONFIG, "timm_model_ids", "is True"),
    "an id more": (top(timm_model_ids=list(IDS.values())), CONFIG, "timm_model_ids", "is False"),
    "no id": (top(timm_model_ids=[]), CONFIG, "timm_model_ids", "is []", *IDS.values()),
    "another id": (
        top(timm_model_ids=["vit_so400m_patch14_siglip_384"]), CONFIG, "'vit_so400m_patch14_siglip_384'", *IDS.values(),
    ),
    "a size more": (top(image_sizes=[56, 56]), CONFIG, "'image_sizes' has 2 entries", "valid: 1"),
    "arguments more": (top(timm_override_args=[None, None]), CONFIG, "'timm_override_args' has 2 entries", "valid: 1"),
    "activations more": (
        top(timm_override_act_layers=[None, None]), CONFIG, "'timm_override_act_layers' has 2 entries", "valid: 1",
    ),
    "constants more": (changed(PREPROCESSOR, constants_of_two), PREPROCESSOR, "for 2 towers", "valid: 1"),
    "a second tower": (
        put(WEIGHTS, f"{SIGLIP}.pos_embed", torch.zeros(1)), WEIGHTS, f"no place for '{SIGLIP}.pos_embed'",
    ),
    "the second tower's name": (
        rename(WEIGHTS, f"{DINO}.pos_embed", f"{SIGLIP}.pos_embed"), WEIGHTS, f"no place for '{SIGLIP}.pos_embed'",
    ),
    "a third layer": (put(WEIGHTS, "projector.fc3.weight", FC3), WEIGHTS, "no place for 'projector.fc3.weight'"),
    "no second layer": (drop(WEIGHTS, "projector.fc2.bias"), "needs 'projector.fc2.bias'"),
    "no position": (drop(WEIGHTS, f"{DINO}.pos_embed"), f"needs '{DINO}.pos_embed'"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(("family", "kind"), KINDS)
def test_what_does_not_fit_is_refused(
    family: str, kind: str, fault: str, release: Callable[[str, str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    plant, *fragments = FAULTS[fault]
    folder = release(family, kind)
    plant(folder)
    monkeypatch.setattr(StoredTensor, "read", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(CheckpointError) as caught:
        loaded(family, folder)
    assert [fragment for fragment in fragments if fragment not in str(caught.value)] == []


@pytest.mark.parametrize("family", FACTORIES)
@pytest.mark.parametrize(("told", "other"), [("siglip", "dinov2"), ("dinov2", "siglip")])
def test_one_tower_is_not_taken_for_the_other(
    family: str, told: str, other: str, release: Callable[[str, str], Path]
) -> None:
    folder = release(family, other)
    top(timm_model_ids=[IDS[told]])(folder)
    with pytest.raises(CheckpointError):
        loaded(family, folder)
    assert not FACTORIES[family].verify(folder, {}).clean


@pytest.mark.parametrize(("family", "kind"), KINDS)
def test_a_loaded_model_of_one_tower_is_adopted(family: str, kind: str, written: Callable[[str, str], Path]) -> None:
    folder = written(family, kind)
    model: Any = OpenVLAForActionPrediction(load_file(folder / WEIGHTS))
    model.config = json.loads((folder / CONFIG).read_text())
    model.norm_stats = json.loads((folder / STATISTICS).read_text())
    small = {
        part: OpenVLAForActionPrediction(torch.load(folder / f"{part}--150000_checkpoint.pt", weights_only=True))
        for part in (("action_head", "proprio_projector") if family == "openvla-oft" else ())
    }
    expected = loaded(family, folder)
    found = FACTORIES[family].adopt(model, {"tokenizer": TOKENIZER, **small})
    assert found.config == expected.config
    assert np.array_equal(actions(found), actions(expected))
