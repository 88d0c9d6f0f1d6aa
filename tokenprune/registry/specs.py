"""Specs: how a plugin declares what it offers, before any class of it is imported. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

HOOK_API_VERSION = 1
StageKind = Literal["controller", "selector", "scorer", "shortcut", "baseline"]
"""`shortcut` saves other work than tokens; `baseline` is for comparison (none, random, grid)."""

CAPABILITIES: Mapping[str, str] = {
    "action_rows": "action tokens in the decoder beside the image, whose attention scorers can read",
    "batch": "several environments in one query",
    "encoder_attention": "attention of the vision towers",
    "head_cache": "reuse of action-head steps",
    "kv_reuse": "K/V of the last query at the same positions",
    "layer_skip": "leaving out decoder layers",
    "merge": "merging tokens instead of dropping them",
}


@dataclass(frozen=True, slots=True)
class StageSpec:
    """A stage a plugin offers.

    Attributes:
        name: Name in `use:` of a pipeline file; lower case with dots and underscores.
        kind: Kind of stage.
        summary: One line.
        target: `"module:Class"`, imported when first used.
        paper: Paper of the method, or an empty string.
        requires: Names from `CAPABILITIES` that the backbone must offer.
    """

    name: str
    kind: StageKind
    summary: str
    target: str
    paper: str = ""
    requires: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class PipelineSpec:
    """A pipeline file a plugin ships.

    Attributes:
        name: What the command line accepts instead of a path.
        summary: One line.
        package: Package that holds the file.
        resource: Path of the YAML file inside that package.
    """

    name: str
    summary: str
    package: str
    resource: str


@dataclass(frozen=True, slots=True)
class BackboneSpec:
    """A backbone an adapter offers.

    Attributes:
        name: What `--backbone` accepts.
        summary: One line.
        target: `"module:Class"` of its `BackboneFactory`, imported only when used.
        presets: Models available without a checkpoint: name to one line, which says whether weights are trained. The
            first is the default.
        episode: `"package:resource"` of a recorded episode that fits its presets, or an empty string.
    """

    name: str
    summary: str
    target: str
    presets: Mapping[str, str] = field(default_factory=dict)
    episode: str = ""

    @property
    def default_preset(self) -> str | None:
        """The first preset, or None without presets."""
        return next(iter(self.presets), None)


@dataclass(frozen=True, slots=True)
class EnvironmentSpec:
    """A simulated environment an adapter offers.

    Attributes:
        name: What `--env` accepts.
        summary: One line.
        target: `"module:Class"` of its `EnvironmentFactory`, imported only when used; several names may share one.
    """

    name: str
    summary: str
    target: str


Spec = StageSpec | PipelineSpec | BackboneSpec | EnvironmentSpec
"""What `tokenprune_register` returns, any number of them."""
