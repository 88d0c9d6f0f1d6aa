"""Feature-wise linear modulation (FiLM, arXiv 1709.07871): the instruction scales and shifts a tower's features."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn


class FiLM(nn.Module):
    """Base class of a transformer block that language modulates.

    Upstream OpenVLA-OFT's policies for ALOHA ("OFT+") wrap every block of both towers: between a block's attention and
    its MLP, `x * (1 + scale(language)) + shift(language)`, the same for every token, prefix tokens included. The
    language is the mean of the prompt's embeddings, with BOS and the stop token and without action placeholders.

    It is a base class of the block and no module in it, because checkpoints keep `scale` and `shift` in the block.

    Args:
        language_width: Width `L` of the language embeddings; None for a block without FiLM, which has no parameters.
        width: Width `D` of the block.
    """

    def __init__(self, language_width: int | None, width: int) -> None:
        super().__init__()
        if language_width is not None:
            self.scale = nn.Linear(language_width, width)
            self.shift = nn.Linear(language_width, width)

    def modulate(self, x: Tensor, language: Tensor | None) -> Tensor:
        """Scale and shift `[B, N, D]` by language `[B, L]`; without language, return it as it is."""
        if language is None:
            return x
        scale, shift = cast(Tensor, self.scale(language)), cast(Tensor, self.shift(language))
        return x * (1 + scale[:, None]) + shift[:, None]
