"""Budgets against exact decimal arithmetic."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokenprune.tokens.budget import UNION, Budget, union_count

prunables = st.integers(0, 1200)
fixed_counts = st.integers(0, 200)
floors = st.integers(0, 80)
buckets = st.sampled_from([1, 2, 8, 16, 32])
ratios = st.tuples(st.integers(1, 10000), st.sampled_from([2, 3, 4])).map(lambda r: (min(r[0], 10 ** r[1]), r[1]))


def rounded(wanted: int, prunable: int, floor: int, bucket: int) -> int:
    """At least the floor, up to whole buckets, and never more than there are."""
    wanted = max(wanted, floor, 0)
    while wanted % bucket:
        wanted += 1
    return min(wanted, prunable)


@given(prunables, fixed_counts, ratios, floors, buckets)
def test_ratio_of_the_prunable_tokens(p: int, f: int, ratio: tuple[int, int], floor: int, bucket: int) -> None:
    exact = Fraction(ratio[0], 10 ** ratio[1])
    budget = Budget(float(f"{ratio[0]}e-{ratio[1]}"), floor=floor, bucket=bucket)
    wanted = max(exact * p // 1, 1)
    assert budget.count(p, f) == rounded(int(wanted), p, floor, bucket)


@given(prunables, fixed_counts, ratios, floors, buckets)
def test_ratio_of_the_sequence(p: int, f: int, ratio: tuple[int, int], floor: int, bucket: int) -> None:
    exact = Fraction(ratio[0], 10 ** ratio[1])
    budget = Budget(float(f"{ratio[0]}e-{ratio[1]}"), "sequence", floor, bucket)
    wanted = exact * (p + f) // 1 - f
    assert budget.count(p, f) == rounded(int(wanted), p, floor, bucket)


@given(prunables, fixed_counts, st.integers(0, 1500), floors, buckets, st.sampled_from(["prunable", "sequence"]))
def test_count(p: int, f: int, count: int, floor: int, bucket: int, of: str) -> None:
    assert Budget(count, of, floor, bucket).count(p, f) == rounded(count, p, floor, bucket)


@given(prunables, fixed_counts, st.integers(0, 1200), floors, buckets)
def test_union(p: int, f: int, protected: int, floor: int, bucket: int) -> None:
    budget = Budget(UNION, floor=floor, bucket=bucket)
    assert budget.count(p, f, min(protected, p)) == rounded(min(protected, p), p, floor, bucket)
    assert budget.count(p, f) == p, "while the union is not known, everything might stay"


@pytest.mark.parametrize(("ratio", "total"), [(0.29, 100), (0.57, 100), (0.58, 50), (0.07, 100), (0.1, 30), (0.7, 10)])
def test_a_decimal_ratio_loses_no_token_to_binary(ratio: float, total: int) -> None:
    assert Budget(ratio).count(total, 0) == round(ratio * total)


def test_the_published_cascade_of_shares_of_the_sequence() -> None:
    held, counts = 174, []
    for _ in range(4):
        held = Budget(0.9, "sequence", floor=59).count(held, 258 - 174)
        counts.append(held)
    assert counts == [148, 124, 103, 84]


def test_a_floor_binds_only_while_there_are_as_many() -> None:
    budget = Budget(0.1, floor=59)
    assert [budget.count(p, 80) for p in (700, 590, 100, 59, 40, 0)] == [70, 59, 59, 59, 40, 0]


def test_a_ratio_of_the_prunable_tokens_never_keeps_nothing() -> None:
    assert Budget(0.001).count(256, 80) == 1
    assert Budget(0.001).count(0, 80) == 0


@given(st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=1, max_size=4))
def test_union_count_is_the_most_any_row_protects(protect: list[list[bool]]) -> None:
    assert union_count(torch.tensor(protect)) == max(row.count(True) for row in protect)
