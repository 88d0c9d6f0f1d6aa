"""An untrained CLIP, small enough for tests: what it relates to a text means nothing, but it is computed as ever."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tokenprune.compat import mend_torchvision

mend_torchvision()


open_clip: Any = importlib.import_module("open_clip")
GRID = (4, 4)

CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 3, "width": 32, "patch_size": 8, "head_width": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
}


def untrained_clip(seed: int = 0) -> Any:
    """The model, with norms that are not neutral, so that a forgotten one shows."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = open_clip.CLIP(**json.loads(json.dumps(CONFIG)))
        for parameter in model.parameters():
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def write_clip(folder: Path, seed: int = 0) -> dict[str, str]:
    """Settings of `trim` that name its files in a folder."""
    model, checkpoint = folder / "untrained.json", folder / "untrained.safetensors"
    model.write_text(json.dumps(CONFIG), encoding="utf-8")
    save_file({name: weight.clone() for name, weight in untrained_clip(seed).state_dict().items()}, checkpoint)
    return {"model": str(model), "checkpoint": str(checkpoint)}
