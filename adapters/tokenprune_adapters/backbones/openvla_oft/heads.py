"""The small modules of OpenVLA-OFT around the decoder, with the parameter names of its checkpoint files."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn


class ProprioProjector(nn.Module):
    """Robot state `[B, S]` to one token `[B, D]`."""

    def __init__(self, state_size: int, width: int) -> None:
        """Two linear layers with a GELU between them."""
        super().__init__()
        self.fc1 = nn.Linear(state_size, width)
        self.act_fn1 = nn.GELU()
        self.fc2 = nn.Linear(width, width)

    def forward(self, state: Tensor) -> Tensor:
        """Project the normalised state."""
        return cast(Tensor, self.fc2(self.act_fn1(self.fc1(state))))


class NoisyActionProjector(nn.Module):
    """Noisy actions to one token per number, in place of the zero placeholders."""

    def __init__(self, width: int) -> None:
        """Two linear layers with a GELU between them; the input is a single number."""
        super().__init__()
        self.fc1 = nn.Linear(1, width)
        self.act_fn1 = nn.GELU()
        self.fc2 = nn.Linear(width, width)

    def forward(self, actions: Tensor) -> Tensor:
        """Project normalised actions `[B, horizon, dims]` to tokens `[B, horizon * dims, D]`."""
        return cast(Tensor, self.fc2(self.act_fn1(self.fc1(actions.flatten(1)[..., None]))))


class ResidualBlock(nn.Module):
    """`x + ReLU(Linear(LayerNorm(x)))`."""

    def __init__(self, width: int) -> None:
        """Keep the norm and the linear layer under `ffn`, as the checkpoint does."""
        super().__init__()
        self.ffn = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block to `[..., D]`."""
        return cast(Tensor, x + self.ffn(x))


class ResidualMLP(nn.Module):
    """LayerNorm, linear, two residual blocks, LayerNorm, linear."""

    def __init__(self, input_width: int, width: int, output_width: int) -> None:
        """Name the parts as the checkpoint does."""
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(input_width)
        self.fc1 = nn.Linear(input_width, width)
        self.relu = nn.ReLU()
        self.mlp_resnet_blocks = nn.ModuleList(ResidualBlock(width) for _ in range(2))
        self.layer_norm2 = nn.LayerNorm(width)
        self.fc2 = nn.Linear(width, output_width)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[..., input_width]` to `[..., output_width]`."""
        x = self.relu(self.fc1(self.layer_norm1(x)))
        for block in self.mlp_resnet_blocks:
            x = block(x)
        return cast(Tensor, self.fc2(self.layer_norm2(x)))


class L1ActionHead(nn.Module):
    """Continuous actions from the hidden states of the action placeholders; no squashing at the end."""

    def __init__(self, horizon: int, dims: int, width: int) -> None:
        """One residual MLP over the states of each action's placeholders, side by side."""
        super().__init__()
        self.horizon = horizon
        self.model = ResidualMLP(dims * width, width, dims)

    def forward(self, states: Tensor) -> Tensor:
        """Map placeholder states `[B, horizon * dims, D]` to normalised actions `[B, horizon, dims]`."""
        return cast(Tensor, self.model(states.unflatten(1, (self.horizon, -1)).flatten(2)))


class NoisePredictor(nn.Module):
    """The diffusion head's MLP under the checkpoint's prefix."""

    def __init__(self, dims: int, width: int) -> None:
        """The same MLP as the L1 head's, under another name."""
        super().__init__()
        self.mlp_resnet = ResidualMLP(dims * width, width, dims)


class DiffusionActionHead(nn.Module):
    """Predicts the noise in the current actions from the hidden states of their tokens; see `diffusion.DDIM`."""

    def __init__(self, horizon: int, dims: int, width: int) -> None:
        """One residual MLP over the states of each action's tokens, side by side."""
        super().__init__()
        self.horizon = horizon
        self.noise_predictor = NoisePredictor(dims, width)

    def forward(self, states: Tensor) -> Tensor:
        """Map token states `[B, horizon * dims, D]` to predicted noise `[B, horizon, dims]`."""
        per_action = states.unflatten(1, (self.horizon, -1)).flatten(2)
        return cast(Tensor, self.noise_predictor.mlp_resnet(per_action))


def head_flops(horizon: int, dims: int, width: int) -> int:
    """FLOPs of the L1 head, or of the diffusion head per step; 2 per multiply-add."""
    return 2 * horizon * (dims * width * width + 2 * width * width + width * dims)


def proprio_flops(state_size: int, width: int) -> int:
    """FLOPs of the proprio projector."""
    return 2 * (state_size * width + width * width)


def noisy_action_flops(horizon: int, dims: int, width: int) -> int:
    """FLOPs of the noisy-action projector per step."""
    return 2 * horizon * dims * (width + width * width)
