"""Exported OpenVLA-OFT policies: what is read back is what was written, and what could not be is never written."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tokenprune_adapters
from tests.helpers.checkpoint_faults import CONFIG, PREPROCESSOR, STATISTICS, WEIGHTS, drop, put, remove
from tests.helpers.planting import REGISTRY
from tests.helpers.release_format import TOKENIZER
from tests.helpers.tiny_oft import INSTRUCTION, observation, tiny_config, tiny_policy_parts, tiny_statistics
from tokenprune.errors import CheckpointError, ConfigError, TokenPruneError
from tokenprune.pipelines.config import DENSE
from tokenprune.policy import Policy
from tokenprune_adapters.backbones.openvla_oft import config as oft_config
from tokenprune_adapters.backbones.openvla_oft import factory
from tokenprune_adapters.backbones.openvla_oft.backbone import OpenVLAOFT
from tokenprune_adapters.backbones.openvla_oft.config import MINI, PRESETS, OFTConfig, with_options
from tokenprune_adapters.backbones.openvla_oft.export import export_oft
from tokenprune_adapters.backbones.openvla_oft.factory import OFTFactory
from tokenprune_adapters.backbones.openvla_oft.model import OFTModel
from tokenprune_adapters.backbones.openvla_oft.release import load_oft, verify_oft
from tokenprune_adapters.weights.untrained import fill_untrained

CPU, HALF, FLOAT, DOUBLE = torch.device("cpu"), torch.float16, torch.float32, torch.float64
HEADS: tuple[dict[str, Any], ...] = ({}, {"head": "diffusion", "steps": 2}, {"head": "discrete"})
FILES = {WEIGHTS, CONFIG, PREPROCESSOR, STATISTICS, "tokenizer.json"}


def with_towers(config: OFTConfig, *which: int) -> OFTConfig:
    """The towers of these numbers, each with its constants."""
    transform = config.transform
    means, stds = (tuple(values[n] for n in which) for values in (transform.means, transform.stds))
    body = replace(config.body, towers=tuple(config.body.towers[n] for n in which))
    return replace(config, body=body, transform=replace(transform, means=means, stds=stds))


def statistics(config: OFTConfig) -> dict[str, Any]:
    bounds = tiny_statistics(config)
    found = {"action": {"q01": bounds.action.low.tolist(), "q99": bounds.action.high.tolist()}}
    found["action"]["mask"] = bounds.action.mask.tolist()
    if bounds.state is not None:
        found["proprio"] = {"q01": bounds.state.low.tolist(), "q99": bounds.state.high.tolist()}
    return {"tiny": {**found, "num_trajectories": 3}}


def exported(folder: Path, backbone: OpenVLAOFT, **more: Any) -> Path:
    given = {"tokenizer_path": TOKENIZER, "statistics": statistics(backbone.config), **more}
    export_oft(folder, given.pop("config", backbone.config), given.pop("model", backbone.model), **given)
    return folder


def actions(backbone: OpenVLAOFT) -> np.ndarray:
    policy = Policy(backbone, DENSE, REGISTRY)
    policy.reset(INSTRUCTION)
    return policy.act(observation(backbone.config)).actions


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@settings(max_examples=12)
@given(
    seed=st.integers(0, 2**16),
    towers=st.sampled_from([(0, 1), (0,), (1,)]),
    head=st.sampled_from(HEADS),
    proprio=st.booleans(),
    kv_heads=st.sampled_from([1, 2, 4]),
    dtype=st.sampled_from([HALF, FLOAT]),
)
def test_round_trip(
    seed: int, towers: tuple[int, ...], head: dict[str, Any], proprio: bool, kv_heads: int, dtype: torch.dtype
) -> None:
    config = with_towers(tiny_config(proprio=proprio, kv_heads=kv_heads, **head), *towers)
    backbone = tiny_policy_parts(config, seed, FLOAT)
    options = {"proprio": proprio, **head}
    with TemporaryDirectory() as root:
        folder = exported(Path(root) / "new" / "policy", backbone, dtype=dtype)
        found = load_oft(folder, options, CPU, FLOAT)
        verified = verify_oft(folder, options)
    backbone.model.to(dtype).to(FLOAT)
    assert found.config == config
    assert np.array_equal(actions(found), actions(backbone))
    assert verified.clean
    assert verified.unused == ()
    assert verified.dtypes == {str(dtype).removeprefix("torch."): len(backbone.model.state_dict())}
    assert verified.statistics == ("tiny",)


def test_the_files_are_a_releases(tmp_path: Path) -> None:
    folder = exported(
        tmp_path / "policy", tiny_policy_parts(tiny_config(**HEADS[1])), card="# A policy\n\nÜber alles.\n"
    )
    small = {f"{part}--checkpoint.pt" for part in ("action_head", "noisy_action_projector", "proprio_projector")}
    assert {path.name for path in folder.iterdir()} == {*FILES, *small, "README.md"}
    assert (folder / "README.md").read_text(encoding="utf-8") == "# A policy\n\nÜber alles.\n"
    assert (folder / "tokenizer.json").read_bytes() == TOKENIZER.read_bytes()
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1
    for name in small:
        held = torch.load(folder / name, weights_only=True)
        assert all(type(value) is torch.Tensor and value.dtype == HALF for value in held.values())
        # A view of something larger would be stored with all of it.
        assert all(value.untyped_storage().nbytes() == value.nbytes for value in held.values())


def test_no_card_no_readme(tmp_path: Path) -> None:
    folder = exported(tmp_path / "policy", tiny_policy_parts(tiny_config(proprio=False, **HEADS[2])))
    assert {path.name for path in folder.iterdir()} == FILES


def test_exporting_changes_no_weights(tmp_path: Path) -> None:
    backbone = tiny_policy_parts(tiny_config())
    before = {name: value.clone() for name, value in backbone.model.state_dict().items()}
    exported(tmp_path / "policy", backbone)
    after = backbone.model.state_dict()
    assert all(value.dtype == DOUBLE and torch.equal(value, before[name]) for name, value in after.items())


def test_a_size_that_is_no_multiple_of_the_width(tmp_path: Path) -> None:
    # In floating point 28 * (61 / 28) is less than 61.
    config = with_towers(tiny_config(), 1)
    tower = replace(config.body.towers[0], hidden_size=28, mlp_size=61)
    config = replace(config, body=replace(config.body, towers=(tower,)))
    assert load_oft(exported(tmp_path / "policy", tiny_policy_parts(config)), {}, CPU, FLOAT).config == config


# What cannot be exported.


def weights(change: Callable[[OFTModel], None]) -> dict[str, Any]:
    model = tiny_policy_parts(tiny_config()).model
    change(model)
    return {"model": model}


def filled(value: float) -> Callable[[OFTModel], None]:
    return lambda model: model.projector.fc2.bias.data[3:4].fill_(value)


def towers(**changes: Any) -> dict[str, Any]:
    config = tiny_config()
    dino, siglip = config.body.towers
    config = replace(config, body=replace(config.body, towers=(dino, replace(siglip, **changes))))
    with torch.device("meta"):
        model = OFTModel(config)
    fill_untrained(model, 0, CPU, FLOAT)
    return {"config": config, "model": model}


def other_statistics(**changes: Any) -> dict[str, Any]:
    return {"statistics": {"tiny": {**statistics(tiny_config())["tiny"], **changes}}}


def causal() -> dict[str, Any]:
    config = tiny_config()
    return {"config": replace(config, body=replace(config.body, decoder=replace(config.body.decoder, causal=True)))}


def few_rows() -> dict[str, Any]:
    config = replace(tiny_config(), body=replace(tiny_config().body, vocab=300))
    return {"config": config}


FAULTS: dict[str, tuple[type[TokenPruneError], Callable[[], dict[str, Any]], tuple[str, ...]]] = {
    "FiLM": (ConfigError, lambda: {"config": with_options(tiny_config(), {"film": True})}, ("body.towers", "film=32")),
    "another tap": (ConfigError, lambda: towers(tap=0), ("body.towers", "tap=0", "read as", "tap=1")),
    "another activation": (ConfigError, lambda: towers(gelu="tanh"), ("body.towers", "gelu='tanh'")),
    "towers of one kind": (
        CheckpointError, lambda: {"config": with_towers(tiny_config(), 1, 1)}, ("config.json", "timm_model_ids"),
    ),
    "towers in the other order": (
        CheckpointError, lambda: {"config": with_towers(tiny_config(), 1, 0)}, ("config.json", "timm_model_ids"),
    ),
    "causal": (ConfigError, causal, ("body.decoder", "causal=True")),
    "constants of another tower": (
        CheckpointError,
        lambda: {"config": replace(tiny_config(), transform=with_towers(tiny_config(), 0).transform)},
        (PREPROCESSOR, "tvf_normalize_params", "valid: 2"),
    ),
    "no tokenizer": (
        CheckpointError, lambda: {"tokenizer_path": Path("nowhere.json")}, ("nowhere.json", "no such file"),
    ),
    "fewer rows than tokens": (CheckpointError, few_rows, (str(TOKENIZER), "text_config.vocab_size", "300")),
    "no statistics": (CheckpointError, lambda: {"statistics": {}}, ("statistics", "no dataset statistics")),
    "no state statistics": (
        CheckpointError, lambda: other_statistics(proprio={}), ("statistics", "tiny", "proprio.q01 is missing"),
    ),
    "another robot's statistics": (
        CheckpointError, lambda: other_statistics(action={"q01": [0] * 14, "q99": [1] * 14}), ("action.q01", "7", "14"),
    ),
    "statistics that are no JSON": (
        CheckpointError, lambda: other_statistics(num_trajectories=np.int64(3)), ("statistics", "malformed", "int64"),
    ),
    "statistics that are no numbers": (
        CheckpointError, lambda: other_statistics(mean=float("nan")), ("statistics", "malformed"),
    ),
    "another model": (
        CheckpointError, lambda: {"model": tiny_policy_parts(tiny_config(depth=2)).model}, ("OFTModel", "layers.2."),
    ),
    "a layer more": (
        CheckpointError, lambda: {"model": tiny_policy_parts(tiny_config(depth=4)).model}, ("no place", "layers.3."),
    ),
    "another shape": (
        CheckpointError, lambda: {"model": tiny_policy_parts(tiny_config(kv_heads=1)).model},
        ("'language_model.model.layers.0.self_attn.k_proj.weight' has shape [8, 32]", "[16, 32]"),
    ),
    "another head": (
        CheckpointError, lambda: {"model": tiny_policy_parts(tiny_config(**HEADS[1])).model}, ("OFTModel", "no place"),
    ),
    "no values": (
        CheckpointError, lambda: weights(lambda model: model.projector.to("meta")), ("projector.fc1", "with values"),
    ),
    "too large a number": (CheckpointError, lambda: weights(filled(1e5)), ("projector.fc2.bias", "finite", "float16")),
    "not a number": (
        CheckpointError, lambda: {**weights(filled(np.nan)), "dtype": DOUBLE}, ("projector.fc2.bias", "finite"),
    ),
    "whole numbers": (CheckpointError, lambda: {"dtype": torch.int32}, ("torch.int32", "float16", "bfloat16")),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_what_could_not_be_read_back_is_not_written(fault: str, tmp_path: Path) -> None:
    kind, given, fragments = FAULTS[fault]
    with pytest.raises(kind) as caught:
        exported(tmp_path / "policy", tiny_policy_parts(tiny_config()), **given())
    assert [fragment for fragment in fragments if fragment not in str(caught.value)] == []
    assert not (tmp_path / "policy").exists()


def test_only_an_empty_folder_is_written_to(tmp_path: Path) -> None:
    backbone, folder, file = tiny_policy_parts(tiny_config()), tmp_path / "policy", tmp_path / "file"
    folder.mkdir()
    exported(folder, backbone)
    before = content(folder)
    file.write_text("mine")
    for taken in (folder, file):
        with pytest.raises(ConfigError, match=r"there is something already; valid: a new or an empty folder"):
            exported(taken, tiny_policy_parts(tiny_config(), seed=1))
    assert content(folder) == before
    assert file.read_text() == "mine"


def test_an_export_that_was_broken_off_does_not_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(OSError, match="no space left"):
        exported(tmp_path / "policy", tiny_policy_parts(tiny_config()))
    assert (tmp_path / "policy" / WEIGHTS).exists()
    with pytest.raises(CheckpointError, match=f"{tmp_path / 'policy' / CONFIG}: cannot be read"):
        load_oft(tmp_path / "policy", {}, CPU, FLOAT)


# What the loader refuses of an exported folder.

QUERY = "language_model.model.layers.1.self_attn.q_proj.weight"
LAST = "vision_backbone.featurizer.blocks.1.attn.qkv.weight"

DAMAGE: dict[str, tuple[Any, ...]] = {
    "a missing key": (drop(WEIGHTS, QUERY), f"needs '{QUERY}'"),
    "a missing key of the tapped block": (drop(WEIGHTS, LAST), f"needs '{LAST}'"),
    "another shape": (put(WEIGHTS, QUERY, torch.zeros(32, 16)), f"'{QUERY}' has shape [32, 16]", "[32, 32]"),
    "a missing key of the head": (drop("action_head--checkpoint.pt", "model.fc2.bias"), "needs 'model.fc2.bias'"),
    "another shape in the head": (
        put("action_head--checkpoint.pt", "model.fc2.bias", torch.zeros(14)), "'model.fc2.bias' has shape [14]", "[7]",
    ),
    "no projector": (remove("proprio_projector--checkpoint.pt"), "proprio_projector--*.pt"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_export_is_refused(damage: str, tmp_path: Path) -> None:
    plant, *fragments = DAMAGE[damage]
    folder = exported(tmp_path / "policy", tiny_policy_parts(with_towers(tiny_config(), 1)))
    plant(folder)
    with pytest.raises(CheckpointError) as caught:
        load_oft(folder, {}, CPU, FLOAT)
    assert [fragment for fragment in fragments if fragment not in str(caught.value)] == []


# The trained preset.


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder `mini` of the preset's size, its weights random."""
    root = tmp_path_factory.mktemp("checkpoints")
    with torch.device("meta"):
        model = OFTModel(MINI)
    fill_untrained(model, 0, CPU, FLOAT)
    export_oft(root / "mini", MINI, model, TOKENIZER, statistics(MINI))
    return root


@pytest.fixture
def shipped(checkpoints: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for module in (oft_config, factory):
        monkeypatch.setattr(module, "OFT_TRAINED", {"mini": "small and trained"})
    monkeypatch.setattr(factory, "_CHECKPOINTS", checkpoints)
    return checkpoints / "mini"


def built(**options: Any) -> OpenVLAOFT:
    return OFTFactory.build("mini", None, options, CPU, FLOAT, 0)


def test_the_mini_is_the_checkpoints(shipped: Path) -> None:
    found, described = built(), OFTFactory.describe("mini", None, {})
    assert found.config == MINI
    assert (found.info.source, found.info.untrained) == ("mini", False)
    assert described.info == found.info
    assert described.layout(INSTRUCTION).n_tokens == 1 + 2 * 256 + 1 + len(found.prompt(INSTRUCTION).ids) + 56 + 1
    image = np.random.default_rng(0).integers(0, 256, (224, 224, 3), dtype=np.uint8)
    assert np.array_equal(described.pixels(image), image.transpose(2, 0, 1))
    np.testing.assert_array_equal(found.statistics.action.low, tiny_statistics(MINI).action.low)
    direct = load_oft(shipped, {"center_crop": False}, CPU, FLOAT)
    assert np.array_equal(actions(found), actions(direct))


def test_options_of_the_mini_are_a_checkpoints(shipped: Path) -> None:
    assert built(center_crop=True).config.transform.center_crop_area == 0.9
    assert built(unnorm_key="tiny").statistics.key == "tiny"
    with pytest.raises(CheckpointError, match="no statistics for 'other'"):
        built(unnorm_key="other")
    with pytest.raises(CheckpointError, match="the option head=l1 fits"):
        built(head="diffusion")
    with pytest.raises(ConfigError, match="no option 'centre_crop'; did you mean 'center_crop'"):
        OFTFactory.describe("mini", None, {"centre_crop": False})
    with pytest.raises(ConfigError, match="not both"):
        OFTFactory.describe("mini", shipped, {})


def test_a_preset_that_is_no_more(shipped: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(factory, "_CHECKPOINTS", tmp_path)
    with pytest.raises(CheckpointError, match=f"{tmp_path / 'mini'}: no such folder"):
        built()
    assert OFTFactory.describe("tiny", None, {}).info.untrained


def test_every_trained_preset_is_there() -> None:
    (spec,) = (spec for spec in tokenprune_adapters.tokenprune_register() if spec.name == "openvla-oft")
    assert set(spec.presets) == {*PRESETS, *tokenprune_adapters.OFT_TRAINED}
    assert all("untrained" in spec.presets[name] for name in PRESETS)
    for name in tokenprune_adapters.OFT_TRAINED:
        assert not OFTFactory.describe(name, None, {}).info.untrained
        assert verify_oft(factory._CHECKPOINTS / name, oft_config.TRAINED_OPTIONS[name]).clean


def test_a_name_that_is_nearly_the_minis(shipped: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'mini'"):
        OFTFactory.describe("mimi", None, {})
