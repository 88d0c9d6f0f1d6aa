"""The plan of a query: where tokens leave and how many stay, known before the query starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property

from tokenprune.tokens.layout import TokenLayout


class Removal(StrEnum):
    """What becomes of the tokens that leave at a cut."""

    DROP = "drop"
    """They are discarded."""
    MERGE = "merge"
    """They are merged into tokens that stay."""
    REUSE = "reuse"
    """Later layers attend to their keys and values from the last query."""


@dataclass(frozen=True, slots=True)
class Group:
    """Views that share a budget of their own at one cut."""

    views: tuple[str, ...]
    keep: int


@dataclass(frozen=True, slots=True)
class Cut:
    """A place where tokens leave.

    Attributes:
        after: Layer it follows, -1 for before layer 0.
        stages: Indices of the stages that propose here, in pipeline order.
        found: Prunable tokens before the cut.
        keep: Prunable tokens it keeps; an upper bound while a union is unresolved.
        groups: Budgets of views, filled first.
        union: Whether a `keep: union` sets the count, and the count is not known yet.
        removal: What becomes of the tokens that leave.
    """

    after: int
    stages: tuple[int, ...]
    found: int
    keep: int
    groups: tuple[Group, ...] = ()
    union: bool = False
    removal: Removal = Removal.DROP


@dataclass(frozen=True)
class Plan:
    """The cuts and token counts of one query.

    Attributes:
        layout: The query's tokens.
        mode: Mode the counts are for.
        depth: Decoder layers.
        cuts: Ascending by layer.
        skipped: Layers that do not run.
        flow_interval: One of every `flow_interval` flow steps runs the action head's layers.
        unions: Counts of the `keep: union` cuts resolved so far.
        own_flops: FLOPs of the stages' own matrix products.
    """

    layout: TokenLayout
    mode: str
    depth: int
    cuts: tuple[Cut, ...]
    skipped: frozenset[int] = frozenset()
    flow_interval: int = 1
    unions: tuple[int, ...] = ()
    own_flops: int = 0

    @classmethod
    def dense(cls, layout: TokenLayout, depth: int, mode: str = "dense") -> Plan:
        """The plan of a query without cuts."""
        return cls(layout, mode, depth, ())

    @cached_property
    def cut_after(self) -> Mapping[int, Cut]:
        """Cuts by the layer they follow."""
        return {cut.after: cut for cut in self.cuts}

    @cached_property
    def entering(self) -> tuple[int, ...]:
        """Prunable tokens before each layer, whether the layer is skipped or not."""
        held = len(self.layout.prunable)
        counts = []
        for layer in range(self.depth):
            before = self.cut_after.get(layer - 1)
            held = held if before is None else before.keep
            counts.append(held)
        return tuple(counts)

    @cached_property
    def prunable(self) -> tuple[int, ...]:
        """Prunable tokens in each layer; none in a skipped layer."""
        return tuple(0 if layer in self.skipped else n for layer, n in enumerate(self.entering))

    @cached_property
    def tokens(self) -> tuple[int, ...]:
        """All tokens in each layer, fixed and prunable; none in a skipped layer."""
        fixed = len(self.layout.fixed)
        return tuple(0 if layer in self.skipped else n + fixed for layer, n in enumerate(self.entering))

    @cached_property
    def keys(self) -> tuple[int, ...]:
        """Keys in each layer: its own tokens, and those reused from the last query."""
        gone = {cut.after: cut.found - cut.keep for cut in self.cuts if cut.removal is Removal.REUSE}
        reused = [sum(n for after, n in gone.items() if after < layer) for layer in range(self.depth)]
        return tuple(n + extra if n else 0 for n, extra in zip(self.tokens, reused, strict=True))

    @property
    def reuses(self) -> bool:
        """Whether the query may reuse keys and values of the last one; it then runs as a batch of one."""
        return any(cut.removal is Removal.REUSE and cut.union for cut in self.cuts)

    @property
    def graph_safe(self) -> bool:
        """Whether every count is known before the query starts."""
        return not self.unions and not any(cut.union for cut in self.cuts)


def cut_name(after: int) -> str:
    """Return a cut's name in pipeline files and results: the layer it follows, or `embedding` before layer 0."""
    return "embedding" if after < 0 else str(after)
