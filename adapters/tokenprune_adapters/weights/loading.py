"""Weights into a model: read from a checkpoint's files, or shared with a model that is already loaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn

from tokenprune.errors import CheckpointError
from tokenprune_adapters.weights.inventory import Inventory
from tokenprune_adapters.weights.tensor_files import StoredTensor

ConfigT = TypeVar("ConfigT")
ModelT = TypeVar("ModelT", bound=nn.Module)


def empty_model(model: Callable[[ConfigT], ModelT], config: ConfigT) -> ModelT:
    """A model on the meta device, which has no memory for its weights."""
    with torch.device("meta"):
        return model(config)


def load_weights(model: nn.Module, inventory: Inventory, device: torch.device, dtype: torch.dtype) -> None:
    """Read the weights of a model that was built on the meta device.

    Tensors are read one by one, so that beside the weights there is never more in memory than the file's copy of one.

    Args:
        model: The model; buffers that are in no `state_dict` are the caller's.
        inventory: Its tensors.
        device: Where they go.
        dtype: Their type, whatever the files hold.

    Raises:
        CheckpointError: If the inventory does not fit, before anything is read; or if a file can no longer be read.
    """
    inventory.check()
    state = {name: tensor.read(device, dtype) for name, tensor in inventory.tensors.items()}
    model.load_state_dict(state, assign=True)


def share_weights(model: nn.Module, inventory: Inventory) -> None:
    """Let a model that was built on the meta device share the weights of one that is already loaded.

    Nothing is copied and no type is changed: a change of the values in one model shows in the other.

    Args:
        model: The model; buffers that are in no `state_dict` are the caller's.
        inventory: Its tensors, from `stored_module`.

    Raises:
        CheckpointError: If the inventory does not fit, or its tensors are spread over several devices or types.
    """
    inventory.check()
    state = {name: tensor.fetch() for name, tensor in inventory.tensors.items()}
    devices: dict[torch.device, StoredTensor] = {}
    dtypes: dict[torch.dtype, StoredTensor] = {}
    for name, values in state.items():
        devices.setdefault(values.device, inventory.tensors[name])
        dtypes.setdefault(values.dtype, inventory.tensors[name])
    if len(devices) > 1:
        (one, first), (other, second), *_ = devices.items()
        raise CheckpointError(f"{first.file}: '{first.key}' is on {one}, '{second.key}' on {other}; valid: one device")
    if len(dtypes) > 1:
        found = ", ".join(f"'{tensor.key}' is {dtype}" for dtype, tensor in dtypes.items())
        raise CheckpointError(f"{next(iter(dtypes.values())).file}: {found}; valid: one type")
    model.load_state_dict(state, assign=True)
