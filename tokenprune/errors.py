"""The errors a user can cause; each message says what is wrong, where, and what would be valid."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class TokenPruneError(Exception):
    """Base of every error raised on purpose by tokenprune."""


class ConfigError(TokenPruneError):
    """A pipeline file or option is wrong; the message starts with `file:line:col` where there is a file."""


class CapabilityError(ConfigError):
    """A pipeline asks for something the backbone does not offer."""


class MissingError(ConfigError):
    """A stage needs something that only the user can provide: a file, a setting, a package."""


class PluginError(TokenPruneError):
    """A plugin is unknown, broken, registered twice, or does not follow the hook specifications."""


class LayoutError(TokenPruneError):
    """Segments do not form a contiguous sequence, or a named row or view does not exist."""


class SelectionError(TokenPruneError):
    """A proposal or selection has the wrong shape, dtype or range."""


class StageError(TokenPruneError):
    """A stage raised, or returned something that cannot be used, while a query was running."""


class TraceError(TokenPruneError):
    """A layer held other tokens than planned."""


class ObservationError(TokenPruneError):
    """The policy cannot use an observation or instruction."""


class CheckpointError(TokenPruneError):
    """A checkpoint is incomplete, truncated, unsafe, or does not fit the backbone."""


class EpisodeError(TokenPruneError):
    """A recorded episode cannot be read."""


class SimulatorError(TokenPruneError):
    """A simulated environment cannot be used, or its simulator failed."""


class RolloutError(TokenPruneError):
    """An evaluation in simulated environments cannot continue: its engine, its workers or its result writer failed."""


class ResultError(TokenPruneError):
    """A result file cannot be read or drawn, or has no such pipeline or query."""


def nearest(name: str, valid: Iterable[str]) -> str:
    """Return the part of an error message that names the nearest valid choice and lists the rest.

    Args:
        name: What the user wrote.
        valid: The names that would have been accepted.

    Returns:
        `"; did you mean 'x'? valid: x, y"`, without the question when nothing is near.
    """
    choices = sorted(set(valid))
    listed = ", ".join(choices) if choices else "(none)"
    close = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'? valid: {listed}" if close else f"; valid: {listed}"
