"""Random weights for presets that nobody has trained."""

from __future__ import annotations

import torch
from torch import nn


@torch.no_grad()
def fill_untrained(module: nn.Module, seed: int, device: torch.device, dtype: torch.dtype) -> None:
    """Give a module on the meta device random weights.

    Matrices are scaled by the root of their inputs so that every part passes on signals of ordinary size; norms
    and layer scales are ones, biases zeros. The numbers are drawn in float32 on the device itself, one matrix after the
    other: they do not depend on the dtype, and next to the weights there is never more in memory than one matrix. They
    are no policy: whatever comes out is marked untrained.
    """
    # The type first, while nothing has memory yet.
    module.to(dtype)
    module.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(seed)
    for name, parameter in module.named_parameters():
        leaf = name.rsplit(".", 1)[-1]
        if parameter.dim() < 2:
            parameter.fill_(0.0 if leaf == "bias" else 1.0)
            continue
        fan_in = 1 if "embed" in name and "proj" not in name else parameter[0].numel()
        values = torch.empty(parameter.shape, device=device).normal_(0.0, fan_in**-0.5, generator=generator)
        parameter.copy_(values)
