"""What stages may know of the vision towers' attention: by name, from the block whose output is the feature."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from tokenprune.model.attention import probabilities, received
from tokenprune.model.info import EncoderAnswer
from tokenprune_adapters.vision.transformer import ViTConfig

Look = Callable[[Tensor, Tensor], None]


def towers_asked(towers: Sequence[ViTConfig]) -> dict[str, int]:
    """Which tower answers each question: the first with a class token for `cls`, the last one for `received`.

    Keys are those of the tower that the best attention comes from: `cls` where there is one.
    """
    with_cls = [number for number, tower in enumerate(towers) if tower.cls]
    last = len(towers) - 1
    best = with_cls[0] if with_cls else last
    from_cls = dict.fromkeys(("cls", "cls_whole"), best) if with_cls else {}
    return {"received": last, **from_cls, "keys": best, "keys_whole": best}


def answers(towers: Sequence[ViTConfig], views: int) -> Mapping[str, EncoderAnswer]:
    """What these towers can tell."""
    found = {}
    for kind, number in towers_asked(towers).items():
        tower = towers[number]
        tokens = tower.grid[0] * tower.grid[1] + tower.prefix_tokens
        rows = {"received": tokens, "cls": 1, "cls_whole": 1, "keys": 0, "keys_whole": 0}[kind]
        width = {"keys": tower.hidden_size // tower.heads, "keys_whole": tower.hidden_size}.get(kind, 1)
        found[kind] = EncoderAnswer(views * 2 * rows * tokens * tower.hidden_size, width)
    return found


class EncoderLook:
    """Attention of towers while they run.

    Attributes:
        seen: By kind, mean over heads: what each patch got `[B, N]` from the class token (`cls`) or from all tokens
            (`received`), and the patches' `keys` `[B, N, d]`. With heads not split: what it got from the class token
            (`cls_whole`) `[B, N]`, and `keys_whole` `[B, N, D]`.
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
                self.seen[kind] = _answer(kind, q, k)[:, patches]

        return look if kinds else None


def _answer(kind: str, q: Tensor, k: Tensor) -> Tensor:
    if kind == "keys":
        return k.mean(1)
    if kind == "keys_whole":
        return _whole(k)
    if kind == "cls_whole":
        return probabilities(_whole(q[:, :, :1])[:, None], _whole(k)[:, None], None).flatten(0, 2)
    return received(q, k, None) if kind == "received" else probabilities(q[:, :, :1], k, None).mean((1, 2))


def _whole(parts: Tensor) -> Tensor:
    """Queries or keys before the heads were split, `[B, n, D]` of `[B, H, n, d]`."""
    return parts.transpose(1, 2).flatten(2)
