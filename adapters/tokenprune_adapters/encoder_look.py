"""What stages may know of the vision towers' attention: by name, from the block whose output is the feature."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from tokenprune.probe import probabilities, received
from tokenprune_adapters.vision import ViTConfig

Look = Callable[[Tensor, Tensor], None]


def towers_asked(towers: Sequence[ViTConfig]) -> dict[str, int]:
    """Which tower answers each question: the last one for `received`, the first with a class token for `cls`."""
    with_cls = [number for number, tower in enumerate(towers) if tower.cls]
    return {"received": len(towers) - 1, **({"cls": with_cls[0]} if with_cls else {})}


def look_flops(towers: Sequence[ViTConfig], views: int) -> Mapping[str, int]:
    """FLOPs per query of each answer these towers can give."""
    found = {}
    for kind, number in towers_asked(towers).items():
        tower = towers[number]
        tokens = tower.grid[0] * tower.grid[1] + tower.prefix_tokens
        found[kind] = views * 2 * (tokens if kind == "received" else 1) * tokens * tower.hidden_size
    return found


class EncoderLook:
    """Attention of towers while they run.

    Attributes:
        seen: By kind, how much each patch got `[B, N]`, mean over heads: from the class token, or from all tokens.
    """

    def __init__(self, towers: Sequence[ViTConfig], wanted: frozenset[str]) -> None:
        """Nothing is seen yet."""
        self.seen: dict[str, Tensor] = {}
        self._towers = towers
        self._asked = [(kind, number) for kind, number in towers_asked(towers).items() if kind in wanted]

    def at(self, number: int) -> Look | None:
        """What a tower's last block is to show its queries and keys `[B, H, n, d]`; None where nobody asks."""
        kinds = [kind for kind, tower in self._asked if tower == number]
        patches = slice(self._towers[number].prefix_tokens, None)

        def look(q: Tensor, k: Tensor) -> None:
            for kind in kinds:
                given = received(q, k, None) if kind == "received" else probabilities(q[:, :, :1], k, None).mean((1, 2))
                self.seen[kind] = given[:, patches]

        return look if kinds else None
