"""Attention of the vision towers, captured for stages in the block whose output is the feature."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from tokenprune.model.attention import probabilities, received
from tokenprune.model.info import EncoderAnswer
from tokenprune_adapters.vision.transformer import AttentionCallback, ViTConfig


def tower_of_kind(towers: Sequence[ViTConfig]) -> dict[str, int]:
    """Each kind of encoder attention that these towers offer, and the index of the tower it is captured in.

    `cls` comes from the first tower with a class token, `received` from the last tower. `keys` come from the tower of
    `cls` if there is one, else from the last.
    """
    with_cls = [number for number, tower in enumerate(towers) if tower.cls]
    last = len(towers) - 1
    best = with_cls[0] if with_cls else last
    from_cls = dict.fromkeys(("cls", "cls_whole"), best) if with_cls else {}
    return {"received": last, **from_cls, "keys": best, "keys_whole": best}


def encoder_attention(towers: Sequence[ViTConfig], views: int) -> Mapping[str, EncoderAnswer]:
    """Each kind of encoder attention that these towers offer, with its cost per query and its width."""
    found = {}
    for kind, number in tower_of_kind(towers).items():
        tower = towers[number]
        tokens = tower.grid[0] * tower.grid[1] + tower.prefix_tokens
        rows = {"received": tokens, "cls": 1, "cls_whole": 1, "keys": 0, "keys_whole": 0}[kind]
        width = {"keys": tower.hidden_size // tower.heads, "keys_whole": tower.hidden_size}.get(kind, 1)
        found[kind] = EncoderAnswer(views * 2 * rows * tokens * tower.hidden_size, width)
    return found


class AttentionCapture:
    """Captures the attention of vision towers while they run.

    Args:
        towers: The towers.
        kinds: The kinds that stages need.

    Attributes:
        captured: The result by kind, a row per patch. Averaged over heads: the attention that each patch receives from
            the class token (`cls`) or from all tokens (`received`), `[B, N]`, and the `keys` `[B, N, d]`. Over the
            full width, heads not split: attention from the class token (`cls_whole`) `[B, N]`, and `keys_whole`
            `[B, N, D]`.
    """

    def __init__(self, towers: Sequence[ViTConfig], kinds: frozenset[str]) -> None:
        self.captured: dict[str, Tensor] = {}
        self._towers = towers
        self._kinds = [(kind, number) for kind, number in tower_of_kind(towers).items() if kind in kinds]

    def callback(self, number: int) -> AttentionCallback | None:
        """What the last block of tower `number` is to call; None if nothing is captured there."""
        kinds = [kind for kind, tower in self._kinds if tower == number]
        patches = slice(self._towers[number].prefix_tokens, None)

        def capture(q: Tensor, k: Tensor) -> None:
            for kind in kinds:
                self.captured[kind] = _per_token(kind, q, k)[:, patches]

        return capture if kinds else None


def _per_token(kind: str, q: Tensor, k: Tensor) -> Tensor:
    """One kind of attention for each token, prefix tokens included."""
    if kind == "keys":
        return k.mean(1)
    if kind == "keys_whole":
        return _merge_heads(k)
    if kind == "cls_whole":
        return probabilities(_merge_heads(q[:, :, :1])[:, None], _merge_heads(k)[:, None], None).flatten(0, 2)
    return received(q, k, None) if kind == "received" else probabilities(q[:, :, :1], k, None).mean((1, 2))


def _merge_heads(parts: Tensor) -> Tensor:
    """Queries or keys as they were before the heads were split, `[B, H, n, d]` to `[B, n, D]`."""
    return parts.transpose(1, 2).flatten(2)
