"""What comes of a check, and how a check fails."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import torch

from tokenprune.errors import TokenPruneError

Outcome = Literal["holds", "fails", "does not apply", "refused"]
SubjectT = TypeVar("SubjectT")

_NOT_THE_AUTHORS = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]))


class CheckFailed(AssertionError):
    """A promise is broken."""


class NotApplicable(Exception):
    """The promise does not concern this plugin."""


@dataclass(frozen=True)
class Verdict:
    """What came of one check on one backbone.

    Attributes:
        check: Name of the check.
        promise: What holds if it holds.
        backbone: Name of the backbone.
        outcome: `refused` where the backbone cannot offer what the stage requires, or the stage lacks what only the
            user can give.
        why: What was found, or why it does not apply.
    """

    check: str
    promise: str
    backbone: str
    outcome: Outcome
    why: str = ""


def promise_of(check: Callable[[SubjectT], None]) -> str:
    """The first line of a check's docstring."""
    return (check.__doc__ or "").strip().splitlines()[0]


def verdict(check: Callable[[SubjectT], None], subject: SubjectT, backbone: str) -> Verdict:
    """Run one check; whatever else it raises than its own is the plugin's failure."""
    outcome: Outcome = "holds"
    why = ""
    try:
        check(subject)
    except NotApplicable as reason:
        outcome, why = "does not apply", str(reason)
    except (CheckFailed, TokenPruneError) as error:
        outcome, why = "fails", str(error)
    except Exception as error:
        outcome, why = "fails", f"{type(error).__name__}: {error}{_place(error)}"
    return Verdict(check.__name__, promise_of(check), backbone, outcome, why)


def demand(found: Verdict) -> None:
    """Fail a test whose check fails.

    Raises:
        AssertionError: Naming the promise and what was found.
    """
    assert found.outcome != "fails", f"{found.promise} {found.why}"


def _place(error: Exception) -> str:
    """The innermost line of the plugin that the error went through, where there is one."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not frame.filename.startswith(_NOT_THE_AUTHORS):
            return f" ({Path(frame.filename).name}:{frame.lineno})"
    return ""
