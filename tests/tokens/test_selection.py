"""Selections and `resolve` against sorting in plain Python, one row at a time."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from fractions import Fraction

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from tests.helpers.drawing import keep_counts, layouts
from tokenprune.errors import SelectionError
from tokenprune.tokens.layout import TokenLayout
from tokenprune.tokens.proposal import Proposal, Quota, resolve
from tokenprune.tokens.selection import CurrentIds, OriginalIds, TokenSelection, apply

INF, NAN = math.inf, math.nan

# Few values, so that ties are frequent; all are exact in every dtype.
VALUES = st.sampled_from([-2.0, -0.5, -0.0, 0.0, 0.25, 1.0, 1.5, INF])
SCORES = st.one_of(VALUES, st.sampled_from([-1.0, 0.75, 3.0, NAN]))
DTYPES = st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64])


@dataclass(frozen=True)
class Vote:
    """One stage's proposal, as nested lists."""

    score: list[list[float]] | None
    protect: list[list[bool]] | None
    drop: list[list[bool]] | None
    weight: float = 1.0
    dtype: torch.dtype = torch.float32

    def proposal(self) -> Proposal:
        return Proposal(
            None if self.score is None else torch.tensor(self.score, dtype=self.dtype),
            None if self.protect is None else torch.tensor(self.protect),
            None if self.drop is None else torch.tensor(self.drop),
        )


@dataclass(frozen=True)
class Group:
    """A quota, as nested lists."""

    member: list[list[bool]]
    keep: int


@dataclass(frozen=True)
class Case:
    """Everything one cut has to decide on."""

    batch: int
    n: int
    votes: list[Vote]
    groups: list[Group]
    keep: int

    def resolve(self, keep: int | None = None) -> Tensor:
        return resolve(
            [vote.proposal() for vote in self.votes],
            self.keep if keep is None else keep,
            [vote.weight for vote in self.votes],
            [Quota(torch.tensor(group.member), group.keep) for group in self.groups],
        )


def grid(batch: int, n: int, cell: st.SearchStrategy) -> st.SearchStrategy:
    return st.lists(st.lists(cell, min_size=n, max_size=n), min_size=batch, max_size=batch)


@st.composite
def votes(draw: st.DrawFn, batch: int, n: int) -> Vote:
    usually, sometimes = st.sampled_from([True, True, True, False]), st.sampled_from([True, False, False])
    few = st.sampled_from([False, False, False, True])
    return Vote(
        draw(grid(batch, n, SCORES)) if draw(usually) else None,
        draw(grid(batch, n, few)) if draw(sometimes) else None,
        draw(grid(batch, n, few)) if draw(sometimes) else None,
        draw(st.sampled_from([0.25, 0.5, 1.0, 1.0, 3.0])),
        draw(DTYPES),
    )


@st.composite
def cases(draw: st.DrawFn, quotas: bool = True) -> Case:
    batch, n = draw(st.integers(1, 3)), draw(st.integers(1, 14))
    drawn = draw(st.lists(votes(batch, n), min_size=1, max_size=3))
    assume(any(v is not None for vote in drawn for v in (vote.score, vote.protect, vote.drop)))
    groups = []
    if quotas:
        for _ in range(draw(st.integers(0, 2))):
            groups.append(Group(draw(grid(batch, n, st.booleans())), draw(st.integers(0, min(n, 4)))))
    return Case(batch, n, drawn, groups, draw(keep_counts(n)))


def lower(scores: list[float], i: int) -> int:
    """How many tokens score strictly lower than token i; NaN counts as the lowest score there is."""
    plain = [-INF if math.isnan(s) else s for s in scores]
    return sum(s < plain[i] for s in plain)


def naive(case: Case, row: int, keep: int) -> list[int]:
    """Sort the tokens of one row by quota, protected, undropped, score and lower index; keep the first."""

    def wish(i: int) -> tuple[int, Fraction, int]:
        protected = any(vote.protect and vote.protect[row][i] for vote in case.votes)
        dropped = any(vote.drop and vote.drop[row][i] for vote in case.votes)
        scored = [vote for vote in case.votes if vote.score]
        total = sum((Fraction(vote.weight) * lower(vote.score[row], i) for vote in scored), Fraction(0))
        if len(scored) == 1:
            total = Fraction(lower(scored[0].score[row], i))
        return (2 if protected else 0 if dropped else 1), total, -i

    tokens = sorted(range(case.n), key=wish, reverse=True)
    quota = set()
    for group in case.groups:
        quota |= set([i for i in tokens if group.member[row][i]][: group.keep])
    return sorted([*(i for i in tokens if i in quota), *(i for i in tokens if i not in quota)][:keep])


@given(cases())
def test_resolve_equals_a_sort_per_row(case: Case) -> None:
    chosen = case.resolve()
    assert chosen.dtype == torch.int64
    assert chosen.tolist() == [naive(case, row, case.keep) for row in range(case.batch)]


@given(cases())
def test_i1_i4_chosen_are_sorted_unique_in_range_and_as_many_as_asked_whatever_the_votes(case: Case) -> None:
    chosen = case.resolve()
    assert tuple(chosen.shape) == (case.batch, case.keep)
    assert bool((chosen.diff(dim=1) > 0).all())
    assert bool(((chosen >= 0) & (chosen < case.n)).all())


@given(cases())
def test_i7_a_larger_keep_is_a_superset(case: Case) -> None:
    for keep in range(case.n):
        smaller, larger = case.resolve(keep).tolist(), case.resolve(keep + 1).tolist()
        assert all(set(a) < set(b) for a, b in zip(smaller, larger, strict=True))


@given(cases())
def test_i9_batch_rows_are_independent(case: Case) -> None:
    def only(cells: list | None, row: int) -> list | None:
        return None if cells is None else [cells[row]]

    together = case.resolve().tolist()
    for row in range(case.batch):
        alone = replace(
            case,
            batch=1,
            votes=[
                replace(v, score=only(v.score, row), protect=only(v.protect, row), drop=only(v.drop, row))
                for v in case.votes
            ],
            groups=[Group([g.member[row]], g.keep) for g in case.groups],
        )
        assert alone.resolve().tolist() == [together[row]]


@given(st.data(), st.integers(1, 3), st.integers(1, 12))
def test_i8_permuting_tokens_with_their_votes_permutes_the_result(data: st.DataObject, batch: int, n: int) -> None:
    order = data.draw(st.permutations(range(n)))
    score = torch.tensor([data.draw(st.permutations([float(i) for i in range(n)])) for _ in range(batch)])
    protect, drop = (torch.tensor(data.draw(grid(batch, n, st.booleans()))) for _ in range(2))
    keep = data.draw(keep_counts(n))
    chosen = resolve([Proposal(score, protect, drop)], keep)
    permuted = resolve([Proposal(score[:, order], protect[:, order], drop[:, order])], keep)
    for before, after in zip(chosen.tolist(), permuted.tolist(), strict=True):
        assert sorted(order[i] for i in after) == before


@given(cases(quotas=False))
def test_i2_protected_tokens_stay_while_there_is_room(case: Case) -> None:
    chosen = case.resolve().tolist()
    for row, kept in enumerate(chosen):
        protected = {i for i in range(case.n) if any(v.protect and v.protect[row][i] for v in case.votes)}
        assert protected <= set(kept) or set(kept) <= protected


def test_equal_scores_keep_the_lower_index() -> None:
    assert resolve([Proposal(torch.zeros(2, 5))], 3).tolist() == [[0, 1, 2]] * 2
    assert resolve([Proposal(torch.tensor([[1.0, 2.0, 2.0, 2.0]]))], 2).tolist() == [[1, 2]]


def test_protect_wins_over_drop_and_over_any_score() -> None:
    score = torch.tensor([[9.0, INF, 1.0, 0.0]])
    protect, drop = torch.tensor([[False, False, False, True]]), torch.tensor([[True, False, False, True]])
    assert resolve([Proposal(score, protect, drop)], 1).tolist() == [[3]]
    assert resolve([Proposal(score, protect, drop)], 3).tolist() == [[1, 2, 3]]


def test_nan_ranks_lowest_and_never_spoils_its_neighbours() -> None:
    assert resolve([Proposal(torch.tensor([[NAN, -5.0, 3.0, NAN, 1.0]]))], 3).tolist() == [[1, 2, 4]]
    assert resolve([Proposal(torch.full((1, 4), NAN))], 2).tolist() == [[0, 1]]


def test_several_scores_are_compared_by_rank_not_by_size() -> None:
    huge, small = torch.tensor([[1e30, 2e30, 3e30, 0.0]]), torch.tensor([[3e-9, 2e-9, 0.0, 1e-9]])
    # Ranks 1 2 3 0 and 3 2 0 1: sums 4 4 3 1.
    assert resolve([Proposal(huge), Proposal(small)], 2).tolist() == [[0, 1]]
    assert resolve([Proposal(huge), Proposal(small)], 1, [1.0, 0.25]).tolist() == [[2]]


def test_equal_sums_of_ranks_are_a_tie_in_whatever_order_the_ranks_come() -> None:
    ranks = [[1, 3, 0, 2, 4, 5, 6], [2, 2, 0, 1, 4, 5, 6], [3, 1, 0, 2, 4, 5, 6]]
    proposals = [Proposal(torch.tensor([row], dtype=torch.float64)) for row in ranks]
    assert 0 in resolve(proposals, 4)[0].tolist()
    assert resolve(proposals[::-1], 4).tolist() == resolve(proposals, 4).tolist()


def test_what_a_group_cannot_fill_goes_to_the_best_of_the_others() -> None:
    score = torch.tensor([[5.0, 4.0, 3.0, 2.0, 1.0, 0.0]])
    last_two = torch.tensor([[False] * 4 + [True] * 2])
    assert resolve([Proposal(score)], 4, quotas=[Quota(last_two, 1)]).tolist() == [[0, 1, 2, 4]]
    assert resolve([Proposal(score)], 4, quotas=[Quota(last_two, 4)]).tolist() == [[0, 1, 4, 5]]


def test_nothing_prunable_is_left() -> None:
    assert resolve([Proposal(torch.zeros(2, 0))], 0).shape == (2, 0)


BAD = {
    "nothing asked": ([], 1, "nothing to resolve"),
    "an empty proposal": ([Proposal()], 1, "nothing to resolve"),
    "keep too large": ([Proposal(torch.zeros(1, 3))], 4, "cannot keep 4 of 3"),
    "keep negative": ([Proposal(torch.zeros(1, 3))], -1, "cannot keep -1 of 3"),
    "lengths differ": ([Proposal(torch.zeros(1, 3)), Proposal(torch.zeros(1, 4))], 1, r"'score' has shape \(1, 4\)"),
    "batches differ": ([Proposal(torch.zeros(2, 3), torch.ones(1, 3) > 0)], 1, r"'protect' has shape \(1, 3\)"),
    "no batch": ([Proposal(torch.zeros(3))], 1, r"'score' has shape \(3,\)"),
    "integer score": ([Proposal(torch.zeros(1, 3, dtype=torch.int64))], 1, "'score' has dtype torch.int64"),
    "float protect": ([Proposal(protect=torch.zeros(1, 3))], 1, "'protect' has dtype torch.float32"),
    "float drop": ([Proposal(drop=torch.zeros(1, 3))], 1, "'drop' has dtype torch.float32"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_proposals_are_refused(case: str) -> None:
    proposals, keep, message = BAD[case]
    with pytest.raises(SelectionError, match=message):
        resolve(proposals, keep)


@st.composite
def selections(draw: st.DrawFn, n_source: int | None = None, batch: int | None = None) -> TokenSelection:
    n = draw(st.integers(1, 12)) if n_source is None else n_source
    rows = draw(st.integers(1, 3)) if batch is None else batch
    keep = draw(st.integers(0, n))
    ids = [sorted(draw(st.permutations(range(n)))[:keep]) for _ in range(rows)]
    return TokenSelection(OriginalIds(torch.tensor(ids, dtype=torch.int64).view(rows, keep)), n)


@given(selections())
def test_i5_to_current_and_to_original_are_inverse_on_the_kept(selection: TokenSelection) -> None:
    batch, kept = selection.ids.shape
    places = CurrentIds(torch.arange(kept).repeat(batch, 1))
    assert torch.equal(selection.to_original(places), selection.ids)
    assert torch.equal(selection.to_current(selection.ids), places)
    backwards = OriginalIds(selection.ids.flip(1))
    assert torch.equal(selection.to_original(selection.to_current(backwards)), backwards)


@given(st.data(), st.integers(1, 10), st.integers(1, 3))
def test_identity_keeps_every_place_in_every_batch(data: st.DataObject, n: int, batch: int) -> None:
    everything = TokenSelection.identity(n, batch)
    assert everything.ids.tolist() == [list(range(n))] * batch
    some = torch.tensor(data.draw(st.lists(st.integers(0, n - 1), min_size=1)))
    asked = OriginalIds(some.expand(batch, -1))
    assert torch.equal(everything.to_current(asked), asked)
    assert torch.equal(everything.to_original(CurrentIds(asked)), asked)


@given(st.data(), selections())
def test_i6_compose_is_associative_and_has_an_identity(data: st.DataObject, a: TokenSelection) -> None:
    batch = a.ids.shape[0]
    b = data.draw(selections(a.n_kept, batch))
    c = data.draw(selections(b.n_kept, batch))
    left, right = a.compose(b).compose(c), a.compose(b.compose(c))
    expected = [[a.ids[r, b.ids[r, j]].item() for j in c.ids[r].tolist()] for r in range(batch)]
    assert left.ids.tolist() == right.ids.tolist() == expected
    assert left.n_source == right.n_source == a.n_source
    assert torch.equal(a.compose(TokenSelection.identity(a.n_kept, batch)).ids, a.ids)
    assert torch.equal(TokenSelection.identity(a.n_source, batch).compose(a).ids, a.ids)


@given(selections())
def test_seen_marks_the_kept(selection: TokenSelection) -> None:
    expected = [[i in row for i in range(selection.n_source)] for row in selection.ids.tolist()]
    assert selection.seen().tolist() == expected


def test_compose_refuses_a_selection_made_for_another_number_of_tokens() -> None:
    with pytest.raises(SelectionError, match="of 5 tokens cannot follow one that keeps 4"):
        TokenSelection.identity(4, 1).compose(TokenSelection.identity(5, 1))


@given(st.data(), layouts(), st.integers(1, 3))
def test_i1_i2_i3_apply_keeps_the_fixed_and_the_chosen_and_nothing_returns(
    data: st.DataObject, layout: TokenLayout, batch: int
) -> None:
    tokens = TokenSelection.identity(layout.n_tokens, batch)
    fixed = torch.tensor(layout.fixed)
    prunable = OriginalIds(torch.tensor(layout.prunable).expand(batch, -1))
    held = [set(range(layout.n_tokens))] * batch
    for _ in range(3):
        p = prunable.shape[1]
        keep = data.draw(keep_counts(p))
        chosen = [sorted(data.draw(st.permutations(range(p)))[:keep]) for _ in range(batch)]
        expected = [sorted({*layout.fixed, *(prunable[r, i].item() for i in chosen[r])}) for r in range(batch)]
        index = torch.tensor(chosen, dtype=torch.int64).view(batch, keep)
        tokens, prunable = apply(tokens, prunable, fixed, index)
        assert tokens.ids.tolist() == expected
        assert tokens.n_source == layout.n_tokens
        assert [[i for i in row if i not in layout.fixed] for row in expected] == prunable.tolist()
        assert all(set(now) <= before for now, before in zip(expected, held, strict=True))
        held = [set(row) for row in expected]
