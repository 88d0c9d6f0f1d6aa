"""VLA-ADP (arXiv 2509.22093): keep the patches the instruction is about, but only while the arm travels far.

Before layer 0 its norm, query and key projections compare the text's embeddings with the patches: scaled products
without rotary embedding or softmax, mean over heads and text. Cameras have budgets of their own, 0.4 of all kept
patches from the first and 0.6 from the wrist. The released code reads the beginning-of-sequence token as well as the
prompt; here the rows are the prompt's.

The gate looks at how far the end effector came from the first to the last pose of the steps since the last query,
achieved and not commanded, and compares with up to three such windows before: as far as the farthest prunes, less than
the shortest does not, in between it prunes. An episode begins unpruned, and after three pruned queries comes a full
one. Where the host does not tell poses, nothing is ever pruned.
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
from tokenprune_plugins.shared.bases import Scored


class RelevanceConfig(CutConfig):
    """How many patches stay; the released default is three quarters."""

    keep: Keep = 0.75


class Relevance(Scored[RelevanceConfig]):
    """Keeps the patches whose keys at layer 0 are most like the text's queries."""

    Config = RelevanceConfig

    def probes(self, info: BackboneInfo, layout: TokenLayout, mode: str) -> tuple[Probe, ...]:
        """The text's rows, at the layer after every cut."""
        return tuple(Probe(layer + 1, "text", ahead=True) for layer in self.cuts(info.decoder.depth))

    def score(self, ctx: SelectContext) -> Tensor:
        """Similarity of text and patches at layer 0; after a layer at the next, which the released code offers too."""
        return ctx.similarity_ahead("text").mean((1, 2))


class GateConfig(StageConfig):
    """Which modes the gate switches, and how long it may prune."""

    pruned: str = Field(default="pruned", description="Mode while the arm travels far.")
    full: str = Field(default="full", description="Mode otherwise.")
    windows: int = Field(default=3, ge=1, description="Earlier windows a displacement is compared with.")
    longest: int = Field(default=3, ge=1, description="Pruned queries after which a full one comes.")

    def chooses(self) -> set[str]:
        """Both modes."""
        return {self.pruned, self.full}


class Gate(Stage[GateConfig]):
    """Prunes while the end effector came at least as far as in the shortest of the windows before."""

    Config = GateConfig

    @hookimpl
    def control(self, ctx: ControlContext) -> ControlDecision:
        """Compare the window just executed with those before it."""
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
