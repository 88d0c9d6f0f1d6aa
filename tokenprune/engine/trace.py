"""The trace: what one query did, checked against its plan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from tokenprune.errors import TraceError
from tokenprune.model.phase import Phase
from tokenprune.tokens.plan import Plan, cut_name

_KERNELS = {0: "math", 1: "flash", 2: "efficient", 3: "cudnn", 4: "overrideable"}


@dataclass(frozen=True, slots=True)
class ProbeRecord:
    """Attention rows computed for one stage at one layer.

    `ahead` if the layer had not run yet; `behind` counts keys of tokens after the layout's.
    """

    stage: str
    layer: int
    rows: str
    count: int
    ahead: bool = False
    behind: int = 0


@dataclass
class QueryTrace:
    """What one query did.

    Attributes:
        pipeline: Name of the pipeline.
        plan: The plan.
        held: Tokens that each layer held.
        kept: Prunable original ids kept at each cut `[B, K]`, by the layer it follows (-1 before layer 0).
        reasons: Per cut, boolean `[B, K]` over the kept ids, by the name of the reason.
        looked_back: Per stage, the age of its past frame in control steps, one per batch row; None without a frame.
        milliseconds: The whole query on the host's clock, from observation to actions.
        phases: Milliseconds per `Phase`.
        encoder: Kinds of the vision towers' attention that stages used.
        ran: Passes of action tokens after the prefill that ran the layers.
        spared: Passes of action tokens that reused the residual of an earlier one instead.
        cached: Keys of each layer for the passes after the prefill; empty without such passes.
        kernel: Attention kernel that torch chose for the first layer.
        probes: Attention rows that were computed.
        overfull: Per cut, the most protected tokens of any row that did not fit; 0 if all were kept.
        fallback: The error for which the query fell back to no pruning, or an empty string.
        answered: Whether a controller answered, so that the model did not run.
        execution: How it ran; with graphs, the first query of each kind runs eagerly or compiled.
    """

    pipeline: str
    plan: Plan
    held: tuple[int, ...] = ()
    kept: dict[int, Tensor] = field(default_factory=dict)
    reasons: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    looked_back: dict[str, tuple[int | None, ...]] = field(default_factory=dict)
    encoder: tuple[str, ...] = ()
    ran: int = 0
    spared: int = 0
    cached: tuple[int, ...] = ()
    milliseconds: float = 0.0
    phases: dict[Phase, float] = field(default_factory=dict)
    kernel: str = ""
    probes: list[ProbeRecord] = field(default_factory=list)
    overfull: dict[int, int] = field(default_factory=dict)
    fallback: str = ""
    answered: bool = False
    execution: str = ""

    @property
    def mode(self) -> str:
        """Mode of the query; `replayed` if a controller answered it."""
        return "replayed" if self.answered else self.plan.mode

    def check(self) -> None:
        """Compare the tokens held with the plan.

        Raises:
            TraceError: If a layer held another number of tokens than planned.
        """
        if self.held != self.plan.tokens:
            pairs = enumerate(zip_longest(self.held, self.plan.tokens))
            layer = next(index for index, (held, planned) in pairs if held != planned)
            raise TraceError(
                f"pipeline '{self.pipeline}', mode '{self.mode}': layer {layer} differs from the plan; "
                f"held {list(self.held)}, planned {list(self.plan.tokens)}"
            )

    def view_counts(self) -> dict[str, dict[str, list[int]]]:
        """Tokens of each view kept at each cut, one number per batch row; waits for the device."""
        counts: dict[str, dict[str, list[int]]] = {}
        for after, ids in self.kept.items():
            spans = {name: segment.span for name, segment in self.plan.layout.views.items()}
            counts[cut_name(after)] = {
                name: ((ids >= span.start) & (ids < span.stop)).sum(1).tolist() for name, span in spans.items()
            }
        return counts

    def to_json(self, with_ids: bool = False) -> dict[str, Any]:
        """The trace as plain data; `with_ids` adds the original ids kept at each cut and for each reason."""
        plain: dict[str, Any] = {
            "pipeline": self.pipeline,
            "mode": self.mode,
            "tokens_held": list(self.held),
            "tokens_planned": list(self.plan.tokens),
            "keys_cached": list(self.cached),
            "layers_skipped": sorted(self.plan.skipped),
            "head_passes": {"ran": self.ran, "spared": self.spared},
            "kept_per_view": self.view_counts(),
            "query_ms": round(self.milliseconds, 4),
            "phases_ms": {name: round(ms, 4) for name, ms in self.phases.items()},
            "attention_kernel": self.kernel,
            "probes": [asdict(probe) for probe in self.probes],
            "encoder_attention": list(self.encoder),
            "protected_over_budget": {cut_name(after): n for after, n in self.overfull.items()},
            "looked_back": {stage: list(steps) for stage, steps in self.looked_back.items()},
            "fallback": self.fallback,
            "replayed": self.answered,
            "execution": self.execution,
        }
        if with_ids:
            plain["kept_ids"] = {cut_name(after): ids.tolist() for after, ids in self.kept.items()}
            plain["reasons"] = {
                cut_name(after): {name: _chosen(self.kept[after], member) for name, member in named.items()}
                for after, named in self.reasons.items()
            }
        return plain


def _chosen(ids: Tensor, member: Tensor) -> list[list[int]]:
    return [row[inside].tolist() for row, inside in zip(ids, member, strict=True)]


def attention_kernel(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> str:
    """Name of the kernel torch's dispatcher picks for scaled dot-product attention over these tensors."""
    choose: Callable[..., int] = torch._fused_sdp_choice
    choice = choose(q, k, v, None, 0.0, causal, enable_gqa=q.shape[1] != k.shape[1])
    return f"sdpa/{_KERNELS.get(choice, str(choice))} ({q.device.type})"
