"""The base of all factories: where weights come from, descriptions, untrained presets."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import torch
from torch import nn

from tokenprune.engine.adapter import Description
from tokenprune.errors import ConfigError
from tokenprune_adapters.backbones.common.backbone import BackboneBase, PolicySetup
from tokenprune_adapters.weights.loading import empty_model
from tokenprune_adapters.weights.untrained import fill_untrained

BackboneT = TypeVar("BackboneT", bound=BackboneBase[Any, Any, Any])


class Checkpoint(NamedTuple):
    """Where weights are read from.

    Attributes:
        folder: A folder, or a hub id `owner/name`.
        options: The options to read it with.
        name: What the policy is called.
    """

    folder: Path
    options: Mapping[str, Any]
    name: str


class FactoryBase(ABC, Generic[BackboneT]):
    """Makes the policies of one family; implements `tokenprune.engine.adapter.BackboneFactory`.

    Attributes:
        name: Registered name of the backbone.
        presets: Names of its presets, for errors.
        backbone: Its class.
        model: The class of its weights, built from a configuration.
    """

    name: ClassVar[str]
    presets: ClassVar[tuple[str, ...]]
    backbone: ClassVar[type[Any]]  # of BackboneT, which a class variable cannot name
    model: ClassVar[type[nn.Module]]

    @classmethod
    def describe(cls, preset: str | None, checkpoint: Path | None, options: Mapping[str, Any]) -> Description:
        """Describe what `build` would make; no weights are made or read.

        Raises:
            ConfigError: If neither or both of preset and checkpoint are given, or an option is wrong.
            CheckpointError: If the checkpoint cannot be used.
        """
        source = cls._checkpoint(preset, checkpoint, options)
        if source is None:
            name = cls._checked_preset(preset, options)
            setup, folder = cls.untrained(name, options), None
            info = setup.config.info(name, untrained=True)
        else:
            setup, folder = cls.read(source), source.folder if source.folder.is_dir() else None
            info = setup.config.info(source.name, untrained=False)
        return Description(info, setup.layout, setup.config.transform.cropped, folder)

    @classmethod
    def build(
        cls,
        preset: str | None,
        checkpoint: Path | None,
        options: Mapping[str, Any],
        device: torch.device,
        dtype: torch.dtype,
        seed: int,
    ) -> BackboneT:
        """Make a policy: with a checkpoint's weights, a trained preset's own, or random ones.

        Raises:
            ConfigError: If neither or both of preset and checkpoint are given, or an option is wrong.
            CheckpointError: If the checkpoint cannot be used.
        """
        source = cls._checkpoint(preset, checkpoint, options)
        if source is not None:
            return cls.load(source, device, dtype)
        name = cls._checked_preset(preset, options)
        setup = cls.untrained(name, options)
        model = empty_model(cls.model, setup.config)
        cls.fill(model, seed, device, dtype)
        backbone: BackboneT = cls.backbone(setup, model, setup.config.info(name, untrained=True))
        return backbone

    @classmethod
    @abstractmethod
    def read(cls, checkpoint: Checkpoint) -> PolicySetup[Any, Any]:
        """Read a checkpoint's configuration, tokenizer and statistics; no weights are read.

        Raises:
            ConfigError: If an option is wrong or missing.
            CheckpointError: If the checkpoint cannot be used.
        """

    @classmethod
    @abstractmethod
    def load(cls, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> BackboneT:
        """Load a checkpoint.

        Raises:
            ConfigError: If an option is wrong or missing.
            CheckpointError: If the checkpoint cannot be used.
        """

    @classmethod
    @abstractmethod
    def untrained(cls, name: str, options: Mapping[str, Any]) -> PolicySetup[Any, Any]:
        """A preset without trained weights.

        Raises:
            ConfigError: If there is no such preset, or an option is wrong.
        """

    @classmethod
    def trained(cls, name: str) -> tuple[Path, Mapping[str, Any]] | None:
        """The folder with a preset's own weights, and its options; None for an untrained preset."""
        return None

    @classmethod
    def fill(cls, model: nn.Module, seed: int, device: torch.device, dtype: torch.dtype) -> None:
        """Give a model on the meta device random weights."""
        fill_untrained(model, seed, device, dtype)

    @classmethod
    def _checkpoint(cls, preset: str | None, checkpoint: Path | None, options: Mapping[str, Any]) -> Checkpoint | None:
        """The checkpoint to read, which some presets come with; None for an untrained preset."""
        if preset is not None and checkpoint is not None:
            raise ConfigError("give a preset or a checkpoint, not both")
        if checkpoint is not None:
            return Checkpoint(Path(checkpoint), options, str(checkpoint))
        trained = None if preset is None else cls.trained(preset)
        if preset is None or trained is None:
            return None
        folder, own = trained
        return Checkpoint(folder, {**own, **options}, preset)

    @classmethod
    def _checked_preset(cls, preset: str | None, options: Mapping[str, Any]) -> str:
        if preset is None:
            raise ConfigError(f"backbone '{cls.name}' needs a checkpoint, or a preset ({', '.join(cls.presets)})")
        if "unnorm_key" in options:
            raise ConfigError("unnorm_key names statistics of a checkpoint; an untrained preset has none")
        return preset
