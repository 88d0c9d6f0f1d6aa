"""What the formats of pi0's checkpoints state, and what options must say."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from transformers import PI0Config as HFConfig

from tests.helpers.checkpoint_faults import edit
from tests.helpers.pi0_format import (
    ASSET,
    CONFIG,
    DIMS,
    HORIZON,
    INSTRUCTION,
    OPENPI,
    SLOTS,
    STATE,
    STEPS,
    TRANSFORMERS,
    VARIANTS,
    WEIGHTS,
    actions,
    chunk,
    loaded,
    needed,
    observation,
    shrink_releases,
    tiny_config,
    tiny_pi0,
    transformers_config,
    write_every,
    write_openpi,
)
from tokenprune.errors import CheckpointError, ConfigError
from tokenprune_adapters.backbones.pi0.config import BASE
from tokenprune_adapters.backbones.pi0.config_files import SLOTS as OUR_SLOTS
from tokenprune_adapters.backbones.pi0.config_files import find_format, read_config_file
from tokenprune_adapters.backbones.pi0.factory import PI0Factory, PI05Factory
from tokenprune_adapters.backbones.pi0.release import read_pi0, verify_pi0
from tokenprune_adapters.inputs.statistics import Quantiles, Standard

FLOAT, BFLOAT = torch.float32, torch.bfloat16
VIEWS = list(SLOTS[:2])
FACTORIES = {"pi0": PI0Factory, "pi05": PI05Factory}


@pytest.fixture(autouse=True)
def _tiny_releases(monkeypatch):
    shrink_releases(monkeypatch)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return write_every(tmp_path_factory.mktemp("pi0"))


@pytest.fixture
def copied(written, tmp_path):
    return lambda variant, kind: shutil.copytree(written[variant, kind], tmp_path / f"{variant}-{kind}")


# openpi.


def test_openpi_states_little(copied):
    folder = copied("pi0", "openpi")
    for lacking in ("horizon", "dims", "state_size", "relative"):
        given = {key: value for key, value in OPENPI.items() if key != lacking}
        with pytest.raises(ConfigError, match=f"no file of this checkpoint in openpi's format states {lacking}; give"):
            loaded("pi0", folder, **given)
    assert read_pi0("pi0", folder, {**OPENPI, "views": VIEWS[:1]}).config.views == (SLOTS[0],)
    given = {key: value for key, value in OPENPI.items() if key != "views"}
    assert read_pi0("pi0", folder, given).config.views == SLOTS
    raw = {
        "action_dim": 32,
        "action_horizon": 3,
        "paligemma_variant": "gemma_2b",
        "action_expert_variant": "gemma_300m",
    }
    (folder / CONFIG).write_text(json.dumps({**raw, "precision": "bfloat16"}))
    del given["horizon"]
    assert read_pi0("pi0", folder, given).config.action.horizon == 3
    (folder / CONFIG).write_text(json.dumps({**raw, "action_dim": 24}))
    with pytest.raises(
        CheckpointError, match=r"'action_in_proj.weight' has shape \[16, 32\]; the model wants \[16, 24\]"
    ):
        loaded("pi0", folder, **given)


def test_openpis_slots():
    assert OUR_SLOTS == SLOTS


def test_views_are_renamed_in_slot_order(copied):
    folder = copied("pi0", "openpi")
    found = loaded("pi0", folder, **{**OPENPI, "views": ["front", "hand"]})
    images = observation()["images"]
    assert np.array_equal(
        chunk(found, images={"hand": images[SLOTS[1]], "front": images[SLOTS[0]]}).actions, actions(tiny_pi0("pi0"))
    )


def test_assets(copied, tmp_path):
    folder = write_openpi(tmp_path / "padded", tiny_pi0("pi05"), pad=32)
    assert np.array_equal(actions(loaded("pi05", folder, **OPENPI)), actions(tiny_pi0("pi05")))
    folder = copied("pi0", "openpi")
    shutil.copytree(folder / "assets" / ASSET, folder / "assets" / "droid")
    with pytest.raises(
        CheckpointError, match=f"assets: holds statistics of several datasets; give one of droid, {ASSET}"
    ):
        loaded("pi0", folder, **OPENPI)
    with pytest.raises(CheckpointError, match=r"no norm_stats.json for 'drod'; did you mean 'droid'"):
        loaded("pi0", folder, **OPENPI, unnorm_key="drod")
    found = loaded("pi0", folder, **OPENPI, unnorm_key="droid")
    assert found.statistics.key == "droid"
    assert (found.info.action.metric, found.info.action.groups) == ({}, tiny_config("pi0").action.groups)
    assert loaded("pi0", folder, **OPENPI, unnorm_key=ASSET).info.action.metric == BASE.action.metric
    shutil.rmtree(folder / "assets")
    with pytest.raises(CheckpointError, match=r"neither 'type'|no such file.*give the option format"):
        loaded("pi0", folder, **OPENPI)
    with pytest.raises(CheckpointError, match=r"assets: holds no <asset_id>/norm_stats.json"):
        loaded("pi0", folder, **OPENPI, format="openpi")
    assert loaded("pi0", folder, **OPENPI, format="openpi", statistics="none").statistics.key == "(none)"


@pytest.mark.parametrize("variant", VARIANTS)
def test_statistics_of_another_place(variant, written, copied):
    folder, assets = copied(variant, "lerobot"), written[variant, "openpi"] / "assets"
    found = loaded(variant, folder, statistics=str(assets))
    assert np.array_equal(actions(found), actions(tiny_pi0(variant, 1e-6)))
    assert found.statistics.key == ASSET


def test_no_statistics(written):
    found = loaded("pi0", written["pi0", "transformers"], **TRANSFORMERS, statistics="none").statistics
    values = np.linspace(-9, 9, STATE)
    assert np.array_equal(found.state.normalise(values), values)
    assert np.array_equal(found.action.unnormalise(values[:DIMS]), values[:DIMS])


def test_a_pi05_that_reads_no_state(written):
    given = {**OPENPI, "state_size": None}
    for source in ({}, {"statistics": "none"}):
        found = loaded("pi05", written["pi05", "openpi"], **given, **source)
        assert (found.config.state_size, found.config.prompt_state, found.statistics.state) == (None, 0, None)
        assert np.array_equal(chunk(found).actions, chunk(found, state=np.ones(STATE)).actions)


# lerobot.


def test_lerobots_configuration(copied):
    folder = copied("pi05", "lerobot")
    release = read_pi0("pi05", folder, {})
    assert (release.config.views, release.config.action.horizon, release.config.steps) == (tuple(VIEWS), HORIZON, STEPS)
    assert (release.config.action.dims, release.config.state_size, release.config.prompt_state) == (DIMS, STATE, STATE)
    assert isinstance(release.statistics.state, Quantiles)
    assert release.config.transform.size == 56
    given = read_pi0("pi05", folder, {"views": ["front"], "horizon": 2, "steps": 5, "dims": 3, "state_size": 5}).config
    assert (given.views, given.action.horizon, given.steps) == (("front",), 2, 5)
    assert (given.action.dims, given.state_size, given.prompt_state) == (3, 5, 5)
    with pytest.raises(ConfigError, match=f"views has 3 cameras; the checkpoint has {VIEWS[0]}, {VIEWS[1]}"):
        read_pi0("pi05", folder, {"views": ["a", "b", "c"]})
    with pytest.raises(ConfigError, match=r"unnorm_key is 'libero'; lerobot's statistics are of one dataset"):
        read_pi0("pi05", folder, {"unnorm_key": "libero"})


def test_lerobots_normalisation_is_the_files(copied):
    folder = copied("pi05", "lerobot")
    for name, at in (("policy_preprocessor.json", 3), ("policy_postprocessor.json", 0)):
        edit(folder / name, lambda data, at=at: data["steps"][at]["config"]["norm_map"].update(STATE="MEAN_STD"))
    found = read_pi0("pi05", folder, {}).statistics
    assert (type(found.state), type(found.action)) == (Standard, Quantiles)


def test_a_prompt_that_is_filled_up(written):
    folder = written["pi05", "lerobot"]
    assert read_pi0("pi05", folder, {"prompt_state": 32}).config.prompt_state == 32
    found = loaded("pi05", folder, prompt_state=10)
    plain = loaded("pi05", folder)
    longer, shorter = (backbone.prompt(INSTRUCTION, np.zeros(STATE)).state for backbone in (found, plain))
    assert len(longer) > len(shorter)
    for wrong in (7, 33, True, "32"):
        with pytest.raises(ConfigError, match="prompt_state must be a whole number, 8 to 32"):
            loaded("pi05", folder, prompt_state=wrong)
    for variant, given in (("pi0", {}), ("pi05", {"state_size": None})):
        with pytest.raises(ConfigError, match=r"prompt_state is for a pi0.5 whose prompt spells the state"):
            loaded(variant, written[variant, "lerobot"], **given, prompt_state=32)


def test_features_that_lerobot_leaves_out(copied):
    folder = copied("pi0", "lerobot")
    edit(folder / CONFIG, lambda raw: [raw["input_features"].pop("observation.state"), raw["output_features"].clear()])
    config = read_pi0("pi0", folder, {"statistics": "none"}).config
    assert (config.state_size, config.action.dims, config.action.metric) == (32, 32, {})


# The releases' dimensions.


def test_dimensions_that_only_names_stand_for(tmp_path, monkeypatch):
    monkeypatch.undo()
    raw = {"type": "pi0", "input_features": {"observation.images.a": {"type": "VISUAL", "shape": [3, 9, 9]}}}
    (tmp_path / CONFIG).write_text(json.dumps({**raw, "output_features": {}}))
    for kind, folder in (("lerobot", tmp_path), ("openpi", tmp_path / "none")):
        config = read_config_file("pi0", folder, kind).config
        assert (config.tower, config.decoder, config.expert) == (BASE.tower, BASE.decoder, BASE.expert)
        assert (config.vocab, config.width, config.eps, config.rope_theta) == (257152, 32, 1e-6, 10000.0)
    (tmp_path / CONFIG).write_text(json.dumps({**raw, "output_features": {}, "action_expert_variant": "gemma_2b"}))
    assert read_config_file("pi0", tmp_path, "lerobot").config.expert == BASE.decoder
    tiny = tiny_config("pi0")
    (tmp_path / CONFIG).write_text(json.dumps(transformers_config(tiny)))
    config = read_config_file("pi0", tmp_path, "transformers").config
    assert (config.tower, config.decoder, config.expert) == (tiny.tower, tiny.decoder, tiny.expert)
    assert config.vocab == tiny.vocab != BASE.vocab
    (tmp_path / CONFIG).write_text(json.dumps(HFConfig().to_dict()))
    config = read_config_file("pi0", tmp_path, "transformers").config
    assert (config.tower, config.decoder, config.expert) == (BASE.tower, BASE.decoder, BASE.expert)
    assert (config.vocab, config.width, config.eps, config.rope_theta) == (257152, 32, 1e-6, 10000.0)


# Formats.


def test_formats_are_told_apart(written, tmp_path):
    for (_, kind), folder in written.items():
        assert find_format(folder, None) == kind
        assert find_format(folder, kind) == kind
    for kind, other in (("lerobot", "openpi"), ("transformers", "lerobot")):
        with pytest.raises(CheckpointError, match=rf"{CONFIG}: is lerobot's with 'type', .*, not {other}'s"):
            find_format(written["pi0", kind], other)
    with pytest.raises(ConfigError, match=r"format is 'openp'; did you mean 'openpi'\?"):
        find_format(tmp_path, "openp")
    with pytest.raises(ConfigError, match="format is 1; valid: lerobot, openpi, transformers"):
        find_format(tmp_path, 1)
    with pytest.raises(CheckpointError, match=rf"{CONFIG}: no such file, .*give the option format"):
        find_format(tmp_path, None)
    (tmp_path / CONFIG).write_text('{"a": 1}')
    with pytest.raises(CheckpointError, match=rf"{CONFIG}: has neither 'type' nor 'model_type'"):
        find_format(tmp_path, None)
    (tmp_path / "params").mkdir()
    with pytest.raises(CheckpointError, match=r"params: weights for JAX are not read; .*convert_jax_model_to_pytorch"):
        find_format(tmp_path, "openpi")


@pytest.mark.parametrize("kind", ["openpi", "lerobot"])
@pytest.mark.parametrize(("variant", "other"), [("pi0", "pi05"), ("pi05", "pi0")])
def test_the_other_policys_checkpoint(kind, variant, other, written):
    file = CONFIG if kind == "lerobot" else WEIGHTS
    with pytest.raises(CheckpointError, match=rf"{file}: .*looks like a checkpoint of '{other}'"):
        loaded(variant, written[other, kind], **needed(kind))
    with pytest.raises(CheckpointError, match=rf"{file}: .*looks like a checkpoint of '{other}'"):
        verify_pi0(variant, written[other, kind], needed(kind))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("field", "kind"), [("model_type", "openvla"), ("type", "smolvla"), ("type", None)])
def test_the_checkpoint_of_another_model(variant, field, kind, tmp_path):
    (tmp_path / CONFIG).write_text(json.dumps({field: kind}))
    with pytest.raises(
        CheckpointError, match=rf"{CONFIG}: '{field}' is .*looks like a checkpoint of {kind and repr(kind)}"
    ):
        loaded(variant, tmp_path)
