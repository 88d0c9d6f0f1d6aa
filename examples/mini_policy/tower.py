"""Train the mini policy's vision tower: each patch classifies the objects inside it.

    python examples/mini_policy/tower.py --frames data/frames --out data/tower --steps 2500

The labels come from the simulator, so no pretrained weights are needed. A patch of 14 pixels covers several
centimetres of the table, and a grasp needs a precision of one; hence each patch predicts a grid of 7 x 7 cells inside
it. The classification head is discarded. An interrupted training continues when started again.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
from pictures import KINDS, LABELLED
from precision import mixed_precision
from torch import Tensor, nn
from torch.nn import functional

from tokenprune_adapters.backbones.openvla_oft.config import MINI
from tokenprune_adapters.vision.transformer import VisionTower

CELLS = 7
"""Cells along each side of a patch."""

HELD_OUT = 20
"""One demonstration in this many of a task is for validation."""

# Weights of the kinds in the loss: objects to grasp are small beside the background.
WEIGHTS = (0.3, 0.5, 1.0, 2.0, 1.5, 1.5, 1.0, 2.0, 1.0, 0.7, 0.7, 0.5)


class LabelledTower(nn.Module):
    """The tower with its classification head."""

    def __init__(self) -> None:
        """Initialise at random; the caller seeds torch."""
        super().__init__()
        config = MINI.body.towers[0]
        self.tower = VisionTower(config)
        nn.init.normal_(self.tower.pos_embed, std=0.02)
        self.norm = nn.LayerNorm(config.hidden_size)
        self.head = nn.Linear(config.hidden_size, CELLS * CELLS * len(KINDS))

    def forward(self, pixels: Tensor) -> Tensor:
        """Scores of kinds `[B, kinds, patches, cells]` for uint8 pixels `[B, 3, S, S]`."""
        features = self.tower(MINI.transform.normalise(pixels, 0, torch.float32))
        scores: Tensor = self.head(self.norm(features)).unflatten(-1, (CELLS * CELLS, len(KINDS)))
        return scores.permute(0, 3, 1, 2)


def by_patch(labels: Tensor) -> Tensor:
    """Reshape labels `[B, 112, 112]` to `[B, patches, cells]`."""
    side = labels.shape[-1] // CELLS
    cells = labels.view(-1, side, CELLS, side, CELLS).transpose(2, 3)
    return cells.reshape(len(labels), side * side, CELLS * CELLS).long()


class Pictures:
    """Frames and labels of many demonstrations, memory-mapped."""

    def __init__(self, folder: Path, held_out: bool) -> None:
        """Open the demonstrations for training, or those held out."""
        self.files = []
        for path in sorted(folder.glob("*.labels.npy")):
            if (int(path.name.split(".")[0].rsplit("-", 1)[1]) % HELD_OUT == HELD_OUT - 1) == held_out:
                frames = np.load(path.with_name(path.name.replace("labels", "frames")), mmap_mode="r")
                self.files.append((frames[::LABELLED], np.load(path, mmap_mode="r")))
        self.index = [(file, row) for file, (frames, _) in enumerate(self.files) for row in range(2 * len(frames))]

    def batch(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """Pixels `[B, 3, 224, 224]` and labels `[B, 112, 112]`."""
        found = [(self.files[file], divmod(row, 2)) for file, row in (self.index[i] for i in rows)]
        pixels = np.stack([frames[at] for (frames, _), at in found]).transpose(0, 3, 1, 2)
        return torch.from_numpy(np.ascontiguousarray(pixels)), torch.from_numpy(
            np.stack([k[at] for (_, k), at in found])
        )


@torch.no_grad()
def validate(model: LabelledTower, pictures: Pictures, count: int = 128) -> str:
    """Intersection over union of the predicted cells, per kind."""
    rows = np.linspace(0, len(pictures.index) - 1, count).astype(int)
    hits, cells = np.zeros(len(KINDS)), np.zeros(len(KINDS))
    for part in np.array_split(rows, max(count // 16, 1)):
        pixels, labels = pictures.batch(part)
        truth, found = by_patch(labels), model(pixels).argmax(1)
        union = np.array([((truth == kind) | (found == kind)).sum().item() for kind in range(len(KINDS))])
        hits += np.array([((truth == kind) & (found == kind)).sum().item() for kind in range(len(KINDS))])
        cells += union
    return " ".join(f"{kind}={h / max(c, 1):.2f}" for kind, h, c in zip(KINDS, hits, cells, strict=True))


def main() -> None:
    """Train from the last checkpoint on."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--frames", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    model = LabelledTower()
    optimiser = torch.optim.AdamW(model.parameters(), lr=arguments.lr, weight_decay=0.05, betas=(0.9, 0.98))
    checkpoint, step = arguments.out / "checkpoint.pt", 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        optimiser.load_state_dict(saved["optimiser"])
        step = saved["step"]
    training, held_out = Pictures(arguments.frames, False), Pictures(arguments.frames, True)
    print(f"{len(training.index)} pictures, {len(held_out.index)} held out, from step {step}", flush=True)
    weights, started, losses = torch.tensor(WEIGHTS), time.time(), []
    while step < arguments.steps:
        rows = np.random.default_rng((0, step)).integers(len(training.index), size=arguments.batch)
        pixels, labels = training.batch(rows)
        warm = min(1.0, (step + 1) / 100)
        for group in optimiser.param_groups:
            group["lr"] = arguments.lr * warm * 0.5 * (1 + math.cos(math.pi * step / arguments.steps))
        with mixed_precision():
            scores = model(pixels)
        loss = functional.cross_entropy(scores.float(), by_patch(labels), weight=weights)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        losses.append(loss.item())
        step += 1
        if step % 50 == 0:
            print(f"{step} loss {np.mean(losses[-50:]):.4f} {time.time() - started:.0f} s", flush=True)
        if step % 250 == 0 or step == arguments.steps:
            print(f"{step} {validate(model, held_out)}", flush=True)
            partial = checkpoint.with_suffix(".partial")
            torch.save({"model": model.state_dict(), "optimiser": optimiser.state_dict(), "step": step}, partial)
            partial.rename(checkpoint)


if __name__ == "__main__":
    main()
