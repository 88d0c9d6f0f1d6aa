"""What observers are given of the action tokens' attention, and what they remember, on a backbone with action rows."""

from __future__ import annotations

from dataclasses import replace

import torch

from tests.helpers.planting import REGISTRY, pipeline
from tests.helpers.registries import with_stages
from tests.helpers.stages import TestConfig
from tests.helpers.tiny_oft import INSTRUCTION, observation, tiny_config, tiny_policy_parts
from tokenprune.model.info import BackboneInfo
from tokenprune.policy import Policy
from tokenprune.registry.hookspecs import hookimpl
from tokenprune.stages.memory import ExecutedAction
from tokenprune.stages.needs import StageNeeds
from tokenprune.stages.query_record import QueryRecord
from tokenprune.stages.stage import Stage
from tokenprune.stages.token_context import LayerContext
from tokenprune.tokens.proposal import Proposal

LAYER = 1


class Watching(Stage[TestConfig]):
    """Cuts by what the action tokens of the last query attended to."""

    Config = TestConfig
    records: list[QueryRecord] = []  # noqa: RUF012 - read by the tests
    recalled: list[tuple[torch.Tensor, torch.Tensor]] = []  # noqa: RUF012

    def requirements(self, info: BackboneInfo) -> StageNeeds:
        return replace(super().requirements(info), action_attention=(LAYER,))

    @hookimpl
    def observe(self, record: QueryRecord | ExecutedAction) -> None:
        if isinstance(record, QueryRecord):
            seen = record.attention[LAYER]
            record.remember("last", seen.prunable, seen.weights.mean((1, 2)))
            self.records.append(record)

    @hookimpl
    def score_layer(self, ctx: LayerContext) -> Proposal:
        values, seen = ctx.recall("last")
        self.recalled.append((values, seen))
        self.expected = ctx.attention_rows("action")
        return Proposal(score=values)


def ran(queries: int) -> tuple[Policy, Watching]:
    found = with_stages(REGISTRY, [Watching], kind="scorer")
    config = pipeline(TestConfig(use="test.watching", after=(LAYER,), keep=10))
    Watching.records, Watching.recalled = [], []
    backbone = tiny_policy_parts(tiny_config())
    policy = Policy(backbone, config, found)
    policy.reset(INSTRUCTION)
    for number in range(queries):
        policy.act(observation(backbone.config, number))
    return policy, policy.pipeline.stages[0]


def test_attention_is_that_of_the_action_rows() -> None:
    _, stage = ran(1)
    seen = Watching.records[0].attention[LAYER]
    assert seen.weights.shape == (1, 4, 56, 32)
    assert seen.prunable.tolist() == [list(range(1, 33))]
    assert torch.equal(seen.weights, stage.expected)


def test_it_is_computed_once_and_counted_once() -> None:
    policy, _ = ran(1)
    trace = policy.act(observation(policy.backbone.config)).trace
    assert [(probe.layer, probe.rows, probe.count) for probe in trace.probes] == [(LAYER, "action", 56)]


def test_what_is_remembered_is_recalled_in_the_next_query_only_until_a_reset() -> None:
    policy, _ = ran(2)
    (_, first), (values, second) = Watching.recalled
    assert not first.any()
    assert second.all()
    assert torch.equal(values, Watching.records[0].attention[LAYER].weights.mean((1, 2)))
    policy.reset(INSTRUCTION)
    policy.act(observation(policy.backbone.config))
    assert not Watching.recalled[-1][1].any()


def test_nothing_is_computed_where_nobody_watches() -> None:
    backbone = tiny_policy_parts(tiny_config())
    policy = Policy(backbone, pipeline(TestConfig(use="test.memory", keep=10)), REGISTRY)
    policy.reset(INSTRUCTION)
    assert policy.act(observation(backbone.config)).trace.probes == []
