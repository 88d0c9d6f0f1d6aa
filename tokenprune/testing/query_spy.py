"""What an adapter hands to its query and gets back, noted while it runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

from torch import Tensor

from tokenprune.engine.query import Query
from tokenprune.model.decoder import Decoder
from tokenprune.testing.verdicts import CheckFailed

PASSES = ("decode", "repeat", "follow")
"""Methods of a query that run tokens through a decoder and return hidden states."""


@dataclass
class Exchange:
    """What passed between an adapter and its queries.

    Attributes:
        decoders: The decoder of each `decode`.
        embeddings: All tokens `[B, N, D]` of each `decode`.
        hidden: Hidden states that `decode`, `repeat` and `follow` returned, in order; empty ones are left out.
        features: View and features `[B, P, C]` of each `transform`.
        noise: What each `noise` drew.
    """

    decoders: list[Decoder] = field(default_factory=list)
    embeddings: list[Tensor] = field(default_factory=list)
    hidden: list[Tensor] = field(default_factory=list)
    features: list[tuple[str, Tensor]] = field(default_factory=list)
    noise: list[Tensor] = field(default_factory=list)

    def decoded(self) -> list[Tensor]:
        """The embeddings, of one `decode` at least.

        Raises:
            CheckFailed: If there was none.
        """
        if not self.embeddings:
            raise CheckFailed("it does not call `query.decode`, so that no pipeline can prune it")
        return self.embeddings


@contextmanager
def spied(**instead: Any) -> Iterator[Exchange]:  # noqa: ANN401
    """Note what queries exchange with the adapter.

    Args:
        instead: Functions of what a query's method would return, by the method's name, which change what the adapter
            gets.
    """
    exchange = Exchange()

    def watching(name: str) -> Any:  # noqa: ANN401
        real, change = getattr(Query, name), instead.get(name, lambda value: value)

        def method(self: Query, *given: Any, **named: Any) -> Tensor:  # noqa: ANN401
            if name == "decode":
                exchange.decoders.append(given[0])
                exchange.embeddings.append(given[1])
            elif name == "transform":
                exchange.features.append((given[0], given[1]))
            found: Tensor = change(real(self, *given, **named))
            if name == "noise":
                exchange.noise.append(found)
            elif name in PASSES and found.numel():
                exchange.hidden.append(found)
            return found

        return method

    with ExitStack() as patched:
        for name in (*PASSES, "transform", "noise"):
            patched.enter_context(patch.object(Query, name, watching(name)))
        yield exchange
