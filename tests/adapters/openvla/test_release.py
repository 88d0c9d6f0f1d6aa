"""OpenVLA's releases: what is there is what runs, and what does not fit is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch

from tests.helpers.checkpoint_faults import edit
from tests.helpers.openvla_format import (
    DATASET,
    KEYS,
    LM_HEAD,
    UNUSED_KEYS,
    OpenVLAForActionPrediction,
    statistics,
    tensors,
    write_openvla,
)
from tests.helpers.openvla_release import BFLOAT, CPU, FLOAT, actions, adopted, original, says
from tests.helpers.tiny_openvla import INSTRUCTION, observation
from tokenprune.errors import CheckpointError, ConfigError
from tokenprune.loading import load
from tokenprune_adapters.backbones.openvla.backbone import OpenVLA
from tokenprune_adapters.backbones.openvla.config import SEVEN_B
from tokenprune_adapters.backbones.openvla.factory import OpenVLAFactory
from tokenprune_adapters.backbones.openvla.release import load_openvla, read_openvla
from tokenprune_adapters.backbones.prismatic.prompt import PromptTokenizer
from tokenprune_adapters.weights.tensor_files import StoredTensor

CONFIG, STATISTICS, WEIGHTS = "config.json", "dataset_statistics.json", "model.safetensors"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_openvla(tmp_path_factory.mktemp("releases") / "single", original())


@pytest.fixture
def single(written: Path, tmp_path: Path) -> Path:
    return shutil.copytree(written, tmp_path / "single")


def loaded(folder: Path, dtype: torch.dtype = FLOAT, **options: Any) -> OpenVLA:
    return load_openvla(folder, options, CPU, dtype)


def set_config(folder: Path, **fields: Any) -> None:
    edit(folder / CONFIG, lambda data: data.update(fields))


@pytest.mark.parametrize("dtype", [FLOAT, BFLOAT])
@pytest.mark.parametrize("shards", [0, 3])
def test_round_trip(dtype: torch.dtype, shards: int, tmp_path: Path) -> None:
    expected = original(dtype)
    found = loaded(write_openvla(tmp_path / "release", expected, dtype, shards), dtype)
    left, right = found.model.state_dict(), expected.model.state_dict()
    assert left.keys() == right.keys()
    assert all(torch.equal(value, right[name]) and value.dtype == dtype for name, value in left.items())
    assert not any(value.is_meta for value in (*found.model.parameters(), *found.model.buffers()))
    assert found.config == expected.config
    assert not found.info.untrained
    assert np.array_equal(actions(found), actions(expected))


def test_the_writer_knows_every_parameter() -> None:
    assert sorted(KEYS) == sorted(name for name, _ in original().model.named_parameters())


def test_load_by_name(single: Path) -> None:
    policy = load("openvla", checkpoint=single, dtype="float32")
    policy.reset(INSTRUCTION)
    assert np.array_equal(policy.act(observation()).actions, actions(original()))
    assert policy.backbone.info.source == str(single)


def test_defaults_are_those_of_the_7b_release(single: Path) -> None:
    def release(config: dict[str, Any]) -> None:
        for name in ("timm_override_args", "pad_to_multiple_of", "n_action_bins"):
            del config[name]
        config.update(image_sizes=[224, 224], text_config={"pad_token_id": 32000})

    edit(single / CONFIG, release)
    sizes = {"input_sizes": [[3, 224, 224]] * 2, "tvf_resize_params": [{"size": [224, 224], "interpolation": 3}] * 2}
    edit(single / "preprocessor_config.json", lambda data: data.update(sizes))
    assert read_openvla(single, {}).config == SEVEN_B


def test_described_from_json_alone(single: Path) -> None:
    (single / WEIGHTS).unlink()
    described = OpenVLAFactory.describe(None, single, {})
    assert (described.info.source, described.info.untrained) == (str(single), False)
    assert described.layout(INSTRUCTION) == original().layout(INSTRUCTION)
    with pytest.raises(ConfigError, match="not both"):
        OpenVLAFactory.describe("tiny", single, {})


def test_statistics_of_a_fine_tune_stand_before_those_of_the_config(single: Path) -> None:
    other = statistics(original(), "bridge_orig", "fractal20220817_data")
    set_config(single, norm_stats=other)
    assert loaded(single).statistics.key == DATASET
    (single / STATISTICS).unlink()
    with pytest.raises(CheckpointError) as error:
        loaded(single)
    assert says(error.value, "config.json", "give unnorm_key, one of bridge_orig, fractal20220817_data")
    with pytest.raises(CheckpointError, match="no statistics for 'bridge'; did you mean 'bridge_orig'"):
        loaded(single, unnorm_key="bridge")
    assert loaded(single, unnorm_key="bridge_orig").statistics.key == "bridge_orig"


def test_bounds_are_scaled_without_an_epsilon(single: Path) -> None:
    backbone = loaded(single)
    low, high = backbone.statistics.action.low, backbone.statistics.action.high
    ends = np.array([[[-1.0] * 7], [[1.0] * 7]])
    actions = backbone.unnormalise(ends, [])
    np.testing.assert_array_equal(actions[:, 0, :6], [low[:6], 0.5 * 2 * (high - low)[:6] + low[:6]])
    np.testing.assert_array_equal(actions[:, 0, 6], [-1, 1])


def test_the_dataset_decides_crop_and_units(single: Path) -> None:
    assert loaded(single).info.action.metric == {"translation": 0.05, "rotation": 0.5}
    assert loaded(single).config.transform.center_crop_area == 0.9
    assert loaded(single, center_crop=False).config.transform.center_crop_area is None
    (single / STATISTICS).write_text(json.dumps(statistics(original(), "bridge_orig")))
    assert loaded(single).info.action.metric == {}
    assert loaded(single).config.transform.center_crop_area is None
    assert loaded(single, center_crop=True).config.transform.center_crop_area == 0.9


def test_padding_and_bins_are_the_files(single: Path) -> None:
    plain = loaded(single, restrict=True)
    assert plain.bins.ids == range(1728, 1984)
    set_config(single, pad_to_multiple_of=0, n_action_bins=128)
    other = loaded(single, restrict=True)
    assert other.bins.ids == range(1920, 2048)
    assert not np.array_equal(actions(other), actions(plain))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"pad_to_multiple_of": "64"}, ("pad_to_multiple_of", "'64'")),
        ({"pad_to_multiple_of": True}, ("pad_to_multiple_of", "True")),
        ({"pad_to_multiple_of": -64}, ("pad_to_multiple_of", "-64")),
        ({"n_action_bins": None}, ("n_action_bins", "None")),
        ({"n_action_bins": 1}, ("n_action_bins 1", "2 bins")),
        ({"n_action_bins": 1985}, ("n_action_bins 1985", "pad_to_multiple_of 64", "vocab_size 2048")),
        ({"pad_to_multiple_of": 2048}, ("n_action_bins 256", "pad_to_multiple_of 2048")),
    ],
)
def test_action_tokens_that_cannot_be(fields: dict[str, Any], words: tuple[str, ...], single: Path) -> None:
    set_config(single, **fields)
    with pytest.raises(CheckpointError) as error:
        read_openvla(single, {})
    assert says(error.value, CONFIG, *words)


def test_the_prompt_style_is_only_taken_from_the_option(single: Path) -> None:
    folder = single.rename(single.parent / "openvla-v01-7b")
    plain, chat = loaded(folder), loaded(folder, prompt="vicuna")
    assert (plain.config.prompt, chat.config.prompt) == ("pure", "vicuna")
    tokenizer = PromptTokenizer.bundled()
    for backbone in (plain, chat):
        ids = tokenizer.encode(INSTRUCTION, style=backbone.config.prompt).ids
        assert backbone.prepare([observation()], [backbone.encode(INSTRUCTION)]).text.tolist() == [list(ids)]


@pytest.mark.parametrize(
    ("plant", "words"),
    [
        (lambda f: edit(f / WEIGHTS, lambda t: t.pop(LM_HEAD)), ("single", f"needs '{LM_HEAD}'")),
        (
            lambda f: edit(f / WEIGHTS, lambda t: t.update({LM_HEAD: torch.zeros(1984, 32)})),
            (WEIGHTS, LM_HEAD, "[1984, 32]", "[2048, 32]"),
        ),
        (
            lambda f: (f / "action_head--150000_checkpoint.pt").write_bytes(b""),
            ("action_head--150000_checkpoint.pt", "openvla-oft"),
        ),
        (lambda f: set_config(f, model_type="pi0"), (CONFIG, "'pi0'")),
        (lambda f: (f / "tokenizer.json").unlink(), ("tokenizer.json",)),
        (
            lambda f: edit(f / STATISTICS, lambda data: data[DATASET]["action"].update(q01=[0.0] * 14)),
            (STATISTICS, "action.q01", "7"),
        ),
    ],
)
def test_faults_are_told_before_a_weight_is_read(
    plant: Any, words: tuple[str, ...], single: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(single)
    monkeypatch.setattr(StoredTensor, "read", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(CheckpointError) as error:
        loaded(single)
    assert says(error.value, *words)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"unorm_key": DATASET}, ("unorm_key", "did you mean 'unnorm_key'")),
        ({"unnorm_key": 1}, ("unnorm_key", "1")),
        ({"views": []}, ("views",)),
    ],
)
def test_wrong_options(options: dict[str, Any], words: tuple[str, ...], single: Path) -> None:
    weights = tensors(original(), FLOAT)
    module = OpenVLAForActionPrediction(weights, statistics(original(), DATASET))
    for make in (
        lambda: loaded(single, **options),
        lambda: read_openvla(single, options),
        lambda: OpenVLAFactory.verify(single, options),
        lambda: adopted(module, **options),
    ):
        with pytest.raises(ConfigError) as error:
            make()
        assert says(error.value, *words)


def test_verify(single: Path) -> None:
    found = OpenVLAFactory.verify(single, {})
    assert found.clean
    assert found.files == (WEIGHTS,)
    assert found.dtypes == {"float32": len(KEYS) + len(UNUSED_KEYS)}
    assert sorted(found.unused) == sorted(f"{WEIGHTS}: {key}" for key in UNUSED_KEYS)
    assert (found.statistics, found.state_size) == ((DATASET,), None)


def test_verify_lists_what_does_not_fit_whatever_the_dataset(single: Path) -> None:
    (single / STATISTICS).write_text(json.dumps(statistics(original(), "one", "other")))

    def spoil(data: dict[str, torch.Tensor]) -> None:
        data["projector.fc4.bias"] = data.pop("projector.fc3.bias")
        data[LM_HEAD] = torch.zeros(2, 2)

    edit(single / WEIGHTS, spoil)
    found = OpenVLAFactory.verify(single, {})
    assert found.statistics == ("one", "other")
    assert found.missing == ("projector.fc3.bias",)
    assert found.unmapped == (f"{WEIGHTS}: projector.fc4.bias",)
    assert [LM_HEAD in line and "[2, 2]" in line for line in found.misshapen] == [True]


def test_a_hub_id_is_downloaded(single: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted: list[list[str]] = []

    def download(name: str, **arguments: Any) -> str:
        assert name == "openvla/openvla-7b"
        files = [
            CONFIG, "tokenizer.model", "model-00001-of-00003.safetensors", "action_head--1_checkpoint.pt",
            "modeling_prismatic.py", "pytorch_model.bin", "sub/model.safetensors",
        ]  # fmt: skip
        wanted.append(list(huggingface_hub.utils.filter_repo_objects(files, **arguments)))
        return str(single)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    hub = Path("openvla/openvla-7b")
    assert OpenVLAFactory.describe(None, hub, {}).info == loaded(hub).info
    assert wanted == [[CONFIG], [CONFIG, "model-00001-of-00003.safetensors", "action_head--1_checkpoint.pt"]]
