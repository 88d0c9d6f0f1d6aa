"""Configuration, preprocessing, tokenizer and statistics of a loaded upstream OpenVLA or OpenVLA-OFT model."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from tokenprune.errors import CheckpointError, ConfigError
from tokenprune_adapters.backbones.prismatic.image_transform import DINO_MEAN, DINO_STD, SIGLIP_MEAN, SIGLIP_STD
from tokenprune_adapters.backbones.prismatic.prompt import PromptTokenizer
from tokenprune_adapters.backbones.prismatic.release import (
    PrismaticRelease,
    image_transform,
    parse_config,
    prismatic_body,
)
from tokenprune_adapters.weights.folder import config_mapping


def read_live_model(module: nn.Module, tokenizer: object, *, causal: bool) -> PrismaticRelease:
    """Read from a loaded model what the files of a release state.

    Its image preprocessing is the release's; upstream keeps it in the processor, not in the model.

    Args:
        module: Upstream's `OpenVLAForActionPrediction`, with its `config`. Its `norm_stats`, if it has any, take
            precedence over those of the config.
        tokenizer: The tokenizer, or the path of its `tokenizer.json`.
        causal: See `read_release`.

    Raises:
        ConfigError: If there is no tokenizer.
        CheckpointError: If the model is another one, or the tokenizer does not fit it.
    """
    where = type(module).__name__
    raw = config_mapping(getattr(module, "config", None))
    fields = parse_config(raw, where)
    body = prismatic_body(fields, where, causal=causal)
    dino, siglip = {"mean": DINO_MEAN, "std": DINO_STD}, {"mean": SIGLIP_MEAN, "std": SIGLIP_STD}
    constants = [dino if tower.cls else siglip for tower in body.towers]
    preprocessor = {"input_sizes": [[3, size, size] for size in fields.image_sizes], "tvf_normalize_params": constants}
    transform = image_transform(preprocessor, raw, body.towers, where)
    if isinstance(tokenizer, str | Path):
        tokenizer = PromptTokenizer.from_file(tokenizer)
    if not isinstance(tokenizer, PromptTokenizer):
        raise ConfigError(f"tokenizer is {tokenizer!r}; valid: a PromptTokenizer, or the path of a tokenizer.json")
    if tokenizer.vocab_size > body.vocab:
        raise CheckpointError(f"{where}: has {body.vocab} embeddings, its tokenizer {tokenizer.vocab_size} tokens")
    statistics = getattr(module, "norm_stats", None) or fields.norm_stats or {}
    return PrismaticRelease(body, transform, tokenizer, statistics, Path(where))
