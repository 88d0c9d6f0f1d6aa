"""Backbones by name, on a device and in a dtype."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tokenprune.adapter import Backbone
from tokenprune.errors import ConfigError, nearest
from tokenprune.registry import Registry

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def load_backbone(
    name: str,
    registry: Registry,
    checkpoint: str | Path | None,
    preset: str | None,
    device: str,
    dtype: str,
    seed: int,
    options: Mapping[str, Any],
) -> Backbone:
    """Load a backbone alone, to share it between policies; arguments as in `load`."""
    if dtype not in (*DTYPES, "auto"):
        raise ConfigError(f"unknown dtype '{dtype}'{nearest(dtype, (*DTYPES, 'auto'))}")
    try:
        target = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"'{device}' is no torch device; write cpu, cuda or cuda:0") from error
    if target.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device '{device}' was asked for, but torch {torch.__version__} sees no GPU")
    chosen = native_dtype(target) if dtype == "auto" else DTYPES[dtype]
    folder = None if checkpoint is None else Path(checkpoint)
    made: Backbone = registry.backbone_factory(name).build(preset, folder, options, target, chosen, seed)
    return made


def native_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device has instructions for it; emulating it would be slower than float32."""
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        probes = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
        native = device.type == "cpu" and any(probe() for probe in probes if probe is not None)
    return torch.bfloat16 if native else torch.float32
