"""Loads a backbone by name and binds a pipeline to it: `load` and `from_module`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tokenprune.engine.adapter import Backbone, Description, Findings
from tokenprune.errors import ConfigError, PluginError, nearest
from tokenprune.model.device import DTYPES, native_dtype
from tokenprune.pipelines.config import PipelineConfig
from tokenprune.pipelines.loader import load_pipeline, parse_pipeline
from tokenprune.policy import Policy
from tokenprune.registry.discovery import Registry


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
    """Load a backbone alone, which several policies can share; arguments as in `load`."""
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


def describe_backbone(
    name: str, registry: Registry, checkpoint: str | Path | None, preset: str | None, options: Mapping[str, Any]
) -> Description:
    """Describe a backbone: dimensions, cameras, actions and token layout; no weights are made or read.

    Args:
        name: Registered name.
        registry: Discovered plugins.
        checkpoint: Folder in the release's format, or a hub id.
        preset: What the backbone offers instead of a checkpoint; its first preset if neither is named.
        options: The backbone's own.

    Raises:
        PluginError: If the backbone is unknown.
        ConfigError: If the preset or an option is wrong.
        CheckpointError: If the checkpoint cannot be used.
    """
    folder = None if checkpoint is None else Path(checkpoint)
    chosen = chosen_preset(name, registry, checkpoint, preset)
    described: Description = registry.backbone_factory(name).describe(chosen, folder, options)
    return described


def verify_checkpoint(name: str, registry: Registry, checkpoint: Path, options: Mapping[str, Any]) -> Findings:
    """Compare a checkpoint with a backbone tensor by tensor; no weights are read.

    Args:
        name: Registered name of the backbone.
        registry: Discovered plugins.
        checkpoint: Folder in the release's format, or a hub id.
        options: The backbone's own.

    Raises:
        PluginError: If the backbone is unknown, or cannot verify checkpoints.
        ConfigError: If an option is wrong.
        CheckpointError: If a file is missing, damaged or unsafe.
    """
    factory = registry.backbone_factory(name)
    if not callable(getattr(factory, "verify", None)):
        raise PluginError(f"backbone '{name}' of {registry.backbone(name).owner} cannot verify checkpoints")
    findings: Findings = factory.verify(checkpoint, options)
    return findings


def chosen_preset(name: str, registry: Registry, checkpoint: str | Path | None, preset: str | None) -> str | None:
    """Return `preset`; the backbone's first preset if neither a preset nor a checkpoint is named.

    Raises:
        PluginError: If the backbone is unknown.
    """
    if checkpoint is None and preset is None:
        return registry.backbone(name).spec.default_preset
    return preset


def load(
    backbone: str,
    *,
    checkpoint: str | Path | None = None,
    preset: str | None = None,
    pipeline: str | Path | Mapping[str, Any] = "dense",
    device: str = "cpu",
    dtype: str = "auto",
    seed: int = 0,
    overrides: Sequence[str] = (),
    execution: str = "eager",
    registry: Registry | None = None,
    **options: Any,  # noqa: ANN401 - the backbone's own options, checked by it
) -> Policy:
    """Load a backbone and bind a pipeline to it.

    Args:
        backbone: Registered name, such as `openvla-oft`.
        checkpoint: Folder in the release's format, or a hub id.
        preset: What the backbone offers instead of a checkpoint: a trained policy of its own, or a size to fill with
            untrained random weights.
        pipeline: Name of a shipped pipeline, path of a pipeline file, or the content of one as plain data.
        device: torch device.
        dtype: One of `float32`, `bfloat16`, `float16`, `float64`; `auto` is bfloat16, the releases' own, where the
            device computes it natively, and float32 elsewhere.
        seed: Seed of an untrained preset's random weights.
        overrides: Such as `stages.1.keep=0.5`; applied to a named pipeline or file.
        execution: `eager`; `compile`, whose first queries take long; or, on a CUDA device, `cuda_graph` or
            `compiled_cuda_graph`, which replay a query as one graph and need token counts that do not depend on data.
        registry: Discovered plugins; discovered here by default.
        **options: Options of the backbone, such as `unnorm_key`.

    Raises:
        PluginError: If the backbone or a stage is unknown.
        ConfigError: If the pipeline or an option is wrong.
        CheckpointError: If the checkpoint cannot be used.
    """
    registry = registry or Registry.discover()
    config = _configured(pipeline, registry, overrides)
    loaded = load_backbone(backbone, registry, checkpoint, preset, device, dtype, seed, options)
    return Policy(loaded, config, registry, execution)


def from_module(
    module: torch.nn.Module,
    backbone: str,
    *,
    pipeline: str | Path | Mapping[str, Any] = "dense",
    overrides: Sequence[str] = (),
    execution: str = "eager",
    registry: Registry | None = None,
    **options: Any,  # noqa: ANN401 - the adapter's own options, checked by it
) -> Policy:
    """Adopt a live upstream model and bind a pipeline to it; its weights are shared, none is copied.

    Args:
        module: The upstream model, on its device and in its dtype.
        backbone: Registered name of its family, such as `openvla`.
        pipeline: As in `load`.
        overrides: As in `load`.
        execution: As in `load`.
        registry: As in `load`.
        **options: Options of the adapter, and what the model does not contain, such as `tokenizer="PATH"`.

    Raises:
        PluginError: If the backbone or a stage is unknown, or the backbone cannot adopt models.
        ConfigError: If the pipeline or an option is wrong.
        CheckpointError: If the model is not of this family.
    """
    registry = registry or Registry.discover()
    config = _configured(pipeline, registry, overrides)
    factory = registry.backbone_factory(backbone)
    if not callable(getattr(factory, "adopt", None)):
        raise PluginError(f"backbone '{backbone}' of {registry.backbone(backbone).owner} cannot adopt a live model")
    return Policy(factory.adopt(module, options), config, registry, execution)


def _configured(
    pipeline: str | Path | Mapping[str, Any], registry: Registry, overrides: Sequence[str]
) -> PipelineConfig:
    if isinstance(pipeline, Mapping):
        return parse_pipeline(pipeline, registry, "pipeline").config
    return load_pipeline(pipeline, registry, overrides).config
