"""SpecPrune as a specification: whole episodes in NumPy, loops and sorts; shares no code with the plugin or the core.

Ties are broken everywhere by the order `(-value, id)`: the lower original id is the better one. Claims and shares are
exact. A decoder has 32 layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import ClassVar

import numpy as np

DEPTH = 32
Frame = Mapping[str, np.ndarray]
"""One uint8 image `[S, S, 3]` per view."""

QK = Callable[[int], tuple[np.ndarray, np.ndarray]]
"""From a layer to queries and keys `[H, n, d]` of every token of the unpruned sequence."""


@dataclass(frozen=True)
class Scene:
    """Where tokens are: ids of each view in raster order, and of the text rows."""

    n_tokens: int
    views: Mapping[str, range]
    grid: tuple[int, int]
    text: range
    instruction: range
    action: range

    @property
    def visual(self) -> list[int]:
        return [token for span in self.views.values() for token in span]

    @property
    def fixed(self) -> list[int]:
        return sorted(set(range(self.n_tokens)) - set(self.visual))


@dataclass(frozen=True)
class Thresholds:
    """A controller's bounds on translation, planar, rotation (lengths) and rise (signed)."""

    enter: tuple[dict[str, float], ...]
    leave: dict[str, float]
    first_step: int


@dataclass(frozen=True)
class Answer:
    """What one query did: its mode, the step it compared with, and the visual ids kept by cut."""

    mode: str
    reference: int | None
    kept: dict[int, list[int]]


def keep_share(share: float, tokens: int) -> int:
    """Floor of the product, in decimal."""
    return math.floor(Fraction(str(share)) * tokens)


def best(ids: Iterable[int], value: Mapping[int, float], count: int | None = None) -> list[int]:
    """Ids by descending value, ties to the lower id; the first `count` of them."""
    return sorted(ids, key=lambda token: (-value[token], token))[:count]


def attention(qk: QK, layer: int, rows: Sequence[int], scene: Scene, held: Sequence[int]) -> np.ndarray:
    """Attention `[H, R, n]` of rows to the held visual tokens; the softmax is over all keys held."""
    q, k = qk(layer)
    keys = [*scene.fixed, *held]
    logits = np.einsum("hrd,hnd->hrn", q[:, list(rows)], k[:, keys]) / math.sqrt(q.shape[2])
    weights = np.exp(logits - logits.max(axis=2, keepdims=True))
    return (weights / weights.sum(axis=2, keepdims=True))[:, :, len(scene.fixed) :]


def mean_attention(qk: QK, layer: int, rows: Sequence[int], scene: Scene, held: Sequence[int]) -> dict[int, float]:
    """`att_l(i)` of the held visual tokens: mean over heads and rows."""
    return dict(zip(held, attention(qk, layer, rows, scene, held).mean(axis=(0, 1)), strict=True))


def similarities(scene: Scene, view: str, now: np.ndarray, then: np.ndarray, both_black: float) -> dict[int, float]:
    """Cosine of each patch's RGB values in two frames."""
    rows, cols = scene.grid
    height, width = now.shape[0] // rows, now.shape[1] // cols
    result = {}
    for place, token in enumerate(scene.views[view]):
        top, left = place // cols * height, place % cols * width
        a = now[top : top + height, left : left + width].ravel().astype(np.int64)
        b = then[top : top + height, left : left + width].ravel().astype(np.int64)
        dot, aa, bb = int(a @ b), int(a @ a), int(b @ b)
        result[token] = both_black if aa == bb == 0 else dot / max(math.sqrt(aa * bb), 1e-8)
    return result


class Controller:
    """Coarse or fine, from executed actions."""

    def __init__(self, bounds: Thresholds, horizon: int = 8) -> None:
        self.bounds, self.horizon = bounds, horizon
        self.mode, self.steps, self.since_query = "coarse", 0, 0
        self.entered_at: int | None = None
        self.last: dict[str, float] | None = None

    @staticmethod
    def measure(action: Sequence[float]) -> dict[str, float]:
        return {
            "translation": math.sqrt(action[0] ** 2 + action[1] ** 2 + action[2] ** 2),
            "planar": math.sqrt(action[0] ** 2 + action[1] ** 2),
            "rotation": math.sqrt(action[3] ** 2 + action[4] ** 2 + action[5] ** 2),
            "rise": action[2],
        }

    def executed(self, action: Sequence[float]) -> bool:
        """Take note of an action; whether a controller that replans would ask for a query now."""
        self.last = measured = self.measure(action)
        step, self.steps = self.steps, self.steps + 1
        self.since_query += 1
        if self.mode == "fine" or step < self.bounds.first_step:
            return False
        if not any(all(bound > measured[name] for name, bound in c.items()) for c in self.bounds.enter):
            return False
        self.mode, self.entered_at = "fine", step
        return self.since_query < self.horizon

    def query(self) -> str:
        """The mode of a query."""
        if self.mode == "fine" and self.last is not None and self.entered_at != self.steps - 1:
            last = self.last
            if any(bound < last[name] for name, bound in self.bounds.leave.items()):
                self.mode = "coarse"
        self.since_query = 0
        return self.mode


@dataclass
class LayerScore:
    """The score that layers of one episode update: weight of the rank times confidence, smoothed."""

    scene: Scene
    steepness: float
    float32: bool = False
    confidence: dict[int, float] = field(default_factory=dict)
    score: dict[int, float] = field(default_factory=dict)

    def begin(self) -> None:
        self.score = dict.fromkeys(self.scene.visual, 0.0)

    def update(self, qk: QK, layer: int, rows: Sequence[int], held: Sequence[int]) -> None:
        by_row = attention(qk, layer, rows, self.scene, held).mean(axis=0)
        order = best(held, dict(zip(held, by_row.mean(axis=0), strict=True)))
        weights = [1 / (1 + math.exp(self.steepness * rank)) for rank in range(len(order))]
        if self.float32:
            # exp(89) is beyond float32, so that 1 / (1 + exp(89)) is 0 there.
            weights = [w if rank < 89 else 0.0 for rank, w in enumerate(weights)]
        total = math.fsum(weights)
        if layer not in self.confidence:
            share = by_row / by_row.sum(axis=1, keepdims=True)
            entropy = -(share * np.log(share)).sum(axis=1).mean() / math.log(len(held))
            self.confidence[layer] = 1 / (float(entropy) + 1e-8)
        for rank, token in enumerate(order):
            new = weights[rank] / total * self.confidence[layer]
            self.score[token] = 0.8 * self.score[token] + 0.2 * new

    def cut(self, held: Sequence[int], keep: int, of_each_view: int = 0) -> list[int]:
        first: set[int] = set()
        for span in self.scene.views.values():
            first |= set(best([t for t in held if t in span], self.score, of_each_view))
        rest = best([t for t in held if t not in first], self.score)
        return sorted([*best(first, self.score), *rest][:keep])


@dataclass(frozen=True)
class Budget:
    """Shares of the prunable tokens by mode: of each static cut (None: the protected), and of the dynamic ones."""

    static: Mapping[str, Sequence[float | None]]
    dynamic: Mapping[str, float]
    floor: int = 0
    of_each_view: int = 0


PAPER_BUDGET = Budget({"coarse": [None], "fine": [None]}, {"coarse": 0.9, "fine": 1.0})

NEAR_BOUNDS = Thresholds(
    ({"translation": 0.35, "rotation": 0.2, "rise": 1e-6},), {"rise": 0.2, "rotation": 0.3, "translation": 0.5}, 0
)

C3_BOUNDS = Thresholds(
    ({"translation": 0.35}, {"planar": 0.1, "rise": 0.1, "rotation": 0.2}), {"rise": 0.2, "rotation": 0.3}, 10
)


class Episode:
    """What the presets share: the controller, the motion since the last query, the frames so far."""

    def __init__(self, scene: Scene, bounds: Thresholds) -> None:
        self.scene = scene
        self.controller = Controller(bounds)
        self.moved = np.zeros(3)

    def executed(self, action: Sequence[float]) -> bool:
        """One control step; whether a controller that replans would ask for a query now."""
        self._move(action)
        return self.controller.executed(action)

    def _move(self, action: Sequence[float]) -> None:
        self.moved = self.moved + np.asarray(action[:3], dtype=np.float64)

    def query(self, frames: Mapping[int, Frame], qk: QK) -> Answer:
        """One query: all frames the host gave so far by control step, the current one included."""
        now = self.controller.steps
        mode = self.controller.query()
        speed = math.sqrt(sum(x * x for x in self.moved))
        self.moved = np.zeros(3)
        reference = self._reference(now, speed, sorted(step for step in frames if step < now))
        then = None if reference is None else frames[reference]
        return Answer(mode, reference, self._kept(mode, frames[now], then, qk))

    def _reference(self, now: int, speed: float, past: list[int]) -> int | None:
        raise NotImplementedError

    def _kept(self, mode: str, now: Frame, then: Frame | None, qk: QK) -> dict[int, list[int]]:
        raise NotImplementedError

    def _rank_shares(self, order: Sequence[int], out_of: int) -> dict[int, int]:
        """Claims `(rank + 1) / out_of`, counted in 120ths, which 20, 24 and 30 divide."""
        return {token: (rank + 1) * (120 // out_of) for rank, token in enumerate(order)}

    def _per_view(self, held: Iterable[int]) -> dict[str, list[int]]:
        chosen = list(held)
        return {view: [t for t in chosen if t in span] for view, span in self.scene.views.items()}


def look_back(now: int, steps: int, past: Sequence[int]) -> int | None:
    """Newest past frame at least that old, or else the oldest past one."""
    old = [step for step in past if step <= now - steps]
    return max(old) if old else min(past, default=None)


class SpecPrune(Episode):
    """Presets `specprune` and `specprune-paper`."""

    UPDATES, CUTS = (9, 14, 19, 24), (10, 15, 20, 25)
    TAU = (0.986, 0.98)
    REMEMBERED = (14, 31)

    def __init__(self, scene: Scene, preset: str, budget: Budget) -> None:
        """`budget` of `specprune` is read from the shipped pipeline, because its numbers may be tuned."""
        super().__init__(scene, NEAR_BOUNDS)
        paper = preset == "specprune-paper"
        self.budget = budget
        self.static_cuts = (1,) if paper else (0, 1)
        self.alpha = {"coarse": 120 * Fraction("0.8"), "fine": 120 * Fraction("1.34" if paper else "0.8")}
        self.layers = LayerScore(scene, steepness=1.0 if paper else 0.1)
        self.previous: dict[int, dict[int, float]] = {}

    def _reference(self, now: int, speed: float, past: list[int]) -> int | None:
        return look_back(now, min(max(math.floor(7 - speed) + 4, 1), 11), past)

    def _kept(self, mode: str, now: Frame, then: Frame | None, qk: QK) -> dict[int, list[int]]:
        held, kept = self.scene.visual, {}
        self.layers.begin()
        claims = self._early_claims(held, now, then)
        remembered = {}
        for layer in range(DEPTH):
            if layer in (0, 1):
                scores = mean_attention(qk, layer, self.scene.instruction, self.scene, held)
                for mine in self._per_view(held).values():
                    self._claim(claims, self._rank_shares(best(mine, scores), 24))
            if layer in self.REMEMBERED:
                remembered[layer] = mean_attention(qk, layer, self.scene.instruction, self.scene, held)
            if layer in self.UPDATES and self.budget.dynamic[mode] < 1:
                self.layers.update(qk, layer, self.scene.instruction, held)
            if layer in self.static_cuts:
                held = kept[layer] = self._static_cut(held, claims, mode, self.static_cuts.index(layer))
            if layer in self.CUTS:
                keep = max(keep_share(self.budget.dynamic[mode], len(held)), self.budget.floor)
                if keep < len(held):
                    held = self.layers.cut(held, keep, self.budget.of_each_view)
                kept[layer] = held
        self.previous = remembered
        return kept

    def _early_claims(self, held: list[int], now: Frame, then: Frame | None) -> dict[int, float]:
        """Claims of change and of the previous query, infinite where there is none."""
        claims: dict[int, float] = dict.fromkeys(held, math.inf)
        for number, (view, mine) in enumerate(self._per_view(held).items()):
            if then is not None:
                alike = similarities(self.scene, view, now[view], then[view], both_black=1.0)
                changed = [t for t in mine if alike[t] < self.TAU[min(number, 1)]]
                by_change = sorted(changed, key=lambda token: (alike[token], token))
                self._claim(claims, self._rank_shares(by_change, 20))
            for scores in self.previous.values():
                self._claim(claims, self._rank_shares(best([t for t in mine if t in scores], scores), 30))
        return claims

    @staticmethod
    def _claim(claims: dict[int, float], new: Mapping[int, int]) -> None:
        for token, claim in new.items():
            claims[token] = min(claims[token], claim)

    def _static_cut(self, held: list[int], claims: dict[int, float], mode: str, number: int) -> list[int]:
        protected = {token for token in held if claims[token] <= self.alpha[mode]}
        share = self.budget.static[mode][number]
        keep = len(protected) if share is None else keep_share(share, len(held))
        order = sorted(held, key=lambda token: (token not in protected, claims[token], token))
        return sorted(order[:keep])


class SpecPruneC3(Episode):
    """Preset `specprune-c3`: what the official revision 8091adc does."""

    UPDATES, CUTS = (14, 19, 24), (10, 15, 20, 25)
    TAU = (0.986, 0.98)
    CAP: ClassVar = {"coarse": (236, 230), "fine": (240, 236)}
    K: ClassVar = {"coarse": (24, 19), "fine": (15, 12)}
    REMEMBERED = (14, 30)
    FLOOR = 59

    def __init__(self, scene: Scene) -> None:
        super().__init__(scene, C3_BOUNDS)
        self.layers = LayerScore(scene, steepness=1.0, float32=True)
        self.previous: set[int] = set()

    def _move(self, action: Sequence[float]) -> None:
        if self.controller.steps >= 9:
            super()._move(action)

    def _reference(self, now: int, speed: float, past: list[int]) -> int | None:
        # Exact: at the bounds of `trunc` the published formula in float64 leads to the same n.
        n = min(math.trunc(Fraction(22, 3) - Fraction(16, 3) * Fraction(speed) / 6) + 3, 6)
        wanted = now - n + 1 if n >= 1 else -n
        if now + 1 < n or wanted >= now:
            return now
        # The release has a frame of every step; of a host that gives fewer, the one `specprune` would take.
        return look_back(now, now - wanted, past)

    def _kept(self, mode: str, now: Frame, then: Frame | None, qk: QK) -> dict[int, list[int]]:
        scene, count = self.scene, {view: self.K[mode][min(n, 1)] for n, view in enumerate(self.scene.views)}
        prompt, end = scene.instruction.start, scene.text.stop
        assert then is not None
        changed = self._changed(mode, now, then)
        kept = {}

        held = scene.visual
        first = mean_attention(qk, 0, range(prompt, end - 1), scene, held)
        doubled = self._top(first, {view: 2 * k for view, k in count.items()})
        held = kept[0] = sorted(changed | doubled | self.previous)
        second = mean_attention(qk, 1, range(prompt + 1, end), scene, held)
        wanted = changed | self._top(second, count) | self._top(first, count) | self.previous
        held = kept[1] = [token for token in held if token in wanted]

        self.layers.begin()
        going_on, seen = True, set()
        for layer in range(2, DEPTH):
            if layer in self.UPDATES and going_on:
                self.layers.update(qk, layer, scene.action, held)
            if layer in self.REMEMBERED:
                rows = range(prompt - 1, min(prompt + 24, scene.n_tokens))
                dense = dict.fromkeys(scene.visual, 0.0) | mean_attention(qk, layer, rows, scene, held)
                seen |= self._top(dense, {view: k // 2 for view, k in count.items()})
            if layer in self.CUTS:
                fixed = len(scene.fixed)
                keep = max(9 * (len(held) + fixed) // 10, self.FLOOR + fixed) - fixed
                # Once nothing leaves, the release looks no more in this query.
                going_on = going_on and keep < len(held)
                held = kept[layer] = self.layers.cut(held, keep) if going_on else held
        self.previous = seen
        return kept

    def _changed(self, mode: str, now: Frame, then: Frame) -> set[int]:
        """Below the threshold, or not among the most alike that the cap leaves out."""
        result = set()
        for number, (view, span) in enumerate(self.scene.views.items()):
            alike = similarities(self.scene, view, now[view], then[view], both_black=0.0)
            result |= {token for token in span if alike[token] < self.TAU[min(number, 1)]}
            result |= set(sorted(span, key=lambda t: (alike[t], t))[: len(span) - self.CAP[mode][min(number, 1)]])
        return result

    def _top(self, value: Mapping[int, float], count: Mapping[str, int]) -> set[int]:
        return {token for view, mine in self._per_view(value).items() for token in best(mine, value, count[view])}


def make(preset: str, scene: Scene, budget: Budget = PAPER_BUDGET) -> Episode:
    """The reference of a preset at the beginning of an episode."""
    return SpecPruneC3(scene) if preset == "specprune-c3" else SpecPrune(scene, preset, budget)
