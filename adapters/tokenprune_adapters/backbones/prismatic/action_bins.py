"""OpenVLA's action tokens: one id at the end of the vocabulary per bin of [-1, 1] (upstream OpenVLA)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from tokenprune.errors import CheckpointError


class ActionBins:
    """Maps token ids to normalised actions.

    The last `n_bins` ids of the vocabulary are the actions, in descending order: the last id is the lowest action.
    `n_bins` values are evenly spaced over [-1, 1], and an action is the centre between two of them. There is one centre
    less than there are ids, so the first two of these ids both give the highest action.

    Args:
        vocab: Tokens of the vocabulary. Rows that pad the embedding table (`pad_to_multiple_of` of `config.json`) do
            not count: 32064 rows are 32000 tokens.
        n_bins: Ids that are actions (`n_action_bins`).
        device: Where the ids will lie.

    Attributes:
        ids: The ids that are actions.
        centres: The actions, in ascending order, float64 `[n_bins - 1]`.

    Raises:
        CheckpointError: If the vocabulary has no room for the actions.
    """

    def __init__(self, vocab: int, n_bins: int = 256, device: torch.device | str = "cpu") -> None:
        if not 2 <= n_bins <= vocab:
            raise CheckpointError(f"{n_bins} action bins in a vocabulary of {vocab}; valid: from 2 to all of it")
        edges = np.linspace(-1, 1, n_bins)
        self.ids = range(vocab - n_bins, vocab)
        self.centres = torch.from_numpy((edges[:-1] + edges[1:]) / 2).to(device)

    def choose(self, logits: Tensor, actions_only: bool = False) -> Tensor:
        """Choose the most likely token of each row.

        Args:
            logits: `[B, V]`, padding rows included.
            actions_only: Choose among the ids that are actions. By default any id can be chosen, like upstream's.

        Returns:
            Token ids, int64 `[B]`.
        """
        if actions_only:
            return logits[:, self.ids.start : self.ids.stop].argmax(-1) + self.ids.start
        return logits.argmax(-1)

    def actions(self, ids: Tensor) -> Tensor:
        """Normalised actions of token ids, on their device and without waiting for it.

        Args:
            ids: `[B, D]`. An id that is no action gives the extreme action on its side, like upstream's.

        Returns:
            float64 `[B, D]`.
        """
        return self.centres[(self.ids.stop - 1 - ids).clamp(0, len(self.centres) - 1)]
