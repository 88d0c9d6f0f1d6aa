"""The promises of a backbone, one function each; the first line of its docstring says what holds.

A check raises `CheckFailed` with what was found, or `NotApplicable` with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from tokenprune.engine.adapter import Backbone, Observation
from tokenprune.engine.executor import GraphExecutor
from tokenprune.pipelines.config import DENSE
from tokenprune.policy import Policy
from tokenprune.testing.backbone_facts import (
    described_without_weights,
    flops_are_those_that_run,
    it_is_what_it_says,
    the_layout_covers_the_sequence,
    the_seed_decides_the_weights,
)
from tokenprune.testing.backbone_refusals import (
    broken_states_are_no_action,
    unknown_options_are_refused,
    wrong_instructions_are_refused,
    wrong_observations_are_refused,
)
from tokenprune.testing.backbone_subject import INSTRUCTIONS, BackboneSubject
from tokenprune.testing.comparison import are_equal, normalised, require_equal, require_near, require_same
from tokenprune.testing.cycles import caught_in_cycles
from tokenprune.testing.masked_query import MaskedQuery
from tokenprune.testing.query_spy import spied
from tokenprune.testing.tape import taped
from tokenprune.testing.verdicts import CheckFailed, NotApplicable
from tokenprune.testing.waiting import no_waiting

ROUGHLY = 0.2
"""Mean difference, of the mean size, that bfloat16 explains."""


def answers(subject: BackboneSubject) -> None:
    """It answers with a chunk of finite actions in two episodes side by side, whatever the instruction's length."""
    action = subject.backbone.info.action
    policy = subject.policy()
    for slot, instruction in enumerate(INSTRUCTIONS[1:]):
        policy.reset(instruction, slot)
    for query in range(2):
        for chunk in policy.act_batch({slot: subject.observation(2 * query + slot) for slot in (0, 1)}).values():
            if chunk.actions.shape != (action.horizon, action.dims):
                raise CheckFailed(
                    f"actions have the shape {list(chunk.actions.shape)}; "
                    f"info.action says [{action.horizon}, {action.dims}]"
                )
            if not np.isfinite(chunk.actions).all():
                raise CheckFailed("actions are not finite")


def pixels_reach_their_own_tokens(subject: BackboneSubject) -> None:
    """The pixels of a view reach every token that the layout gives to it, and no others."""
    first, other = subject.observation(0), subject.observation(1)
    for view in subject.backbone.info.views:
        changed = {**first, "images": {**first["images"], view: other["images"][view]}}
        with spied() as seen:
            subject.ask(observations=[first])
            subject.ask(observations=[changed])
        before, after = seen.decoded()
        found = (before != after).any(2)[0].nonzero()[:, 0].tolist()
        span = subject.backbone.encode(INSTRUCTIONS[0], first.get("state")).layout.views[view].span
        require_same(f"tokens that the pixels of view '{view}' change", found, list(span))


def every_input_is_read(subject: BackboneSubject) -> None:
    """Each view, and the state where there is one, changes what is read at the end."""
    first, other = subject.observation(0), subject.observation(1)
    before = subject.read(first)
    changes = {f"view '{v}'": {**first, "images": {**first["images"], v: other["images"][v]}} for v in first["images"]}
    if subject.backbone.info.state_size is not None:
        changes["the state"] = {**first, "state": other["state"]}
    for what, observation in changes.items():
        if are_equal(before, subject.read(observation)):
            raise CheckFailed(f"{what} changes nothing")


def stages_may_change_features(subject: BackboneSubject) -> None:
    """The features of every view go through `query.transform`, a row for each patch, and on as they come back."""
    first, other = subject.observation(0), subject.observation(1)
    with spied(transform=torch.zeros_like) as seen:
        subject.ask(observations=[first])
        subject.ask(observations=[{**first, "images": other["images"]}])
    layout = subject.backbone.encode(INSTRUCTIONS[0], first.get("state")).layout
    found = [(view, features.shape[1]) for view, features in seen.features]
    expected = 2 * [(view, segment.length) for view, segment in layout.views.items()]
    require_same("views and patches that go through query.transform", found, expected)
    if not torch.equal(*seen.decoded()):
        raise CheckFailed("pixels reach the decoder although query.transform returned zeros")


def the_same_query_gives_the_same_actions(subject: BackboneSubject) -> None:
    """What a query answers depends on what it is given, not on the queries before it or the process's own chance."""
    first = subject.read()
    subject.ask(observations=[subject.observation(5)])
    torch.rand(1)
    require_equal(first, subject.read(), "the same query, asked again, gives others")


def batch_rows_are_independent(subject: BackboneSubject) -> None:
    """What it answers in one environment does not depend on the others in the batch, dense or pruned."""
    if "batch" not in subject.backbone.info.capabilities:
        raise NotApplicable("info.capabilities has no 'batch'")
    observations, instructions = subject.alike(3)
    for config in (DENSE, subject.thinned):
        with spied() as seen:
            together = subject.ask(config, observations, instructions)
        require_same("rows of one pass over three environments of one layout", len(seen.decoded()[0]), 3)
        for row in range(3):
            one = slice(row, row + 1)
            with spied() as own:
                (alone,) = subject.ask(config, observations[one], instructions[one], first_slot=row)
            pairs = [*zip([hidden[one] for hidden in seen.hidden], own.hidden, strict=True)]
            for found, expected in (*pairs, (normalised(together[row]), normalised(alone))):
                require_near(
                    found, expected, f"pipeline '{config.name}': row {row} of a batch, and the same query alone,"
                )


def dropping_equals_masking(subject: BackboneSubject) -> None:
    """Tokens dropped by a pipeline equal tokens that stay and are masked, in everything that is read."""
    backbone = subject.backbone
    real = type(backbone).infer
    observations, instructions = subject.alike(2 if "batch" in backbone.info.capabilities else 1)

    def infer(self: Backbone, inputs: Any, query: Any) -> Tensor:  # noqa: ANN401
        actions = real(self, inputs, query)
        reference: Any = MaskedQuery(query.trace.plan.layout, query.trace.kept, seen.noise)
        expected = real(self, inputs, reference)
        require_same("how often hidden states are read", len(seen.hidden), len(reference.hidden))
        for found, wanted in zip([*seen.hidden, actions], [*reference.hidden, expected], strict=True):
            require_near(
                found, wanted, f"pipeline '{query.trace.pipeline}': what is read, and the same of a masked model,"
            )
        return actions

    for config in (DENSE, subject.thinned):
        with spied() as seen, patch.object(type(backbone), "infer", infer):
            subject.ask(config, observations, instructions)
        seen.decoded()


def keeping_everything_is_dense(subject: BackboneSubject) -> None:
    """A pipeline that is told to keep everything gives what dense gives, bit for bit."""
    kept, dense = subject.read(config=subject.keeping_everything), subject.read()
    require_equal(kept, dense, "what is read differs from dense although every token was kept")


def no_query_waits(subject: BackboneSubject) -> None:
    """No query waits for the device."""
    for config in (DENSE, subject.thinned):
        with no_waiting(subject.backbone):
            subject.ask(config)


def a_replay_is_the_query(subject: BackboneSubject) -> None:
    """Captured once, as for a CUDA graph, it answers later queries as if they were run."""
    for config in (DENSE, subject.thinned):
        eager, recorded = subject.policy(config), subject.policy(config)
        recorded.executor = GraphExecutor(recorded.backbone, taped)
        for policy in (eager, recorded):
            policy.reset(INSTRUCTIONS[0])
        for query in range(3):
            observation = subject.observation(query)
            found, expected = (normalised(policy.act(observation)) for policy in (recorded, eager))
            require_equal(
                [found], [expected], f"query {query} of pipeline '{config.name}' was replayed and gives others"
            )


def statistics_go_both_ways(subject: BackboneSubject) -> None:
    """Actions keep their shape in the environment's units, row by row, and statistics undo themselves."""
    backbone = subject.backbone
    action = backbone.info.action
    rng = np.random.default_rng(0)
    values = rng.uniform(-0.99, 0.99, (2, action.horizon, action.dims))
    observations, given = [subject.observation(seed) for seed in range(2)], values.copy()
    found = backbone.unnormalise(given, observations)
    require_same("the shape of actions in the environment's units", found.shape, values.shape)
    if not np.array_equal(given, values):
        raise CheckFailed("`unnormalise` writes to the actions it is given")
    for row in range(2):
        alone = backbone.unnormalise(values[row : row + 1].copy(), observations[row : row + 1])[0]
        require_near(
            torch.from_numpy(found[row]), torch.from_numpy(alone), f"row {row} un-normalised in a batch and alone"
        )
    statistics = getattr(backbone, "statistics", None)
    for name, size in (("action", action.dims), ("state", backbone.info.state_size)):
        known = getattr(statistics, name, None)
        if known is not None and callable(getattr(known, "normalise", None)):
            numbers = rng.uniform(-0.99, 0.99, (5, size or 0))
            back = torch.from_numpy(known.normalise(known.unnormalise(numbers.copy())))
            require_near(back, torch.from_numpy(numbers), f"statistics of the {name}: numbers sent there and back")


def nothing_waits_for_the_garbage_collector(subject: BackboneSubject) -> None:
    """When a query has ended, its tensors are freed at once."""
    for config in (DENSE, subject.thinned):
        policy = subject.policy(config)
        policy.reset(INSTRUCTIONS[0])
        first, *rest = (subject.observation(seed) for seed in range(3))
        policy.act(first)
        if left := caught_in_cycles(partial(_act_on, policy, rest)):
            raise CheckFailed(
                f"{left} tensors of two queries hang on cycles; let nothing that holds a tensor be reached from itself"
            )


def _act_on(policy: Policy, observations: Sequence[Observation]) -> None:
    for observation in observations:
        policy.act(observation)


def it_works_in_bfloat16(subject: BackboneSubject) -> None:
    """It works in bfloat16, dense and pruned, and reads nearly what it reads in float64."""
    backbone = subject.built("bfloat16")
    subject.ask(subject.thinned, backbone=backbone)
    with spied() as seen:
        subject.ask(backbone=backbone)
    require_same("the dtype of what enters the decoder", seen.decoded()[0].dtype, torch.bfloat16)
    # Later passes may go on from another token.
    found, expected = seen.hidden[0].double(), subject.read()[0].double()
    gap = ((found - expected).abs().mean() / expected.abs().mean()).item()
    if not gap < ROUGHLY:
        raise CheckFailed(f"what is read first differs from float64 by {gap:.2g} of its size")


BACKBONE_CHECKS: tuple[Callable[[BackboneSubject], None], ...] = (
    answers,
    it_is_what_it_says,
    the_layout_covers_the_sequence,
    pixels_reach_their_own_tokens,
    every_input_is_read,
    stages_may_change_features,
    the_same_query_gives_the_same_actions,
    batch_rows_are_independent,
    dropping_equals_masking,
    keeping_everything_is_dense,
    no_query_waits,
    a_replay_is_the_query,
    flops_are_those_that_run,
    described_without_weights,
    the_seed_decides_the_weights,
    statistics_go_both_ways,
    wrong_observations_are_refused,
    wrong_instructions_are_refused,
    unknown_options_are_refused,
    broken_states_are_no_action,
    nothing_waits_for_the_garbage_collector,
    it_works_in_bfloat16,
)
"""The promises of a backbone, in the order in which they are checked."""
