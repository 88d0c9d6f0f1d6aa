"""What a picture shows of a result: the cut at which each token was lost, and why the others were kept."""

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
    """The tokens that one cut kept.

    Attributes:
        name: The layer it follows, or `embedding`.
        kept: Original ids of the prunable tokens it kept.
        reasons: Kept ids by the reason that a stage gave.
    """

    name: str
    kept: frozenset[int]
    reasons: Mapping[str, frozenset[int]]


@dataclass(frozen=True, slots=True)
class QueryResult:
    """What one query did with its tokens (the first batch row).

    Attributes:
        step: Control step of the query.
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
        preset: The backbone's preset, or None.
        checkpoint: Folder or hub id, or None.
        options: The backbone's own options.
        episode: Name of the episode.
        episode_path: Its file; None for the one that ships with the backbone.
        instruction: The language instruction.
        horizon: Actions per chunk.
        translation: Dimensions of an action that move the end effector; may be empty.
        views: Cameras in sequence order.
        n_tokens: Tokens before any cut.
        n_fixed: Tokens that no stage may drop.
        modes: Every mode that may occur.
        queries: In their order.
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
    """Return the index of the cut that dropped each token, by original id of the dropped tokens."""
    lost: dict[int, int] = {}
    left = frozenset(prunable)
    for index, cut in enumerate(cuts):
        lost.update(dict.fromkeys(sorted(left - cut.kept), index))
        left &= cut.kept
    return lost


def reasons_kept(cuts: Sequence[Cut], prunable: Iterable[int], lost: Mapping[int, int]) -> dict[int, str]:
    """Return why each remaining token was kept: the first reason in precedence at the last cut that gave any.

    Tokens without a reason were ranked high by the score. Where no token was dropped none was ranked, and they have no
    entry.
    """
    found = dict.fromkeys((i for i in prunable if i not in lost), SCORE) if lost else {}
    for cut in cuts:
        at_cut: dict[int, str] = {}
        for name in reversed(precedence(cut.reasons)):
            at_cut.update(dict.fromkeys(cut.reasons[name], name))
        found.update({token: name for token, name in at_cut.items() if token not in lost})
    return found


def precedence(names: Iterable[str]) -> tuple[str, ...]:
    """Return reasons in order of precedence: the known ones, unknown ones by name, the score last."""
    return tuple(sorted(names, key=lambda name: (_PRECEDENCE.get(name, 3), name)))


def further_reasons(names: Iterable[str]) -> dict[str, str]:
    """Return the name under which each reason is drawn; reasons without a colour of their own share `other`."""
    further = [name for name in precedence(set(names)) if name not in _PRECEDENCE]
    return {name: name if name in _PRECEDENCE else OTHER for name in names} | {n: n for n in further[:_MAX_FURTHER]}
