"""OpenVLA-OFT with any head and with FiLM as upstream has it: files of a release, or modules that are loaded."""

from __future__ import annotations

import copy
import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.helpers.release_format import BODY_KEYS, CONFIG, HEAD, PREPROCESSOR, PROPRIO, TOKENIZER, UNUSED_KEYS
from tokenprune_adapters.backbones.openvla_oft.backbone import OpenVLAOFT

LM_HEAD = "language_model.lm_head.weight"
MLP = tuple(key.removeprefix("model.") for key in HEAD)
LINEAR = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "attn_pool.q")
RANK = 32

FILES = {
    part: f"{part}--150000_checkpoint.pt"
    for part in ("action_head", "noisy_action_projector", "proprio_projector", "vision_backbone")
}


def parts(backbone: OpenVLAOFT, dtype: torch.dtype) -> dict[str, dict[str, Tensor]]:
    """What upstream's modules hold, by module; the model itself under `body`."""
    config, state = backbone.config, dict(backbone.model.named_parameters())
    generator = torch.Generator().manual_seed(7)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    body = {key: state[key] for key in BODY_KEYS}
    for key in UNUSED_KEYS:
        like = key.replace(".blocks.2.", ".blocks.0.")
        body[key] = noise(*body[like].shape) if like in body else noise(3, 5)
    found = {"body": body}
    if config.head == "l1":
        found["action_head"] = {f"model.{key}": state[f"action_head.model.{key}"] for key in MLP}
    elif config.head == "diffusion":
        mlp = "noise_predictor.mlp_resnet"
        found["action_head"] = {f"{mlp}.{key}": state[f"action_head.{mlp}.{key}"] for key in MLP}
        found["noisy_action_projector"] = {key: state[f"noisy_action_projector.{key}"] for key in PROPRIO}
    else:
        body[LM_HEAD] = state[LM_HEAD]
    if config.state_size is not None:
        found["proprio_projector"] = {key: state[f"proprio_projector.{key}"] for key in PROPRIO}
    if config.film:
        towers = {key: value for key, value in body.items() if key.startswith("vision_backbone.")}
        heard = {key: value for key, value in state.items() if re.search(r"blocks\.\d\.(scale|shift)\.", key)}
        heard |= {key.replace("blocks.1", "blocks.2"): noise(*heard[key].shape) for key in heard if "blocks.1" in key}
        found["vision_backbone"] = wrapped(towers | heard, noise)
        # The file of the model has the towers as they were before.
        body |= {key: noise(*value.shape) for key, value in towers.items()}
    return {
        part: {key: value.detach().to(dtype).clone() for key, value in tensors.items()}
        for part, tensors in found.items()
    }


def wrapped(towers: dict[str, Tensor], noise: Any) -> dict[str, Tensor]:
    """The towers as upstream's FiLM wrapper and PEFT name them, each linear layer with LoRA that is not merged."""
    found = {}
    for name, value in towers.items():
        key = re.sub(r"(blocks\.\d)\.(?!scale|shift)", r"\1.block.", name)
        layer, _, leaf = key.rpartition(".")
        if not layer.endswith(LINEAR):
            found[key] = value
        elif leaf == "bias":
            found[f"{layer}.base_layer.bias"] = value
        else:
            down, up = noise(RANK, value.shape[1]).to(value.dtype), noise(value.shape[0], RANK).to(value.dtype)
            # Upstream trains a rank above 16 with an alpha of 16.
            found[f"{layer}.base_layer.weight"] = value - 16 / RANK * up @ down
            found[f"{layer}.lora_A.default.weight"] = down
            found[f"{layer}.lora_B.default.weight"] = up
    return found


def statistics(backbone: OpenVLAOFT) -> dict[str, Any]:
    """The bounds of the robot, and others that look like them under the names of the other robots' bounds."""
    low, high = backbone.config.bounds
    others = {"q01", "q99", "min", "max"} - {low, high}
    entry: dict[str, Any] = {}
    for part, bounds in (("action", backbone.statistics.action), ("proprio", backbone.statistics.state)):
        if bounds is not None:
            values = {low: bounds.low.tolist(), high: bounds.high.tolist()}
            entry[part] = values | {name: [0.5] * len(bounds.low) for name in others}
    entry["action"]["mask"] = backbone.statistics.action.mask.tolist()
    return {"tiny": entry}


def write_oft(folder: Path, backbone: OpenVLAOFT, dtype: torch.dtype = torch.float64, prefix: str = "module.") -> Path:
    """Write a backbone as a release, keys of the `.pt` files behind `prefix`."""
    folder.mkdir(parents=True)
    found = parts(backbone, dtype)
    save_file(found.pop("body"), folder / "model.safetensors", metadata={"format": "pt"})
    for part, tensors in found.items():
        torch.save({prefix + key: value for key, value in tensors.items()}, folder / FILES[part])
    for name, data in (
        ("config", CONFIG),
        ("preprocessor_config", PREPROCESSOR),
        ("dataset_statistics", statistics(backbone)),
    ):
        (folder / f"{name}.json").write_text(json.dumps(data))
    shutil.copy(TOKENIZER, folder / "tokenizer.json")
    return folder


class OpenVLAForActionPrediction(nn.Module):
    """A module that holds the parameters it is given, under their names."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        for key, value in tensors.items():
            *path, leaf = key.split(".")
            at: nn.Module = self
            for name in path:
                if name not in at._modules:
                    at.add_module(name, nn.Module())
                at = at.get_submodule(name)
            at.register_parameter(leaf, nn.Parameter(value))


def live(backbone: OpenVLAOFT, dtype: torch.dtype = torch.float64) -> tuple[Any, dict[str, nn.Module]]:
    """Upstream's model and, by the name of the option, the modules beside it."""
    found = parts(backbone, dtype)
    model: Any = OpenVLAForActionPrediction(found.pop("body"))
    model.config = copy.deepcopy(CONFIG)
    model.norm_stats = statistics(backbone)
    return model, {part: OpenVLAForActionPrediction(tensors) for part, tensors in found.items()}
