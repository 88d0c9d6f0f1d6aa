"""Loading a release: what was written is what runs, and what is wrong with a folder is said before anything runs."""

from __future__ import annotations

import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.checkpoint_faults import (
    CONFIG,
    JSON_FAULTS,
    PREPROCESSOR,
    QUERY,
    SHARD_FAULTS,
    STATISTICS,
    WEIGHT_FAULTS,
    WEIGHTS,
    Plant,
    Trap,
    edit,
    images,
    pickled,
    text,
    top,
)
from tests.helpers.checkpoint_faults import HEAD as HEAD_FILE
from tests.helpers.checkpoint_faults import PROPRIO as PROPRIO_FILE
from tests.helpers.release_format import BODY_KEYS, HEAD, PROPRIO, UNUSED_KEYS, write_release
from tests.helpers.tiny_oft import INSTRUCTION, observation, tiny_config, tiny_policy_parts
from tokenprune.errors import CheckpointError, ConfigError
from tokenprune.loading import load
from tokenprune.pipelines.config import DENSE
from tokenprune.policy import Policy
from tokenprune.registry.discovery import Registry
from tokenprune_adapters.backbones.openvla_oft.backbone import OpenVLAOFT
from tokenprune_adapters.backbones.openvla_oft.factory import OFTFactory
from tokenprune_adapters.backbones.openvla_oft.release import load_oft, read_oft
from tokenprune_adapters.weights import tensor_files as tensors
from tokenprune_adapters.weights.tensor_files import StoredTensor, stored_pt

CPU = torch.device("cpu")
FLOAT, BFLOAT = torch.float32, torch.bfloat16


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """One release in a single file and one in three shards, with the same weights."""
    root = tmp_path_factory.mktemp("releases")
    backbone = tiny_policy_parts(tiny_config(), dtype=FLOAT)
    return write_release(root / "single", backbone), write_release(root / "sharded", backbone, shards=3)


@pytest.fixture
def single(written: tuple[Path, Path], tmp_path: Path) -> Path:
    return shutil.copytree(written[0], tmp_path / "single")


@pytest.fixture
def sharded(written: tuple[Path, Path], tmp_path: Path) -> Path:
    return shutil.copytree(written[1], tmp_path / "sharded")


def loaded(folder: Path, dtype: torch.dtype = FLOAT, **options: Any) -> OpenVLAOFT:
    return load_oft(folder, options, CPU, dtype)


def actions(backbone: OpenVLAOFT) -> np.ndarray:
    policy = Policy(backbone, DENSE, Registry())
    policy.reset(INSTRUCTION)
    return policy.act(observation(backbone.config)).actions


def same_weights(found: OpenVLAOFT, expected: OpenVLAOFT, dtype: torch.dtype) -> None:
    left, right = found.model.state_dict(), expected.model.state_dict()
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert value.dtype == dtype
        assert torch.equal(value, right[name].to(dtype)), name


# What is written is what runs.


@pytest.mark.parametrize("dtype", [FLOAT, BFLOAT])
@pytest.mark.parametrize(("shards", "prefix"), [(0, "module."), (3, ""), (1, "module.")])
def test_round_trip(dtype: torch.dtype, shards: int, prefix: str, tmp_path: Path) -> None:
    original = tiny_policy_parts(tiny_config(), dtype=dtype)
    found = loaded(write_release(tmp_path / "release", original, dtype, shards, prefix), dtype)
    same_weights(found, original, dtype)
    assert found.config == original.config
    assert not found.info.untrained
    assert np.array_equal(actions(found), actions(original))


def test_the_writer_knows_every_parameter() -> None:
    model = tiny_policy_parts(tiny_config()).model
    keys = [*BODY_KEYS, *(f"action_head.{key}" for key in HEAD), *(f"proprio_projector.{key}" for key in PROPRIO)]
    assert sorted(keys) == sorted(name for name, _ in model.named_parameters())


@pytest.mark.parametrize("stored", [FLOAT, BFLOAT, torch.float16, torch.float64])
@pytest.mark.parametrize("dtype", [FLOAT, BFLOAT, torch.float64])
def test_weights_are_cast_on_the_way(stored: torch.dtype, dtype: torch.dtype, tmp_path: Path) -> None:
    original = tiny_policy_parts(tiny_config(), dtype=stored)
    same_weights(loaded(write_release(tmp_path / "release", original, stored), dtype), original, dtype)


def test_without_robot_state(tmp_path: Path) -> None:
    original = tiny_policy_parts(tiny_config(views=("primary",), proprio=False), dtype=FLOAT)
    found = loaded(write_release(tmp_path / "release", original), views=["primary"], proprio=False)
    assert found.config == original.config
    assert np.array_equal(actions(found), actions(original))


def test_an_unread_projector_may_stay(single: Path) -> None:
    shutil.copy(single / PROPRIO_FILE, single / "proprio_projector--2_checkpoint.pt")
    assert loaded(single, proprio=False).config.state_size is None


def test_unused_tensors_need_not_be_there(single: Path) -> None:
    edit(single / WEIGHTS, lambda t: [t.pop(key) for key in UNUSED_KEYS])
    same_weights(loaded(single), tiny_policy_parts(tiny_config(), dtype=FLOAT), FLOAT)


def test_nothing_of_the_files_stays_in_memory(single: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[weakref.ref[torch.Tensor]] = []
    fetch = tensors._fetch

    def watched(path: Path, key: str) -> torch.Tensor:
        assert not any(reference() is not None for reference in fetched)
        values = fetch(path, key)
        fetched.append(weakref.ref(values))
        return values

    monkeypatch.setattr(tensors, "_fetch", watched)
    backbone = loaded(single)
    assert len(fetched) == len(BODY_KEYS)
    before = actions(backbone)
    for path in single.glob("*.*"):
        path.unlink()
    assert np.array_equal(actions(backbone), before)
    assert not any(value.is_meta for value in (*backbone.model.parameters(), *backbone.model.buffers()))


def test_norm_epsilon(single: Path) -> None:
    implied = loaded(single)
    text(rms_norm_eps=1e-6)(single)
    assert np.array_equal(actions(loaded(single)), actions(implied))
    text(rms_norm_eps=1e-2)(single)
    stated = loaded(single)
    assert (implied.config.body.eps, stated.config.body.eps) == (1e-6, 1e-2)
    assert not np.array_equal(actions(stated), actions(implied))


def test_rope_base(single: Path) -> None:
    plain = actions(loaded(single))
    text(rope_scaling=None, rope_parameters={"rope_type": "default", "rope_theta": 10000.0})(single)
    assert np.array_equal(actions(loaded(single)), plain)
    text(rope_parameters={"rope_type": "default", "rope_theta": 100.0})(single)
    assert loaded(single).config.body.rope_theta == 100
    text(rope_parameters=None, rope_theta=500, rope_scaling={"type": "default"})(single)
    assert loaded(single).config.body.rope_theta == 500
    assert not np.array_equal(actions(loaded(single)), plain)


def test_defaults_are_those_of_the_7b_release(single: Path) -> None:
    from tokenprune_adapters.backbones.openvla_oft.config import SEVEN_B

    def release(config: dict[str, Any]) -> None:
        del config["timm_override_args"]
        config.update(image_sizes=[224, 224], text_config={"pad_token_id": 32000})

    edit(single / CONFIG, release)
    sizes = [{"size": [224, 224], "interpolation": 3}] * 2
    images(input_sizes=[[3, 224, 224]] * 2, tvf_resize_params=sizes)(single)
    assert read_oft(single, {}).config == SEVEN_B


def test_preprocessing_is_the_files(single: Path) -> None:
    def change(data: dict[str, Any]) -> None:
        data.update(image_resize_strategy="letterbox")
        data["tvf_normalize_params"][1]["mean"] = [0.25, 0.5, 0.75]

    edit(single / PREPROCESSOR, change)
    transform = read_oft(single, {}).config.transform
    assert transform.resize == "letterbox"
    assert transform.means == ((0.484375, 0.455078125, 0.40625), (0.25, 0.5, 0.75))
    assert transform.center_crop_area == 0.9
    assert read_oft(single, {"center_crop": False}).config.transform.center_crop_area is None


def test_statistics_of_a_dataset(single: Path) -> None:
    path = single / STATISTICS
    edit(path, lambda data: data.update(other=data["libero_spatial_no_noops"]))
    with pytest.raises(
        CheckpointError, match=r"dataset_statistics\.json: .*unnorm_key, one of libero_spatial.*, other"
    ):
        loaded(single)
    with pytest.raises(CheckpointError, match=r"dataset_statistics\.json: .*did you mean 'libero_spatial_no_noops'"):
        loaded(single, unnorm_key="libero_spatial")
    assert loaded(single, unnorm_key="other").statistics.key == "other"


def test_statistics_in_the_config(single: Path) -> None:
    expected = actions(loaded(single))
    top(norm_stats=json.loads((single / STATISTICS).read_text()))(single)
    (single / STATISTICS).unlink()
    assert np.array_equal(actions(loaded(single)), expected)


def test_load_by_name(sharded: Path) -> None:
    policy = load("openvla-oft", checkpoint=sharded, views=["primary", "wrist"], dtype="float32")
    policy.reset(INSTRUCTION)
    expected = actions(tiny_policy_parts(tiny_config(), dtype=FLOAT))
    assert np.array_equal(policy.act(observation(tiny_config())).actions, expected)
    assert policy.backbone.info.source == str(sharded)


# A folder is described without its weights.


def test_described_from_json_alone(single: Path) -> None:
    for path in [*single.glob("*.safetensors"), *single.glob("*.pt")]:
        path.unlink()
    described = OFTFactory.describe(None, single, {})
    assert (described.info.source, described.info.untrained) == (str(single), False)
    assert described.layout(INSTRUCTION) == tiny_policy_parts(tiny_config()).layout(INSTRUCTION)


def test_remote_code_is_not_followed(single: Path) -> None:
    for name in ("modeling_prismatic", "configuration_prismatic", "processing_prismatic"):
        (single / f"{name}.py").write_text(f"open({str(single / 'ran')!r}, 'w')")
    actions(loaded(single))
    assert not (single / "ran").exists()


# Every fault is told, by file and key, before a weight is read.


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*_: object) -> torch.Tensor:
        raise AssertionError("weights were read before the fault was found")

    monkeypatch.setattr(StoredTensor, "read", read)


def refused(folder: Path, plant: Plant, *fragments: str) -> None:
    plant(folder)
    with pytest.raises(CheckpointError) as caught:
        loaded(folder)
    assert [fragment for fragment in fragments if fragment not in str(caught.value)] == []
    assert not (folder / "ran").exists()


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize("fault", JSON_FAULTS)
def test_fault_of_the_configuration(fault: str, single: Path) -> None:
    refused(single, *JSON_FAULTS[fault])
    with pytest.raises(CheckpointError):
        read_oft(single, {})


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize("fault", WEIGHT_FAULTS)
def test_fault_of_the_weights(fault: str, single: Path) -> None:
    refused(single, *WEIGHT_FAULTS[fault])


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize("fault", SHARD_FAULTS)
def test_fault_of_the_shards(fault: str, sharded: Path) -> None:
    refused(sharded, *SHARD_FAULTS[fault])


@pytest.mark.parametrize(
    ("options", "fragments"),
    [
        ({"unorm_key": "tiny"}, ["unorm_key", "did you mean 'unnorm_key'"]),
        ({"unnorm_key": 1}, ["unnorm_key", "1"]),
        ({"proprio": "yes"}, ["proprio", "'yes'"]),
        ({"views": []}, ["views"]),
    ],
)
def test_wrong_options(options: dict[str, Any], fragments: list[str], single: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_oft(single, options, CPU, FLOAT)
    assert all(fragment in str(caught.value) for fragment in fragments)


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(BODY_KEYS), st.sampled_from(["drop", "rename", "shape"]))
def test_no_tensor_goes_unnoticed(written: tuple[Path, Path], key: str, fault: str) -> None:
    def plant(data: dict[str, torch.Tensor]) -> None:
        values = data.pop(key)
        if fault == "rename":
            data[f"{key}_"] = values
        elif fault == "shape":
            data[key] = torch.zeros(*values.shape, 2)

    folder = written[0].parent / "changed"
    shutil.copytree(written[0], folder, dirs_exist_ok=True)
    edit(folder / WEIGHTS, plant)
    with pytest.raises(CheckpointError, match=f"'{key}_?'"):
        loaded(folder)


@settings(max_examples=20, deadline=None)
@given(st.sampled_from([WEIGHTS, HEAD_FILE, PROPRIO_FILE]), st.floats(0, 1, exclude_max=True))
def test_no_truncation_goes_unnoticed(written: tuple[Path, Path], name: str, share: float) -> None:
    folder = written[0].parent / "truncated"
    shutil.copytree(written[0], folder, dirs_exist_ok=True)
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: int(share * len(content))])
    with pytest.raises(CheckpointError, match=f"{name}: .*truncated"):
        loaded(folder)


def test_a_file_that_vanishes_while_it_is_read(single: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetch = tensors._fetch

    def vanishing(path: Path, key: str) -> torch.Tensor:
        if key == QUERY:
            path.unlink()
        return fetch(path, key)

    monkeypatch.setattr(tensors, "_fetch", vanishing)
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: '{QUERY}' cannot be read"):
        loaded(single)


def test_the_way_around_the_refusal_is_not_shown(tmp_path: Path) -> None:
    path = tmp_path / HEAD_FILE
    path.write_bytes(pickled(Trap(tmp_path / "ran")))
    with pytest.raises(CheckpointError) as caught:
        stored_pt(path)
    assert "weights_only" not in str(caught.value)
    assert caught.value.__cause__ is None


# Folders and the hub.


def test_an_existing_folder_stays_off_the_network(single: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("went to the hub"))
    (single.parent / "owner").mkdir()
    single.rename(single.parent / "owner" / "name")
    monkeypatch.chdir(single.parent)
    assert loaded(Path("owner/name")).info.source == "owner/name"
    for missing in ("nowhere", "/nowhere", "a/b/c", "../nowhere", "owner/name/config.json"):
        with pytest.raises(CheckpointError, match=f"{missing}: no such folder"):
            loaded(Path(missing))


def test_a_hub_id_is_downloaded(single: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, dict[str, Any]]] = []

    def download(name: str, **arguments: Any) -> str:
        calls.append((name, arguments))
        return str(single)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    info = OFTFactory.describe(None, Path("owner/name"), {}).info
    assert loaded(Path("owner/name")).info == info
    assert info.source == "owner/name"
    files = [
        "config.json", "model-00001-of-00004.safetensors", HEAD_FILE, PROPRIO_FILE, "vision_backbone--1_checkpoint.pt",
        "modeling_prismatic.py", "lora_adapter/adapter_model.safetensors", "pytorch_model.bin", "README.md",
    ]  # fmt: skip
    fetched = [list(huggingface_hub.utils.filter_repo_objects(files, **arguments)) for _, arguments in calls]
    assert fetched == [files[:1], files[:5]]
    assert {name for name, _ in calls} == {"owner/name"}


def test_a_hub_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for error in (LocalEntryNotFoundError("offline"), ValueError("bad id"), ConnectionError("reset")):

        def fail(*_: Any, error: Exception = error, **__: Any) -> str:
            raise error

        monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
        with pytest.raises(CheckpointError, match=f"'owner/name' .*{error}"):
            loaded(Path("owner/name"))
