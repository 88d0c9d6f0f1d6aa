"""Paired statistics: against scipy, statsmodels and own loops, with coverage, symmetry and every edge."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import scipy.stats
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from statsmodels.stats.contingency_tables import mcnemar as statsmodels_mcnemar
from statsmodels.stats.power import normal_sample_size_one_tail
from statsmodels.stats.proportion import proportion_confint

from tokenprune.evaluation.statistics import (
    detectable_difference,
    mcnemar,
    p_value,
    paired,
    pairs_needed,
    points,
    verdict,
    wilson,
)

COUNTS = st.integers(0, 40)
PAIRS = st.lists(st.tuples(st.booleans(), st.booleans(), st.integers(0, 3)), min_size=1, max_size=60)


def of_counts(both, only_baseline, only_other, neither, stratum=0):
    outcomes = (
        [(True, True)] * both
        + [(True, False)] * only_baseline
        + [(False, True)] * only_other
        + [(False, False)] * neither
    )
    return paired([a for a, _ in outcomes], [b for _, b in outcomes], [stratum] * len(outcomes))


@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.99])
@pytest.mark.parametrize("n", [1, 2, 7, 50, 500])
def test_wilson_against_scipy_and_statsmodels(n, confidence):
    for successes in {0, 1, n // 3, n - 1, n}:
        ours = wilson(successes, n, confidence)
        scipys = scipy.stats.binomtest(successes, n).proportion_ci(confidence, "wilson")
        theirs = proportion_confint(successes, n, 1 - confidence, "wilson")
        assert ours == pytest.approx(tuple(scipys), abs=1e-12)
        assert ours == pytest.approx(theirs, abs=1e-12)


def test_wilson_knows_nothing_without_trials_and_never_leaves_the_shares():
    assert wilson(0, 0) == (0.0, 1.0)
    assert all(wilson(0, n)[0] == 0 and wilson(n, n)[1] == 1 for n in range(1, 300))


@pytest.mark.parametrize(("successes", "n", "confidence"), [(3, 2, 0.95), (-1, 2, 0.95), (1, 2, 1.0), (1, 2, 0.0)])
def test_wilson_refuses(successes, n, confidence):
    with pytest.raises(ValueError, match="valid"):
        wilson(successes, n, confidence)


@given(COUNTS, COUNTS, st.integers(2, 5))
def test_wilson_holds_the_share_and_narrows_with_more_of_the_same(successes, failures, times):
    n = successes + failures
    assume(n)
    low, high = wilson(successes, n)
    assert 0 <= low <= successes / n <= high <= 1
    wider = wilson(times * successes, times * n)
    assert wider[1] - wider[0] < high - low


def test_exact_mcnemar_against_scipy_and_statsmodels():
    for lost in range(0, 30, 3):
        for gained in range(0, 30, 2):
            p = mcnemar(lost, gained)
            theirs = statsmodels_mcnemar([[5, lost], [gained, 2]], exact=True).pvalue
            scipys = scipy.stats.binomtest(lost, lost + gained).pvalue if lost + gained else 1.0
            assert p == pytest.approx(theirs, rel=1e-12)
            assert p == pytest.approx(scipys, rel=1e-12)


def test_mcnemar_of_thousands_of_pairs():
    assert mcnemar(1400, 1600) == pytest.approx(scipy.stats.binomtest(1400, 3000).pvalue, rel=1e-9)
    assert mcnemar(0, 5000) == 0


@given(COUNTS, COUNTS, st.integers(2, 4))
def test_more_of_the_same_pairs_never_raise_p(lost, gained, times):
    assert mcnemar(times * lost, times * gained) <= mcnemar(lost, gained)


@given(PAIRS)
@settings(max_examples=25)
def test_counts_difference_and_symmetry(pairs):
    baseline, other, strata = ([pair[i] for pair in pairs] for i in range(3))
    result, swapped = paired(baseline, other, strata), paired(other, baseline, strata)
    tally = {(True, True): 0, (True, False): 0, (False, True): 0, (False, False): 0}
    for a, b in zip(baseline, other, strict=True):
        tally[a, b] += 1
    assert (result.both, result.only_baseline, result.only_other, result.neither) == tuple(tally.values())
    assert result.n == len(pairs)
    assert result.difference == pytest.approx(sum(other) / len(pairs) - sum(baseline) / len(pairs))
    assert -1 <= result.low <= result.difference <= result.high <= 1
    assert swapped.difference == -result.difference
    assert swapped.p == result.p
    # Another draw: ends may move by a step of the lattice of differences.
    assert (swapped.low, swapped.high) == pytest.approx((-result.high, -result.low), abs=1.01 / len(pairs))


@given(PAIRS, st.randoms(use_true_random=False))
@settings(max_examples=25)
def test_the_order_of_pairs_within_a_task_changes_nothing(pairs, chance):
    pairs = sorted(pairs, key=lambda pair: pair[2])
    mixed = sorted(chance.sample(pairs, len(pairs)), key=lambda pair: pair[2])
    assert paired(*zip(*pairs, strict=True)) == paired(*zip(*mixed, strict=True))


def resample(gains, strata, times, chance):
    """Draw pairs with replacement within each stratum, one by one."""
    groups = {}
    for gain, stratum in zip(gains, strata, strict=True):
        groups.setdefault(stratum, []).append(gain)
    means = []
    for _ in range(times):
        drawn = [chance.choice(group) for group in groups.values() for _ in group]
        means.append(sum(drawn) / len(drawn))
    means.sort()
    return means[int(0.025 * times)], means[int(0.975 * times) - 1]


def test_the_bootstrap_against_one_that_draws_pair_by_pair():
    chance = random.Random(3)
    strata = [i // 20 for i in range(80)]
    baseline = [chance.random() < 0.9 for _ in strata]
    other = [chance.random() < 0.4 + 0.15 * stratum for stratum in strata]
    gains = [int(b) - int(a) for a, b in zip(baseline, other, strict=True)]
    result = paired(baseline, other, strata)
    assert (result.low, result.high) == pytest.approx(resample(gains, strata, 4000, chance), abs=1.5 / 80)


def test_tasks_are_resampled_apart():
    baseline, other, tasks = [True] * 40, [False] * 20 + [True] * 20, ["lost"] * 20 + ["kept"] * 20
    apart, together = paired(baseline, other, tasks), paired(baseline, other, ["all"] * 40)
    assert (apart.low, apart.high) == (-0.5, -0.5)
    assert together.low == pytest.approx(-0.65, abs=0.03)
    assert together.high == pytest.approx(-0.35, abs=0.03)


def test_tasks_of_one_pair_are_resampled_together():
    baseline, other = [True] * 10, [False] * 3 + [True] * 7
    alone, together = paired(baseline, other, range(10)), paired(baseline, other, [0] * 10)
    assert alone == together
    assert alone.low < alone.difference < alone.high


def test_the_interval_covers_the_true_difference_as_often_as_it_says():
    rng = np.random.default_rng(5)
    covered, runs = 0, 300
    for run in range(runs):
        drawn = rng.choice(4, 60, p=(0.5, 0.25, 0.1, 0.15))
        result = paired([d in (0, 1) for d in drawn], [d in (0, 2) for d in drawn], [0] * 60, seed=run)
        covered += result.low <= -0.15 <= result.high
    assert 0.91 <= covered / runs <= 0.98


def test_equal_arguments_give_equal_intervals_and_the_seed_counts():
    rng = np.random.default_rng(0)
    arguments = list(rng.random(400) < 0.7), list(rng.random(400) < 0.6), [0] * 400
    assert paired(*arguments) == paired(*arguments)
    assert len({(r.low, r.high) for r in (paired(*arguments, seed=seed) for seed in range(8))}) > 1


def test_lengths_must_agree():
    with pytest.raises(ValueError, match="zip"):
        paired([True], [True, False], [0, 0])


def test_without_pairs_nothing_is_known():
    result = paired([], [], [])
    assert (result.n, result.low, result.high, result.p) == (0, -1, 1, 1)
    assert math.isnan(result.difference)


@given(COUNTS, COUNTS, COUNTS)
def test_pairs_needed_against_statsmodels(lost, gained, alike):
    n = lost + gained + alike
    assume(lost != gained)
    discordance, difference = (lost + gained) / n, abs(lost - gained) / n
    null, alternative = math.sqrt(discordance), math.sqrt(max(0, discordance - difference**2))
    theirs = normal_sample_size_one_tail(difference, 0.8, 0.025, std_null=null, std_alternative=alternative)
    assert pairs_needed(lost, gained, n) == max(6, math.ceil(theirs - 1e-9))


@pytest.mark.parametrize(("lost", "gained", "n"), [(6, 2, 50), (20, 10, 100), (9, 1, 200), (0, 5, 50)])
def test_as_many_pairs_as_needed_do_see_the_difference(lost, gained, n):
    def power(pairs):
        """Of the exact test, over every possible outcome that is not vanishingly rare."""
        detected = 0.0
        for discordant in range(1, pairs + 1):
            chance = scipy.stats.binom.pmf(discordant, pairs, (lost + gained) / n)
            if chance < 1e-6:
                continue
            won = np.arange(discordant + 1)
            clear = 2 * scipy.stats.binom.cdf(np.minimum(won, discordant - won), discordant, 0.5) < 0.05
            detected += chance * scipy.stats.binom.pmf(won[clear], discordant, gained / (lost + gained)).sum()
        return detected

    needed = pairs_needed(lost, gained, n)
    assert 0.75 < power(needed) < 0.81
    assert power(needed // 2) < 0.6


@pytest.mark.parametrize("alpha", [0.05, 0.01, 1e-4])
def test_fewer_pairs_than_the_exact_test_can_use_never_suffice(alpha):
    needed = pairs_needed(100, 0, 100, alpha=alpha)
    assert mcnemar(needed, 0) <= alpha
    assert needed == max(
        math.ceil(scipy.stats.norm.isf(alpha / 2) ** 2), next(k for k in range(99) if 2 * 0.5**k <= alpha)
    )


@given(COUNTS, COUNTS, COUNTS)
def test_where_nothing_is_seen_more_pairs_are_needed(lost, gained, alike):
    n = lost + gained + alike
    assume(lost != gained and mcnemar(lost, gained) >= 0.05)
    assert pairs_needed(lost, gained, n) > n


def test_no_number_of_pairs_shows_a_difference_of_nothing():
    assert pairs_needed(4, 4, 50) is None
    assert pairs_needed(0, 0, 0) is None


@given(st.integers(6, 2000), st.floats(0, 1))
def test_the_detectable_difference_needs_just_so_many_pairs(n, share):
    discordant = round(share * n)
    found = detectable_difference(n, discordant)

    def needed(difference):
        discordance = max(discordant / n, difference)
        spread = math.sqrt(max(0, discordance - difference**2))
        return normal_sample_size_one_tail(
            difference, 0.8, 0.025, std_null=math.sqrt(discordance), std_alternative=spread
        )

    assert 0 < found <= 1
    assert needed(found) <= n * (1 + 1e-6)
    assert needed(found * 0.99) > n


def test_more_pairs_detect_less_and_too_few_detect_nothing():
    sizes = [detectable_difference(n, n // 5) for n in (10, 50, 250, 1000)]
    assert sizes == sorted(sizes, reverse=True)
    assert detectable_difference(5, 0) is None
    assert detectable_difference(0, 0) is None


@pytest.mark.parametrize(
    ("counts", "sentence"),
    [
        ((0, 0, 0, 0), "cannot be compared: no start has been finished by both"),
        ((30, 13, 1, 6), "loses 24 points (95 % interval -38 to -12, McNemar p = 0.0018)"),
        ((60, 1, 22, 117), "gains 10.5 points (95 % interval +6 to +15, McNemar p < 0.0001)"),
        (
            (40, 1, 0, 9),
            "no difference can be seen with 50 episodes; about 400 pairs would be needed to see the 2-point "
            "difference observed",
        ),
        (
            (440, 30, 28, 2),
            "no difference can be seen with 500 episodes; about 57000 pairs would be needed to see the 0.4-point "
            "difference observed",
        ),
        (
            (40, 0, 0, 10),
            "no difference can be seen with 50 episodes (every pair ended alike); one of 15 points probably would be",
        ),
        (
            (400, 30, 30, 40),
            "no difference can be seen with 500 episodes (30 pairs won by each); one of 4.3 points probably would be",
        ),
        (
            (2, 1, 1, 1),
            "no difference can be seen with 5 episodes (1 pair won by each); so few show none, however large",
        ),
        (
            (1, 0, 0, 0),
            "no difference can be seen with 1 episode (every pair ended alike); so few show none, however large",
        ),
    ],
)
def test_verdicts(counts, sentence):
    assert verdict(of_counts(*counts)) == sentence


def test_a_verdict_needs_p_below_five_per_cent():
    assert verdict(of_counts(20, 6, 0, 0)).startswith("loses")
    assert verdict(of_counts(20, 5, 0, 0)).startswith("no difference")


def test_numbers_are_written_short():
    assert [points(share) for share in (0.24, 0.024, 1.0, 0.0)] == ["24", "2.4", "100", "0"]
    assert [points(share, sign=True) for share in (0.24, -0.036, 0.0, -0.0001)] == ["+24", "-3.6", "0", "0"]
    assert [p_value(p) for p in (0.00049, 0.013, 1.0, 0.0)] == ["p = 0.00049", "p = 0.013", "p = 1", "p < 0.0001"]
