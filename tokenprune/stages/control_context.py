"""What controllers read and return: host data only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from tokenprune.stages.memory import ExecutedAction

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True, slots=True)
class ControlDecision:
    """A controller's choice.

    Attributes:
        mode: One of the modes the pipeline declares.
        replan: Ask the host, after an executed action, for a new query before the chunk is used up.
        actions: A chunk `[T, D]` in the environment's units that answers the query, as long as the policy's chunks. The
            model then does not run, and the mode is ignored.
    """

    mode: str
    replan: bool = False
    actions: np.ndarray | None = None


@dataclass(frozen=True, slots=True)
class ControlContext:
    """Host data of one environment, before a query or after an executed action.

    Attributes:
        event: `query` before a query, `executed` after an executed action.
        slot: The environment.
        modes: Modes to choose from; the first is the default.
        queries: Queries since the last reset, without those that a controller answered.
        executed: Actions executed since the last reset, oldest first; one per control step.
        since_query: Actions executed since the last query.
        memory: The stage's own state for this slot; emptied by `reset`.
    """

    event: Literal["query", "executed"]
    slot: int
    modes: tuple[str, ...]
    queries: int
    executed: Sequence[ExecutedAction]
    since_query: Sequence[ExecutedAction]
    memory: dict[str, Any]
