"""Hypothesis strategies for token layouts, selections and stage contexts.

Needs hypothesis, which the extra `dev` and the packages of `tokenprune new plugin` install.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.model.decoder import Decoder
from tokenprune.model.info import ActionSpec, BackboneInfo, DecoderShape
from tokenprune.pipelines.planning import make_plan
from tokenprune.stages.frames import FrameBuffer
from tokenprune.stages.memory import Slot, StageMemory
from tokenprune.stages.stage import Stage
from tokenprune.stages.token_context import QueryView, SelectContext, StageView
from tokenprune.tokens.layout import Role, Segment, TokenLayout
from tokenprune.tokens.layout_tables import LayoutTables
from tokenprune.tokens.positions import Positions
from tokenprune.tokens.selection import OriginalIds, TokenSelection, rows_at

try:
    from hypothesis import strategies as st
except ImportError as error:
    raise ImportError("tokenprune.testing.strategies needs hypothesis: pip install hypothesis") from error

DEPTH = 8
VIEWS = ("primary", "wrist", "left")
seeds = st.integers(0, 2**31 - 1)
batches = st.integers(1, 3)


def random(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Standard normal numbers of the given shape that depend only on the seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@st.composite
def layouts(draw: st.DrawFn, max_views: int = 3, max_side: int = 4) -> TokenLayout:
    """Token layouts like those of the backbones, some with fixed tokens between views."""
    parts = [Segment(Role.BOS, 0, draw(st.integers(0, 1)))]
    sides = st.integers(1, max_side)
    for view in VIEWS[: draw(st.integers(1, max_views))]:
        rows, cols = draw(sides), draw(sides)
        parts.append(Segment(Role.VISION, 0, rows * cols, view, (rows, cols), prunable=True))
        between = draw(st.sampled_from([None, None, Role.PAD, Role.STATE, Role.TEXT, Role.STOP]))
        if between is not None:
            parts.append(Segment(between, 0, draw(st.integers(1, 3))))
    extra = draw(st.sampled_from([None, Role.PROPRIO, Role.STATE]))
    if extra is not None:
        parts.append(Segment(extra, 0, 1))

    text = draw(st.integers(3, 12))
    start = sum(part.length for part in parts)
    inside = sorted(draw(st.lists(st.integers(0, text), min_size=2, max_size=2, unique=True)))
    rows_named = {"text": range(start, start + text), "instruction": range(start + inside[0], start + inside[1])}
    parts.append(Segment(Role.TEXT, 0, text))
    stop, actions = start + text, draw(st.integers(0, 6))
    rows_named["readout"] = range(stop - 1, stop + max(actions, 1) - 1)
    if actions:
        rows_named["action"] = range(stop, stop + actions)
        parts.append(Segment(Role.ACTION, 0, actions))
    parts.append(Segment(Role.STOP, 0, draw(st.integers(0, 1))))
    return TokenLayout.build(parts, rows_named)


@st.composite
def selections(draw: st.DrawFn, layout: TokenLayout, batch: int = 1) -> TokenSelection:
    """Selections after a cut: all fixed tokens, and in each row the same number of prunable ones, at least 1."""
    keep = draw(st.integers(1, len(layout.prunable)))
    rows = [sorted([*layout.fixed, *draw(st.permutations(layout.prunable))[:keep]]) for _ in range(batch)]
    return TokenSelection(OriginalIds(torch.tensor(rows)), layout.n_tokens)


@st.composite
def contexts(draw: st.DrawFn, stage: Stage[Any] | None = None, width: int = 8, side: int = 16) -> SelectContext:
    """Contexts of `select_tokens` with a random layout, and noise as embeddings and pixels.

    Args:
        draw: Passed by hypothesis.
        stage: Stage whose cuts are in `ctx.plan`; every token is then held. Without a stage there are no cuts, and some
            tokens have left already.
        width: Width of the embeddings.
        side: Side length in pixels of each patch.
    """
    layout, batch, seed = draw(layouts()), draw(batches), draw(seeds)
    everything_held = TokenSelection.identity(layout.n_tokens, batch)
    tokens = draw(selections(layout, batch)) if stage is None else everything_held
    tables = LayoutTables(layout, torch.device("cpu"))
    prunable = tokens.ids[tables.place[tokens.ids] >= 0].view(batch, -1)
    everything = random(seed, batch, layout.n_tokens, width, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    images = {
        view: torch.randint(
            0, 256, (batch, 3, side * (segment.grid or (1, 1))[0], side * (segment.grid or (1, 1))[1]),
            generator=generator, dtype=torch.uint8,
        )
        for view, segment in layout.views.items()
    }  # fmt: skip
    planned = () if stage is None else (stage,)
    slots = [Slot(index, "push it", FrameBuffer(0)) for index in range(batch)]
    decoder = Decoder((), nn.Identity(), head_dim=width, rope_theta=10000.0, causal=draw(st.booleans()))
    needs = tuple(one.requirements(_info(decoder)) for one in planned)
    names = tuple(type(one).__name__ for one in planned)
    return SelectContext(
        plan=make_plan(planned, needs, names, layout, "default", DEPTH),
        layer=-1,
        tokens=tokens,
        prunable=OriginalIds(prunable),
        hidden=rows_at(everything, tokens.ids),
        _query=QueryView(decoder, Positions.PRESERVE, images, torch.arange(batch), tables, slots, {}),
        _stage=StageView(StageMemory(slots, "0.", len(layout.prunable), tables.prunable.device), None, {}, _no_note),
    )


def _info(decoder: Decoder) -> BackboneInfo:
    """A backbone with the depth of the layouts' plans; its other dimensions do not matter."""
    shape = DecoderShape(DEPTH, 8, 1, 1, decoder.head_dim, 8, decoder.causal)
    return BackboneInfo("random", "random", True, shape, VIEWS, ActionSpec(1, {"translation": (0, 1, 2)}))


def _no_note(layer: int, rows: str, count: int, ahead: bool) -> None:
    pass
