"""What choosing costs: counted beforehand and by torch as it happens."""

from __future__ import annotations

import json

import pytest
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from tests.helpers.backbones import BACKBONES
from tests.helpers.planting import REGISTRY
from tests.helpers.tiny_oft import INSTRUCTION
from tokenprune.cli import app
from tokenprune.errors import CapabilityError, ConfigError, MissingError
from tokenprune.pipelines.loader import load_pipeline
from tokenprune.policy import Policy
from tokenprune.report.describe import trace_flops

# Distances of what is recycled are computed in another way for few tokens than for many.
INEXACT = {"sparsevlm-recycle"}
FLOWS = ("efficientvla", "head_cache", "vla_pruner", "specprune")

# What OpenVLA-OFT's L1 head refuses, and what needs weights of its own.
REFUSED = {"efficientvla": CapabilityError, "head_cache": CapabilityError, "trim": MissingError}
CASES = [
    *(("oft", name) for name in sorted(REGISTRY.pipelines) if name not in REFUSED),
    *(("pi0", name) for name in FLOWS),
]


@pytest.mark.parametrize(("family", "name"), [case for case in CASES if case[1] not in INEXACT])
def test_a_query_multiplies_what_is_counted(family: str, name: str) -> None:
    backbone, seen, _ = BACKBONES[family]()
    policy = Policy(backbone, load_pipeline(name, REGISTRY).config, REGISTRY)
    policy.reset(INSTRUCTION)
    for _ in range(4 if name == "vla_pruner" else 2):
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            trace = policy.act(seen).trace
        assert trace_flops(backbone.info, trace).total == counter.get_total_flops()


@pytest.mark.parametrize("name", REFUSED)
def test_a_pipeline_that_cannot_run_is_refused(name: str) -> None:
    backbone, _, _ = BACKBONES["oft"]()
    with pytest.raises(REFUSED[name]):
        Policy(backbone, load_pipeline(name, REGISTRY).config, REGISTRY)


def test_explain_tables_every_pipeline() -> None:
    done = CliRunner().invoke(app, ["explain", "--all", "--preset", "7b"])
    assert done.exit_code == 0, done.output
    assert max(map(len, done.output.splitlines())) <= 80
    told = json.loads(CliRunner().invoke(app, ["explain", "--all", "--preset", "7b", "--json"]).output)
    rows = {(row["pipeline"], row["mode"]): row for row in told["pipelines"]}
    assert rows["random", "default"]["choosing"] == 0
    # Cosines of each two of 512 patches, 4096 wide.
    assert rows["divprune", "default"]["choosing"] == 2 * 512 * 512 * 4096
    assert {name for name, _ in rows} | set(told["refused"]) == set(REGISTRY.pipelines) - {"test.x"}
    assert "head_cache" in told["refused"]


def test_explain_wants_one_or_all() -> None:
    for words in (["explain"], ["explain", "fastv", "--all"]):
        done = CliRunner().invoke(app, words)
        assert isinstance(done.exception, ConfigError)
        assert str(done.exception) == "name a pipeline, or give --all"
