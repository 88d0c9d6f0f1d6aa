"""What tests of the speed measurement share."""

from __future__ import annotations

import torch

from tests.helpers.paths import ROOT
from tokenprune.bench.roofline import Roof
from tokenprune.compare.episode import load_episode

EPISODE = load_episode(ROOT / "adapters/tokenprune_adapters/episodes/libero_spatial.npz")


def given_roof(device: torch.device, dtype: torch.dtype) -> Roof:
    return Roof(1e12, 1e10, 8, 8)
