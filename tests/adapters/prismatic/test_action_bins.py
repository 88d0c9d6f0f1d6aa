"""Action tokens: ids to actions against plain numpy, the ids beyond the actions, the choice of a token."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokenprune.errors import CheckpointError
from tokenprune_adapters.backbones.prismatic.action_bins import ActionBins

ROWS, VOCAB = 32064, 32000
bins = ActionBins(VOCAB)


def reference(token: int, vocab: int = VOCAB, n_bins: int = 256) -> float:
    """One token by the definition: discretised on `n_bins` values, counted from the end of the vocabulary."""
    values = np.linspace(-1, 1, n_bins)
    index = vocab - token - 1
    index = min(max(index, 0), n_bins - 2)
    return (values[index] + values[index + 1]) / 2


def test_every_row_of_the_release():
    got = bins.actions(torch.arange(ROWS)[None])[0]
    assert got.dtype == torch.float64
    assert got.tolist() == [reference(token) for token in range(ROWS)]


@given(st.integers(300, 5000), st.integers(2, 256), st.data())
def test_any_vocabulary(vocab, n_bins, data):
    ids = data.draw(st.lists(st.lists(st.integers(0, vocab + 64), min_size=7, max_size=7), min_size=1, max_size=3))
    got = ActionBins(vocab, n_bins).actions(torch.tensor(ids))
    assert got.tolist() == [[reference(token, vocab, n_bins) for token in row] for row in ids]


def test_known_tokens():
    first, second, last = 31744, 31745, 31999
    centre = 1 - 1 / 255
    ids = torch.tensor([[last, last - 127, second, first, 0, 29871, VOCAB, ROWS - 1]])
    expected = [-centre, 0, centre, centre, centre, centre, -centre, -centre]
    assert bins.actions(ids)[0].tolist() == pytest.approx(expected, abs=1e-12)


def test_padding_rows_shift_every_action():
    ids = torch.arange(31746, 32000)[None]
    assert not torch.isclose(ActionBins(ROWS).actions(ids), bins.actions(ids)).any()


def test_ids_of_the_actions():
    assert bins.ids == range(31744, 32000)
    assert ActionBins(300, 10).ids == range(290, 300)


def test_an_action_comes_back():
    actions = np.random.default_rng(0).uniform(-1, 1, 500)
    tokens = VOCAB - np.digitize(actions, np.linspace(-1, 1, 256))
    back = bins.actions(torch.from_numpy(tokens)[None])[0].numpy()
    assert abs(back - actions).max() <= 1 / 255 + 1e-12


def test_any_token_can_be_chosen():
    logits = torch.zeros(3, ROWS)
    for row, token in enumerate((5, 31800, ROWS - 1)):
        logits[row, token] = 1
    assert bins.choose(logits).tolist() == [5, 31800, ROWS - 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_choice_among_actions_only(dtype):
    logits = torch.zeros(3, ROWS, dtype=dtype)
    logits[:, [5, 31743, VOCAB, ROWS - 1]] = 9
    for row, token in enumerate((31744, 31800, 31999)):
        logits[row, token] = 1
    assert bins.choose(logits, actions_only=True).tolist() == [31744, 31800, 31999]


@pytest.mark.parametrize("actions_only", [False, True])
def test_no_value_is_read_on_the_host(monkeypatch, actions_only):
    def refuse(*_):
        raise AssertionError("a value was read")

    logits = torch.randn(7, ROWS)
    for name in ("item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__index__", "__float__"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    assert bins.actions(bins.choose(logits, actions_only)[None]).shape == (1, 7)


@pytest.mark.parametrize(("vocab", "n_bins"), [(200, 256), (256, 1), (0, 0)])
def test_a_vocabulary_without_room_is_refused(vocab, n_bins):
    with pytest.raises(CheckpointError, match=f"{n_bins} action bins in a vocabulary of {vocab}; valid"):
        ActionBins(vocab, n_bins)
