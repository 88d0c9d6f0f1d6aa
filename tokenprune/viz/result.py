"""What a picture shows of a result: which tokens each query lost at which cut, and why the others were kept."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SCORE = "score"
OTHER = "other"
_PRECEDENCE = {"dynamic": 0, "previous": 1, "local": 2, OTHER: 4, SCORE: 5}
_MAX_FURTHER = 3


@dataclass(frozen=True, slots=True)
class View:
    """One camera's tokens: original ids from `start`, patches of `grid` `(rows, cols)` in raster order."""

    name: str
    start: int
    length: int
    grid: tuple[int, int] | None
    prunable: bool

    @property
    def span(self) -> range:
        """Original ids of the view."""
        return range(self.start, self.start + self.length)


@dataclass(frozen=True, slots=True)
class Cut:
    """What one cut kept.

    Attributes:
        name: The layer it follows, or `embedding`.
        kept: Original ids of the prunable tokens it kept.
        reasons: Those among them that a stage gave a reason for, by reason.
    """

    name: str
    kept: frozenset[int]
    reasons: Mapping[str, frozenset[int]]


@dataclass(frozen=True, slots=True)
class QueryResult:
    """What one query did with its tokens (the first row of a batch).

    Attributes:
        step: Control step it was asked at.
        mode: Mode it ran in.
        fallback: Why it ran dense although a pipeline was given, or an empty string.
        held: Tokens each layer held.
        cuts: Names of its cuts, first to last.
        lost: Index into `cuts` by the original id of each token that was cut.
        reasons: Why each remaining prunable token was kept, by original id; empty where nothing was cut.
        looked_back: Control steps between the frames that stages compared, by stage.
    """

    step: int
    mode: str
    fallback: str
    held: tuple[int, ...]
    cuts: tuple[str, ...]
    lost: Mapping[int, int]
    reasons: Mapping[int, str]
    looked_back: Mapping[str, int]


@dataclass(frozen=True)
class Result:
    """One pipeline's run over an episode.

    Attributes:
        label: Name of the pipeline.
        backbone: Registered name of the backbone.
        source: Its preset or checkpoint, as shown.
        untrained: Whether its weights were random.
        preset: What the run was asked for, likewise `checkpoint` and `options`.
        episode: Name of the episode.
        episode_path: Where it was read from; None for the one that ships with the backbone.
        instruction: What the robot was told.
        horizon: Actions per chunk.
        translation: Dimensions of an action that move the end effector; may be empty.
        views: Cameras in sequence order.
        n_tokens: Tokens before any cut.
        n_fixed: Those among them that no stage may drop.
        modes: Every mode that may occur.
        queries: In the order they were asked.
    """

    label: str
    backbone: str
    source: str
    untrained: bool
    preset: str | None
    checkpoint: str | None
    options: Mapping[str, Any]
    episode: str
    episode_path: Path | None
    instruction: str
    horizon: int
    translation: tuple[int, ...]
    views: tuple[View, ...]
    n_tokens: int
    n_fixed: int
    modes: tuple[str, ...]
    queries: tuple[QueryResult, ...]

    @property
    def reason_names(self) -> tuple[str, ...]:
        """Every reason that occurs in any query, in order of precedence."""
        return precedence({name for query in self.queries for name in query.reasons.values()})


def losses(cuts: Sequence[Cut], prunable: Iterable[int]) -> dict[int, int]:
    """Index of the cut that dropped each token that was dropped."""
    lost: dict[int, int] = {}
    left = frozenset(prunable)
    for index, cut in enumerate(cuts):
        lost.update(dict.fromkeys(sorted(left - cut.kept), index))
        left &= cut.kept
    return lost


def reasons_kept(cuts: Sequence[Cut], prunable: Iterable[int], lost: Mapping[int, int]) -> dict[int, str]:
    """Why each remaining token was kept: the foremost reason given at the last cut that gave it any.

    Tokens without a reason were ranked high by the score. Where nothing was dropped nothing was ranked, so they then
    have no entry.
    """
    found = dict.fromkeys((i for i in prunable if i not in lost), SCORE) if lost else {}
    for cut in cuts:
        given: dict[int, str] = {}
        for name in reversed(precedence(cut.reasons)):
            given.update(dict.fromkeys(cut.reasons[name], name))
        found.update({token: name for token, name in given.items() if token not in lost})
    return found


def precedence(names: Iterable[str]) -> tuple[str, ...]:
    """Reasons, foremost first: the known ones, further ones by name, the score last."""
    return tuple(sorted(names, key=lambda name: (_PRECEDENCE.get(name, 3), name)))


def further_reasons(names: Iterable[str]) -> dict[str, str]:
    """The name under which each reason is drawn; those beyond the colours at hand share one."""
    further = [name for name in precedence(set(names)) if name not in _PRECEDENCE]
    return {name: name if name in _PRECEDENCE else OTHER for name in names} | {n: n for n in further[:_MAX_FURTHER]}
