"""Finds tensors in reference cycles, which only the garbage collector frees."""

from __future__ import annotations

import gc
from collections.abc import Callable

from torch import Tensor


def caught_in_cycles(work: Callable[[], object]) -> int:
    """Number of unreachable tensors that `work` leaves in reference cycles.

    The garbage collector runs by number of objects, not by bytes, so gigabytes may pile up before it does.
    """
    gc.collect()
    # Exclude objects that existed before.
    gc.freeze()
    before = gc.get_debug()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        work()
        gc.collect()
        return sum(isinstance(one, Tensor) for one in gc.garbage)
    finally:
        gc.set_debug(before)
        gc.garbage.clear()
        gc.unfreeze()
