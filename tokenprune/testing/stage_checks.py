"""The promises of a stage, one function each; the first line of its docstring says what holds.

A check raises `CheckFailed` with what was found, or `NotApplicable` with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import zip_longest
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from pydantic import ValidationError

from tokenprune.engine.executor import GraphExecutor
from tokenprune.errors import TokenPruneError
from tokenprune.pipelines.binding import BoundPipeline, HookCall, bind
from tokenprune.pipelines.config import DENSE
from tokenprune.policy import ActionChunk
from tokenprune.stages.config import CutConfig
from tokenprune.stages.token_context import rows_name
from tokenprune.testing.cycles import caught_in_cycles
from tokenprune.testing.stage_subject import INSTRUCTIONS, StageSubject
from tokenprune.testing.tape import taped
from tokenprune.testing.verdicts import CheckFailed, NotApplicable
from tokenprune.testing.waiting import no_waiting
from tokenprune.tokens.budget import UNION

DEPTHS = (6, 18, 32)


def runs(subject: StageSubject) -> None:
    """It answers in every query of two episodes side by side, whatever the instruction's length."""
    policy = subject.policy(slots=(0, 1))
    policy.reset(INSTRUCTIONS[2], 1)
    for first in range(0, 4):
        for slot in (0, 1):
            subject.queries(policy, 1, (slot,), first)


def keeping_everything_is_dense(subject: StageSubject) -> None:
    """Told to keep everything, it gives the dense policy's actions, bit for bit."""
    _needs_cuts(subject)
    own = subject.queries(subject.policy(subject.keeping_everything()), 4)
    dense = subject.queries(subject.policy(DENSE), 4)
    _same_actions(own, dense, "query {} differs from dense although every token was kept")


def same_seed_same_selection(subject: StageSubject) -> None:
    """The same seed and the same pictures give the same selection."""
    first, second = (subject.queries(subject.policy(), 4) for _ in range(2))
    _same_selection(first, second, "query {} kept other tokens the second time")


def batch_rows_are_independent(subject: StageSubject) -> None:
    """What it keeps in one environment does not depend on the others in the batch."""
    together = subject.queries(subject.policy(slots=(0, 1, 2)), 4, (0, 1, 2))
    alone = subject.queries(subject.policy(slots=(2,)), 4, (2,))
    for query, (one, other) in enumerate(zip(together, alone, strict=True)):
        for cut, kept in one.trace.kept.items():
            if not torch.equal(kept[-1], other.trace.kept[cut][0]):
                raise CheckFailed(f"query {query} kept other tokens beside two other environments than alone")


def reset_forgets(subject: StageSubject) -> None:
    """After a reset nothing of the last episode is left."""
    used, fresh = subject.policy(), subject.policy()
    subject.queries(used, 4)
    for policy in (used, fresh):
        policy.reset(INSTRUCTIONS[0])
    later, plain = (subject.queries(policy, 4, first=10) for policy in (used, fresh))
    _same_selection(later, plain, "query {} after a reset depends on the episode before it")
    _same_actions(later, plain, "query {} after a reset depends on the episode before it")


def the_model_stays_as_it_was(subject: StageSubject) -> None:
    """It changes no weight and leaves no hook behind."""
    model = getattr(subject.backbone, "model", None)
    if not isinstance(model, torch.nn.Module):
        raise NotApplicable("the backbone shows no model")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    subject.queries(subject.policy(), 2)
    try:
        for name, value in model.state_dict().items():
            if not torch.equal(value, before[name]):
                raise CheckFailed(f"the weight {name} has changed")
        for name, module in model.named_modules():
            if module._forward_hooks or module._forward_pre_hooks:
                raise CheckFailed(f"a hook is left on {name or 'the model'}")
    finally:
        model.load_state_dict(before)
        for module in model.modules():
            module._forward_hooks.clear()
            module._forward_pre_hooks.clear()


def what_it_is_shown_stays_as_it_was(subject: StageSubject) -> None:
    """It writes to nothing that it is shown."""
    real = BoundPipeline.call

    def watched(self: BoundPipeline, call: HookCall, ctx: Any, where: str = "") -> Any:  # noqa: ANN401
        names = [name for name in ("hidden", "prunable", "features", "q", "k") if hasattr(ctx, name)]
        shown = {f"ctx.{name}": getattr(ctx, name) for name in names}
        if isinstance(getattr(ctx, "images", None), Mapping):
            shown |= {f"ctx.images['{view}']": pixels for view, pixels in ctx.images.items()}
        before = {name: value.clone() for name, value in shown.items()}
        answer = real(self, call, ctx, where)
        for name, value in shown.items():
            if not torch.equal(value, before[name]):
                raise CheckFailed(f"{call.hook} wrote to {name}")
        return answer

    with patch.object(BoundPipeline, "call", watched):
        subject.queries(subject.policy(), 2)


def it_works_in_bfloat16(subject: StageSubject) -> None:
    """It works in the releases' own type."""
    subject.queries(subject.policy(backbone=subject.backbone_in("bfloat16")), 4)


def no_query_waits(subject: StageSubject) -> None:
    """No query waits for the device."""
    if _has_union(subject):
        raise NotApplicable("its count is known only during the query")
    policy = subject.policy(slots=(0, 1))
    subject.queries(policy, 4, (0, 1))
    with no_waiting(subject.backbone):
        subject.queries(policy, 1, (0, 1), first=4)


def a_replay_is_the_query(subject: StageSubject) -> None:
    """Recorded once, as for a CUDA graph, it answers later queries as if it were asked."""
    if _has_union(subject):
        raise NotApplicable("its count is known only during the query")
    eager, recorded = subject.policy(), subject.policy()
    if not all(needs.graph_safe for needs in recorded.pipeline.needs):
        raise NotApplicable("it says that it works on the host")
    recorded.executor = GraphExecutor(recorded.backbone, taped)
    own, plain = (subject.queries(policy, 6) for policy in (recorded, eager))
    message = "query {} was replayed and differs; what it reads on the host belongs in `host_state`"
    _same_selection(own, plain, message)
    _same_actions(own, plain, message)


def nothing_waits_for_the_garbage_collector(subject: StageSubject) -> None:
    """When a query has ended and something newer is remembered, its tensors are freed at once."""
    policy = subject.policy()
    subject.queries(policy, 1)
    if left := caught_in_cycles(lambda: subject.queries(policy, 2, first=1)):
        raise CheckFailed(
            f"{left} tensors of two queries hang on cycles; let nothing that holds a tensor be reached from itself"
        )


def probes_are_declared(subject: StageSubject) -> None:
    """The attention it computes is the attention that `probes` declares, so that FLOPs are told right."""
    policy = subject.policy()
    trace = subject.queries(policy, 5)[-1].trace
    (stage,), (needs,) = policy.pipeline.stages, policy.pipeline.needs
    info, layout = policy.backbone.info, trace.plan.layout
    watched = {layer for layer in needs.action_attention if "action" in layout.row_names}
    declared = {(p.layer, rows_name(p.rows), p.ahead) for p in stage.probes(info, layout, trace.mode)}
    declared -= {(layer, "action", False) for layer in watched}
    found = {(p.layer, p.rows, p.ahead) for p in trace.probes if p.stage == subject.stage}
    if found != declared:
        more, less = sorted(found - declared), sorted(declared - found)
        raise CheckFailed(f"computed and not declared: {more or 'none'}; declared and not computed: {less or 'none'}")


def it_fits_every_depth(subject: StageSubject) -> None:
    """Its shipped or default settings fit decoders of 6, 18 and 32 layers."""
    layout = subject.backbone.encode(INSTRUCTIONS[0], subject.observation(0, 0).get("state")).layout
    for depth in DEPTHS:
        info = replace(subject.backbone.info, decoder=replace(subject.backbone.info.decoder, depth=depth))
        try:
            bound = bind(subject.config, info, subject.registry)
            for mode in subject.config.modes:
                bound.plan(layout, mode)
        except TokenPruneError as error:
            raise CheckFailed(f"with {depth} layers: {error}") from error


def unknown_keys_are_refused(subject: StageSubject) -> None:
    """A key its configuration does not know is an error, not silence."""
    stage = subject.config.stages[0]
    try:
        type(stage).model_validate({**stage.model_dump(), "no_such_key": 1})
    except ValidationError:
        return
    raise CheckFailed(f"{type(stage).__name__} accepts the key 'no_such_key'")


def every_key_is_explained(subject: StageSubject) -> None:
    """Every key of its own says in the schema what it means."""
    config = type(subject.config.stages[0])
    schema = config.model_json_schema()
    silent = [
        name
        for name, entry in schema["properties"].items()
        if "description" not in entry and name not in CutConfig.model_fields
    ]
    if silent:
        raise CheckFailed(f"no description: {', '.join(silent)} of {config.__name__}")


STAGE_CHECKS: tuple[Callable[[StageSubject], None], ...] = (
    runs,
    keeping_everything_is_dense,
    same_seed_same_selection,
    batch_rows_are_independent,
    reset_forgets,
    the_model_stays_as_it_was,
    what_it_is_shown_stays_as_it_was,
    it_works_in_bfloat16,
    no_query_waits,
    a_replay_is_the_query,
    nothing_waits_for_the_garbage_collector,
    probes_are_declared,
    it_fits_every_depth,
    unknown_keys_are_refused,
    every_key_is_explained,
)
"""The promises of a stage, in the order in which they are checked."""


def _needs_cuts(subject: StageSubject) -> None:
    if not subject.cuts:
        raise NotApplicable("it has no cut")


def _has_union(subject: StageSubject) -> bool:
    stage = subject.config.stages[0]
    if not subject.cuts:
        return False
    entries = range(len(stage.after))
    return any(stage.budget(mode, entry).amount == UNION for mode in subject.config.modes for entry in entries)


def _same_selection(first: Sequence[ActionChunk], second: Sequence[ActionChunk], message: str) -> None:
    for query, (one, other) in enumerate(zip(first, second, strict=True)):
        pairs = zip_longest(one.trace.kept.items(), other.trace.kept.items())
        if any(a is None or b is None or a[0] != b[0] or not torch.equal(a[1], b[1]) for a, b in pairs):
            raise CheckFailed(message.format(query))


def _same_actions(first: Sequence[ActionChunk], second: Sequence[ActionChunk], message: str) -> None:
    for query, (one, other) in enumerate(zip(first, second, strict=True)):
        if not np.array_equal(one.actions, other.actions):
            raise CheckFailed(message.format(query))
