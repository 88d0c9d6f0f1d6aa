"""Compute the trained tower's features of all images, on which the decoder is trained.

    python examples/mini_policy/features.py --frames data/frames --tower data/tower/checkpoint.pt --out data/features

One file per demonstration, float16 `[n, views, patches, width]`, and `black.npy` with the features of a black image,
which replace those of a dropped camera. Existing files are kept.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from export import read_back
from tower import LabelledTower

from tokenprune_adapters.backbones.openvla_oft.config import MINI
from tokenprune_adapters.vision.transformer import VisionTower


@torch.inference_mode()
def encode(tower: VisionTower, frames: np.ndarray) -> np.ndarray:
    """Features `[n, patches, width]` of frames `[n, S, S, 3]`."""
    pixels = torch.from_numpy(np.ascontiguousarray(frames.transpose(0, 3, 1, 2)))
    features = [tower(MINI.transform.normalise(part, 0, torch.float32)) for part in pixels.split(16)]
    return torch.cat(features).half().numpy()


def main() -> None:
    """Compute the missing features."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--frames", type=Path, required=True)
    parser.add_argument("--tower", type=Path, required=True, help="checkpoint of tower.py, or an exported policy")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.tower.is_dir():
        tower = read_back(arguments.tower)[0].vision_backbone.featurizer
    else:
        labelled = LabelledTower()
        labelled.load_state_dict(torch.load(arguments.tower, weights_only=True)["model"])
        tower = labelled.tower
    np.save(arguments.out / "black.npy", encode(tower, np.zeros((1, 224, 224, 3), np.uint8))[0])
    for path in sorted(arguments.frames.glob("*.frames.npy")):
        out = arguments.out / path.name.replace(".frames", "")
        if not out.exists():
            frames = np.load(path)
            np.save(out, encode(tower, frames.reshape(-1, *frames.shape[2:])).reshape(*frames.shape[:2], -1, 192))
            print(out.stem, flush=True)


if __name__ == "__main__":
    main()
