"""What reference counts alone do not free."""

from __future__ import annotations

import gc
from collections.abc import Callable

from torch import Tensor


def caught_in_cycles(work: Callable[[], object]) -> int:
    """How many tensors some work leaves that nobody can reach, and that only the garbage collector would free.

    Python looks for cycles after so many objects, whatever they hold, so by then there may be gigabytes of them.
    """
    gc.collect()
    # What was there before is not looked through again.
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
