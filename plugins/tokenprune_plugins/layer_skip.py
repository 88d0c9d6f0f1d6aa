"""EfficientVLA's layer pruning (arXiv 2506.10100): leave out decoder layers that hardly change the tokens.

The importance of a layer is 1 minus the cosine similarity of its input and its output, mean over tokens and calibration
queries. The paper leaves out the least important layers, but no two adjacent ones. The last layer always stays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import cosine_similarity

from tokenprune import (
    BackboneInfo,
    LayerContext,
    Layers,
    SelectContext,
    Stage,
    StageConfig,
    StageNeeds,
    hookimpl,
    layer_indices,
)


class LayerSkipConfig(StageConfig):
    """Which layers are left out."""

    layers: Layers = Field(
        description="Layers to leave out, by number or by share of the depth; `layer_cosine` measures which."
    )


class LayerSkip(Stage[LayerSkipConfig]):
    """Leaves out the configured decoder layers."""

    Config = LayerSkipConfig

    def requirements(self, info: BackboneInfo) -> StageNeeds:
        """The layers to leave out."""
        layers = layer_indices(self.config.layers, info.decoder.depth, "layers")
        return replace(super().requirements(info), skipped_layers=layers)

    def caveats(self, info: BackboneInfo) -> str:
        """Numbers of the layers that are left out of this decoder."""
        skipped = self.requirements(info).skipped_layers
        return f"leaves out {', '.join(map(str, skipped))} of {info.decoder.depth} layers"


class LayerCosineConfig(StageConfig):
    """How many layers to report as least important."""

    leave_out: int = Field(default=4, ge=1, description="Number of layers to report as the least important ones.")


class LayerCosine(Stage[LayerCosineConfig]):
    """Measures the importance of every layer but the last, as `tokenprune run layer_cosine` prints; drops nothing."""

    Config = LayerCosineConfig

    def __init__(self, config: LayerCosineConfig) -> None:
        super().__init__(config)
        self._measured: dict[int, list[Tensor]] = {}

    def requirements(self, info: BackboneInfo) -> StageNeeds:
        """A call before layer 0 and after every layer but the last; not graph-safe, as it collects on the host."""
        needs = super().requirements(info).also_called_after(range(-1, info.decoder.depth - 1))
        return replace(needs, graph_safe=False)

    @hookimpl
    def select_tokens(self, ctx: SelectContext) -> None:
        """Keep the input of layer 0."""
        ctx.scratch["entered"] = ctx.hidden

    @hookimpl
    def score_layer(self, ctx: LayerContext) -> None:
        """Measure one layer: 1 minus the cosine similarity of its input and its output."""
        entered, left = ctx.scratch["entered"].double(), ctx.hidden.double()
        self._measured.setdefault(ctx.layer, []).append(1 - cosine_similarity(entered, left, dim=-1).mean())
        ctx.scratch["entered"] = ctx.hidden

    def findings(self) -> Mapping[str, object]:  # cold: after the queries
        """Importance of each layer but the last, mean over queries, and the least important layers."""
        means = [torch.stack(queries).mean().item() for _, queries in sorted(self._measured.items())]
        return {
            "importance, layer by layer": [round(mean, 4) for mean in means],
            "layers that matter least": list(least_important(means, self.config.leave_out)),
        }


def least_important(importance: Sequence[float], count: int) -> tuple[int, ...]:
    """The `count` least important layers, no two of them adjacent, in ascending order; fewer if no more qualify."""
    chosen: set[int] = set()
    for layer in sorted(range(len(importance)), key=lambda layer: (importance[layer], layer)):
        if len(chosen) < count and not {layer - 1, layer + 1} & chosen:
            chosen.add(layer)
    return tuple(sorted(chosen))
