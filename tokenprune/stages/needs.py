"""What a stage needs from a query, declared once for binding, planning, `check` and `explain`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from tokenprune.tokens.plan import Removal


@dataclass(frozen=True, slots=True)
class StageNeeds:
    """Where a stage is called on one backbone, what it reads there, and what its cuts do.

    Layers are indices from 0; -1 means before layer 0. A named capability goes into the stage's `StageSpec.requires`.

    Attributes:
        cuts: Layers after which the stage cuts, one for each entry of `after`.
        layers: Layers after which `score_layer` is called, whether the stage cuts there or not. -1 calls
            `select_tokens`, which is always called if the stage cuts before layer 0.
        action_attention: Layers whose attention of action tokens `observe` reads.
        encoder_attention: Kinds of the vision towers' attention that `ctx.encoder_attention` is called with.
            Capability: `encoder_attention`.
        skipped_layers: Decoder layers that do not run; never the last. Capability: `layer_skip`.
        removal: What happens to tokens that leave at the stage's cuts. `REUSE` needs `keep: union`, and no other stage
            of the pipeline may cut. Capabilities: `merge` for `MERGE`, `kv_reuse` for `REUSE`.
        look_back_frames: Past control steps whose camera frames are kept for `look_back`.
        flow_interval: One of every `flow_interval` flow steps runs the action head's layers; the other steps reuse its
            residual. Capability: `head_cache`.
        graph_safe: Whether all hooks called within a query work on the device only, so that a CUDA graph can capture
            them.
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
        """A copy with these layers added to `layers`."""
        return replace(self, layers=tuple(sorted({*self.layers, *layers})))
