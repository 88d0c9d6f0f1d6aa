"""A tokenised prompt and the layout of the query that it makes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tokenprune.tokens.layout import TokenLayout


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """A tokenised prompt; made once per reset, or once per query where the prompt spells the robot state.

    Attributes:
        layout: Tokens of a query with this prompt.
        tokens: The prompt in the adapter's own form; the core passes it on to `Backbone.prepare`.
    """

    layout: TokenLayout
    tokens: Any
