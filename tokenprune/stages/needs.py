"""What a stage needs of a query: one object that bind, plan, `check` and `explain` read."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from tokenprune.tokens.plan import Removal


@dataclass(frozen=True, slots=True)
class StageNeeds:
    """Where a stage is called on one backbone, what it is shown, and what its cuts do.

    Attributes:
        cuts: Layers after which it cuts, one for each entry of `after`; -1 is before layer 0.
        layers: Layers after which `score_layer` is called, with a cut there or without one. With -1 among them,
            `select_tokens` is called before layer 0, also without a cut there.
        action_attention: Layers at which `observe` is given the action tokens' attention.
        encoder_attention: Kinds of the vision towers' attention that `ctx.encoder_attention` gives; the capability
            `encoder_attention`.
        skipped_layers: Decoder layers to leave out, never the last; the capability `layer_skip`.
        removal: What becomes of tokens that leave at its cuts. `MERGE` is the capability `merge`. `REUSE` is the
            capability `kv_reuse`; it goes with `keep: union`, and no other stage of the pipeline may cut.
        look_back_frames: Control steps before the current one whose camera frames are kept for `look_back`.
        flow_interval: Of every `flow_interval` flow steps of the action head, the first runs through its layers; at the
            others, what the layers added at that step is added again. The capability `head_cache`.
        graph_safe: Whether the hooks that are called in a query do all their work on the device, so that a CUDA graph
            can hold it.
    """

    cuts: tuple[int, ...] = ()
    layers: tuple[int, ...] = ()
    action_attention: tuple[int, ...] = ()
    encoder_attention: tuple[str, ...] = ()
    skipped_layers: tuple[int, ...] = ()
    removal: Removal = Removal.DROP
    look_back_frames: int = 0
    flow_interval: int = 1
    graph_safe: bool = True

    def also_called_after(self, layers: Iterable[int]) -> StageNeeds:
        """The same needs, with calls after more layers (-1: before layer 0)."""
        return replace(self, layers=tuple(sorted({*self.layers, *layers})))
