"""Random weights for untrained presets."""

from __future__ import annotations

import torch
from torch import nn


@torch.no_grad()
def fill_untrained(module: nn.Module, seed: int, device: torch.device, dtype: torch.dtype) -> None:
    """Give a module on the meta device random weights.

    Matrices have a standard deviation of one over the root of their fan-in, so that activations keep their size; norms
    and layer scales are ones, biases zeros. Values are drawn in float32 on the device, one matrix after the other:
    they do not depend on the dtype, and beside the weights there is never more in memory than one matrix. Results of
    such weights are marked untrained.
    """
    # The type first, while the module has no memory.
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
