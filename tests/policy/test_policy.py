"""Policies: failing stages, fallbacks, slots, modes, traces."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import tokenprune
from tests.helpers import stages
from tests.helpers.planting import pipeline
from tests.helpers.registries import with_stages
from tests.helpers.tiny_oft import INSTRUCTION, observation, tiny_config, tiny_policy_parts
from tokenprune.engine import combine as resolution
from tokenprune.errors import CapabilityError, ConfigError, PluginError, StageError, TokenPruneError, TraceError
from tokenprune.pipelines.config import DENSE, PipelineConfig
from tokenprune.policy import Policy
from tokenprune.registry.discovery import Registry
from tokenprune.registry.hookspecs import hookimpl
from tokenprune.registry.plugin_checks import Owner
from tokenprune.stages.config import StageConfig, ViewBudget
from tokenprune.stages.control_context import ControlContext, ControlDecision
from tokenprune.stages.feature_context import FeatureContext
from tokenprune.stages.stage import Stage
from tokenprune_adapters.backbones.openvla_oft.backbone import OpenVLAOFT
from tokenprune_plugins.fastv import FastVConfig
from tokenprune_plugins.shared.bases import HalfConfig


class ByCount(Stage[StageConfig]):
    """Fine mode in every other query; doubles features of the wrist view; keeps a diary."""

    diary: list[object]

    def __init__(self, config: StageConfig) -> None:
        super().__init__(config)
        self.diary = []

    @hookimpl
    def reset(self, episode: object) -> None:
        self.diary.append(episode)

    @hookimpl
    def control(self, ctx: ControlContext) -> ControlDecision | None:
        return ControlDecision("fine") if ctx.queries % 2 else None

    @hookimpl
    def transform_features(self, ctx: FeatureContext) -> torch.Tensor | None:
        return 2 * ctx.features if ctx.view == "wrist" else None

    @hookimpl
    def observe(self, record: object) -> None:
        self.diary.append(record)


class Rogue(Stage[StageConfig]):
    """Chooses a mode that does not exist."""

    @hookimpl
    def control(self, ctx: ControlContext) -> ControlDecision:
        return ControlDecision("finer")


@pytest.fixture(scope="module")
def registry() -> Registry:
    return with_stages(stages.registry(), (ByCount, Rogue), "test", "controller")


@pytest.fixture(scope="module")
def backbone() -> OpenVLAOFT:
    return tiny_policy_parts(tiny_config())


def started(backbone: OpenVLAOFT, config: PipelineConfig, registry: Registry) -> Policy:
    policy = Policy(backbone, config, registry)
    policy.reset(INSTRUCTION)
    return policy


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        ("broken", ("test.broken", "select_tokens", "before layer 0", "ZeroDivisionError", "no scores today")),
        ("nan", ("test.nan", "NaN")),
        ("wrongshape", ("test.wrongshape", "[1, 33]", "[1, 32]")),
        ("wrongtype", ("test.wrongtype", "Tensor", "Proposal")),
        ("silent", ("test.silent", "16 of 32")),
    ],
)
def test_a_failing_stage_is_named(stage: str, words: tuple[str, ...], backbone: OpenVLAOFT, registry: Registry) -> None:
    policy = started(backbone, pipeline(stages.TestConfig(use=f"test.{stage}")), registry)
    with pytest.raises(StageError) as error:
        policy.act(observation(backbone.config))
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("stage", ["broken", "nan", "wrongshape", "wrongtype", "silent"])
def test_on_error_dense_falls_back_and_says_so(stage: str, backbone: OpenVLAOFT, registry: Registry) -> None:
    policy = started(backbone, pipeline(stages.TestConfig(use=f"test.{stage}"), on_error="dense"), registry)
    obs = observation(backbone.config)
    chunk, dense = policy.act(obs), started(backbone, DENSE, registry).act(obs)
    assert np.array_equal(chunk.normalised, dense.normalised)
    assert f"test.{stage}" in chunk.trace.fallback
    assert chunk.trace.pipeline == "drawn"
    assert not dense.trace.fallback


def test_interleaved_environments_equal_separate_ones(backbone: OpenVLAOFT, registry: Registry) -> None:
    config = pipeline(stages.TestConfig(use="test.memory", keep=0.3))
    together, alone = Policy(backbone, config, registry), [Policy(backbone, config, registry) for _ in range(2)]
    for slot in (0, 1):
        together.reset(INSTRUCTION, slot)
        alone[slot].reset(INSTRUCTION, slot)
    for step in range(3):
        observations = {slot: observation(backbone.config, 10 * step + slot) for slot in (0, 1)}
        chunks = together.act_batch(observations)
        for slot in (0, 1):
            single = alone[slot].act(observations[slot], slot)
            assert torch.equal(chunks[slot].trace.kept[-1][slot], single.trace.kept[-1][0])
            np.testing.assert_allclose(chunks[slot].normalised, single.normalised, rtol=0, atol=1e-10)


def test_a_controller_chooses_among_declared_modes(backbone: OpenVLAOFT, registry: Registry) -> None:
    cut = HalfConfig(use="uniform_grid", keep={"coarse": 8, "fine": 24})
    policy = started(backbone, pipeline(StageConfig(use="test.bycount"), cut, modes=("coarse", "fine")), registry)
    traces = [policy.act(observation(backbone.config)).trace for _ in range(4)]
    assert [trace.mode for trace in traces] == ["coarse", "fine", "coarse", "fine"]
    assert [trace.plan.prunable[-1] for trace in traces] == [8, 24, 8, 24]


def test_slots_in_different_modes_share_a_batch_call(backbone: OpenVLAOFT, registry: Registry) -> None:
    cut = HalfConfig(use="uniform_grid", keep={"coarse": 8, "fine": 24})
    policy = started(backbone, pipeline(StageConfig(use="test.bycount"), cut, modes=("coarse", "fine")), registry)
    policy.act(observation(backbone.config))
    policy.reset(INSTRUCTION, 1)
    chunks = policy.act_batch({slot: observation(backbone.config) for slot in (0, 1)})
    assert [chunks[slot].trace.mode for slot in (0, 1)] == ["fine", "coarse"]


def test_an_unknown_mode_names_the_nearest(backbone: OpenVLAOFT, registry: Registry) -> None:
    policy = started(backbone, pipeline(StageConfig(use="test.rogue"), modes=("coarse", "fine")), registry)
    with pytest.raises(StageError, match=r"test\.rogue.*'finer'; did you mean 'fine'"):
        policy.act(observation(backbone.config))


def test_features_are_transformed_per_view(backbone: OpenVLAOFT, registry: Registry) -> None:
    obs = observation(backbone.config)
    changed = started(backbone, pipeline(StageConfig(use="test.bycount"), modes=("coarse", "fine")), registry).act(obs)
    plain = started(backbone, DENSE, registry).act(obs)
    assert np.abs(changed.normalised - plain.normalised).max() > 1e-3


def test_observers_see_episodes_queries_and_executed_actions(backbone: OpenVLAOFT, registry: Registry) -> None:
    policy = started(backbone, pipeline(StageConfig(use="test.bycount"), modes=("coarse", "fine")), registry)
    policy.act(observation(backbone.config))
    policy.executed(np.arange(7.0), pose=np.zeros(3), time=0.05)
    stage = policy.pipeline.stages[0]
    assert isinstance(stage, ByCount)
    assert [type(entry).__name__ for entry in stage.diary] == ["EpisodeStart", "QueryRecord", "ExecutedAction"]
    assert stage.diary[1].actions.shape == (1, 8, 7)
    assert stage.diary[2].action.tolist() == list(range(7))


def test_two_policies_share_no_stage_object(backbone: OpenVLAOFT, registry: Registry) -> None:
    config = pipeline(StageConfig(use="test.bycount"), modes=("coarse", "fine"))
    one, other = Policy(backbone, config, registry), Policy(backbone, config, registry)
    assert one.pipeline.stages[0] is not other.pipeline.stages[0]


def test_a_trace_that_differs_from_the_plan_is_refused(
    backbone: OpenVLAOFT, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = started(backbone, pipeline(HalfConfig(use="random", after=(1,))), registry)
    real = resolution.resolve
    monkeypatch.setattr(resolution, "resolve", lambda proposals, keep, *rest: real(proposals, keep + 1, *rest))
    with pytest.raises(TraceError, match="layer 2 differs from the plan"):
        policy.act(observation(backbone.config))


def test_capabilities_are_checked_when_bound(backbone: OpenVLAOFT, registry: Registry) -> None:
    spec = replace(registry.stages["random"].spec, name="needy", requires=frozenset({"head_cache"}))
    needy = stages.registry().with_specs(spec, owner=Owner("tests", "0", __name__))
    with pytest.raises(CapabilityError, match="'needy' requires head_cache, which backbone 'openvla-oft' does not"):
        Policy(backbone, pipeline(HalfConfig(use="needy")), needy)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (HalfConfig(use="random", after=(7,)), "valid in a decoder of 3 layers: 0 to 1"),
        (FastVConfig(use="fastv", after=("embedding",)), "no select_tokens"),
        (stages.TestConfig(use="test.broken", after=(1,)), "no score_layer"),
    ],
)
def test_cuts_are_checked_when_bound(config: Any, words: str, backbone: OpenVLAOFT, registry: Registry) -> None:
    with pytest.raises(ConfigError, match=words):
        Policy(backbone, pipeline(config), registry)


def test_budgets_are_checked_before_the_first_query(backbone: OpenVLAOFT, registry: Registry) -> None:
    cut = HalfConfig(use="random", views={"wirst": ViewBudget(keep=4)})
    policy = Policy(backbone, pipeline(cut), registry)
    with pytest.raises(ConfigError, match=r"views\.wirst is no view of this policy; did you mean 'wrist'"):
        policy.reset(INSTRUCTION)


def test_actions_that_are_not_finite_are_refused(registry: Registry) -> None:
    backbone = tiny_policy_parts(tiny_config())
    backbone.model.action_head.model.fc2.bias[0] = torch.inf
    with pytest.raises(TokenPruneError, match="not finite"):
        started(backbone, DENSE, registry).act(observation(backbone.config))


def test_phases_sum_to_about_the_whole_query(backbone: OpenVLAOFT, registry: Registry) -> None:
    trace = (
        started(backbone, pipeline(FastVConfig(use="fastv", after=(1,))), registry)
        .act(observation(backbone.config))
        .trace
    )
    assert set(trace.phases) == {"preprocess", "vision", "selection", "decoder", "head", "history"}
    assert sum(trace.phases.values()) <= trace.milliseconds
    assert trace.kernel.startswith("sdpa/")
    assert [(probe.layer, probe.rows) for probe in trace.probes] == [(1, "text")]


def test_load_by_name() -> None:
    policy = tokenprune.load("openvla-oft", preset="small", pipeline="fastv", overrides=["stages.0.keep=64"])
    policy.reset(INSTRUCTION)
    images = {view: np.zeros((224, 224, 3), dtype=np.uint8) for view in ("primary", "wrist")}
    chunk = policy.act({"images": images, "state": np.zeros(8)})
    assert chunk.actions.shape == (8, 7)
    assert chunk.trace.plan.prunable[-1] == 64
    assert policy.backbone.info.untrained


@pytest.mark.parametrize(("native", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_auto_dtype_is_what_the_processor_computes(
    native: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False, raising=False)
    assert tokenprune.load("openvla-oft", preset="small").backbone.dtype is dtype
    assert tokenprune.load("openvla-oft", preset="small", dtype="float64").backbone.dtype is torch.float64


def test_load_takes_plain_data() -> None:
    data = {"version": 1, "name": "mine", "stages": [{"use": "uniform_grid", "keep": 100}]}
    policy = tokenprune.load("openvla-oft", preset="small", pipeline=data)
    assert policy.pipeline.config.stages[0].keep == 100
    with pytest.raises(ConfigError, match=r"pipeline: stages\.0.*did you mean 'keep'"):
        tokenprune.load("openvla-oft", preset="small", pipeline=data | {"stages": [{"use": "random", "kep": 1}]})


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"backbone": "openvla-otf"}, PluginError, "did you mean 'openvla-oft'"),
        ({"dtype": "float8"}, ConfigError, "float16"),
        ({"device": "tpu9"}, ConfigError, "no torch device"),
        ({"preset": "smal"}, ConfigError, "did you mean 'small'"),
        ({"preset": None}, ConfigError, "needs a checkpoint"),
        ({"pipeline": "fasttv"}, TokenPruneError, "did you mean 'fastv'"),
        ({"view": ["primary"]}, ConfigError, "did you mean 'views'"),
        ({"views": []}, ConfigError, "one to three"),
        ({"unnorm_key": "libero"}, ConfigError, "an untrained preset has none"),
    ],
)
def test_load_refuses_what_it_does_not_know(arguments: dict[str, Any], error: type[Exception], words: str) -> None:
    backbone = arguments.pop("backbone", "openvla-oft")
    with pytest.raises(error, match=words):
        tokenprune.load(backbone, **({"preset": "small"} | arguments))
