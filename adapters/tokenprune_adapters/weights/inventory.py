"""An inventory of a checkpoint: each stored tensor and each parameter of the model, accounted for before a read."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from tokenprune.engine.adapter import Findings
from tokenprune.errors import CheckpointError
from tokenprune_adapters.weights.tensor_files import StoredTensor

_NOTHING = re.compile(r"(?!)")


class Missing(NamedTuple):
    """A parameter that no stored tensor gives: the file or folder it should be in, and its name there."""

    where: Path
    name: str


class Misshapen(NamedTuple):
    """A stored tensor of the wrong shape, and the shape of the model's parameter."""

    tensor: StoredTensor
    wanted: tuple[int, ...]


@dataclass(frozen=True)
class Inventory:
    """The tensors of a checkpoint, or of a part of it, compared with a model's parameters.

    Attributes:
        tensors: Tensors that fit, by the model's name of the parameter.
        unused: Known tensors that no query needs.
        unmapped: Tensors that belong to no parameter.
        missing: Parameters that no stored tensor gives.
        misshapen: Tensors whose shape is not the parameter's.
    """

    tensors: Mapping[str, StoredTensor]
    unused: tuple[StoredTensor, ...] = ()
    unmapped: tuple[StoredTensor, ...] = ()
    missing: tuple[Missing, ...] = ()
    misshapen: tuple[Misshapen, ...] = ()

    def __add__(self, other: Inventory) -> Inventory:
        """The inventory of two parts of a checkpoint together.

        Raises:
            CheckpointError: If both hold the same parameter.
        """
        for name in self.tensors.keys() & other.tensors.keys():
            raise _duplicate(name, self.tensors[name], other.tensors[name])
        return Inventory(
            {**self.tensors, **other.tensors},
            self.unused + other.unused,
            self.unmapped + other.unmapped,
            self.missing + other.missing,
            self.misshapen + other.misshapen,
        )

    def under(self, prefix: str) -> Inventory:
        """The inventory of a submodule as part of the whole model, where its parameters' names begin with `prefix`."""
        return replace(self, tensors={prefix + name: tensor for name, tensor in self.tensors.items()})

    @property
    def stored(self) -> tuple[StoredTensor, ...]:
        """Every tensor of the files."""
        misshapen = (entry.tensor for entry in self.misshapen)
        return (*self.tensors.values(), *self.unused, *self.unmapped, *misshapen)

    def check(self) -> None:
        """Refuse a checkpoint that is not exactly what the model needs.

        Raises:
            CheckpointError: If a tensor is left over, missing, or has another shape, naming file and key.
        """
        if self.unmapped:
            file = self.unmapped[0].file
            keys = _listed(tensor.key for tensor in self.unmapped if tensor.file == file)
            raise CheckpointError(f"{file}: the model has no place for {keys}")
        if self.missing:
            where = self.missing[0].where
            names = _listed(entry.name for entry in self.missing if entry.where == where)
            raise CheckpointError(f"{where}: the model also needs {names}")
        for tensor, shape in self.misshapen:
            found, wanted = list(tensor.shape), list(shape)
            raise CheckpointError(f"{tensor.file}: '{tensor.key}' has shape {found}; the model wants {wanted}")

    def findings(self, statistics: Iterable[str], state_size: int | None) -> Findings:
        """The inventory as text, with file names instead of paths.

        Args:
            statistics: Datasets whose statistics the checkpoint holds.
            state_size: Numbers of robot state that a query needs, None if the policy reads none.
        """
        dtypes = Counter(str(tensor.dtype).removeprefix("torch.") for tensor in self.stored)
        return Findings(
            files=tuple(sorted({tensor.file.name for tensor in self.stored})),
            dtypes=dict(dtypes.most_common()),
            unused=tuple(map(_place, self.unused)),
            unmapped=tuple(map(_place, self.unmapped)),
            missing=tuple(name if where.is_dir() else f"{where.name}: {name}" for where, name in self.missing),
            misshapen=tuple(
                f"{_place(tensor)} has shape {list(tensor.shape)}; the model wants {list(shape)}"
                for tensor, shape in self.misshapen
            ),
            statistics=tuple(statistics),
            state_size=state_size,
        )


def take_inventory(
    wanted: Mapping[str, Tensor],
    stored: Mapping[str, StoredTensor],
    where: Path,
    rename: Callable[[str], str | None] = str,
    unused: re.Pattern[str] = _NOTHING,
    ties: Mapping[str, str] | None = None,
) -> Inventory:
    """Compare stored tensors with a model's parameters; no values are read.

    Args:
        wanted: The model's `state_dict()`.
        stored: The tensors in the files, by key.
        where: The checkpoint, or the file of this part; errors about missing parameters name it.
        rename: Maps a stored key to the name of a parameter, or to None. By default the keys are the names.
        unused: Matches the keys of known tensors that no query needs.
        ties: Parameter to the key of a tied tensor, which is read if the parameter's own key is absent. An example is
            an embedding table that was saved as the output layer. Otherwise the tied tensor counts as unused.

    Returns:
        The inventory; `check` refuses one that does not fit.

    Raises:
        CheckpointError: If two stored tensors are the same parameter, naming both.
    """
    tied = dict(ties or {})
    mapped: dict[str, StoredTensor] = {}
    rest: dict[str, StoredTensor] = {}
    for key, tensor in stored.items():
        name = rename(key)
        if name is None or name not in wanted:
            rest[key] = tensor
        elif name in mapped:
            raise _duplicate(name, mapped[name], tensor)
        else:
            mapped[name] = tensor
    known = {key for key in rest if unused.fullmatch(key) or key in tied.values()}
    for name, key in tied.items():
        if name in wanted and name not in mapped and key in rest:
            mapped[name] = rest.pop(key)
    return Inventory(
        tensors={name: tensor for name, tensor in mapped.items() if tensor.shape == wanted[name].shape},
        unused=tuple(tensor for key, tensor in rest.items() if key in known),
        unmapped=tuple(tensor for key, tensor in rest.items() if key not in known),
        missing=tuple(Missing(where, name) for name in wanted if name not in mapped),
        misshapen=tuple(
            Misshapen(tensor, tuple(wanted[name].shape))
            for name, tensor in mapped.items()
            if tensor.shape != wanted[name].shape
        ),
    )


def _place(tensor: StoredTensor) -> str:
    return f"{tensor.file.name}: {tensor.key}"


def _duplicate(name: str, first: StoredTensor, second: StoredTensor) -> CheckpointError:
    return CheckpointError(
        f"{second.file}: '{second.key}' and '{first.key}' of {first.file.name} are both the model's '{name}'"
    )


def _listed(keys: Iterable[str], most: int = 5) -> str:
    names = [f"'{key}'" for key in keys]
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
