"""What can be wrong with a release folder: how to make it so, and what the error must say."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from tokenprune_adapters.backbones.openvla_oft.release import read_oft

CONFIG, PREPROCESSOR, STATISTICS = "config.json", "preprocessor_config.json", "dataset_statistics.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
FIRST, LAST = "model-00001-of-00003.safetensors", "model-00003-of-00003.safetensors"
HEAD, PROPRIO = "action_head--150000_checkpoint.pt", "proprio_projector--150000_checkpoint.pt"
QUERY = "language_model.model.layers.1.self_attn.q_proj.weight"
SCALE, GAMMA = (f"vision_backbone.featurizer.blocks.0.ls1.{name}" for name in ("scale_factor", "gamma"))
BLOCK_3 = "vision_backbone.featurizer.blocks.3.norm1.bias"
DATASET = "libero_spatial_no_noops"
ZERO = torch.zeros(2, 2)
Plant = Callable[[Path], object]


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def pickled(value: object) -> bytes:
    """What `torch.save` writes."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the content of a JSON, safetensors or `.pt` file."""
    if path.suffix == ".json":
        data = json.loads(path.read_text())
        change(data)
        path.write_text(json.dumps(data))
    elif path.suffix == ".pt":
        data = torch.load(path, weights_only=True)
        change(data)
        torch.save(data, path)
    else:
        data = load_file(path)
        change(data)
        save_file(data, path)


def changed(name: str, change: Callable[[dict[str, Any]], object]) -> Plant:
    """Change a file."""
    return lambda folder: edit(folder / name, change)


def put(name: str, key: str, value: object) -> Plant:
    """Set an entry of a file."""
    return changed(name, lambda data: data.update({key: value}))


def drop(name: str, key: str) -> Plant:
    """Remove an entry from a file."""
    return changed(name, lambda data: data.pop(key))


def rename(name: str, old: str, new: str) -> Plant:
    """Rename an entry of a file."""
    return changed(name, lambda data: data.update({new: data.pop(old)}))


def top(**fields: object) -> Plant:
    """Set fields of `config.json`."""
    return changed(CONFIG, lambda data: data.update(fields))


def text(**fields: object) -> Plant:
    """Set fields of its `text_config`."""
    return changed(CONFIG, lambda data: data["text_config"].update(fields))


def tower(**fields: object) -> Plant:
    """Set arguments of the second tower."""
    return changed(CONFIG, lambda data: data["timm_override_args"][1].update(fields))


def images(**fields: object) -> Plant:
    """Set fields of `preprocessor_config.json`."""
    return changed(PREPROCESSOR, lambda data: data.update(fields))


def place(shard: object) -> Plant:
    """Set where the index says the query projection is."""
    return changed(INDEX, lambda data: data["weight_map"].update({QUERY: shard}))


def remove(name: str) -> Plant:
    """Remove a file."""
    return lambda folder: (folder / name).unlink()


def write(name: str, content: bytes) -> Plant:
    """Replace a file."""
    return lambda folder: (folder / name).write_bytes(content)


def trap(name: str, dump: Callable[[Trap], bytes]) -> Plant:
    """Replace a file by one that runs code when it is unpickled."""
    return lambda folder: (folder / name).write_bytes(dump(Trap(folder / "ran")))


def cut(name: str, by: int) -> Plant:
    """Cut bytes off the end of a file."""
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-by])


def copy(name: str, to: str) -> Plant:
    """Copy a file."""
    return lambda folder: shutil.copy(folder / name, folder / to)


def no_statistics(folder: Path) -> None:
    """Neither of the two places has statistics."""
    (folder / STATISTICS).unlink()
    edit(folder / CONFIG, lambda data: data.pop("norm_stats"))


def damaged(folder: Path) -> None:
    """An archive that is whole, and holds something else."""
    content = (folder / HEAD).read_bytes()
    assert b"/data.pkl" in content
    (folder / HEAD).write_bytes(content.replace(b"/data.pkl", b"/dada.pkl"))


def shard_outside(folder: Path) -> None:
    """The index leads out of the folder, to a shard that exists."""
    (folder / FIRST).rename(folder.parent / FIRST)
    names = {FIRST: f"../{FIRST}"}
    edit(
        folder / INDEX, lambda data: data.update(weight_map={k: names.get(n, n) for k, n in data["weight_map"].items()})
    )


def fewer_rows(folder: Path) -> None:
    """The last token has no row, with one row more all have."""
    largest = max(Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab().values())
    text(vocab_size=largest + 1)(folder)
    read_oft(folder, {})
    text(vocab_size=largest)(folder)


def sparse_ids(folder: Path) -> None:
    """Few tokens, one of them with a high id."""
    path = folder / "tokenizer.json"
    edit(path, lambda data: data["model"]["vocab"].update({"<far>": 5000}))
    assert Tokenizer.from_file(str(path)).get_vocab_size() < 2048


def openpi(folder: Path) -> None:
    """A folder without config.json, with the statistics where openpi has them."""
    (folder / CONFIG).unlink()
    (folder / "assets").mkdir()


def swapped(data: dict[str, Any]) -> None:
    """Each tower under the other's name."""
    names = {"featurizer": "fused_featurizer", "fused_featurizer": "featurizer"}
    tensors = {".".join(names.get(part, part) for part in key.split(".")): value for key, value in data.items()}
    data.clear()
    data.update(tensors)


# Name: how to make the folder wrong, then what the error must contain.
Faults = dict[str, tuple[Plant | str, ...]]

JSON_FAULTS: Faults = {
    "no config": (remove(CONFIG), CONFIG, "No such file"),
    "config is no JSON": (write(CONFIG, b"{"), CONFIG, "not valid JSON"),
    "config is not text": (write(CONFIG, b"\xff\xfe\xff"), CONFIG, "not valid JSON"),
    "config is a list": (write(CONFIG, b"[1]"), CONFIG, "list"),
    "pi0 of lerobot": (
        write(CONFIG, b'{"type": "pi0"}'), CONFIG, "'type' is 'pi0'", "looks like a checkpoint of 'pi0'",
    ),
    "pi0 of transformers": (top(model_type="pi0"), CONFIG, "'model_type' is 'pi0'", "valid: 'openvla'"),
    "pi0 of openpi": (openpi, CONFIG, "no such file", "looks like openpi's", "pi0"),
    "no towers": (drop(CONFIG, "timm_model_ids"), CONFIG, "timm_model_ids", "missing"),
    "other towers": (
        changed(CONFIG, lambda data: data["timm_model_ids"].reverse()),
        CONFIG, "timm_model_ids", "valid: ['vit_large_patch14_reg4_dinov2.lvd142m', 'vit_so400m_patch14_siglip_224']",
    ),
    "not fused": (
        top(use_fused_vision_backbone=False),
        CONFIG, "timm_model_ids", "['vit_so400m_patch14_siglip_224'], since 'use_fused_vision_backbone' is False",
    ),
    "fused by half": (top(use_fused_vision_backbone=0.5), CONFIG, "use_fused_vision_backbone", "0.5", "boolean"),
    "one id": (
        top(timm_model_ids=["vit_so400m_patch14_siglip_224"]), CONFIG, "timm_model_ids", "is True",
    ),
    "one activation": (
        top(timm_override_act_layers=[None]), CONFIG, "timm_override_act_layers", "1 entries", "valid: 2",
    ),
    "no arguments": (top(timm_override_args=[]), CONFIG, "timm_override_args", "0 entries", "valid: 2"),
    "a tower's activation": (
        top(timm_override_act_layers=[None, "quick_gelu"]), CONFIG, "timm_override_act_layers.1", "quick_gelu",
    ),
    "one image size": (top(image_sizes=[56]), CONFIG, "image_sizes"),
    "image size as text": (top(image_sizes=["56", 56]), CONFIG, "image_sizes.0", "'56'", "integer"),
    "image size no multiple": (top(image_sizes=[56, 57]), CONFIG, "image_sizes", "entry 1", "57", "multiple"),
    "unequal grids": (top(image_sizes=[56, 28]), CONFIG, "image_sizes", "4x4 and 2x2"),
    "unknown argument": (tower(num_head=3), CONFIG, "timm_override_args.1.num_head", "did you mean 'num_heads'"),
    "negative depth": (tower(depth=-1), CONFIG, "timm_override_args.1.depth", "-1"),
    "tower heads": (tower(num_heads=3), CONFIG, "timm_override_args, entry 1", "multiple of heads 3"),
    "text config a list": (top(text_config=[]), CONFIG, "text_config", "[]"),
    "scaled rope": (
        text(rope_scaling={"type": "linear", "factor": 2.0}),
        CONFIG, "text_config.rope_scaling", "'linear'", "'default'",
    ),
    "scaled rope, new": (text(rope_parameters={"factor": 2.0}), CONFIG, "rope_parameters.factor", "not supported"),
    "endless layers": (text(num_hidden_layers=10**9), CONFIG, "text_config.num_hidden_layers", "1024"),
    "endless rows": (text(vocab_size=10**15), CONFIG, "text_config.vocab_size", "1048576"),
    "endless MLP": (tower(mlp_ratio=1e300), CONFIG, "timm_override_args.1.mlp_ratio", "1024"),
    "a width of 0": (text(hidden_size=0), CONFIG, "text_config.hidden_size", "is 0"),
    "a boolean count": (text(num_hidden_layers=True), CONFIG, "text_config.num_hidden_layers", "True"),
    "half a token": (text(vocab_size=2048.5), CONFIG, "text_config.vocab_size", "2048.5"),
    "endless epsilon": (text(rms_norm_eps=float("inf")), CONFIG, "text_config.rms_norm_eps", "finite"),
    "heads": (text(num_attention_heads=5), CONFIG, "text_config", "num_attention_heads 5", "multiple"),
    "key heads": (text(num_key_value_heads=3), CONFIG, "text_config", "num_key_value_heads 3", "multiple"),
    "odd heads": (text(num_attention_heads=32), CONFIG, "text_config", "width 1", "even"),
    "another decoder": (text(model_type="mistral"), CONFIG, "text_config.model_type", "'llama'"),
    "another activation": (text(hidden_act="gelu"), CONFIG, "text_config.hidden_act", "'silu'"),
    "attention biases": (text(attention_bias=True), CONFIG, "text_config.attention_bias", "False"),
    "no preprocessor": (remove(PREPROCESSOR), PREPROCESSOR, "No such file"),
    "unknown resize": (images(image_resize_strategy="crop"), PREPROCESSOR, "'crop'"),
    "sizes a number": (images(input_sizes=56), PREPROCESSOR, "malformed"),
    "interpolations null": (images(interpolations=None), PREPROCESSOR, "malformed"),
    "one tower's constants": (
        changed(PREPROCESSOR, lambda data: data["tvf_normalize_params"].pop()),
        PREPROCESSOR, "tvf_normalize_params", "valid: 2",
    ),
    "other image size": (images(input_sizes=[[3, 28, 28]] * 2), PREPROCESSOR, "side 28", "image_sizes [56, 56]"),
    "no statistics": (no_statistics, STATISTICS, "norm_stats"),
    "empty statistics": (write(STATISTICS, b"{}"), STATISTICS, "no dataset statistics"),
    "statistics as text": (
        changed(STATISTICS, lambda data: data[DATASET]["action"].update(q01=["a"] * 7)), STATISTICS, "malformed",
    ),
    "another robot's statistics": (
        changed(STATISTICS, lambda data: data[DATASET]["action"].update(q01=[0.0] * 14)),
        STATISTICS, "action.q01", "7", "14",
    ),
    "no state statistics": (
        changed(STATISTICS, lambda data: data[DATASET].pop("proprio")), STATISTICS, "'proprio' is missing",
    ),
    "no tokenizer": (remove("tokenizer.json"), "tokenizer.json", "no such file"),
    "not a tokenizer": (write("tokenizer.json", b"{}"), "tokenizer.json", "not a readable"),
    "a token more than rows": (fewer_rows, "tokenizer.json", "text_config.vocab_size"),
    "a token beyond the rows": (sparse_ids, "tokenizer.json", "token 5000", "text_config.vocab_size", "2048"),
}  # fmt: skip

WEIGHT_FAULTS: Faults = {
    "no weights": (remove(WEIGHTS), "single", WEIGHTS, INDEX),
    "empty": (write(WEIGHTS, b""), WEIGHTS, "truncated"),
    "truncated": (cut(WEIGHTS, 1), WEIGHTS, "truncated"),
    "another format": (write(WEIGHTS, pickled({QUERY: ZERO})), WEIGHTS, "not a safetensors file"),
    "missing": (drop(WEIGHTS, QUERY), "single", f"needs '{QUERY}'"),
    "left over": (put(WEIGHTS, "projector.fc4.bias", ZERO), WEIGHTS, "no place for 'projector.fc4.bias'"),
    "a scale for the lm_head": (
        put(WEIGHTS, "language_model.lm_head.weight_scale", ZERO), WEIGHTS, "'language_model.lm_head.weight_scale'",
    ),
    "timm's layer scale": (rename(WEIGHTS, SCALE, GAMMA), WEIGHTS, f"no place for '{GAMMA}'"),
    "a block more": (put(WEIGHTS, BLOCK_3, ZERO), WEIGHTS, f"no place for '{BLOCK_3}'"),
    "shape": (put(WEIGHTS, QUERY, ZERO), WEIGHTS, f"'{QUERY}' has shape [2, 2]", "wants [32, 32]"),
    "transposed": (
        put(WEIGHTS, "projector.fc2.weight", torch.zeros(160, 32)),
        WEIGHTS, "'projector.fc2.weight' has shape [160, 32]", "wants [32, 160]",
    ),
    "swapped towers": (
        changed(WEIGHTS, swapped), WEIGHTS, "no place for", f"'{SCALE.replace('.feat', '.fused_feat')}'",
    ),
    "vocabulary": (text(vocab_size=2112), WEIGHTS, "embed_tokens.weight' has shape [2048, 32]", "[2112, 32]"),
    "quantised": (put(WEIGHTS, QUERY, torch.zeros(32, 32, dtype=torch.int8)), WEIGHTS, QUERY, "I8", "BF16"),
    "no head": (remove(HEAD), "single", "action_head--*.pt", "L1 head", "looks like OpenVLA's"),
    "two heads": (copy(HEAD, "action_head--5_checkpoint.pt"), "several", HEAD, "action_head--5_checkpoint.pt"),
    "no projector": (remove(PROPRIO), "single", "proprio_projector--*.pt", "option proprio"),
    "truncated head": (cut(HEAD, 1), HEAD, "truncated"),
    "empty head": (write(HEAD, b""), HEAD, "truncated"),
    "damaged head": (damaged, HEAD, "cannot be read"),
    "a list": (write(HEAD, pickled([ZERO])), HEAD, "[tensor(", "dict of tensors"),
    "a bare tensor": (write(HEAD, pickled(ZERO)), HEAD, "tensor(", "dict of tensors"),
    "an empty dict": (write(HEAD, pickled({})), HEAD, "{}", "dict of tensors"),
    "a dict of dicts": (write(HEAD, pickled({"state": {"a": ZERO}})), HEAD, "'state' is a dict"),
    "no names": (write(HEAD, pickled({0: ZERO})), HEAD, "0 is a Tensor", "name"),
    "integers": (put(HEAD, "module.model.fc1.bias", torch.arange(32)), HEAD, "module.model.fc1.bias", "int64"),
    "sparse": (put(HEAD, "module.model.fc1.bias", torch.zeros(32).to_sparse()), HEAD, "fc1.bias", "sparse"),
    "no values": (put(HEAD, "module.model.fc1.bias", torch.zeros(32, device="meta")), HEAD, "fc1.bias", "meta"),
    "a module": (write(HEAD, pickled(torch.nn.Linear(2, 2))), HEAD, "refused", "more than tensors", "Linear"),
    "code": (trap(HEAD, pickled), HEAD, "refused", "more than tensors", "mkdir"),
    "code beside tensors": (
        trap(PROPRIO, lambda code: pickled({"module.fc1.bias": ZERO, "x": code})), PROPRIO, "refused",
    ),
    "code in a bare pickle": (trap(HEAD, pickle.dumps), HEAD, "not a file of torch.save"),
    "half parallel": (
        rename(HEAD, "module.model.fc1.bias", "model.fc1.bias"), HEAD, "no place for 'module.model.layer_norm1.weight'",
    ),
    "diffusion head": (
        rename(HEAD, "module.model.fc1.bias", "module.noise_predictor.fc1.bias"),
        HEAD, "no place for 'module.noise_predictor.fc1.bias'",
    ),
    "missing in the head": (drop(HEAD, "module.model.fc2.bias"), HEAD, "needs 'model.fc2.bias'"),
    "another robot's head": (
        put(HEAD, "module.model.fc2.bias", torch.zeros(14)), HEAD, "'module.model.fc2.bias' has shape [14]", "[7]",
    ),
    "another robot's state": (
        put(PROPRIO, "module.fc1.weight", torch.zeros(32, 14)), PROPRIO, "'module.fc1.weight' has shape [32, 14]",
    ),
    "FiLM": (copy(HEAD, "vision_backbone--1_checkpoint.pt"), "vision_backbone--1_checkpoint.pt", "FiLM"),
}  # fmt: skip

SHARD_FAULTS: Faults = {
    "no shard": (remove(FIRST), INDEX, FIRST, "no such file"),
    "truncated shard": (cut(FIRST, 100), FIRST, "truncated"),
    "not in its shard": (drop(FIRST, QUERY), FIRST, f"'{QUERY}' is missing"),
    "in another shard": (place(LAST), LAST, f"'{QUERY}' is missing"),
    "in two shards": (put(LAST, QUERY, ZERO), LAST, f"'{QUERY}' is also in {FIRST}"),
    "not in the index": (changed(INDEX, lambda data: data["weight_map"].pop(QUERY)), FIRST, QUERY, "not listed"),
    "empty index": (write(INDEX, b"{}"), INDEX, "weight_map"),
    "a shard elsewhere": (shard_outside, INDEX, f"'../{FIRST}'", "beside it"),
    "a number for a shard": (place(1), INDEX, QUERY, "is 1"),
    "two forms": (copy(FIRST, WEIGHTS), "sharded", WEIGHTS, INDEX, "both"),
}  # fmt: skip
