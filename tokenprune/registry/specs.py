"""What a plugin says about itself before any of its code is imported. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

HOOK_API_VERSION = 1


StageKind = Literal["controller", "selector", "scorer", "shortcut", "baseline"]
"""`shortcut` saves work other than tokens; `baseline` is a control that every comparison needs (none, random, grid)."""


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
        name: What `use:` in a pipeline file says, lower case with dots and underscores.
        kind: What the stage does.
        summary: One line.
        target: `"module:Class"`, imported only when used.
        paper: Where the method comes from, or an empty string.
        requires: Names from `CAPABILITIES` a backbone must offer.
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
        presets: What there is without a checkpoint, name to one line each, which says whether the weights are trained;
            the first is taken where neither is named.
        episode: `"package:resource"` of a recorded episode that fits its presets, or an empty string.
    """

    name: str
    summary: str
    target: str
    presets: Mapping[str, str] = field(default_factory=dict)
    episode: str = ""

    @property
    def default_preset(self) -> str | None:
        """The first preset, None where there is none."""
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
