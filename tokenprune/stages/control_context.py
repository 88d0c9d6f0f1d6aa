"""What controllers see and answer: host data only."""

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
        actions: A chunk `[T, D]` in the environment's units that answers the query in place of the model, which then
            does not run; as many actions as the policy's own chunks have. The mode counts for nothing.
    """

    mode: str
    replan: bool = False
    actions: np.ndarray | None = None


@dataclass(frozen=True, slots=True)
class ControlContext:
    """What is known on the host before a query, or after an executed action.

    Attributes:
        event: `query` before a query, `executed` after an action.
        slot: Environment it is about.
        modes: What may be chosen; the first is the default.
        queries: Queries since the last reset, those not counted that a controller answered.
        executed: Actions executed since the last reset, oldest first; as many as control steps have passed.
        since_query: Those of them that follow the last query.
        memory: The stage's own, per slot; emptied by `reset`.
    """

    event: Literal["query", "executed"]
    slot: int
    modes: tuple[str, ...]
    queries: int
    executed: Sequence[ExecutedAction]
    since_query: Sequence[ExecutedAction]
    memory: dict[str, Any]
