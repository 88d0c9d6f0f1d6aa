"""Summarises episodes: per variant over everything, per environment and per task, each beside the baseline."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tokenprune.errors import ResultError, nearest
from tokenprune.evaluation.statistics import Paired, paired, pairs_needed, verdict, wilson

if TYPE_CHECKING:
    from tokenprune.evaluation.records import EpisodeRecord
    from tokenprune.evaluation.starts import Start

DENSE = "dense"


@dataclass(frozen=True)
class VariantRow:
    """One variant over everything, over one environment or over one task.

    Where nothing was finished, or there is nothing to compare with, a number is None.

    Attributes:
        variant: Its label.
        environment: None over all environments.
        task: None over all tasks.
        episodes: Finished.
        missing: Starts that were planned or that another variant has finished, and that this one has not finished.
        successes: Episodes that succeeded.
        success_share: Successes over episodes.
        success_low: Lower end of Wilson's 95 % interval of the share.
        success_high: Upper end.
        steps_per_success: Control steps of an episode that succeeded, mean.
        steps_per_episode: Control steps of any episode, mean.
        queries_per_episode: Mean.
        replans_per_episode: Queries that a controller requested before the chunk ended, mean.
        fallbacks: Queries that fell back to dense, sum.
        query_ms_p50: Whole query, median over all queries.
        query_ms_p95: Whole query, 95th percentile over all queries.
        control_steps_per_policy_s: Control steps per second spent in the policy, without the simulator's time.
        action_change: L1 distance between successive actions, mean over an episode's steps, mean over episodes.
        seam_change: The same where a new chunk begins, over the episodes with more than one query.
        gripper_switches_per_episode: Mean.
        tokens_mean: Visual tokens held, mean over layers and queries.
        tokens_last: Visual tokens the last layer holds, mean over queries.
        gflops_per_query: Mean over queries.
        flop_ratio: The baseline's FLOPs per query over its own, on the starts both finished.
        speedup: The baseline's median query over its own, on the starts both finished.
        crashes: Simulators restarted, sum.
        overhead_share: Share of the episodes' time spent in neither simulator nor policy.
        unpaired: Starts that only one of this variant and the baseline has finished.
        paired: Comparison on the starts that both have finished.
    """

    variant: str
    environment: str | None
    task: int | None
    episodes: int
    missing: int
    successes: int
    success_share: float | None
    success_low: float
    success_high: float
    steps_per_success: float | None
    steps_per_episode: float | None
    queries_per_episode: float | None
    replans_per_episode: float | None
    fallbacks: int
    query_ms_p50: float | None
    query_ms_p95: float | None
    control_steps_per_policy_s: float | None
    action_change: float | None
    seam_change: float | None
    gripper_switches_per_episode: float | None
    tokens_mean: float | None
    tokens_last: float | None
    gflops_per_query: float | None
    flop_ratio: float | None
    speedup: float | None
    crashes: int
    overhead_share: float | None
    unpaired: int | None
    paired: Paired | None

    @property
    def verdict(self) -> str | None:
        """What the comparison shows, in one sentence; None for the baseline."""
        return None if self.paired is None else verdict(self.paired)

    def to_json(self) -> dict[str, Any]:
        """Return flat plain data, with the same names for every row."""
        plain = asdict(self)
        del plain["paired"]
        pair = self.paired
        some = pair if pair is not None and pair.n else None
        return plain | {
            "pairs": None if pair is None else pair.n,
            "pairs_both": None if pair is None else pair.both,
            "pairs_only_baseline": None if pair is None else pair.only_baseline,
            "pairs_only_variant": None if pair is None else pair.only_other,
            "pairs_neither": None if pair is None else pair.neither,
            "difference_share": None if some is None else some.difference,
            "difference_low": None if some is None else some.low,
            "difference_high": None if some is None else some.high,
            "mcnemar_p": None if some is None else some.p,
            "pairs_needed": None if some is None else pairs_needed(some.only_baseline, some.only_other, some.n),
            "verdict": self.verdict,
        }


@dataclass(frozen=True)
class Summary:
    """All rows of an evaluation.

    Attributes:
        baseline: Label of the variant the others are compared with, or None.
        rows: By variant in the order asked for; of each, over everything, then by environment, then by task.
        notes: What is unfinished or unpaired, in sentences.
    """

    baseline: str | None
    rows: tuple[VariantRow, ...]
    notes: tuple[str, ...]

    def at(self, environment: str | None = None, task: int | None = None) -> tuple[VariantRow, ...]:
        """Return the rows of one scope, one per variant; without arguments those over everything."""
        return tuple(row for row in self.rows if (row.environment, row.task) == (environment, task))

    def tasks(self) -> dict[str, tuple[int, ...]]:
        """Return the tasks that were evaluated, by environment."""
        found: dict[str, dict[int, None]] = {}
        for row in self.rows:
            if row.environment is not None and row.task is not None:
                found.setdefault(row.environment, {})[row.task] = None
        return {environment: tuple(tasks) for environment, tasks in found.items()}

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain data."""
        return {"baseline": self.baseline, "notes": list(self.notes), "rows": [row.to_json() for row in self.rows]}

    def write_csv(self, path: Path) -> None:
        """Write one line per row under a line of column names; unknown values are left empty.

        Raises:
            ResultError: If the file cannot be written.
        """
        lines = [row.to_json() for row in self.rows]
        try:
            with path.open("w", encoding="utf-8", newline="") as file:
                writer = csv.DictWriter(file, list(lines[0]), lineterminator="\n")
                writer.writeheader()
                writer.writerows(lines)
        except OSError as error:
            raise ResultError(f"cannot write {path}: {error.strerror or error}") from error


def summarise(
    records: Iterable[EpisodeRecord],
    baseline: str | None = None,
    variants: Sequence[str] = (),
    planned: Iterable[Start] = (),
) -> Summary:
    """Summarise the finished episodes.

    Args:
        records: Episodes in any order.
        baseline: Label of the variant to compare with; when left out it is `dense`, if that was evaluated.
        variants: Labels in the order of the rows, those without an episode included; further ones found in the
            records follow by name.
        planned: Starts that every variant was to run.

    Raises:
        ResultError: If there is neither an episode nor a variant, the baseline is none of the variants, or a variant
            ran a start twice.
    """
    found: dict[str, dict[Start, EpisodeRecord]] = {label: {} for label in variants}
    unsorted: dict[str, dict[Start, EpisodeRecord]] = {}
    for record in records:
        group = found if record.variant in found else unsorted
        own = group.setdefault(record.variant, {})
        if record.start in own:
            raise ResultError(f"'{record.variant}' has two episodes that begin alike: {record.start}")
        own[record.start] = record
    found |= {label: unsorted[label] for label in sorted(unsorted)}
    if not found:
        raise ResultError("there is no episode to summarise")
    if baseline is not None and baseline not in found:
        raise ResultError(f"baseline '{baseline}' was not evaluated{nearest(baseline, found)}")
    if baseline is None and DENSE in found:
        baseline = DENSE
    starts = sorted(set(planned).union(*found.values()))
    scopes = sorted(
        {_place(start)[:depth] for start in starts for depth in (0, 1, 2)} | {()}, key=lambda at: (len(at), at)
    )
    rows = []
    for label, own in found.items():
        against = None if baseline is None else found[baseline]
        for scope in scopes:
            within = [start for start in starts if _place(start)[: len(scope)] == scope]
            rows.append(_row(label, scope, within, own, against, label == baseline))
    return Summary(baseline, tuple(rows), tuple(_notes([row for row in rows if row.environment is None], baseline)))


def _row(
    label: str,
    scope: tuple[Any, ...],
    starts: Sequence[Start],
    own: Mapping[Start, EpisodeRecord],
    against: Mapping[Start, EpisodeRecord] | None,
    is_baseline: bool,
) -> VariantRow:
    mine = [own[start] for start in starts if start in own]
    common = [start for start in starts if start in own and start in (against or {})]
    both = [own[start] for start in common]
    theirs = [] if against is None else [against[start] for start in common]
    successes = [record for record in mine if record.success]
    low, high = wilson(len(successes), len(mine))
    median, gflops, whole = _latency(mine, 50), _by_query(mine, "gflops"), sum(r.episode_s for r in mine)
    compared, unpaired = None, None
    if against is not None and not is_baseline:
        before, after = ([record.success for record in run] for run in (theirs, both))
        compared = paired(before, after, [_place(start) for start in common])
        unpaired = sum((start in own) != (start in against) for start in starts)
    return VariantRow(
        variant=label,
        environment=scope[0] if scope else None,
        task=scope[1] if len(scope) > 1 else None,
        episodes=len(mine),
        missing=len(starts) - len(mine),
        successes=len(successes),
        success_share=_over(len(successes), len(mine)),
        success_low=low,
        success_high=high,
        steps_per_success=_over(sum(r.steps for r in successes), len(successes)),
        steps_per_episode=_over(sum(r.steps for r in mine), len(mine)),
        queries_per_episode=_over(sum(r.queries for r in mine), len(mine)),
        replans_per_episode=_over(sum(r.replans for r in mine), len(mine)),
        fallbacks=sum(r.fallbacks for r in mine),
        query_ms_p50=median,
        query_ms_p95=_latency(mine, 95),
        control_steps_per_policy_s=_over(sum(r.steps for r in mine), sum(r.policy_s for r in mine)),
        action_change=_mean([r.action_change for r in mine]),
        seam_change=_mean([r.seam_change for r in mine]),
        gripper_switches_per_episode=_over(sum(r.gripper_switches for r in mine), len(mine)),
        tokens_mean=_by_query(mine, "tokens_mean"),
        tokens_last=_by_query(mine, "tokens_last"),
        gflops_per_query=gflops,
        flop_ratio=_over(_by_query(theirs, "gflops"), _by_query(both, "gflops")),
        # Of the same starts: the machine may have had another speed in the baseline's other episodes.
        speedup=_over(_latency(theirs, 50), _latency(both, 50)),
        crashes=sum(r.crashes for r in mine),
        overhead_share=_over(whole - sum(r.simulator_s + r.policy_s for r in mine), whole),
        unpaired=unpaired,
        paired=compared,
    )


def _notes(rows: Sequence[VariantRow], baseline: str | None) -> Iterable[str]:
    """Yield what is unfinished or unpaired over everything; equal sentences of several variants are joined."""
    if any(row.missing for row in rows):
        yield "The evaluation is unfinished; the numbers are those of the episodes finished so far."
    variants_of: dict[str, list[str]] = {}
    for row in rows:
        if row.missing or row.unpaired:
            pairs = "" if row.paired is None else f", {row.paired.n} pairs compared"
            finished = f"{row.episodes} of {row.episodes + row.missing} episodes finished{pairs}"
            variants_of.setdefault(finished, []).append(row.variant)
    for finished, variants in variants_of.items():
        yield f"{finished}: {', '.join(variants)}."
    if baseline is None:
        yield f"Nothing is compared: '{DENSE}' was not evaluated and no other baseline was named."


def _place(start: Start) -> tuple[Any, ...]:
    return start.environment, start.task


def _by_query(records: Sequence[EpisodeRecord], name: str) -> float | None:
    """Return the mean over all queries of a number that each record holds as the mean over its own queries."""
    return _over(sum(getattr(r, name) * r.queries for r in records), sum(r.queries for r in records))


def _latency(records: Sequence[EpisodeRecord], percentile: float) -> float | None:
    times = [ms for record in records for ms in record.query_ms]
    return float(np.percentile(times, percentile)) if times else None


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return _over(sum(known), len(known))


def _over(value: float | None, by: float | None) -> float | None:
    return None if value is None or not by else value / by
