"""pi0 from transformers' own model, which is already loaded: its weights are shared, none is copied."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from tokenprune_adapters.backbones.pi0.backbone import PI0
from tokenprune_adapters.backbones.pi0.config import Variant
from tokenprune_adapters.backbones.pi0.config_files import read_transformers_config
from tokenprune_adapters.backbones.pi0.model import PI0Model
from tokenprune_adapters.backbones.pi0.release import configure
from tokenprune_adapters.backbones.pi0.tensor_names import take_pi0_inventory
from tokenprune_adapters.weights.folder import config_mapping
from tokenprune_adapters.weights.loading import empty_model, share_weights
from tokenprune_adapters.weights.tensor_files import stored_module


def adopt_pi0(variant: Variant, module: nn.Module, options: Mapping[str, Any]) -> PI0:
    """Share the weights of a loaded `PI0ForConditionalGeneration` of transformers; none is copied.

    Args:
        variant: `pi0`; transformers has no pi0.5.
        module: The model, on its device and in its dtype.
        options: See `read_pi0`; `tokenizer`, `statistics`, `dims`, `state_size` and `relative` must be given.

    Returns:
        The backbone, on the model's device and in its type.

    Raises:
        CheckpointError: If it is another model, or has tensors over several devices or of several types.
        ConfigError: If an option is wrong or missing.
    """
    where = type(module).__name__
    stated = read_transformers_config(variant, config_mapping(getattr(module, "config", None)), where)
    setup = configure(stated, "transformers", None, options)
    model = empty_model(PI0Model, setup.config)
    stored = stored_module(module.state_dict(), where)
    share_weights(model, take_pi0_inventory(variant, model.state_dict(), stored, Path(where)))
    return PI0(setup, model, setup.config.info(where, untrained=False))
