"""VLA-ADP (arXiv 2509.22093): keep the patches related to the instruction, but only while the arm travels far.

Before layer 0 the score of a patch is its similarity to the text, computed with that layer's norm, query and key
projections: scaled products without rotary embedding or softmax, mean over heads and text. The method gives each camera
a budget of its own, 0.4 of all kept patches to the first camera and 0.6 to the wrist camera; here `views` can do this.
The released code also reads the beginning-of-sequence token; here the rows are the prompt's.

The gate measures a displacement at each query: the distance between the end effector's first and last achieved poses
since the last query. It prunes if this is at least the smallest displacement of up to three earlier queries. The first
query of an episode is not pruned, and after three pruned queries comes a full one. If the host reports no poses,
nothing is ever pruned.
"""

from __future__ import annotations

from itertools import takewhile

import numpy as np
from pydantic import Field
from torch import Tensor

from tokenprune import (
    BackboneInfo,
    ControlContext,
    ControlDecision,
    CutConfig,
    Keep,
    Probe,
    SelectContext,
    Stage,
    StageConfig,
    TokenLayout,
    hookimpl,
)
from tokenprune_plugins.shared.bases import ScoreStage


class RelevanceConfig(CutConfig):
    """How many patches stay; the released code's default is three quarters."""

    keep: Keep = 0.75


class Relevance(ScoreStage[RelevanceConfig]):
    """Keeps the patches whose keys at the next layer are most similar to the text's queries."""

    Config = RelevanceConfig

    def probes(self, info: BackboneInfo, layout: TokenLayout, mode: str) -> tuple[Probe, ...]:
        """The text's rows at the layer after every cut."""
        return tuple(Probe(layer + 1, "text", ahead=True) for layer in self.cuts(info.decoder.depth))

    def score(self, ctx: SelectContext) -> Tensor:
        """Similarity of text and patches in the next layer's projections; before layer 0 these are layer 0's."""
        return ctx.similarity_ahead("text").mean((1, 2))


class GateConfig(StageConfig):
    """Which modes the gate chooses, and how many queries in a row it may prune."""

    pruned: str = Field(default="pruned", description="Mode while the arm travels far.")
    full: str = Field(default="full", description="Mode otherwise.")
    windows: int = Field(default=3, ge=1, description="Number of earlier displacements to compare with.")
    longest: int = Field(default=3, ge=1, description="Most pruned queries in a row; a full one follows.")

    def chooses(self) -> set[str]:
        """Both modes."""
        return {self.pruned, self.full}


class Gate(Stage[GateConfig]):
    """Prunes while the end effector travels at least as far as in the shortest of the last few windows."""

    Config = GateConfig

    @hookimpl
    def control(self, ctx: ControlContext) -> ControlDecision:
        """Compare the displacement since the last query with earlier ones."""
        memory = ctx.memory
        if ctx.event == "query":
            past: list[float] = memory.setdefault("past", [])
            chosen: list[bool] = memory.setdefault("chosen", [])
            poses = [done.pose for done in ctx.since_query if done.pose is not None]
            prune = False
            if poses:
                moved = float(np.linalg.norm(poses[-1][:3] - poses[0][:3]))
                in_a_row = sum(1 for _ in takewhile(bool, reversed(chosen)))
                prune = bool(past) and moved >= min(past) and in_a_row < self.config.longest
                memory["past"] = [*past, moved][-self.config.windows :]
            memory["chosen"] = [*chosen, prune][-self.config.longest :]
        return ControlDecision(self.config.pruned if memory.get("chosen", [False])[-1] else self.config.full)
