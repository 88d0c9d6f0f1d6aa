"""Devices and dtypes: uploads that do not block, and the dtype a device computes natively."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def native_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 if the device has instructions for it, else float32, which is faster than emulation."""
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        probes = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
        native = device.type == "cpu" and any(probe() for probe in probes if probe is not None)
    return torch.bfloat16 if native else torch.float32


def upload(values: Tensor, device: torch.device) -> Tensor:
    """Copy a host tensor to the device; to a GPU through pinned memory, so that the host does not wait."""
    if device.type != "cuda":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)
