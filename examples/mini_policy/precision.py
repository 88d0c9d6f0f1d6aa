"""Mixed precision for training on a CPU; weights stay float32."""

from __future__ import annotations

import torch

from tokenprune.model.device import native_dtype

_NATIVE = native_dtype(torch.device("cpu")) == torch.bfloat16


def mixed_precision() -> torch.autocast:
    """Autocast to bfloat16 if the processor has it natively, which is twice as fast there."""
    return torch.autocast("cpu", torch.bfloat16, enabled=_NATIVE)
