"""Checkpoints of pi0 and pi0.5 in the formats of openpi, lerobot and transformers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tokenprune.engine.adapter import Findings
from tokenprune.errors import CheckpointError, ConfigError
from tokenprune_adapters.backbones.common.options import whole_number
from tokenprune_adapters.backbones.pi0.backbone import PI0, PI0Setup
from tokenprune_adapters.backbones.pi0.config import PI0Config, Variant, with_options
from tokenprune_adapters.backbones.pi0.config_files import FileConfig, Format, find_format, read_config_file
from tokenprune_adapters.backbones.pi0.model import PI0Model
from tokenprune_adapters.backbones.pi0.prompt import GemmaTokenizer
from tokenprune_adapters.backbones.pi0.statistics import read_lerobot, read_openpi
from tokenprune_adapters.backbones.pi0.tensor_names import take_pi0_inventory
from tokenprune_adapters.inputs.statistics import Standard, Statistics
from tokenprune_adapters.inputs.tokenizer import read_tokenizer
from tokenprune_adapters.weights.folder import JSON_FILES, local_folder
from tokenprune_adapters.weights.loading import empty_model, load_weights
from tokenprune_adapters.weights.tensor_files import stored_safetensors

# lerobot keeps its statistics in safetensors files.
_DESCRIBING = (*JSON_FILES, "policy_*.safetensors")
_FILES = (*JSON_FILES, "*.safetensors")
_PREPROCESSOR = "policy_preprocessor.json"
_OWN_OPTIONS = ("format", "statistics", "tokenizer", "prompt_state")


def read_pi0(variant: Variant, folder: Path, options: Mapping[str, Any]) -> PI0Setup:
    """Read a checkpoint's configuration, tokenizer and statistics; no weights are read or downloaded.

    Images are prepared like openpi's in every format. Actions are in LIBERO's units if the dataset's name contains
    `libero`; otherwise their units are not known.

    Args:
        variant: The policy that the checkpoint must be of.
        folder: A folder written by openpi's conversion or training for PyTorch, by lerobot or by transformers; or a hub
            id `owner/name` of one of the latter two.
        options: See `with_options`, whose options take precedence over the files; and these:

            - `format`: `openpi`, `lerobot` or `transformers`, if no file tells it.
            - `tokenizer`: PaliGemma's `tokenizer.json`, if the folder has none.
            - `statistics`: a folder with openpi's `norm_stats.json`, to replace the checkpoint's own; `none` for states
              and actions in the policy's own units. Must be given for transformers' format.
            - `unnorm_key`: the dataset, if there are statistics of several.
            - `prompt_state`: numbers of state in pi0.5's prompt, 32 for policies trained with lerobot before 0.5.0,
              which appended zeros; no file states it.

            The formats of openpi and transformers do not state `dims`, `state_size` and `relative`, and openpi's
            training does not state `horizon`; then they must be given. `state_size` is null for a pi0.5 that reads
            no state, such as openpi's for LIBERO. `relative` is 6 for openpi's pi0 for LIBERO, whose training adds a
            delta transform.

    Raises:
        CheckpointError: If a file is missing, malformed, of another policy, or asks for what is not supported.
        ConfigError: If an option is wrong or missing.
    """
    return _read(variant, local_folder(folder, _DESCRIBING), options)


def load_pi0(
    variant: Variant, folder: Path, options: Mapping[str, Any], device: torch.device, dtype: torch.dtype
) -> PI0:
    """Load a checkpoint.

    Every tensor of every file is accounted for before the first is read. Only tensors that no query needs are left
    out, by name: the expert's word embeddings and output layer, and the prefix's output layer if its word embeddings
    are in the files. Tensors are read one by one into a model on the meta device.

    Args:
        variant: See `read_pi0`.
        folder: See `read_pi0`.
        options: See `read_pi0`.
        device: Where the weights go.
        dtype: Their type, whatever the files hold.

    Raises:
        CheckpointError: If a file is missing, damaged or unsafe, or does not fit the configuration.
        ConfigError: If an option is wrong or missing.
    """
    local = local_folder(folder, _FILES)
    setup = _read(variant, local, options)
    model = empty_model(PI0Model, setup.config)
    inventory = take_pi0_inventory(variant, model.state_dict(), stored_safetensors(local), local)
    load_weights(model, inventory, device, dtype)
    return PI0(setup, model, setup.config.info(str(folder), untrained=False))


def verify_pi0(variant: Variant, folder: Path, options: Mapping[str, Any]) -> Findings:
    """List what a checkpoint holds and what of it does not fit the model; no weights are read.

    Raises:
        CheckpointError: If a file is missing, damaged or unsafe, or the checkpoint is of another policy.
        ConfigError: If an option is wrong or missing.
    """
    local = local_folder(folder, _FILES)
    setup = _read(variant, local, options)
    model = empty_model(PI0Model, setup.config)
    inventory = take_pi0_inventory(variant, model.state_dict(), stored_safetensors(local), local)
    return inventory.findings((setup.statistics.key,), setup.config.state_size)


def configure(stated: FileConfig, file_format: Format, folder: Path | None, options: Mapping[str, Any]) -> PI0Setup:
    """Complete what `config.json` states with the user's options, the statistics and the tokenizer.

    Args:
        stated: What the file states.
        file_format: The checkpoint's format.
        folder: The checkpoint; None for a loaded model.
        options: See `read_pi0`.

    Raises:
        CheckpointError: If statistics or tokenizer are missing or malformed.
        ConfigError: If an option is wrong or missing.
    """
    config = _with_options(stated, file_format, options)
    statistics = _statistics(config, file_format, folder, options)
    if "libero" not in statistics.key:
        config = replace(config, action=replace(config.action, metric={}))
    path = options.get("tokenizer")
    if path is None:
        if folder is None:
            raise ConfigError("a loaded model has no tokenizer; give the option tokenizer, PaliGemma's tokenizer.json")
        path = folder / "tokenizer.json"
    if not isinstance(path, str | Path):
        raise ConfigError(f"tokenizer must be the path of a tokenizer.json, got {path!r}")
    return PI0Setup(config, _tokenizer(Path(path), config.vocab), statistics)


def _read(variant: Variant, folder: Path, options: Mapping[str, Any]) -> PI0Setup:
    file_format = find_format(folder, options.get("format"))
    return configure(read_config_file(variant, folder, file_format), file_format, folder, options)


def _with_options(stated: FileConfig, file_format: Format, options: Mapping[str, Any]) -> PI0Config:
    own = {key: value for key, value in options.items() if key not in _OWN_OPTIONS}
    chosen = {"views": stated.slots, **stated.options, **own}
    config = with_options(stated.config, chosen)
    needed = ("horizon", "dims", "state_size", *(() if file_format == "lerobot" else ("relative",)))
    lacking = [name for name in needed if name not in chosen]
    if lacking:
        raise ConfigError(
            f"no file of this checkpoint in {file_format}'s format states {', '.join(lacking)}; give each as an option"
        )
    if len(config.views) > len(stated.slots):
        raise ConfigError(f"views has {len(config.views)} cameras; the checkpoint has {', '.join(stated.slots)}")
    spelled = options.get("prompt_state")
    if spelled is None:
        return config
    if not config.prompt_state:
        raise ConfigError("prompt_state is for a pi0.5 whose prompt spells the state; this policy's does not")
    count = whole_number("prompt_state", spelled, least=config.prompt_state, most=config.width)
    return replace(config, prompt_state=count)


def _statistics(config: PI0Config, file_format: Format, folder: Path | None, options: Mapping[str, Any]) -> Statistics:
    source, key = options.get("statistics"), options.get("unnorm_key")
    dims, size = config.action.dims, config.state_size
    if source == "none":
        plain = [Standard(np.zeros(count), np.ones(count), 0.0) for count in (dims, size or 1)]
        return Statistics("(none)", plain[0], plain[1] if size else None)
    if source is not None and not isinstance(source, str | Path):
        raise ConfigError(f"statistics must be a folder with openpi's norm_stats.json, or none, got {source!r}")
    quantiles = config.variant == "pi05"
    if source is not None:
        return read_openpi(Path(source), key, dims, size, quantiles=quantiles)
    if folder is None or file_format == "transformers":
        raise ConfigError(
            "transformers' models carry no statistics; give the option statistics, a folder with openpi's "
            "norm_stats.json, or none for states and actions in the policy's own units"
        )
    if file_format == "openpi":
        return read_openpi(folder / "assets", key, dims, size, quantiles=quantiles)
    if key is not None:
        raise ConfigError(f"unnorm_key is '{key}'; lerobot's statistics are of one dataset, which no file names")
    if not (folder / _PREPROCESSOR).exists():
        raise CheckpointError(
            f"{folder / _PREPROCESSOR}: no such file; for a checkpoint of lerobot before 0.4, which has its statistics "
            "among the weights, lerobot.processor.migrate_policy_normalization writes it"
        )
    return read_lerobot(folder, dims, size)


def _tokenizer(path: Path, vocab: int) -> GemmaTokenizer:
    try:
        tokenizer = GemmaTokenizer.from_file(path)
    except CheckpointError as error:
        if path.exists():
            raise
        raise CheckpointError(f"{error}, or give another's path as the option tokenizer") from error
    # A prompt never contains special tokens, and the id of PaliGemma's image token is beyond the table.
    raw = read_tokenizer(path)
    special = {index for index, token in raw.get_added_tokens_decoder().items() if token.special}
    largest = max(set(raw.get_vocab().values()) - special)
    if largest >= vocab:
        raise CheckpointError(f"{path}: has token {largest}; the embedding table has {vocab} rows")
    return tokenizer
