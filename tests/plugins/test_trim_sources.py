"""Where TRIM's CLIP comes from: the user's file, a tag, a hub name; and what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from tests.helpers.tiny_clip import CONFIG, open_clip, untrained_clip, write_clip
from tests.helpers.tiny_oft import observation
from tests.helpers.trim_policy import OFT, policy_of
from tokenprune.cli import app
from tokenprune.errors import ConfigError, MissingError
from tokenprune_plugins.shared import clip
from tokenprune_plugins.trim import TRIMConfig


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_clip(tmp_path_factory.mktemp("clip"))


def refused(settings: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        policy_of(TRIMConfig(use="trim", **settings))
    return str(caught.value)


def test_without_a_checkpoint_it_is_refused_and_says_what_to_give() -> None:
    said = refused({})
    assert "stages.0 ('trim'): checkpoint: " in said
    assert "give its weights: a file, a tag of open_clip's such as openai, or hf-hub:NAME" in said
    with pytest.raises(MissingError):
        policy_of(TRIMConfig(use="trim"))
    with pytest.raises(MissingError, match="give its weights"):
        CliRunner().invoke(app, ["explain", "trim"], catch_exceptions=False)


def test_without_open_clip_the_extra_is_named(files: dict[str, str]) -> None:
    with patch.dict(sys.modules, {"open_clip": None}):
        said = refused(files)
    assert said.endswith("install the extra: pip install 'tokenprune-vla[clip]'")
    with patch.dict(sys.modules, {"open_clip": None}), pytest.raises(MissingError):
        policy_of(TRIMConfig(use="trim", **files))


def test_a_checkpoint_of_another_model_is_refused(files: dict[str, str], tmp_path: Path) -> None:
    weights = load_file(files["checkpoint"])
    weights["visual.conv1.weight"] = torch.zeros(32, 3, 4, 4)
    weights["visual.head"] = weights.pop("visual.proj")
    del weights["ln_final.bias"]
    save_file(weights, tmp_path / "other.safetensors")
    said = refused({**files, "checkpoint": str(tmp_path / "other.safetensors")})
    assert "does not fit the model: it lacks ln_final.bias (and 1 more); " in said
    assert "visual.conv1.weight is [32, 3, 4, 4] and must be [32, 3, 8, 8]; the model has no visual.head" in said


class Planted:
    """What unpickling would run."""

    ran = False

    def __reduce__(self) -> Any:
        return (setattr, (Planted, "ran", True))


def test_a_file_is_read_as_weights_alone(files: dict[str, str], tmp_path: Path) -> None:
    torch.save({"state_dict": Planted()}, tmp_path / "planted.pt")
    (tmp_path / "cut.safetensors").write_bytes(Path(files["checkpoint"]).read_bytes()[:1000])
    for name in ("planted.pt", "cut.safetensors"):
        assert "cannot be read as weights alone" in refused({**files, "checkpoint": str(tmp_path / name)})
    assert not Planted.ran


def test_a_training_checkpoint_gives_the_same(files: dict[str, str], tmp_path: Path) -> None:
    weights = {f"module.{name}": weight for name, weight in load_file(files["checkpoint"]).items()}
    torch.save({"epoch": 3, "state_dict": weights}, tmp_path / "epoch.pt")
    other = {**files, "checkpoint": str(tmp_path / "epoch.pt")}
    first, second = (policy_of(TRIMConfig(use="trim", **one)).act(observation(OFT.config)) for one in (files, other))
    assert np.array_equal(first.normalised, second.normalised)


def test_the_hubs_description_brings_its_colours(files: dict[str, str], tmp_path: Path) -> None:
    described = {"model_cfg": CONFIG, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.25] * 3}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(described), encoding="utf-8")
    mine = clip.load(str(tmp_path / "open_clip_config.json"), files["checkpoint"], -1)
    torch.testing.assert_close(mine._prepared(torch.full((1, 3, 32, 32), 255, dtype=torch.uint8)).max().item(), 2.0)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"checkpoint": "openay"}, r"there is no file 'openay', and open_clip knows no such weights.*'openai'"),
        ({"checkpoint": "FILE", "model": "ViT-B-61"}, r"model: 'ViT-B-61': .*no such model.*ViT-B-16"),
        ({"checkpoint": "FILE", "model": "RN50"}, r"'RN50' does not project single patches; valid: a plain ViT"),
        ({"checkpoint": "FILE", "model": "absent.json"}, r"model: 'absent.json': FileNotFoundError"),
        ({"layer": -4}, r"layer: -4: the image tower has 3 blocks; valid: -3 to -1"),
    ],
)
def test_what_does_not_fit_is_told(files: dict[str, str], settings: dict[str, Any], said: str) -> None:
    given_ = {"checkpoint": files["checkpoint"]} if settings.get("checkpoint") == "FILE" else {}
    if settings.get("checkpoint") == "openay":
        given_ = {"model": "ViT-L-14-336-quickgelu"}
    with pytest.raises(ConfigError, match=said):
        policy_of(TRIMConfig(use="trim", **{**files, **settings, **given_}))


@pytest.mark.parametrize(
    ("settings", "asked"),
    [
        ({"checkpoint": "openai"}, ("ViT-L-14-336-quickgelu", "openai")),
        ({"checkpoint": "hf-hub:somebody/clip"}, ("hf-hub:somebody/clip", None)),
    ],
)
def test_open_clip_fetches_what_the_user_names(settings: dict[str, Any], asked: Any) -> None:
    calls = []

    def create(model: str, pretrained: str | None, require_pretrained: bool) -> Any:
        assert require_pretrained
        calls.append((model, pretrained))
        made = untrained_clip()
        made.visual.preprocess_cfg = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
        return made

    tokenizer = open_clip.SimpleTokenizer(context_length=16)
    with patch.object(open_clip, "create_model", create), patch.object(open_clip, "get_tokenizer", lambda _: tokenizer):
        policy_of(TRIMConfig(use="trim", **settings)).act(observation(OFT.config))
    assert calls == [asked]


def test_what_open_clip_cannot_fetch_is_told() -> None:
    def create(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no network")

    with patch.object(open_clip, "create_model", create):
        assert "checkpoint: open_clip cannot load 'openai': no network" in refused({"checkpoint": "openai"})
