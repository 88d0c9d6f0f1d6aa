"""How many tokens a cut keeps: a count, a ratio, or as many as are protected."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

UNION: Literal["union"] = "union"
"""The amount `union` of `keep`: as many tokens as the stages protect."""

Amount = int | float | Literal["union"]
"""A count (int), a ratio (float in (0, 1]), or `union`: as many tokens as are protected."""


@dataclass(frozen=True, slots=True)
class Budget:
    """What a stage asks a cut to keep.

    Attributes:
        amount: Count, ratio or `union`.
        of: What a ratio is a share of: the prunable tokens before the cut, or all tokens before it, from whose kept
            share the fixed tokens are then subtracted (as some published variants count).
        floor: Least number of prunable tokens to keep, if there are as many.
        bucket: The count is rounded up to a multiple of this.
    """

    amount: Amount
    of: Literal["prunable", "sequence"] = "prunable"
    floor: int = 0
    bucket: int = 1

    def count(self, prunable: int, fixed: int, union: int | None = None) -> int:
        """Number of prunable tokens to keep.

        Ratios round down, as the published implementations do, but keep at least one token.

        Args:
            prunable: Prunable tokens before the cut.
            fixed: Tokens that always stay.
            union: Protected tokens; `None` while that is unknown, which keeps everything.
        """
        if self.amount == UNION:
            wanted = prunable if union is None else union
        elif isinstance(self.amount, int):
            wanted = self.amount
        elif self.of == "sequence":
            wanted = _share(self.amount, prunable + fixed) - fixed
        else:
            wanted = max(_share(self.amount, prunable), 1)
        wanted = math.ceil(max(wanted, self.floor) / self.bucket) * self.bucket
        return min(wanted, prunable)


def _share(ratio: float, total: int) -> int:
    # 0.29 * 100 is 28.999999999999996 in floating point, and must keep 29 tokens.
    return math.floor(ratio * total + 1e-9)


def union_count(protect: Tensor) -> int:
    """Largest number of protected tokens in any row of `[B, P]`.

    Waits for the device. It is the only data-dependent count; a plan with one is not graph-safe.
    """
    return int(protect.sum(1).max().item())
