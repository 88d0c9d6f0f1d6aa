"""Write tower and policy as one checkpoint in OpenVLA-OFT's release format.

    python examples/mini_policy/export.py --tower data/tower/checkpoint.pt --policy data/policy/checkpoint.pt \
        --statistics data/policy/statistics.json --out adapters/tokenprune_adapters/checkpoints/mini

The averaged weights are written, in float16.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from learner import Learner
from samples import RawStatistics
from tower import LabelledTower

from tokenprune_adapters.backbones.openvla_oft.config import MINI, TRAINED_OPTIONS
from tokenprune_adapters.backbones.openvla_oft.export import export_oft
from tokenprune_adapters.backbones.openvla_oft.model import OFTModel
from tokenprune_adapters.backbones.openvla_oft.release import load_oft
from tokenprune_adapters.inputs.tokenizer import BUNDLED

CARD = Path(__file__).with_name("CARD.md")
DATASET = "libero_mini_scripted"


def assemble(tower: Path, policy: Path) -> OFTModel:
    """Assemble the model from the two checkpoints."""
    labelled, learner, model = LabelledTower(), Learner(), OFTModel(MINI)
    labelled.load_state_dict(torch.load(tower, weights_only=True)["model"])
    learner.load_state_dict(torch.load(policy, weights_only=True)["average"])
    model.vision_backbone.featurizer.load_state_dict(labelled.tower.state_dict())
    missing, unexpected = model.load_state_dict(learner.model.state_dict(), strict=False)
    assert not unexpected
    assert all(name.startswith("vision_backbone.") for name in missing)
    return model


def read_back(folder: Path) -> tuple[OFTModel, RawStatistics]:
    """The weights of an exported policy, in float32, and its statistics."""
    model = load_oft(folder, TRAINED_OPTIONS["mini"], torch.device("cpu"), torch.float32).model
    return model, json.loads((folder / "dataset_statistics.json").read_text())[DATASET]


def main() -> None:
    """Export."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    for name in ("--tower", "--policy", "--statistics", "--out"):
        parser.add_argument(name, type=Path, required=True)
    arguments = parser.parse_args()
    statistics = {DATASET: json.loads(arguments.statistics.read_text())}
    card = CARD.read_text(encoding="utf-8") if CARD.exists() else ""
    export_oft(arguments.out, MINI, assemble(arguments.tower, arguments.policy), BUNDLED, statistics, card=card)


if __name__ == "__main__":
    main()
