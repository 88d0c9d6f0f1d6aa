"""DDIM sampling of actions and the encoding of its timesteps, for diffusion heads."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tokenprune.errors import CheckpointError, ConfigError

_MAX_BETA = 0.999


class DDIM:
    """Deterministic DDIM (arXiv 2010.02502, eta 0) for a model that predicts the noise.

    The variant of upstream OpenVLA-OFT, which is diffusers' `DDIMScheduler` with squared-cosine betas
    (`squaredcos_cap_v2`) and defaults otherwise: the predicted clean sample is clipped to [-1, 1], timesteps are spaced
    `leading`, and the last step ends without noise. Like diffusers', the schedule is rounded to float32, and a step
    computes in the sample's dtype. Coefficients are Python floats and need no device.

    Attributes:
        timesteps: The trained timestep of each step, descending to 0. With fewer steps than trained they are the lowest
            multiples of `train_steps // steps`, so the first may be far from the noisiest.
    """

    def __init__(self, train_steps: int = 50, steps: int = 50) -> None:
        """Compute the schedule.

        Args:
            train_steps: Timesteps the model was trained with.
            steps: Steps from noise to sample.

        Raises:
            ConfigError: If there are no steps, or more than trained.
        """
        if not 1 <= steps <= train_steps:
            raise ConfigError(f"cannot denoise in {steps} steps; valid: 1 to {train_steps}, as many as trained")
        stride = train_steps // steps
        self.timesteps = tuple(range((steps - 1) * stride, -1, -stride))
        remaining = _remaining_signal(train_steps)
        levels = torch.cat([remaining[list(self.timesteps)], remaining.new_ones(1)])
        signal, noise = levels.sqrt().tolist(), (1 - levels).sqrt().tolist()
        self._coefficients = tuple(zip(signal[:-1], noise[:-1], signal[1:], noise[1:], strict=True))

    def step(self, noise_pred: Tensor, index: int, sample: Tensor) -> Tensor:
        """Take one step towards the clean sample.

        Args:
            noise_pred: The noise that the model predicts in `sample`, of its shape.
            index: Which of `timesteps` the sample is at.
            sample: The noisy sample, any shape and floating dtype.

        Returns:
            The sample at the next timestep; after the last step, the clean sample in [-1, 1].
        """
        signal, noise, next_signal, next_noise = self._coefficients[index]
        clean = ((sample - noise_pred * noise) / signal).clamp(-1, 1)
        stepped: Tensor = clean * next_signal + noise_pred * next_noise
        return stepped


def _remaining_signal(train_steps: int) -> Tensor:
    """Share of the signal's variance that is left at each timestep (alpha bar), float32 `[train_steps]`."""

    def target(time: float) -> float:
        return math.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2

    ratios = [target((t + 1) / train_steps) / target(t / train_steps) for t in range(train_steps)]
    betas = torch.tensor([min(1 - ratio, _MAX_BETA) for ratio in ratios], dtype=torch.float32, device="cpu")
    return (1 - betas).cumprod(0)


def timestep_encodings(timesteps: Sequence[int], width: int) -> Tensor:
    """Sinusoidal encodings of timesteps (upstream OpenVLA-OFT).

    Sines in the first half and cosines in the second, of the timestep times frequencies that fall geometrically from 1
    to 1/10000.

    Args:
        timesteps: Integers `[S]`.
        width: Numbers per encoding, D.

    Returns:
        `[S, D]`, float32 on the CPU.

    Raises:
        CheckpointError: If the width is odd or below 4.
    """
    if width < 4 or width % 2:
        raise CheckpointError(f"timesteps cannot be encoded in a width of {width}; valid: an even width from 4")
    half = width // 2
    ranks = torch.arange(half, dtype=torch.float32, device="cpu")
    frequencies = ranks.mul(-math.log(10000)).div(half - 1).exp()
    angles = torch.tensor(timesteps, dtype=torch.float32, device="cpu")[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1)
