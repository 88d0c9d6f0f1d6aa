"""The action heads and small projectors against explicit sums, for the chunks of LIBERO, ALOHA and Bridge."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tokenprune_adapters.backbones.openvla_oft.heads import (
    DiffusionActionHead,
    L1ActionHead,
    NoisyActionProjector,
    ProprioProjector,
    head_flops,
    noisy_action_flops,
    proprio_flops,
)
from tokenprune_adapters.backbones.prismatic.config import lm_head_flops

WIDTH = 6
CHUNKS = [(8, 7), (25, 14), (5, 7)]
HEADS = {L1ActionHead: "model", DiffusionActionHead: "noise_predictor.mlp_resnet"}


def randomised(module: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.double().parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return module


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def weights_of(module: nn.Module) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in module.state_dict().items()}


def naive_linear(weights: dict[str, np.ndarray], name: str, x: np.ndarray) -> np.ndarray:
    return weights[f"{name}.weight"] @ x + weights[f"{name}.bias"]


def naive_norm(weights: dict[str, np.ndarray], name: str, x: np.ndarray) -> np.ndarray:
    return (x - x.mean()) / math.sqrt(x.var() + 1e-5) * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def naive_head(weights: dict[str, np.ndarray], prefix: str, states: np.ndarray, dims: int) -> np.ndarray:
    """One action at a time: the states of its numbers in a row, then the MLP."""
    actions = []
    for start in range(0, len(states), dims):
        x = np.concatenate([states[start + number] for number in range(dims)])
        x = np.maximum(naive_linear(weights, f"{prefix}.fc1", naive_norm(weights, f"{prefix}.layer_norm1", x)), 0)
        for block in ("0", "1"):
            ffn = f"{prefix}.mlp_resnet_blocks.{block}.ffn"
            x = x + np.maximum(naive_linear(weights, f"{ffn}.1", naive_norm(weights, f"{ffn}.0", x)), 0)
        actions.append(naive_linear(weights, f"{prefix}.fc2", naive_norm(weights, f"{prefix}.layer_norm2", x)))
    return np.stack(actions)


def naive_two_layers(weights: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    hidden = naive_linear(weights, "fc1", x)
    hidden = np.array([h * (1 + math.erf(h / math.sqrt(2))) / 2 for h in hidden])
    return naive_linear(weights, "fc2", hidden)


@pytest.mark.parametrize(("horizon", "dims"), CHUNKS)
@pytest.mark.parametrize("head_class", HEADS)
def test_a_head_is_its_sums(head_class: type[nn.Module], horizon: int, dims: int) -> None:
    head = randomised(head_class(horizon, dims, WIDTH))
    states = draw(2, horizon * dims, WIDTH)
    got = head(states)
    assert got.shape == (2, horizon, dims)
    for sample in range(2):
        want = naive_head(weights_of(head), HEADS[head_class], states[sample].numpy(), dims)
        np.testing.assert_allclose(got[sample].detach().numpy(), want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("horizon", "dims"), CHUNKS)
def test_every_noisy_number_becomes_one_token(horizon: int, dims: int) -> None:
    projector = randomised(NoisyActionProjector(WIDTH))
    actions = draw(2, horizon, dims)
    got = projector(actions)
    assert got.shape == (2, horizon * dims, WIDTH)
    for sample in range(2):
        for token in range(horizon * dims):
            number = actions[sample, token // dims, token % dims].numpy()[None]
            want = naive_two_layers(weights_of(projector), number)
            np.testing.assert_allclose(got[sample, token].detach().numpy(), want, rtol=1e-10, atol=1e-10)


def test_the_state_becomes_one_token() -> None:
    projector = randomised(ProprioProjector(14, WIDTH))
    state = draw(2, 14)
    for sample in range(2):
        want = naive_two_layers(weights_of(projector), state[sample].numpy())
        np.testing.assert_allclose(projector(state)[sample].detach().numpy(), want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("horizon", "dims"), CHUNKS)
@pytest.mark.parametrize("head_class", HEADS)
def test_a_head_has_the_names_of_its_file(head_class: type[nn.Module], horizon: int, dims: int) -> None:
    prefix = HEADS[head_class]
    wanted = {
        "layer_norm1": [(dims * WIDTH,)] * 2,
        "fc1": [(WIDTH, dims * WIDTH), (WIDTH,)],
        "mlp_resnet_blocks.0.ffn.0": [(WIDTH,)] * 2,
        "mlp_resnet_blocks.0.ffn.1": [(WIDTH, WIDTH), (WIDTH,)],
        "mlp_resnet_blocks.1.ffn.0": [(WIDTH,)] * 2,
        "mlp_resnet_blocks.1.ffn.1": [(WIDTH, WIDTH), (WIDTH,)],
        "layer_norm2": [(WIDTH,)] * 2,
        "fc2": [(dims, WIDTH), (dims,)],
    }
    names = {
        f"{prefix}.{name}.{kind}": shape
        for name, shapes in wanted.items()
        for kind, shape in zip(("weight", "bias"), shapes, strict=True)
    }
    found = {name: tuple(value.shape) for name, value in head_class(horizon, dims, WIDTH).state_dict().items()}
    assert found == names


def test_the_projectors_have_the_names_of_their_files() -> None:
    rest = {"fc1.bias": (WIDTH,), "fc2.weight": (WIDTH, WIDTH), "fc2.bias": (WIDTH,)}
    for projector, inputs in ((NoisyActionProjector(WIDTH), 1), (ProprioProjector(8, WIDTH), 8)):
        found = {name: tuple(value.shape) for name, value in projector.state_dict().items()}
        assert found == rest | {"fc1.weight": (WIDTH, inputs)}


def counted(module: nn.Module, x: torch.Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        module(x)
    return counter.get_total_flops()


@pytest.mark.parametrize(("horizon", "dims"), CHUNKS)
def test_flops_are_those_torch_counts(horizon: int, dims: int) -> None:
    rows, vocab, state_size = horizon * dims, 20, 14
    states = torch.zeros(1, rows, WIDTH)
    for head_class in HEADS:
        assert head_flops(horizon, dims, WIDTH) == counted(head_class(horizon, dims, WIDTH), states)
    actions = torch.zeros(1, horizon, dims)
    assert noisy_action_flops(horizon, dims, WIDTH) == counted(NoisyActionProjector(WIDTH), actions)
    assert lm_head_flops(horizon, dims, WIDTH, vocab) == counted(nn.Linear(WIDTH, vocab, bias=False), states)
    assert proprio_flops(state_size, WIDTH) == counted(ProprioProjector(state_size, WIDTH), torch.zeros(1, state_size))
