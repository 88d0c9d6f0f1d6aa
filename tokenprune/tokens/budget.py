"""How many tokens a cut keeps: a ratio, a count or the union of what is protected, as one static integer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

UNION: Literal["union"] = "union"
"""The amount `union` of `keep`: as many tokens as the stages protect."""


Amount = int | float | Literal["union"]
"""A count (int), a share of what the cut finds (float in (0, 1]), or as many as are protected."""


@dataclass(frozen=True, slots=True)
class Budget:
    """What a stage asks a cut to keep.

    Attributes:
        amount: Count, ratio or `union`.
        of: What a ratio is a share of: the prunable tokens the cut finds, or the whole sequence it finds
            (published variants that count every token); the fixed tokens then come off the kept share.
        floor: Prunable tokens never to fall below, while there are as many.
        bucket: The count is rounded up to a multiple of this.
    """

    amount: Amount
    of: Literal["prunable", "sequence"] = "prunable"
    floor: int = 0
    bucket: int = 1

    def count(self, prunable: int, fixed: int, union: int | None = None) -> int:
        """Prunable tokens to keep.

        Ratios round down, as the published implementations do, but never to nothing.

        Args:
            prunable: Prunable tokens the cut finds.
            fixed: Tokens that always stay.
            union: How many tokens are protected; `None` while that is not known, which keeps everything.
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
    # 0.29 * 100 is 28.999999999999996: a ratio written in decimal must not lose a token to binary.
    return math.floor(ratio * total + 1e-9)


def union_count(protect: Tensor) -> int:
    """Largest number of protected tokens in any row of `[B, P]`.

    Reading it waits for the device: this is the only data-dependent count, and a plan with one is not graph-safe.
    """
    return int(protect.sum(1).max().item())
