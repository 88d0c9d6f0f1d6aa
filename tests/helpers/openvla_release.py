"""OpenVLA from a release's folder and from upstream's loaded model."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from tests.helpers.openvla_format import (
    DATASET,
    TOKENIZER,
    OpenVLAForActionPrediction,
    statistics,
    tensors,
)
from tests.helpers.tiny_openvla import act, observation, tiny_config, tiny_openvla
from tokenprune.errors import TokenPruneError
from tokenprune.pipelines.config import DENSE
from tokenprune_adapters.backbones.openvla.backbone import OpenVLA
from tokenprune_adapters.backbones.openvla.factory import OpenVLAFactory

CPU = torch.device("cpu")
FLOAT, BFLOAT = torch.float32, torch.bfloat16


def original(dtype: torch.dtype = FLOAT) -> OpenVLA:
    return tiny_openvla(tiny_config(), dtype=dtype, exact=False)


def upstream(dtype: torch.dtype = FLOAT, **fields: Any) -> OpenVLAForActionPrediction:
    backbone = original(dtype)
    return OpenVLAForActionPrediction(tensors(backbone, dtype), statistics(backbone, DATASET), **fields)


def adopted(module: torch.nn.Module, **options: Any) -> OpenVLA:
    return OpenVLAFactory.adopt(module, {"tokenizer": TOKENIZER, **options})


def actions(backbone: OpenVLA) -> np.ndarray:
    (chunk,) = act(backbone, DENSE, [observation()])
    return chunk.actions


def says(error: TokenPruneError, *words: str) -> bool:
    return not [word for word in words if word not in str(error)]
