"""Releases of every head and robot, with FiLM and without, and upstream's loaded model: what is there is what runs."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from torch import nn

from tests.helpers.checkpoint_faults import CONFIG, STATISTICS, WEIGHTS, changed, copy, drop, put, remove, rename, top
from tests.helpers.oft_release import FILES, LM_HEAD, OpenVLAForActionPrediction, live, write_oft
from tests.helpers.planting import REGISTRY
from tests.helpers.release_format import TOKENIZER
from tests.helpers.tiny_oft import INSTRUCTION, observation, tiny_config, tiny_policy_parts
from tokenprune import from_module
from tokenprune.errors import CheckpointError, ConfigError
from tokenprune.pipelines.config import DENSE
from tokenprune.policy import Policy
from tokenprune_adapters.backbones.openvla_oft.backbone import OpenVLAOFT
from tokenprune_adapters.backbones.openvla_oft.factory import OFTFactory
from tokenprune_adapters.weights.tensor_files import StoredTensor

CPU, DOUBLE = torch.device("cpu"), torch.float64
VIEWS = {"libero": ("primary", "wrist"), "aloha": ("high", "left_wrist", "right_wrist"), "bridge": ("primary",)}
HEAD, NOISY, PROPRIO, FILM = FILES.values()

CASES: dict[str, dict[str, Any]] = {
    "l1": {},
    "diffusion": {"head": "diffusion", "steps": 3},
    "discrete": {"head": "discrete"},
    "aloha": {"constants": "aloha"},
    "aloha with FiLM": {"constants": "aloha", "film": True},
    "aloha, diffusion and FiLM": {"constants": "aloha", "film": True, "head": "diffusion", "steps": 1, "horizon": 12},
    "bridge": {"constants": "bridge"},
    "bridge, discrete": {"constants": "bridge", "head": "discrete", "proprio": False},
    "FiLM": {"film": True},
}

SHAPES = {
    "aloha": (25, 14), "aloha with FiLM": (25, 14), "aloha, diffusion and FiLM": (12, 14),
    "bridge": (5, 7), "bridge, discrete": (5, 7),
}  # fmt: skip


def made(case: str) -> OpenVLAOFT:
    options = dict(CASES[case])
    config = tiny_config(VIEWS[options.get("constants", "libero")], options.pop("proprio", True), **options)
    return tiny_policy_parts(config)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("releases")

    def write(case: str) -> Path:
        folder = root / case
        return folder if folder.exists() else write_oft(folder, made(case))

    return write


@pytest.fixture
def release(written: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    return lambda case: shutil.copytree(written(case), tmp_path / "release")


def loaded(folder: Path, **options: Any) -> OpenVLAOFT:
    return OFTFactory.build(None, folder, options, CPU, DOUBLE, 0)


def actions(backbone: OpenVLAOFT) -> np.ndarray:
    policy = Policy(backbone, DENSE, REGISTRY)
    policy.reset(INSTRUCTION)
    return policy.act(observation(backbone.config)).actions


def same(found: OpenVLAOFT, expected: OpenVLAOFT, merged: bool) -> None:
    """Weights to the last bit, but for those of layers whose LoRA had to be merged."""
    left, right = found.model.state_dict(), expected.model.state_dict()
    assert left.keys() == right.keys()
    for name, value in left.items():
        close = torch.allclose(value, right[name], rtol=0, atol=1e-13)
        assert close if merged and name.startswith("vision_backbone.") else torch.equal(value, right[name]), name


# Releases.


@pytest.mark.parametrize("case", CASES)
def test_round_trip(case: str, written: Callable[[str], Path]) -> None:
    expected, found = made(case), loaded(written(case), **CASES[case])
    film = CASES[case].get("film", False)
    same(found, expected, merged=film)
    assert found.config == expected.config
    assert not found.info.untrained
    assert actions(found).shape == SHAPES.get(case, (8, 7))
    np.testing.assert_allclose(actions(found), actions(expected), rtol=0, atol=1e-6 if film else 0)


@pytest.mark.parametrize("case", CASES)
def test_every_tensor_is_accounted_for(case: str, written: Callable[[str], Path]) -> None:
    found = OFTFactory.verify(written(case), CASES[case])
    assert found.clean
    options = CASES[case]
    assert (f"{WEIGHTS}: {LM_HEAD}" in found.unused) == (options.get("head") != "discrete")
    film = options.get("film", False)
    assert (f"{WEIGHTS}: vision_backbone.featurizer.blocks.0.norm1.weight" in found.unused) == film
    assert (f"{FILM}: module.vision_backbone.featurizer.blocks.2.scale.weight" in found.unused) == film


@pytest.mark.parametrize("prefix", ["", "module.", "vision_backbone.", "module.vision_backbone."])
def test_prefixes_of_the_towers_file(prefix: str, release: Callable[[str], Path]) -> None:
    folder = release("FiLM")
    expected = actions(loaded(folder, film=True))

    def renamed(data: dict[str, torch.Tensor]) -> None:
        tensors = {key.replace("module.vision_backbone.", prefix): value for key, value in data.items()}
        data.clear()
        data.update(tensors)

    changed(FILM, renamed)(folder)
    assert np.array_equal(actions(loaded(folder, film=True)), expected)


@pytest.mark.parametrize("case", ["diffusion", "aloha with FiLM", "bridge, discrete"])
def test_described_without_weights(case: str, release: Callable[[str], Path]) -> None:
    folder = release(case)
    for path in [*folder.glob("*.safetensors"), *folder.glob("*.pt")]:
        path.unlink()
    described, expected = OFTFactory.describe(None, folder, CASES[case]), made(case)
    assert described.layout(INSTRUCTION) == expected.layout(INSTRUCTION)
    assert described.info.action == expected.info.action
    assert described.info.other_flops == expected.info.other_flops
    assert described.info.repeats == expected.info.repeats


def test_the_files_of_the_hub(release: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []
    folder = release("aloha, diffusion and FiLM")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda _, **how: (calls.append(how), str(folder))[1])
    assert loaded(Path("owner/name"), **CASES["aloha, diffusion and FiLM"]).info.source == "owner/name"
    kept = huggingface_hub.utils.filter_repo_objects([*FILES.values(), "model.bin", "x/action_head--1.pt"], **calls[0])
    assert list(kept) == list(FILES.values())


# What is wrong with a folder, and which option would fit.

QUERY = "vision_backbone.featurizer.blocks.1.block.attn.qkv"
SCALE = "vision_backbone.featurizer.blocks.1.scale.weight"

FAULTS: dict[str, tuple[Any, ...]] = {
    "L1 for diffusion": ("l1", {"head": "diffusion"}, None, HEAD, "'diffusion'", "head=l1 fits"),
    "diffusion for L1": ("diffusion", {}, None, HEAD, "'l1'", "head=diffusion fits"),
    "a head for discrete tokens": ("l1", {"head": "discrete"}, None, HEAD, "head=discrete"),
    "no head": ("discrete", {}, None, "action_head--*.pt", "head=discrete", "L1 head"),
    "no noise predictor": (
        "diffusion", CASES["diffusion"], remove(HEAD), "action_head--*.pt", "head=diffusion",
    ),
    "no noisy projector": (
        "diffusion", CASES["diffusion"], remove(NOISY), "noisy_action_projector--*.pt", "head=diffusion",
    ),
    "two noisy projectors": (
        "diffusion", CASES["diffusion"], copy(NOISY, "noisy_action_projector--5_checkpoint.pt"), "several", NOISY,
    ),
    "a noisy projector of the state": (
        "diffusion", CASES["diffusion"], copy(PROPRIO, NOISY), NOISY, "fc1.weight' has shape [32, 8]", "[32, 1]",
    ),
    "no lm_head": ("discrete", CASES["discrete"], drop(WEIGHTS, LM_HEAD), f"needs '{LM_HEAD}'"),
    "bins as text": ("discrete", CASES["discrete"], top(n_action_bins="256"), CONFIG, "n_action_bins '256'"),
    "negative padding": ("discrete", CASES["discrete"], top(pad_to_multiple_of=-1), CONFIG, "pad_to_multiple_of -1"),
    "too many bins": ("discrete", CASES["discrete"], top(n_action_bins=1985), CONFIG, "n_action_bins 1985", "2048"),
    "FiLM unasked for": ("FiLM", {}, None, FILM, "FiLM", "film to true"),
    "no FiLM": ("l1", {"film": True}, None, "vision_backbone--*.pt", "option film"),
    "two FiLM files": ("FiLM", {"film": True}, copy(FILM, "vision_backbone--5_checkpoint.pt"), "several", FILM),
    "no scale": (
        "FiLM", {"film": True}, drop(FILM, f"module.vision_backbone.{SCALE.partition('.')[2]}"),
        FILM, f"needs '{SCALE}'",
    ),
    "half a LoRA": (
        "FiLM", {"film": True}, drop(FILM, f"module.{QUERY}.lora_B.default.weight"), FILM, "lora_B", "is missing",
    ),
    "a block more": (
        "FiLM", {"film": True}, put(FILM, "module.vision_backbone.featurizer.blocks.3.scale.bias", torch.zeros(24)),
        FILM, "no place for", "blocks.3.scale.bias",
    ),
    "no tower": (
        "FiLM", {"film": True}, rename(FILM, f"module.{QUERY}.base_layer.bias", "module.projector.fc1.bias"),
        FILM, "tensor of no tower",
    ),
    "ALOHA as LIBERO": ("aloha", {}, None, STATISTICS, "action.q01", "7", "14"),
    "LIBERO as ALOHA": ("l1", {"constants": "aloha"}, None, STATISTICS, "action.min", "14", "7"),
    "LIBERO as Bridge": ("l1", {"constants": "bridge"}, None, STATISTICS, "proprio.q01", "7", "8"),
    "another chunk": (
        "aloha", {"constants": "aloha"}, changed(STATISTICS, lambda data: data["tiny"]["action"].pop("min")),
        STATISTICS, "action.min is missing",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_wrong_is_said_before_weights_are_read(
    fault: str, release: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    case, options, plant, *fragments = FAULTS[fault]
    folder = release(case)
    if plant is not None:
        plant(folder)
    monkeypatch.setattr(StoredTensor, "read", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(CheckpointError) as caught:
        loaded(folder, **options)
    assert [fragment for fragment in fragments if fragment not in str(caught.value)] == []


def test_where_the_actions_stand_in_the_vocabulary_is_the_files(release: Callable[[str], Path]) -> None:
    folder = release("discrete")
    top(n_action_bins=100, pad_to_multiple_of=8)(folder)
    found = loaded(folder, head="discrete")
    assert (found.bins.ids, len(found.bins.centres)) == (range(1940, 2040), 99)
    changed(CONFIG, lambda data: [data.pop("n_action_bins"), data.pop("pad_to_multiple_of")])(folder)
    assert loaded(folder, head="discrete").bins.ids == range(1728, 1984)


# Upstream's model, already loaded.


def adopted(case: str, model: nn.Module, modules: dict[str, nn.Module], **more: Any) -> OpenVLAOFT:
    return OFTFactory.adopt(model, {"tokenizer": TOKENIZER, **CASES[case], **modules, **more})


@pytest.mark.parametrize("case", CASES)
def test_an_adopted_model_shares_its_weights(case: str) -> None:
    expected, (model, modules) = made(case), live(made(case))
    film = CASES[case].get("film", False)
    found = adopted(case, model, modules)
    same(found, expected, merged=film)
    assert found.config == expected.config
    np.testing.assert_allclose(actions(found), actions(expected), rtol=0, atol=1e-6 if film else 0)
    homes = {value.data_ptr() for part in (model, *modules.values()) for value in part.parameters()}
    copied = {name for name, value in found.model.named_parameters() if value.data_ptr() not in homes}
    linear = r"vision_backbone\.\w+\.blocks\.\d\.(attn|mlp)\.\w+\.weight"
    assert all(film and re.fullmatch(linear, name) for name in copied)
    assert len(copied) == (16 if film else 0)
    assert all(value.requires_grad for part in (model, *modules.values()) for value in part.parameters())


def test_towers_with_film_may_be_the_models_own() -> None:
    model, modules = live(made("FiLM"))
    expected = adopted("FiLM", model, modules)
    model.vision_backbone = modules.pop("vision_backbone")
    assert np.array_equal(actions(adopted("FiLM", model, modules)), actions(expected))
    with pytest.raises(CheckpointError, match="its towers use FiLM; set the option film to true"):
        adopted("l1", model, modules)


def test_prefixes_of_parallel_training_are_dropped() -> None:
    model, modules = live(made("diffusion"))
    expected = actions(adopted("diffusion", model, modules))
    parallel = {part: nn.ModuleDict({"module": module}) for part, module in modules.items()}
    assert np.array_equal(actions(adopted("diffusion", model, parallel)), expected)


def test_from_module() -> None:
    model, modules = live(made("l1"), torch.float32)
    policy = from_module(model, "openvla-oft", tokenizer=str(TOKENIZER), registry=REGISTRY, **modules)
    policy.reset(INSTRUCTION)
    assert policy.act(observation(policy.backbone.config)).actions.shape == (8, 7)
    assert (policy.backbone.info.source, policy.backbone.dtype) == ("OpenVLAForActionPrediction", torch.float32)


def test_statistics_may_be_the_configs() -> None:
    model, modules = live(made("l1"))
    expected = actions(adopted("l1", model, modules))
    model.config["norm_stats"], model.norm_stats = model.norm_stats, None
    assert np.array_equal(actions(adopted("l1", model, modules)), expected)


@pytest.mark.parametrize(
    ("case", "more", "words"),
    [
        ("l1", {"tokenizer": None}, ["tokenizer is None", "tokenizer.json"]),
        ("l1", {"action_head": None}, ["action_head is a NoneType", "upstream's module"]),
        ("l1", {"action_haed": nn.Linear(1, 1)}, ["'action_haed'", "did you mean 'action_head'"]),
        ("l1", {"noisy_action_projector": nn.Linear(1, 1)}, ["noisy_action_projector", "no use", "action_head"]),
        ("l1", {"vision_backbone": nn.Linear(1, 1)}, ["vision_backbone", "no use"]),
        ("l1", {"proprio": False}, ["proprio_projector", "no use"]),
        ("l1", {"head": "discrete"}, ["action_head", "no use"]),
        ("l1", {"head": "diffusion"}, ["noisy_action_projector is missing"]),
        ("discrete", {"head": "l1"}, ["action_head is missing"]),
        ("l1", {"steps": 3}, ["steps", "head=diffusion"]),
    ],
)
def test_wrong_options_of_an_adoption(case: str, more: dict[str, Any], words: list[str]) -> None:
    model, modules = live(made(case))
    with pytest.raises(ConfigError) as caught:
        adopted(case, model, modules, **more)
    assert [word for word in words if word not in str(caught.value)] == []


def other_model(model: Any, modules: dict[str, nn.Module]) -> None:
    model.config["model_type"] = "llava"


def half_a_model(model: Any, modules: dict[str, nn.Module]) -> None:
    del model.projector.fc2


def no_config(model: Any, modules: dict[str, nn.Module]) -> None:
    model.config = None


def no_statistics(model: Any, modules: dict[str, nn.Module]) -> None:
    model.norm_stats = {}


def two_types(model: Any, modules: dict[str, nn.Module]) -> None:
    modules["action_head"].float()


def another_head(model: Any, modules: dict[str, nn.Module]) -> None:
    modules["action_head"] = live(made("diffusion"))[1]["action_head"]


def no_values(model: Any, modules: dict[str, nn.Module]) -> None:
    modules["proprio_projector"].to("meta")


def fewer_rows(model: Any, modules: dict[str, nn.Module]) -> None:
    model.config["text_config"]["vocab_size"] = 100


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (other_model, ["'model_type' is 'llava'"]),
        (half_a_model, ["OpenVLAForActionPrediction", "needs 'projector.fc2.weight'"]),
        (no_config, ["config is a NoneType"]),
        (no_statistics, ["no dataset statistics"]),
        (two_types, ["float32", "float64", "valid: one type"]),
        (another_head, ["holds another head", "head=diffusion fits"]),
        (no_values, ["meta", "with values"]),
        (fewer_rows, ["100 embeddings", "tokenizer"]),
    ],
)
def test_a_model_that_cannot_be_adopted(spoil: Callable[..., None], words: list[str]) -> None:
    model, modules = live(made("l1"))
    spoil(model, modules)
    with pytest.raises(CheckpointError) as caught:
        adopted("l1", model, modules)
    assert [word for word in words if word not in str(caught.value)] == []


def test_the_stand_in_has_the_names_it_was_given() -> None:
    assert set(OpenVLAForActionPrediction({"a.0.b": torch.zeros(1)}).state_dict()) == {"a.0.b"}
