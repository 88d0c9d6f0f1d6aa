"""What only a GPU shows. `make bench-gpu` runs these; without a GPU they fail, and nothing else asks for them."""

from __future__ import annotations

from unittest.mock import patch

import numpy as np
import pytest
import torch
from long_run import long_run

from tests.helpers.graph_safe import GRAPH_SAFE
from tests.helpers.planting import REGISTRY
from tokenprune.bench.roofline import measure_roof
from tokenprune.bench.settings import BenchSettings
from tokenprune.bench.speed import Subject, bench
from tokenprune.bench.upstream import UPSTREAM, UpstreamBackbone
from tokenprune.compare.episode import load_episode
from tokenprune.compare.episode_source import bundled_episode
from tokenprune.loading import load_backbone
from tokenprune.pipelines.config import DENSE
from tokenprune.pipelines.loader import load_pipeline
from tokenprune.policy import Policy
from tokenprune.testing.matrix import INSTRUCTION, random_observation

pytestmark = pytest.mark.cuda
BACKBONES = ("openvla", "openvla-oft", "pi0", "pi05")


def made(name: str, device: str, dtype: str = "float32"):
    return load_backbone(name, REGISTRY, None, "tiny", device, dtype, 0, {})


def queries(backbone, pipeline: str, count: int = 3, execution: str = "eager"):
    policy = Policy(backbone, load_pipeline(pipeline, REGISTRY).config, REGISTRY, execution)
    policy.reset(INSTRUCTION)
    rng = np.random.default_rng(0)
    chunks = []
    for _ in range(count):
        chunks.append(policy.act(random_observation(backbone, rng)))
        policy.executed(np.full(backbone.info.action.dims, 0.4))
    return chunks


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("pipeline", ["dense", "uniform_grid", "fastv", "specprune"])
def test_a_gpu_keeps_the_same_tokens_and_gives_the_same_actions(name, pipeline):
    on_cpu, on_gpu = made(name, "cpu", "float64"), made(name, "cuda", "float64")
    on_gpu.model.load_state_dict(on_cpu.model.state_dict())
    for one, other in zip(queries(on_cpu, pipeline), queries(on_gpu, pipeline), strict=True):
        assert one.trace.held == other.trace.held
        for after, ids in one.trace.kept.items():
            assert torch.equal(ids, other.trace.kept[after].cpu())
        assert np.abs(one.actions - other.actions).max() < 1e-5


@pytest.mark.parametrize("name", BACKBONES)
def test_weights_are_made_on_the_device_in_their_dtype(name):
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    backbone = load_backbone(name, REGISTRY, None, "small", "cuda", "bfloat16", 0, {})
    values = list(backbone.model.state_dict().values())
    assert {(value.device.type, value.dtype) for value in values} == {("cuda", torch.bfloat16)}
    taken = torch.cuda.max_memory_allocated() - before
    weights, largest = sum(value.nbytes for value in values), max(4 * value.numel() for value in values)
    assert taken < 1.1 * weights + 2 * largest + 2**22


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("pipeline", GRAPH_SAFE)
def test_no_query_waits_for_the_device_by_torchs_own_account(pipeline):
    backbone = made("openvla-oft", "cuda")
    real = type(backbone).infer

    def infer(self, inputs, query):
        torch.cuda.set_sync_debug_mode("error")
        try:
            return real(self, inputs, query)
        finally:
            torch.cuda.set_sync_debug_mode(0)

    with patch.object(type(backbone), "infer", infer):
        queries(backbone, pipeline)


@pytest.mark.parametrize("name", BACKBONES)
def test_the_upstream_reconstruction_equals_dense(name):
    backbone = made(name, "cuda", "float64")
    policies = [Policy(one, DENSE, REGISTRY) for one in (backbone, UpstreamBackbone(backbone))]
    seen = random_observation(backbone, np.random.default_rng(0))
    for policy in policies:
        policy.reset(INSTRUCTION)
    dense, upstream = (policy.act(seen).actions for policy in policies)
    assert np.abs(dense - upstream).max() < 1e-6


def test_the_bench_counts_waits_and_memory_on_a_gpu():
    episode = load_episode(bundled_episode(REGISTRY, "openvla-oft"))
    settings = BenchSettings(dtypes=("bfloat16",), device="cuda", pairs=3, warmup=1, reference="upstream")
    subjects = [Subject("openvla-oft", "small", episode)]
    data = bench(subjects, [load_pipeline("specprune", REGISTRY)], settings, REGISTRY).to_json()
    rows = {row["pipeline"]: row for row in data["results"][0]["rows"]}
    assert data["provenance"]["gpu"]
    assert rows["dense"]["waits"] > 0, "the upload of the pictures and the download of the actions wait"
    assert rows["dense"]["kernel"].startswith("sdpa/")
    assert rows["dense"]["kernel"].endswith("(cuda)")
    assert 0 < rows["specprune"]["peak_bytes"] <= rows[UPSTREAM]["peak_bytes"]
    assert all(row["phases"]["decoder"] > 0 for row in rows.values())


def test_the_roof_of_a_gpu_is_above_any_cpus():
    roof = measure_roof(torch.device("cuda"), torch.bfloat16)
    assert 5e12 < roof.flops < 1e16
    assert 1e11 < roof.bandwidth < 1e14


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("pipeline", ["dense", "uniform_grid", "fastv", "specprune", "vla_pruner", "ttf"])
@pytest.mark.parametrize("execution", ["cuda_graph", "compile", "compiled_cuda_graph"])
def test_every_execution_keeps_the_same_tokens_and_gives_the_same_actions(name, pipeline, execution):
    backbone = made(name, "cuda", "float64")
    eager, own = (queries(backbone, pipeline, 6, how) for how in ("eager", execution))
    for one, other in zip(eager, own, strict=True):
        assert one.trace.kept.keys() == other.trace.kept.keys()
        assert all(torch.equal(ids, other.trace.kept[after]) for after, ids in one.trace.kept.items())
        assert np.abs(one.normalised - other.normalised).max() < 1e-9
    assert own[-1].trace.execution == execution


@pytest.mark.parametrize("name", BACKBONES)
def test_a_replay_tells_the_time_of_its_phases(name):
    eager, replayed = (
        [chunk.trace for chunk in queries(made(name, "cuda"), "specprune", 8, how)[-2:]]
        for how in ("eager", "cuda_graph")
    )
    for one, other in zip(eager, replayed, strict=True):
        assert other.execution == "cuda_graph"
        assert set(other.phases) == {*one.phases, "replay"}
        assert min(other.phases.values()) >= 0
        assert other.phases["decoder"] > 0
        assert sum(other.phases.values()) < 1.1 * other.milliseconds


def test_a_reset_and_a_mode_switch_record_nothing_again():
    backbone = made("openvla-oft", "cuda")
    policy = Policy(backbone, load_pipeline("specprune", REGISTRY).config, REGISTRY, "cuda_graph")
    rng, ran = np.random.default_rng(0), []
    for _ in range(3):
        policy.reset(INSTRUCTION)
        for query in range(8):
            ran.append(policy.act(random_observation(backbone, rng)).trace)
            policy.executed(np.full(backbone.info.action.dims, 0.7 if query % 4 < 2 else -0.01))
    assert {trace.mode for trace in ran} == {"coarse", "fine"}
    assert {trace.execution for trace in ran[8:]} == {"cuda_graph"}


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_a_replay_waits_for_nothing_between_upload_and_download():
    backbone = made("openvla-oft", "cuda", "bfloat16")
    policy = Policy(backbone, load_pipeline("specprune", REGISTRY).config, REGISTRY, "cuda_graph")
    policy.reset(INSTRUCTION)
    rng = np.random.default_rng(0)
    for _ in range(4):
        policy.act(random_observation(backbone, rng))
    real = type(policy.executor).run

    def run(self, *given):
        torch.cuda.set_sync_debug_mode("error")
        try:
            return real(self, *given)
        finally:
            torch.cuda.set_sync_debug_mode(0)

    with patch.object(type(policy.executor), "run", run):
        assert policy.act(random_observation(backbone, rng)).trace.execution == "cuda_graph"


def test_memory_stays_flat_over_replays():
    policy = Policy(made("openvla-oft", "cuda"), load_pipeline("specprune", REGISTRY).config, REGISTRY, "cuda_graph")
    first, *_, last = long_run(policy, 1500, 300)
    assert last.device_mb - first.device_mb < 1
