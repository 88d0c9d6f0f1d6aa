"""Compiled layers give what the plain ones give."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch._dynamo.testing

from tests.helpers.backbones import BACKBONES
from tests.helpers.look import look
from tests.helpers.planting import REGISTRY
from tests.helpers.tiny_oft import INSTRUCTION
from tokenprune.model import decoder
from tokenprune.pipelines.loader import load_pipeline
from tokenprune.policy import ActionChunk, Policy


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    decoder.compiled_parts.cache_clear()
    yield
    torch._dynamo.reset()
    decoder.compiled_parts.cache_clear()


def queries(family: str, execution: str) -> list[ActionChunk]:
    backbone, _, _ = BACKBONES[family]()
    policy = Policy(backbone, load_pipeline("specprune", REGISTRY).config, REGISTRY, execution)
    policy.reset(INSTRUCTION)
    return [policy.act(look(backbone, seed)) for seed in range(3)]


def equal(family: str, tolerance: float) -> None:
    for eager, own in zip(queries(family, "eager"), queries(family, "compile"), strict=True):
        assert own.trace.execution == "compile"
        assert eager.trace.kept.keys() == own.trace.kept.keys()
        assert all(torch.equal(ids, own.trace.kept[after]) for after, ids in eager.trace.kept.items())
        np.testing.assert_allclose(own.normalised, eager.normalised, rtol=0, atol=tolerance)


@pytest.mark.parametrize("family", ["oft", "pi0"])
def test_compiled_layers_keep_the_same_tokens(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without code generation, which takes long; every layer and every count of tokens shares one program."""
    compiled = torch.compile
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch, "compile", lambda run, dynamic: compiled(run, dynamic=dynamic, backend=counter))
    equal(family, 1e-9)
    # Before and after attention, for one or two decoders, and once more where one token comes alone.
    assert 2 <= counter.frame_count <= 6


# Torch's code generator itself uses what torch calls deprecated.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(BACKBONES))
def test_generated_code_keeps_the_same_tokens(family: str) -> None:
    # Norms are float32 in every model, and generated code rounds them in its own order.
    equal(family, 1e-5)
