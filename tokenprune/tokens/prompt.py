"""A tokenised prompt and the token layout of its queries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tokenprune.tokens.layout import TokenLayout


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """A tokenised prompt; made once per reset, or once per query if the prompt contains the robot state.

    Attributes:
        layout: Tokens of a query with this prompt.
        tokens: The prompt in the adapter's own form; the core passes it on to `Backbone.prepare`.
    """

    layout: TokenLayout
    tokens: Any
