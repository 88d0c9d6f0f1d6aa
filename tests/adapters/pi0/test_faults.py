"""What is wrong with a checkpoint of pi0 or pi0.5 is said by file and key, before a weight is read."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer

from tests.helpers.checkpoint_faults import changed, cut, drop, edit, put, remove, rename
from tests.helpers.pi0_format import (
    ASSET,
    CONFIG,
    EMBEDDINGS,
    EXPERT,
    OPENPI,
    OUTPUT,
    SLOTS,
    STATE,
    TOWER,
    TRANSFORMERS,
    VARIANTS,
    WEIGHTS,
    actions,
    loaded,
    names,
    needed,
    shrink_releases,
    tiny_pi0,
    write_every,
    write_lerobot,
)
from tokenprune.errors import CheckpointError, ConfigError
from tokenprune_adapters.backbones.pi0.factory import PI0Factory, PI05Factory
from tokenprune_adapters.backbones.pi0.tensor_names import model_name
from tokenprune_adapters.weights.tensor_files import StoredTensor

FLOAT, BFLOAT = torch.float32, torch.bfloat16
VIEWS = list(SLOTS[:2])
FACTORIES = {"pi0": PI0Factory, "pi05": PI05Factory}
QUERY = f"{EXPERT}.model.layers.1.self_attn.q_proj.weight"
STATISTICS = "policy_postprocessor_step_0_unnormalizer_processor.safetensors"
POSITIONS = f"{TOWER.replace('tower', 'tower.vision_model')}.embeddings.position_embedding.weight"


@pytest.fixture(autouse=True)
def _tiny_releases(monkeypatch):
    shrink_releases(monkeypatch)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return write_every(tmp_path_factory.mktemp("pi0"))


@pytest.fixture
def copied(written, tmp_path):
    return lambda variant, kind: shutil.copytree(written[variant, kind], tmp_path / f"{variant}-{kind}")


# Faults are told, by file and key, before a weight is read.


@pytest.fixture
def unread(monkeypatch):
    def read(*_):
        raise AssertionError("weights were read before the fault was found")

    monkeypatch.setattr(StoredTensor, "read", read)


def vlm(part, **fields):
    return changed(CONFIG, lambda raw: raw["vlm_config"][part].update(fields))


def dit(**fields):
    return changed(CONFIG, lambda raw: raw["dit_config"].update(fields))


def state(**fields):
    return changed(CONFIG, lambda raw: raw["input_features"]["observation.state"].update(fields))


def no_head_dim(folder):
    edit(folder / CONFIG, lambda raw: raw["dit_config"].pop("head_dim"))


def no_cameras(folder):
    edit(folder / CONFIG, lambda raw: [raw["input_features"].pop(f"observation.images.{view}") for view in VIEWS])


def integers(folder):
    edit(folder / WEIGHTS, lambda held: held.update({QUERY: torch.zeros(32, 16, dtype=torch.int8)}))


def swap_shapes(folder):
    """Queries and keys of the expert, of eight and of four heads."""
    first, second = QUERY, QUERY.replace("q_proj", "k_proj")

    def swap(held):
        held[first], held[second] = held[second], held[first]

    edit(folder / WEIGHTS, swap)


def shape(key, *sizes):
    return changed(WEIGHTS, lambda held: held.update({key: torch.zeros(sizes)}))


def old_buffers(folder):
    edit(folder / WEIGHTS, lambda held: held.update({"normalize_inputs.buffer_observation_state.mean": torch.zeros(8)}))


def double(folder):
    key = POSITIONS.replace("vision_model.", "")
    edit(folder / WEIGHTS, lambda held: held.update({key: held[POSITIONS].clone()}))


def far_token(special):
    def plant(folder):
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        vocab = tokenizer.get_vocab_size()
        add = tokenizer.add_special_tokens if special else tokenizer.add_tokens
        tokenizer.add_special_tokens(["<bos>"])  # the bundled tokenizer is known by its vocabulary
        add([AddedToken(f"<extra{at}>", special=special, normalized=False) for at in range(2048 - vocab)])
        tokenizer.save(str(folder / "tokenizer.json"))

    return plant


FAULTS = {
    "openpi": {
        "unexpected": (put(WEIGHTS, "extra.weight", torch.zeros(2)), WEIGHTS, "no place for 'extra.weight'"),
        "missing": (drop(WEIGHTS, QUERY), "needs 'expert.layers.1.self_attn.q_proj.weight'"),
        "misspelled": (rename(WEIGHTS, QUERY, f"{QUERY}s"), WEIGHTS, f"no place for '{QUERY}s'"),
        "no embeddings": (drop(WEIGHTS, OUTPUT), "needs 'language.embed_tokens.weight'"),
        "queries and keys swapped": (swap_shapes, WEIGHTS, "k_proj.weight' has shape [32, 16]; the model wants [8,"),
        "positions of another grid": (shape(POSITIONS, 9, 24), WEIGHTS, POSITIONS, "has shape [9, 24]"),
        "flat positions": (shape(POSITIONS, 384), WEIGHTS, POSITIONS, "has shape [384]"),
        "both spellings": (double, WEIGHTS, POSITIONS, "are both the model's 'vision.pos_embed'"),
        "integers": (integers, WEIGHTS, QUERY, "stored as I8"),
        "statistics among the weights": (old_buffers, WEIGHTS, "normalize_inputs.buffer_observation_state.mean"),
        "truncated": (cut(WEIGHTS, 100), WEIGHTS, "truncated"),
        "no weights": (remove(WEIGHTS), "holds no weights"),
        "no tokenizer": (remove("tokenizer.json"), "tokenizer.json: no such file", "paligemma", "the option tokenizer"),
        "tokens without a row": (far_token(False), "tokenizer.json: has token 2048; the embedding table has 2048 rows"),
        "no statistics": (remove(f"assets/{ASSET}/norm_stats.json"), "assets: holds no <asset_id>/norm_stats.json"),
        "another expert": (
            lambda folder: (folder / CONFIG).write_text('{"action_expert_variant": "gemma_300"}'),
            CONFIG, "'action_expert_variant' is 'gemma_300'; did you mean 'gemma_300m'?",
        ),
    },
    "lerobot": {
        "no config": (remove(CONFIG), CONFIG, "no such file", "give the option format"),
        "config is no JSON": (lambda folder: (folder / CONFIG).write_text("{"), CONFIG, "not valid JSON"),
        "several observations": (put(CONFIG, "n_obs_steps", 2), CONFIG, "'n_obs_steps' is 2"),
        "relative actions": (put(CONFIG, "use_relative_actions", True), CONFIG, "'use_relative_actions' is True"),
        "an adapter": (put(CONFIG, "use_peft", True), CONFIG, "'use_peft' is True"),
        "another period": (put(CONFIG, "max_period", 8.0), CONFIG, "'max_period' is 8.0", "less than or equal to 4"),
        "a shorter period": (put(CONFIG, "min_period", 1e-3), CONFIG, "'min_period' is 0.001"),
        "no square": (put(CONFIG, "image_resolution", [56, 70]), CONFIG, "is [56, 70]; valid: a square"),
        "no whole patches": (put(CONFIG, "image_resolution", [57, 57]), CONFIG, "image_size 57", "patch_size 14"),
        "a text for a number": (put(CONFIG, "chunk_size", "50"), CONFIG, "'chunk_size' is '50'"),
        "no chunk": (put(CONFIG, "chunk_size", 0), CONFIG, "'chunk_size' is 0"),
        "no features": (drop(CONFIG, "input_features"), CONFIG, "'input_features' is missing"),
        "no cameras": (no_cameras, CONFIG, "'input_features' has no camera"),
        "a long state": (state(shape=[33]), CONFIG, "has shape [33]; valid: one length, 32 at most"),
        "a state of two axes": (state(shape=[4, 2]), CONFIG, "'observation.state' has shape [4, 2]"),
        "another prefix": (put(CONFIG, "paligemma_variant", "gemma_7b"), CONFIG, "'paligemma_variant' is 'gemma_7b'"),
        "no preprocessor": (remove("policy_preprocessor.json"), "policy_preprocessor.json: no such file", "migrate"),
        "no postprocessor": (remove("policy_postprocessor.json"), "policy_postprocessor.json: cannot be read"),
        "no statistics": (remove(STATISTICS), STATISTICS, "missing, truncated"),
    },
    "transformers": {
        "no parts": (drop(CONFIG, "dit_config"), CONFIG, "'dit_config' is missing"),
        "no width": (no_head_dim, CONFIG, "'dit_config.head_dim' is missing"),
        "another activation": (dit(hidden_act="silu"), CONFIG, "'dit_config.hidden_act' is 'silu'"),
        "decoders of other depths": (dit(num_hidden_layers=2), CONFIG, "have depth 3 and 2; valid: the same"),
        "decoders of other heads": (dit(num_attention_heads=8), CONFIG, "have heads 4 and 8"),
        "other epsilons": (dit(rms_norm_eps=1e-5), CONFIG, "text_config and dit_config differ in rms_norm_eps"),
        "scaled positions": (dit(rope_parameters={"rope_type": "linear"}), CONFIG, "rope_type' is 'linear'"),
        "an odd head": (dit(head_dim=7), CONFIG, "'dit_config.head_dim' is 7", "multiple of 2"),
        "an odd width": (dit(hidden_size=15), CONFIG, "an expert of width 15", "an even width"),
        "another tower": (vlm("vision_config", num_attention_heads=5), CONFIG, "hidden_size 24", "heads 5"),
        "a tower with other numbers": (vlm("vision_config", intermediate_size=41), WEIGHTS, "the model wants [41]"),
        "exact GELU": (vlm("vision_config", hidden_act="gelu"), CONFIG, "vision_config.hidden_act' is 'gelu'"),
        "a state of another width": (put(CONFIG, "max_state_dim", 16), CONFIG, "'max_state_dim' is 16"),
    },
}  # fmt: skip


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize(("kind", "fault"), [(kind, fault) for kind, faults in FAULTS.items() for fault in faults])
def test_faults(kind, fault, copied, written):
    plant, *fragments = FAULTS[kind][fault]
    folder = copied("pi0", kind)
    plant(folder)
    with pytest.raises(CheckpointError) as caught:
        loaded("pi0", folder, **needed(kind))
    assert [fragment for fragment in fragments if fragment not in str(caught.value)] == []


def test_a_missing_shard(tmp_path):
    folder = write_lerobot(tmp_path / "sharded", tiny_pi0("pi05"), shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"index.json: names 'model-00002-of-00003.safetensors' for '"):
        loaded("pi05", folder)


def test_special_tokens_may_lie_behind_the_table(copied):
    folder = copied("pi0", "openpi")
    far_token(True)(folder)
    assert max(Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab().values()) == 2048
    assert max(loaded("pi0", folder, **OPENPI).prompt("<extra1> <extra9>").ids) < 2048


@pytest.mark.parametrize(
    ("given", "fragment"),
    [
        ({"tokenizer": 3}, "tokenizer must be the path of a tokenizer.json, got 3"),
        ({"statistics": 3}, "statistics must be a folder with openpi's norm_stats.json, or none, got 3"),
        ({"view": ["a"]}, "no option 'view'; did you mean 'views'?"),
        ({"state_size": None}, "state_size"),
        ({"horizon": 0}, "horizon"),
    ],
)
def test_wrong_options(given, fragment, written):
    with pytest.raises(ConfigError, match=re.escape(fragment)):
        loaded("pi0", written["pi0", "openpi"], **{**OPENPI, **given})


def test_transformers_has_no_statistics(written):
    with pytest.raises(ConfigError, match="transformers' models carry no statistics; give the option statistics"):
        loaded("pi0", written["pi0", "transformers"], **TRANSFORMERS)


def test_a_tokenizer_of_another_place(copied):
    folder = copied("pi05", "lerobot")
    (folder / "tokenizer.json").rename(folder.parent / "other.json")
    assert np.array_equal(
        actions(loaded("pi05", folder, tokenizer=folder.parent / "other.json")), actions(tiny_pi0("pi05", 1e-8))
    )


@settings(max_examples=12)
@given(st.sampled_from(VARIANTS), st.data(), st.sampled_from(["drop", "rename", "shape"]))
def test_no_tensor_goes_unnoticed(written, variant, data, fault):
    key = data.draw(st.sampled_from([key for key in names(variant) if key != EMBEDDINGS]))
    key = key.replace("vision_tower.", "vision_tower.vision_model.")

    def plant(held):
        values = held.pop(key)
        if fault == "rename":
            held[f"{key}_"] = values
        elif fault == "shape":
            held[key] = torch.zeros(*values.shape, 2)

    folder = written[variant, "openpi"].parent / "changed"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(written[variant, "openpi"], folder)
    edit(folder / WEIGHTS, plant)
    wanted = model_name(key) if fault == "drop" else f"{key}_?"
    with pytest.raises(CheckpointError, match=f"'{wanted}'"):
        loaded(variant, folder, **OPENPI)


# What `verify` says.


@pytest.mark.parametrize("variant", VARIANTS)
def test_verified(variant, written, copied):
    good = FACTORIES[variant].verify(written[variant, "lerobot"], {})
    assert good.clean
    assert (good.files, good.statistics, good.state_size) == ((WEIGHTS,), ("(unnamed)",), STATE)
    assert good.unused == tuple(f"{WEIGHTS}: model.{key}" for key in (f"{EXPERT}.lm_head.weight", OUTPUT))
    folder = copied(variant, "lerobot")

    def break_it(held):
        held["extra"] = torch.zeros(1)
        held["normalize_targets.buffer_action.mean"] = torch.zeros(7)
        del held[f"model.{QUERY}"]
        held["model.action_in_proj.bias"] = torch.zeros(3)

    edit(folder / WEIGHTS, break_it)
    bad = FACTORIES[variant].verify(folder, {})
    assert not bad.clean
    assert bad.unmapped == (f"{WEIGHTS}: extra", f"{WEIGHTS}: normalize_targets.buffer_action.mean")
    assert bad.missing == ("expert.layers.1.self_attn.q_proj.weight",)
    assert bad.misshapen == (f"{WEIGHTS}: model.action_in_proj.bias has shape [3]; the model wants [16]",)


def test_verified_on_the_command_line(written, monkeypatch, capsys):
    from tokenprune.cli import main

    words = ["verify", str(written["pi05", "lerobot"]), "--backbone", "pi05", "--dtype", "float32", "--json"]
    monkeypatch.setattr("sys.argv", ["tokenprune", *words])
    with pytest.raises(SystemExit) as stopped:
        main()
    found = json.loads(capsys.readouterr().out)
    assert (stopped.value.code, found["clean"], found["views_ignored"]) == (0, True, [])
