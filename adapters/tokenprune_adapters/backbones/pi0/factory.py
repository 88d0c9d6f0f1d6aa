"""Makes pi0 and pi0.5 policies, from a preset or a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from tokenprune.engine.adapter import Description, Findings
from tokenprune.errors import CheckpointError
from tokenprune_adapters.backbones.pi0.backbone import PI0
from tokenprune_adapters.backbones.pi0.config import PRESETS, PI0Config, Variant, preset, with_options
from tokenprune_adapters.backbones.pi0.model import PI0Model
from tokenprune_adapters.backbones.pi0.prompt import GemmaTokenizer
from tokenprune_adapters.backbones.pi0.release import adopt_pi0, load_pi0, read_pi0, verify_pi0
from tokenprune_adapters.inputs.statistics import Normaliser, Quantiles, Standard, Statistics
from tokenprune_adapters.weights.sources import existing, one_source, preset_of
from tokenprune_adapters.weights.untrained import fill_untrained


class PI0Factory:
    """Makes pi0 policies; implements `tokenprune.engine.adapter.BackboneFactory`."""

    variant: ClassVar[Variant] = "pi0"

    @classmethod
    def describe(cls, name: str | None, checkpoint: Path | None, options: Mapping[str, Any]) -> Description:
        """What would be built; nothing is allocated."""
        one_source(name, checkpoint)
        if checkpoint is not None:
            release = read_pi0(cls.variant, Path(checkpoint), options)
            config, tokenizer = release.config, release.tokenizer
            info = config.info(str(checkpoint), untrained=False)
        else:
            config, tokenizer = _untrained_config(cls.variant, name, options), GemmaTokenizer.bundled()
            info = config.info(name or "", untrained=True)
        return Description(
            info,
            lambda instruction: config.layout(tokenizer.encode(instruction, config.max_text, config.spelled(None))),
            config.transform.cropped,
            existing(checkpoint),
        )

    @classmethod
    def build(
        cls,
        name: str | None,
        checkpoint: Path | None,
        options: Mapping[str, Any],
        device: torch.device,
        dtype: torch.dtype,
        seed: int,
    ) -> PI0:
        """A policy from a checkpoint, or with untrained weights from a preset.

        Raises:
            ConfigError: If neither or both of preset and checkpoint are given, or an option is wrong.
            CheckpointError: If the checkpoint cannot be used.
        """
        one_source(name, checkpoint)
        if checkpoint is not None:
            return load_pi0(cls.variant, Path(checkpoint), options, device, dtype)
        config, tokenizer = _untrained_config(cls.variant, name, options), GemmaTokenizer.bundled()
        if tokenizer.vocab_size > config.vocab:
            raise CheckpointError(
                f"the tokenizer has {tokenizer.vocab_size} tokens, the embedding table {config.vocab} rows"
            )
        with torch.device("meta"):
            model = PI0Model(config)
        fill_untrained(model, seed, device, dtype)
        model.neutralise()
        return PI0(config, model, tokenizer, _identity(config), config.info(name or "", untrained=True))

    @classmethod
    def verify(cls, checkpoint: Path, options: Mapping[str, Any]) -> Findings:
        """What a checkpoint holds and what of it does not fit; no weights are read.

        Raises:
            ConfigError: If an option is wrong or missing.
            CheckpointError: If a file is missing, damaged or unsafe, or the checkpoint is of another policy.
        """
        return verify_pi0(cls.variant, Path(checkpoint), options)

    @classmethod
    def adopt(cls, module: nn.Module, options: Mapping[str, Any]) -> PI0:
        """A policy that shares the weights of transformers' own model, which is already loaded; see `adopt_pi0`.

        Raises:
            ConfigError: If an option is wrong or missing.
            CheckpointError: If the model is another one, or cannot be shared.
        """
        return adopt_pi0(cls.variant, module, options)


class PI05Factory(PI0Factory):
    """Makes pi0.5 policies."""

    variant: ClassVar[Variant] = "pi05"


def _untrained_config(variant: Variant, name: str | None, options: Mapping[str, Any]) -> PI0Config:
    return with_options(preset(variant, preset_of(variant, name, PRESETS, options)), options)


def _identity(config: PI0Config) -> Statistics:
    """Statistics of no dataset, of the kind the release has: everything is normalised already."""

    def unit(size: int) -> Normaliser:
        if config.variant == "pi0":
            return Standard(np.zeros(size), np.ones(size), 0.0)
        return Quantiles(-np.ones(size), np.ones(size), 0.0)

    state = None if config.state_size is None else unit(config.state_size)
    return Statistics("(none)", unit(config.action.dims), state)
