"""Arithmetic of training: bfloat16 where this processor has it, twice as fast there; weights stay float32."""

from __future__ import annotations

import torch

from tokenprune.model.device import native_dtype

_NATIVE = native_dtype(torch.device("cpu")) == torch.bfloat16


def mixed_precision() -> torch.autocast:
    """Matrix products and attention in bfloat16 where that is native."""
    return torch.autocast("cpu", torch.bfloat16, enabled=_NATIVE)
