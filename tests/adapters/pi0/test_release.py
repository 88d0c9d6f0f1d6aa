"""Checkpoints of pi0 and pi0.5: what is written in each format, or adopted, is what runs."""

from __future__ import annotations

import json
import shutil
import weakref
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import PI0Config as HFConfig
from transformers import PI0ForConditionalGeneration

from tests.helpers.checkpoint_faults import edit
from tests.helpers.pi0_format import (
    CONFIG,
    DIMS,
    EMBEDDINGS,
    EXPERT,
    INSTRUCTION,
    OPENPI,
    OUTPUT,
    SLOTS,
    TOKENIZER,
    TRANSFORMERS,
    VARIANTS,
    WEIGHTS,
    actions,
    chunk,
    loaded,
    names,
    needed,
    observation,
    same_weights,
    shrink_releases,
    tensors,
    tiny_config,
    tiny_pi0,
    transformers_config,
    write_every,
    write_lerobot,
    write_weights,
)
from tokenprune.engine.query import Query
from tokenprune.errors import CheckpointError, ConfigError
from tokenprune.loading import from_module, load
from tokenprune_adapters.backbones.pi0.factory import PI0Factory, PI05Factory
from tokenprune_adapters.backbones.pi0.live_model import adopt_pi0
from tokenprune_adapters.backbones.pi0.release import verify_pi0
from tokenprune_adapters.backbones.pi0.tensor_names import model_name
from tokenprune_adapters.weights import tensor_files as tensors_module

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


# What is written is what runs.


@pytest.mark.parametrize(
    ("variant", "kind"), [*((v, k) for v in VARIANTS for k in ("openpi", "lerobot")), ("pi0", "transformers")]
)
def test_every_format_gives_the_same_actions(variant, kind, written):
    original = tiny_pi0(variant, 1e-8 if kind == "lerobot" else 1e-6)
    given = needed(kind)
    if kind == "transformers":
        given["statistics"] = str(written["pi0", "openpi"] / "assets")
    found = loaded(variant, written[variant, kind], **given)
    same_weights(found, original)
    assert np.array_equal(actions(found), actions(original))
    assert replace(found.config, action=original.config.action) == original.config
    assert (found.info.source, found.info.untrained) == (str(written[variant, kind]), False)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    ("precision", "dtype", "shards"),
    [("bfloat16", FLOAT, 0), ("mixed", FLOAT, 3), ("mixed", BFLOAT, 0), ("float32", BFLOAT, 2)],
)
def test_types_and_shards(variant, precision, dtype, shards, tmp_path):
    original = tiny_pi0(variant, 1e-8, dtype=BFLOAT if precision != "float32" else FLOAT)
    folder = write_lerobot(tmp_path / "written", original, precision=precision, shards=shards)
    found = loaded(variant, folder, dtype)
    assert {value.dtype for value in found.model.state_dict().values()} == {dtype}
    same_weights(found, original)
    held = verify_pi0(variant, folder, {}).dtypes
    assert set(held) == {"float32", "bfloat16"} if precision == "mixed" else precision in held


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_writer_knows_every_parameter(variant):
    assert sorted(names(variant).values()) == sorted(tiny_pi0(variant).model.state_dict())


@pytest.mark.parametrize("prefix", ["", "model."])
@pytest.mark.parametrize("tower", ["", "vision_model."])
@pytest.mark.parametrize("language", ["", "model."])
@pytest.mark.parametrize("kept", [EMBEDDINGS, OUTPUT])
def test_spellings(prefix, tower, language, kept, written, tmp_path):
    # transformers writes each of these, depending on the checkpoint that it had read.
    original = tiny_pi0("pi0")
    folder = shutil.copytree(written["pi0", "transformers"], tmp_path / "spelled")
    held = tensors(original, prefix, tower, language)
    dropped = {EMBEDDINGS: OUTPUT, OUTPUT: EMBEDDINGS.replace("language_model.", f"language_model.{language}")}[kept]
    del held[prefix + dropped]
    write_weights(folder, held)
    same_weights(loaded("pi0", folder, **TRANSFORMERS, statistics="none"), original)


def test_word_embeddings_win_over_an_output_layer_that_differs(copied):
    folder = copied("pi05", "lerobot")
    edit(folder / WEIGHTS, lambda held: held[f"model.{OUTPUT}"].add_(1))
    same_weights(loaded("pi05", folder), tiny_pi0("pi05"))


@pytest.mark.parametrize("key", [f"{EXPERT}.lm_head.weight", f"{EXPERT}.model.embed_tokens.weight"])
def test_the_expert_reads_and_writes_no_words(key, copied):
    folder = copied("pi05", "lerobot")
    edit(folder / WEIGHTS, lambda held: held.pop(f"model.{EXPERT}.lm_head.weight"))
    same_weights(loaded("pi05", folder), tiny_pi0("pi05"))
    edit(folder / WEIGHTS, lambda held: held.update({f"model.{key}": torch.zeros(5, 5)}))
    same_weights(loaded("pi05", folder), tiny_pi0("pi05"))
    assert f"{WEIGHTS}: model.{key}" in verify_pi0("pi05", folder, {}).unused


def test_one_tensor_at_a_time_is_read(written, monkeypatch):
    fetched = []
    fetch = tensors_module._fetch

    def watched(path, key):
        assert not any(reference() is not None for reference in fetched)
        values = fetch(path, key)
        fetched.append(weakref.ref(values))
        return values

    monkeypatch.setattr(tensors_module, "_fetch", watched)
    loaded("pi05", written["pi05", "lerobot"])
    assert len(fetched) == len(names("pi05"))


@pytest.mark.parametrize("variant", VARIANTS)
def test_loaded_and_described_by_name(variant, written):
    folder = written[variant, "lerobot"]
    policy = load(variant, checkpoint=folder, dtype="float32")
    policy.reset(INSTRUCTION)
    assert np.array_equal(policy.act(observation()).actions, actions(tiny_pi0(variant, 1e-8)))
    described = FACTORIES[variant].describe(None, folder, {})
    assert described.info == policy.backbone.info
    assert described.layout(INSTRUCTION) == policy.backbone.layout(INSTRUCTION)


def test_described_without_weights(copied):
    folder = copied("pi05", "lerobot")
    (folder / WEIGHTS).unlink()
    assert PI05Factory.describe(None, folder, {}).info.views == tuple(VIEWS)


# transformers' own model.


@pytest.fixture(scope="module")
def native():
    """A tiny model of transformers with random weights."""
    torch.manual_seed(4)
    model = PI0ForConditionalGeneration(HFConfig(**transformers_config(tiny_config("pi0")))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


def sampled(native, backbone):
    """transformers' actions for the noise and the inputs of our first query."""
    seen = {}
    noise = Query.noise

    def kept(query, *shape):
        seen["noise"] = noise(query, *shape)
        return seen["noise"]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Query, "noise", kept)
        ours = chunk(backbone).normalised
    inputs = backbone.prepare([observation()], [backbone.encode(INSTRUCTION, observation()["state"])])
    patches = 16 * len(VIEWS)
    image = native.config.vlm_config.image_token_id
    ids = torch.cat([torch.full((1, patches), image), inputs.text], dim=1)
    pixels = torch.stack([inputs.images[view] for view in VIEWS], dim=1).float() / 127.5 - 1
    theirs = native.sample_actions(
        state=inputs.state,
        input_ids=ids,
        pixel_values=pixels,
        noise=seen["noise"],
        attention_mask=torch.ones_like(ids),
        pixel_attention_mask=torch.ones(1, len(VIEWS), dtype=torch.bool),
    )
    return ours, theirs[0, :, :DIMS].numpy()


def test_what_transformers_writes(native, tmp_path):
    native.save_pretrained(tmp_path)
    backbone = loaded("pi0", tmp_path, **TRANSFORMERS, statistics="none", tokenizer=str(TOKENIZER))
    ours, theirs = sampled(native, backbone)
    # transformers computes the time embedding in single precision.
    assert np.abs(ours - theirs).max() < 5e-4
    assert np.abs(theirs).max() > 1
    assert replace(backbone.config, action=tiny_config("pi0").action) == tiny_config("pi0")


def test_what_transformers_writes_after_it_read_openpis(written, tmp_path):
    folder = shutil.copytree(written["pi0", "openpi"], tmp_path / "openpi")
    (folder / CONFIG).write_text(json.dumps(transformers_config(tiny_config("pi0"))))
    PI0ForConditionalGeneration.from_pretrained(folder).save_pretrained(tmp_path / "again")
    found = loaded("pi0", tmp_path / "again", **TRANSFORMERS, statistics="none", tokenizer=str(TOKENIZER))
    same_weights(found, tiny_pi0("pi0"))


def test_adopted_by_reference(native):
    given = {**TRANSFORMERS, "statistics": "none", "tokenizer": str(TOKENIZER)}
    before = {name: (value.data_ptr(), value.requires_grad) for name, value in native.named_parameters()}
    policy = from_module(native, "pi0", **given)
    homes = {parameter.data_ptr() for parameter in native.parameters()}
    assert {parameter.data_ptr() for parameter in policy.backbone.model.parameters()} <= homes
    expected = {
        ours: value.data_ptr() for key, value in native.state_dict().items() if (ours := model_name(key)) is not None
    }
    assert {name: value.data_ptr() for name, value in policy.backbone.model.named_parameters()} == {
        name: expected[name] for name in names("pi0").values()
    }
    ours, theirs = sampled(native, policy.backbone)
    assert np.abs(ours - theirs).max() < 5e-4
    assert {name: (value.data_ptr(), value.requires_grad) for name, value in native.named_parameters()} == before
    assert policy.backbone.info.source == "PI0ForConditionalGeneration"


def test_what_cannot_be_adopted(native):
    given = {**TRANSFORMERS, "statistics": "none", "tokenizer": str(TOKENIZER)}
    with pytest.raises(CheckpointError, match=r"'model_type' is 'pi0'; .*looks like a checkpoint of 'pi0'"):
        PI05Factory.adopt(native, given)
    with pytest.raises(CheckpointError, match="config is a NoneType"):
        PI0Factory.adopt(torch.nn.Linear(2, 2), given)
    mixed = PI0ForConditionalGeneration(native.config)
    mixed.action_out_proj.to(BFLOAT)
    with pytest.raises(CheckpointError, match=r"is torch.float32, 'action_out_proj.weight' is torch.bfloat16"):
        adopt_pi0("pi0", mixed, given)
    for name in ("tokenizer", "statistics", "dims", "state_size", "relative"):
        with pytest.raises(ConfigError, match=name):
            adopt_pi0("pi0", native, {key: value for key, value in given.items() if key != name})


# The hub.


def test_a_hub_id(written, monkeypatch):
    calls = []

    def download(name, **arguments):
        calls.append(arguments)
        return str(written["pi05", "lerobot"])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    info = PI05Factory.describe(None, Path("owner/name"), {}).info
    assert loaded("pi05", Path("owner/name")).info == info
    state_file = "policy_preprocessor_step_3_normalizer_processor.safetensors"
    files = [
        "config.json",
        "policy_preprocessor.json",
        state_file,
        "tokenizer.json",
        "model.safetensors",
        "x.py",
        "a/b.json",
    ]
    fetched = [list(huggingface_hub.utils.filter_repo_objects(files, **arguments)) for arguments in calls]
    assert fetched == [files[:4], files[:5]]


def test_a_file_whose_dtype_is_odd_is_not_read(tmp_path):
    save_file({"a": torch.zeros(2, dtype=torch.float8_e4m3fn)}, tmp_path / WEIGHTS)
    (tmp_path / "assets").mkdir()
    with pytest.raises(CheckpointError, match="F8_E4M3"):
        verify_pi0("pi0", tmp_path, {**OPENPI, "statistics": "none", "tokenizer": TOKENIZER})
