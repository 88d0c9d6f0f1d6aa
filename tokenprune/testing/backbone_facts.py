"""Promises of a backbone about what it says of itself: its facts, its layout, its FLOPs, its weights.

The first line of each docstring says what holds.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from tokenprune.model.device import DTYPES
from tokenprune.model.flops import layer_weights, query_flops
from tokenprune.pipelines.config import DENSE
from tokenprune.registry.specs import CAPABILITIES
from tokenprune.testing.backbone_subject import INSTRUCTIONS, BackboneSubject
from tokenprune.testing.comparison import are_equal, require_equal, require_same
from tokenprune.testing.query_spy import spied
from tokenprune.testing.verdicts import CheckFailed, NotApplicable


def it_is_what_it_says(subject: BackboneSubject) -> None:
    """Its name, preset, dtype, decoder, actions and capabilities are those it says it has."""
    info = subject.backbone.info
    require_same("info.name", info.name, subject.name)
    require_same("info.source", info.source, subject.preset)
    for name in ("float32", "float64"):
        require_same(f"the dtype of a backbone built in {name}", subject.built(name).dtype, DTYPES[name])
    if unknown := sorted(info.capabilities - set(CAPABILITIES)):
        raise CheckFailed(f"info.capabilities has {unknown}; valid: {', '.join(CAPABILITIES)}")
    dims = sorted(dim for group in info.action.groups.values() for dim in group)
    require_same("the dimensions that info.action.groups name", dims, list(range(info.action.dims)))
    with spied() as seen:
        subject.ask()
    embeddings, decoder = seen.decoded()[0], seen.decoders[0]
    for what, found, said in (
        ("layers", len(decoder.layers), info.decoder.depth),
        ("head_dim", decoder.head_dim, info.decoder.head_dim),
        ("causal", decoder.causal, info.decoder.causal),
        ("the width of the embeddings", embeddings.shape[2], info.decoder.hidden),
    ):
        require_same(f"{what} of the decoder", found, said)


def the_layout_covers_the_sequence(subject: BackboneSubject) -> None:
    """The layout names every token that enters the decoder, each view's grid, and the rows of the prompt."""
    backbone, lengths = subject.backbone, []
    for instruction in INSTRUCTIONS:
        observation = subject.observation(0)
        layout = backbone.encode(instruction, observation.get("state")).layout
        with spied() as seen:
            try:
                subject.ask(observations=[observation], instructions=[instruction])
            except Exception:
                if not seen.embeddings or seen.embeddings[0].shape[1] == layout.n_tokens:
                    raise
                # The query fails of it too, and does not say why.
        require_same("tokens that the layout names", layout.n_tokens, seen.decoded()[0].shape[1])
        require_same("views of the layout", tuple(layout.views), backbone.info.views)
        for view, segment in layout.views.items():
            if segment.grid is None:
                raise CheckFailed(f"the segment of view '{view}' has no grid")
        if not layout.prunable:
            raise CheckFailed("no token is prunable")
        for name in ("text", "instruction"):
            if name not in layout.row_names:
                raise CheckFailed(f"the layout names no rows '{name}'; stages ask for them")
        text, words = layout.span("text"), layout.span("instruction")
        if not (text.start <= words.start < words.stop <= text.stop):
            raise CheckFailed(f"rows 'instruction' = {words} are no part of rows 'text' = {text}")
        lengths.append((len(instruction), len(words)))
    ordered = [words for _, words in sorted(lengths)]
    if ordered != sorted(ordered):
        raise CheckFailed("a longer instruction has fewer rows 'instruction'")


def flops_are_those_that_run(subject: BackboneSubject) -> None:
    """The FLOPs that its description adds up to are those torch counts, dense and pruned."""
    for config in (DENSE, subject.thinned):
        # The kernels of a CPU are not counted; this one is.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            (chunk,) = subject.ask(config)
        planned = query_flops(subject.backbone.info, chunk.trace.plan)
        if planned.total != counter.get_total_flops():
            parts = {**planned.other, "decoder": planned.decoder, "follow_up": planned.follow_up}
            raise CheckFailed(
                f"pipeline '{config.name}': torch counts {counter.get_total_flops()}, info tells {planned.total}: "
                + ", ".join(f"{name} {number}" for name, number in parts.items())
            )


def described_without_weights(subject: BackboneSubject) -> None:
    """It is described without weights, and is built as described: its facts, its layouts, its pixels."""
    with _Sizes() as made:
        described = subject.factory.describe(subject.preset, None, subject.options)
        layouts = [described.layout(instruction) for instruction in INSTRUCTIONS]
    if made.numbers >= layer_weights(described.info.decoder):
        raise CheckFailed(f"describing it makes {made.numbers} numbers, as many as a layer of the decoder has")
    backbone = subject.backbone
    require_same("the info that is described", described.info, backbone.info)
    for instruction, layout in zip(INSTRUCTIONS, layouts, strict=True):
        require_same(f"the layout that is described for '{instruction}'", layout, backbone.encode(instruction).layout)
    observation = subject.observation(0)
    pixels = backbone.pixels([observation["images"]])
    prompt = backbone.encode(INSTRUCTIONS[0], observation.get("state"))
    prepared = backbone.prepare([observation], [prompt]).images
    for view in backbone.info.views:
        known = {"described": described.pixels(observation["images"][view]), "prepared": prepared[view][0]}
        for what, found in known.items():
            if pixels[view].dtype != torch.uint8 or not torch.equal(found, pixels[view][0]):
                raise CheckFailed(f"view '{view}': the {what} pixels are not those of `pixels`, uint8 [3, S, S]")


def the_seed_decides_the_weights(subject: BackboneSubject) -> None:
    """The same seed gives the same weights, whatever else draws numbers, and another seed others."""
    torch.rand(1)
    first, again = (subject.read(backbone=subject.built()) for _ in range(2))
    require_equal(first, again, "built twice with one seed, it gives others")
    if not subject.backbone.info.untrained:
        raise NotApplicable("its weights are trained")
    other = subject.read(backbone=subject.built(seed=1))
    if are_equal(first, other):
        raise CheckFailed("built with another seed, it answers the same")


class _Sizes(TorchDispatchMode):
    """Counts the numbers of tensors that take memory."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        made = func(*args, **(kwargs or {}))
        tensors = [one for one in tree_leaves(made) if isinstance(one, Tensor) and one.device.type != "meta"]
        self.numbers += sum(one.numel() for one in tensors)
        return made
