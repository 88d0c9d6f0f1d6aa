"""The DDIM sampler and the timestep encodings against their equations, in numpy's float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokenprune.errors import CheckpointError, ConfigError
from tokenprune_adapters.backbones.openvla_oft.diffusion import DDIM, timestep_encodings

# The schedule is float32: at the noisiest timestep, where a millionth of the signal's variance is left, its root is
# off by 2.5e-5 of itself.
RELATIVE = 1e-4


def kept_signal(train_steps: int) -> list[float]:
    """Products of one minus beta, the betas from Nichol and Dhariwal's cosine curve and at most 0.999."""

    def curve(t: float) -> float:
        return math.cos((t / train_steps + 0.008) / (1 + 0.008) * math.pi / 2) ** 2

    levels, level = [], 1.0
    for t in range(train_steps):
        level *= 1 - min(1 - curve(t + 1) / curve(t), 0.999)
        levels.append(level)
    return levels


def reference_step(noise_pred: np.ndarray, sample: np.ndarray, level: float, following: float) -> np.ndarray:
    """Equation 12 of arXiv 2010.02502 without its random term, the predicted x0 clipped."""
    x0 = np.minimum(np.maximum((sample - math.sqrt(1 - level) * noise_pred) / math.sqrt(level), -1), 1)
    return math.sqrt(following) * x0 + math.sqrt(1 - following) * noise_pred


def reference_levels(train_steps: int, steps: int) -> list[float]:
    """Levels from the noisiest visited timestep to the clean sample."""
    kept, stride = kept_signal(train_steps), train_steps // steps
    return [kept[n * stride] for n in reversed(range(steps))] + [1.0]


def test_the_trained_steps_run_from_noise_to_sample() -> None:
    assert DDIM().timesteps == tuple(range(49, -1, -1))
    assert all(type(t) is int for t in DDIM().timesteps)


@pytest.mark.parametrize(
    ("steps", "timesteps"),
    [
        (10, (45, 40, 35, 30, 25, 20, 15, 10, 5, 0)),
        (7, (42, 35, 28, 21, 14, 7, 0)),
        (1, (0,)),
        (40, tuple(range(39, -1, -1))),
    ],
)
def test_fewer_steps_than_trained_are_multiples_from_zero(steps: int, timesteps: tuple[int, ...]) -> None:
    assert DDIM(50, steps).timesteps == timesteps


@given(st.integers(1, 80).flatmap(lambda train: st.tuples(st.just(train), st.integers(1, train))), st.integers(0, 9))
def test_a_step_follows_its_equation(train_and_steps: tuple[int, int], seed: int) -> None:
    train_steps, steps = train_and_steps
    ddim, levels = DDIM(train_steps, steps), reference_levels(train_steps, steps)
    assert len(ddim.timesteps) == steps
    rng = np.random.default_rng(seed)
    for index in range(steps):
        noise_pred = rng.normal(size=(2, 3, 4))
        # Half of the predicted samples are inside [-1, 1], whatever the level.
        x0 = rng.normal(scale=1.5, size=noise_pred.shape)
        sample = math.sqrt(levels[index]) * x0 + math.sqrt(1 - levels[index]) * noise_pred
        got = ddim.step(torch.from_numpy(noise_pred), index, torch.from_numpy(sample))
        want = reference_step(noise_pred, sample, levels[index], levels[index + 1])
        np.testing.assert_allclose(got.numpy(), want, atol=RELATIVE * math.sqrt(levels[index + 1]), rtol=1e-6)


@pytest.mark.parametrize(("train_steps", "steps"), [(50, 50), (50, 10), (50, 3), (20, 20)])
def test_knowing_the_noise_recovers_the_sample(train_steps: int, steps: int) -> None:
    rng = np.random.default_rng(3)
    x0, noise = rng.uniform(-0.99, 0.99, (2, 5, 7)), rng.normal(size=(2, 5, 7))
    level = reference_levels(train_steps, steps)[0]
    ddim = DDIM(train_steps, steps)
    sample = torch.from_numpy(math.sqrt(level) * x0 + math.sqrt(1 - level) * noise)
    for index in range(steps):
        sample = ddim.step(torch.from_numpy(noise), index, sample)
    np.testing.assert_allclose(sample.numpy(), x0, atol=RELATIVE)


def test_a_predicted_sample_outside_the_actions_is_clipped() -> None:
    sample = torch.tensor([-3.0, -0.5, 0.5, 3.0], dtype=torch.float64)
    last = DDIM().step(torch.zeros(4, dtype=torch.float64), 49, sample)
    assert last[[0, 3]].tolist() == [-1.0, 1.0]
    assert last[[1, 2]].tolist() == pytest.approx([-0.5, 0.5], rel=1e-2)


def test_the_noise_is_not_derived_anew_from_a_clipped_sample() -> None:
    sample = torch.tensor([-100.0, 100.0], dtype=torch.float64)
    level = kept_signal(50)[23]
    noise = 0.3 * math.sqrt(1 - level)
    want = [noise - math.sqrt(level), noise + math.sqrt(level)]
    assert DDIM().step(torch.full_like(sample, 0.3), 25, sample).tolist() == pytest.approx(want, rel=1e-6)


def test_trajectories_are_those_of_diffusers() -> None:
    # DDIMScheduler(num_train_timesteps=50, beta_schedule="squaredcos_cap_v2") of diffusers 0.30.3, in float64.
    def run(ddim: DDIM, count: int) -> list[float]:
        sample = torch.linspace(-2, 2, 7, dtype=torch.float64)
        for index in range(count):
            sample = ddim.step(torch.sin(3 * sample + index), index, sample)
        return sample.tolist()

    recorded = {
        (7, 7): [-0.215701073, 0.27016051, -0.528388599, -0.597576949, 0.269776778, -0.582193692, 0.330093314],
        (7, 3): [-0.147275759, -0.005370788, -0.41550266, -0.218443441, -0.005569961, -0.366785964, 0.031601027],
        (50, 25): [0.008416536, 0.010181681, 0.015008924, -0.001618415, 0.013308394, 0.015047277, -0.007335992],
        (50, 50): [-0.059093322, -0.056588833, -0.04974036, -0.073333659, -0.052152801, -0.049685952, -0.081448627],
    }
    for (steps, count), values in recorded.items():
        assert run(DDIM(50, steps), count) == pytest.approx(values, abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_step_keeps_the_dtype(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    noise_pred, sample = (torch.randn(1, 8, 7, generator=generator).to(dtype) for _ in range(2))
    got = DDIM().step(noise_pred, 30, sample)
    assert got.dtype == dtype
    exact = DDIM().step(noise_pred.double(), 30, sample.double())
    assert (got.double() - exact).abs().max() <= 8 * torch.finfo(dtype).eps


def test_a_step_reads_no_data() -> None:
    # Tensors on the meta device have no data that could be read.
    with torch.device("meta"):
        ddim = DDIM(50, 5)
        sample = torch.empty(1, 8, 7)
    assert ddim.step(sample, 0, sample).shape == (1, 8, 7)
    live = torch.full((1,), 0.5, dtype=torch.float64)
    assert torch.equal(ddim.step(live, 0, live), DDIM(50, 5).step(live, 0, live))


@pytest.mark.parametrize("steps", [-1, 0, 51])
def test_a_number_of_steps_that_cannot_be_is_refused(steps: int) -> None:
    with pytest.raises(ConfigError, match=f"in {steps} steps; valid: 1 to 50"):
        DDIM(50, steps)


def test_no_step_follows_the_last() -> None:
    sample = torch.zeros(1)
    with pytest.raises(IndexError):
        DDIM(50, 5).step(sample, 5, sample)


@pytest.mark.parametrize("width", [4, 6, 32, 4096])
def test_encodings_are_sines_then_cosines(width: int) -> None:
    timesteps = DDIM().timesteps
    want = np.empty((len(timesteps), width))
    for row, t in enumerate(timesteps):
        for i in range(width // 2):
            angle = t * 10000.0 ** (-i / (width // 2 - 1))
            want[row, i], want[row, width // 2 + i] = math.sin(angle), math.cos(angle)
    got = timestep_encodings(timesteps, width)
    assert got.dtype == torch.float32
    np.testing.assert_allclose(got.numpy(), want, atol=5e-6)


@pytest.mark.parametrize("width", [0, 2, 5])
def test_a_width_that_cannot_hold_an_encoding_is_refused(width: int) -> None:
    with pytest.raises(CheckpointError, match=f"a width of {width}; valid: an even width from 4"):
        timestep_encodings((0,), width)
