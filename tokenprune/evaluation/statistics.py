"""Statistics of paired episodes: intervals, McNemar's exact test, and how many pairs a difference needs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

ALPHA = 0.05
POWER = 0.8
RESAMPLES = 10_000


@dataclass(frozen=True)
class Paired:
    """Two variants on the same starts.

    Attributes:
        n: Pairs.
        both: Pairs in which both succeeded.
        only_baseline: Pairs in which only the baseline succeeded.
        only_other: Pairs in which only the other variant succeeded.
        neither: Pairs in which both failed.
        difference: Success of the other minus success of the baseline, as a share; NaN without pairs.
        low: Lower end of the bootstrap interval of the difference, 95 %; -1 without pairs.
        high: Upper end; 1 without pairs.
        p: McNemar's exact two-sided p; 1 without pairs.
    """

    n: int
    both: int
    only_baseline: int
    only_other: int
    neither: int
    difference: float
    low: float
    high: float
    p: float


def wilson(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return the score interval of a share (Wilson, 1927), as Brown, Cai and DasGupta (2001) recommend for few trials.

    With `p = successes / n` and `z` the normal quantile of `(1 + confidence) / 2` its ends are
    `(p + z²/2n ± z sqrt(p(1 - p)/n + z²/4n²)) / (1 + z²/n)`.

    Returns:
        Lower and upper end, shares; (0, 1) where `n` is 0.

    Raises:
        ValueError: If `successes` is not within 0 and `n`, or `confidence` not between 0 and 1.
    """
    if not 0 <= successes <= n:
        raise ValueError(f"{successes} successes of {n}; valid: 0 to n")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}; valid: between 0 and 1")
    if n == 0:
        return 0.0, 1.0
    share, z = successes / n, NormalDist().inv_cdf((1 + confidence) / 2)
    centre = share + z * z / (2 * n)
    reach = z * math.sqrt(share * (1 - share) / n + (z / (2 * n)) ** 2)
    low, high = (centre - reach) / (1 + z * z / n), (centre + reach) / (1 + z * z / n)
    return 0.0 if successes == 0 else low, 1.0 if successes == n else high


def mcnemar(only_baseline: int, only_other: int) -> float:
    """Return the exact two-sided p of McNemar's test (1947).

    Under its null hypothesis either variant wins a discordant pair with probability 1/2.

    Twice the binomial tail `P(X <= min(only_baseline, only_other))` of `X ~ B(only_baseline + only_other, 1/2)`, at
    most 1.
    """
    discordant = only_baseline + only_other
    tail = sum(math.comb(discordant, k) for k in range(min(only_baseline, only_other) + 1))
    return min(1.0, 2 * tail / (1 << discordant))


def paired(baseline: Sequence[bool], other: Sequence[bool], strata: Sequence[object], seed: int = 0) -> Paired:
    """Compare two variants on the same starts.

    The interval is the percentile bootstrap (Efron and Tibshirani, 1993) over 10 000 resamples. Pairs are drawn within
    their stratum, because the tasks of a suite are fixed and not a sample. Strata of one pair are drawn together, since
    alone they cannot vary. With m pairs in a stratum the interval is too narrow by about `sqrt((m - 1) / m)`. It has no
    width where no pair is discordant. The verdict therefore uses the exact test.

    Args:
        baseline: Success of the baseline, by pair.
        other: Success of the other variant, by pair.
        strata: Stratum of each pair, resampled apart: its task.
        seed: Seed of the resampling; equal arguments give equal intervals, whatever the order of pairs in a stratum.

    Raises:
        ValueError: If the three differ in length.
    """
    outcomes = [(bool(a), bool(b), stratum) for a, b, stratum in zip(baseline, other, strata, strict=True)]
    counts, n = Counter((a, b) for a, b, _ in outcomes), len(outcomes)
    lost, gained = counts[True, False], counts[False, True]
    low, high = _bootstrap([(stratum, b - a) for a, b, stratum in outcomes], seed) if n else (-1.0, 1.0)
    return Paired(
        n=n,
        both=counts[True, True],
        only_baseline=lost,
        only_other=gained,
        neither=counts[False, False],
        difference=(gained - lost) / n if n else math.nan,
        low=low,
        high=high,
        p=mcnemar(lost, gained),
    )


def _bootstrap(gains: Sequence[tuple[object, int]], seed: int) -> tuple[float, float]:
    """Return the interval of the mean of gains (1, 0 or -1); their counts in a resample are multinomial."""
    sizes = Counter(stratum for stratum, _ in gains)
    # The pool of single pairs needs a key that no stratum can have, and any hashable may be a stratum.
    grouped: dict[tuple[object, ...], list[int]] = {}
    for stratum, gain in gains:
        grouped.setdefault((stratum,) if sizes[stratum] > 1 else (), []).append(gain)
    rng, total = np.random.default_rng(seed), np.zeros(RESAMPLES, np.int64)
    for group in grouped.values():
        size, lost, gained = len(group), group.count(-1), group.count(1)
        drawn = rng.multinomial(size, (lost / size, gained / size, (size - lost - gained) / size), RESAMPLES)
        total += drawn[:, 1] - drawn[:, 0]
    low, high = np.quantile(total / len(gains), (ALPHA / 2, 1 - ALPHA / 2))
    return float(low), float(high)


def pairs_needed(only_baseline: int, only_other: int, n: int, power: float = POWER, alpha: float = ALPHA) -> int | None:
    """Return how many pairs McNemar's test needs to detect the observed difference with a probability of `power`.

    Connor (1987): `(z₁ sqrt(ψ) + z₂ sqrt(ψ - δ²))² / δ²` with ψ the share of discordant pairs, δ the difference, and
    z₁, z₂ the normal quantiles of `1 - alpha/2` and `power`. The formula is for the asymptotic test; the exact one is a
    little weaker, with a power of 0.76 to 0.8 where 0.8 is wanted. The result is never less than the pairs that the
    exact test needs to reach `alpha` at all.

    Args:
        only_baseline: Pairs in which only the baseline succeeded.
        only_other: Pairs in which only the other variant succeeded.
        n: All pairs.
        power: Wanted probability of detecting the difference.
        alpha: The p below which a difference counts as detected.

    Returns:
        The number of pairs; None where no difference was observed.
    """
    if only_baseline == only_other:
        return None
    discordance, difference = (only_baseline + only_other) / n, abs(only_other - only_baseline) / n
    return math.ceil(_pairs(discordance, difference, power, alpha))


def detectable_difference(n: int, discordant: int, power: float = POWER, alpha: float = ALPHA) -> float | None:
    """Return the smallest difference that `n` pairs detect with a probability of `power`; inverts `pairs_needed`.

    A difference cannot exceed the share of discordant pairs. Where it needs more than were observed, all discordant
    pairs are taken to favour one side.

    Args:
        n: Pairs.
        discordant: Pairs among them in which one variant succeeded and the other failed.
        power: Wanted probability of detecting the difference.
        alpha: The p below which a difference counts as detected.

    Returns:
        A share; None where so few pairs detect no difference, however large.
    """
    if n < _pairs(1.0, 1.0, power, alpha):
        return None
    low, high = 0.0, 1.0
    while high - low > 1e-6:
        middle = (low + high) / 2
        detected = _pairs(max(middle, discordant / n), middle, power, alpha) <= n
        low, high = (low, middle) if detected else (middle, high)
    return high


def _pairs(discordance: float, difference: float, power: float, alpha: float) -> float:
    critical, wanted = (NormalDist().inv_cdf(share) for share in (1 - alpha / 2, power))
    spread = max(0.0, discordance - difference**2)
    connor = ((critical * math.sqrt(discordance) + wanted * math.sqrt(spread)) / difference) ** 2
    # The smallest p of k discordant pairs is 2^(1 - k).
    return max(connor, math.ceil(1 - math.log2(alpha)))


def verdict(result: Paired) -> str:
    """Return what the pairs show of the other variant: one sentence without its subject and full stop."""
    if result.n == 0:
        return "cannot be compared: no start has been finished by both"
    size = points(abs(result.difference))
    if result.p < ALPHA:
        done = "gains" if result.difference > 0 else "loses"
        ends = f"{points(result.low, sign=True)} to {points(result.high, sign=True)}"
        return f"{done} {size} points (95 % interval {ends}, McNemar {p_value(result.p)})"
    unseen = f"no difference can be seen with {result.n} episode{'s' if result.n > 1 else ''}"
    needed = pairs_needed(result.only_baseline, result.only_other, result.n)
    if needed is not None:
        return f"{unseen}; about {_about(needed)} pairs would be needed to see the {size}-point difference observed"
    each = f"{result.only_other} pair{'s' if result.only_other > 1 else ''} won by each"
    alike = each if result.only_other else "every pair ended alike"
    could = detectable_difference(result.n, result.only_baseline + result.only_other)
    enough = "so few show none, however large" if could is None else f"one of {points(could)} points probably would be"
    return f"{unseen} ({alike}); {enough}"


def points(share: float, sign: bool = False) -> str:
    """Return a share in percentage points, to a tenth where that is not 0: `24`, `2.4`; with `sign`, `+24`."""
    text = f"{100 * share:{'+' if sign else ''}.1f}".removesuffix(".0")
    return "0" if text in ("-0", "+0") else text


def p_value(p: float) -> str:
    """Return `p = 0.0005`, or `p < 0.0001` below that."""
    return "p < 0.0001" if p < 0.0001 else f"p = {p:.2g}"


def _about(pairs: int) -> str:
    """Return two significant digits; the formula is no more exact."""
    step = 10 ** max(0, len(str(pairs)) - 2)
    return str(math.ceil(pairs / step) * step)
