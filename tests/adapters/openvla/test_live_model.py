"""An upstream OpenVLA that is already loaded shares its weights with the policy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers.openvla_format import LM_HEAD, TOKENIZER, OpenVLAForActionPrediction, statistics, tensors
from tests.helpers.openvla_release import BFLOAT, CPU, FLOAT, actions, adopted, original, says, upstream
from tests.helpers.tiny_openvla import INSTRUCTION, observation
from tokenprune.errors import CheckpointError, ConfigError
from tokenprune.loading import from_module
from tokenprune_adapters.backbones.openvla.factory import OpenVLAFactory
from tokenprune_adapters.backbones.prismatic.prompt import PromptTokenizer


@pytest.mark.parametrize("dtype", [FLOAT, BFLOAT])
def test_adopted_weights_are_shared(dtype: torch.dtype) -> None:
    module = upstream(dtype)
    found = adopted(module, tokenizer=PromptTokenizer.bundled())
    for name, value in found.model.named_parameters():
        assert value.data_ptr() == module.get_parameter(name).data_ptr(), name
    assert (found.dtype, found.device) == (dtype, CPU)
    assert (found.info.source, found.info.untrained) == ("OpenVLAForActionPrediction", False)
    assert found.config == original(dtype).config
    assert np.array_equal(actions(found), actions(original(dtype)))


def test_an_adopted_model_stays_as_it_is() -> None:
    module = upstream()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    actions(adopted(module))
    assert module.training
    assert all(value.requires_grad for value in module.parameters())
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_changes_of_the_model_are_seen() -> None:
    module = upstream()
    found = adopted(module, restrict=True)
    before = actions(found)
    with torch.no_grad():
        module.get_parameter(LM_HEAD).neg_()
    assert not np.array_equal(actions(found), before)


def test_statistics_of_an_adopted_model() -> None:
    weights, backbone = tensors(original(), FLOAT), original()
    own, base = statistics(backbone, "mine"), statistics(backbone, "bridge_orig")
    both = OpenVLAForActionPrediction(weights, own, norm_stats=base)
    assert adopted(both).statistics.key == "mine"
    configured = OpenVLAForActionPrediction(weights, None, norm_stats=base)
    assert adopted(configured).statistics.key == "bridge_orig"
    with pytest.raises(CheckpointError, match="OpenVLAForActionPrediction: holds no dataset statistics"):
        adopted(OpenVLAForActionPrediction(weights, None))


def test_an_adopted_model_is_read_by_its_config() -> None:
    module = upstream(image_resize_strategy="letterbox", pad_to_multiple_of=0, n_action_bins=128)
    found = adopted(module, tokenizer=str(TOKENIZER), views="wrist", prompt="vicuna", center_crop=False)
    transform = found.config.transform
    assert (transform.resize, transform.size, transform.center_crop_area) == ("letterbox", 56, None)
    assert transform.means == original().config.transform.means
    assert transform.stds == original().config.transform.stds
    assert found.bins.ids == range(1920, 2048)
    assert (found.info.views, found.config.prompt) == (("wrist",), "vicuna")


def test_adopted_by_name() -> None:
    policy = from_module(upstream(), "openvla", pipeline="uniform_grid", tokenizer=TOKENIZER)
    policy.reset(INSTRUCTION)
    chunk = policy.act(observation())
    assert np.isfinite(chunk.actions).all()
    assert chunk.trace.held[0] == len(chunk.trace.plan.layout.fixed) + 8


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, ("tokenizer is None", "valid: a PromptTokenizer")),
        ({"tokenizer": 7}, ("tokenizer is 7",)),
        ({"tokeniser": TOKENIZER}, ("'tokeniser'", "did you mean 'tokenizer'")),
    ],
)
def test_a_loaded_model_needs_a_tokenizer(options: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as error:
        OpenVLAFactory.adopt(upstream(), options)
    assert says(error.value, *words)


def no_head() -> OpenVLAForActionPrediction:
    module = upstream()
    del module.language_model.lm_head
    return module


def mixed() -> OpenVLAForActionPrediction:
    module = upstream()
    module.get_submodule("projector").to(BFLOAT)
    return module


def wrapped() -> OpenVLAForActionPrediction:
    module = upstream()
    layer = module.get_submodule("projector.fc1")
    layer.base_layer = torch.nn.Linear(2, 2)
    return module


def quantised() -> OpenVLAForActionPrediction:
    module = upstream()
    module.get_submodule("projector").register_buffer("scale", torch.zeros(2, dtype=torch.int8))
    return module


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (lambda: torch.nn.Linear(2, 2), ("config", "NoneType")),
        (lambda: upstream(model_type="llava"), ("'llava'", "valid: 'openvla'")),
        (no_head, (f"needs '{LM_HEAD}'",)),
        (mixed, ("float32", "bfloat16", "projector", "one type")),
        (wrapped, ("no place for", "projector.fc1.base_layer")),
        (quantised, ("projector.scale", "int8")),
        (lambda: upstream(text_config={"vocab_size": 640}), ("640 embeddings", "tokens")),
        (lambda: upstream(image_resize_strategy="resize"), ("'resize'", "did you mean 'resize-crop'")),
        (
            lambda: upstream(timm_override_args=[{"patch_size": 28}, None], image_sizes=[112, 56]),
            ("[3, 112, 112]", "one square size"),
        ),
    ],
)
def test_models_that_cannot_be_adopted(module: Any, words: tuple[str, ...]) -> None:
    with pytest.raises(CheckpointError) as error:
        adopted(module())
    assert says(error.value, *words)
