"""pi0 and pi0.5 against lerobot's own, from what lerobot itself saves to the actions it itself takes."""

from __future__ import annotations

import importlib
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, processors

from tests.helpers.pi0_format import DIMS, HORIZON, INSTRUCTION, STATE, STEPS, TOKENIZER, VARIANTS, chunk, loaded
from tokenprune.engine.query import Query
from tokenprune.model.info import DecoderShape
from tokenprune_adapters.backbones.pi0 import config_files
from tokenprune_adapters.backbones.pi0.config import TINY
from tokenprune_adapters.backbones.pi0.release import verify_pi0

# lerobot's own imports warn.
pytestmark = [pytest.mark.peer, pytest.mark.filterwarnings("ignore")]

# lerobot fixes 8 heads, the tower's MLP and the rows of the word embeddings.
GEMMA = {
    "gemma_2b": DecoderShape(depth=3, hidden=48, heads=8, kv_heads=1, head_dim=16, mlp=96, causal=False),
    "gemma_300m": DecoderShape(depth=3, hidden=32, heads=8, kv_heads=1, head_dim=16, mlp=64, causal=False),
}
TOWER = replace(TINY.tower, mlp_size=4304)
ROWS = 257152
CAMERAS = {"top": (80, 100), "wrist": (96, 96)}
TOLERANCE = 1e-5


def modules(variant):
    names = ("modeling", "processor", "configuration")
    return [importlib.import_module(f"lerobot.policies.{variant}.{name}_{variant}") for name in names]


def shrink(monkeypatch, modeling):
    """Both sides take the releases' dimensions from names; let these names stand for tiny ones."""
    from transformers import GemmaConfig, PaliGemmaConfig

    def tiny_gemma(name):
        shape = GEMMA[name]
        return modeling.GemmaConfig(shape.hidden, shape.depth, shape.mlp, shape.heads, shape.kv_heads, shape.head_dim)

    def tiny_paligemma():
        vision = {
            "model_type": "siglip_vision_model", "hidden_size": TOWER.hidden_size, "num_hidden_layers": TOWER.depth,
            "num_attention_heads": TOWER.heads, "patch_size": TOWER.patch_size, "vision_use_head": False,
        }  # fmt: skip
        return PaliGemmaConfig(vision_config=vision)

    monkeypatch.setattr(modeling, "get_gemma_config", tiny_gemma)
    monkeypatch.setattr(modeling, "CONFIG_MAPPING", {"paligemma": tiny_paligemma, "gemma": GemmaConfig})
    monkeypatch.setattr(config_files, "_GEMMA", GEMMA)
    monkeypatch.setattr(config_files, "BASE", replace(TINY, tower=TOWER, vocab=ROWS))


def policy_of(variant, modeling, configuration):
    """A policy of lerobot's with random weights, every one of which matters."""
    from lerobot.configs import FeatureType, PolicyFeature

    kind = "PI05" if variant == "pi05" else "PI0"
    inputs = {
        f"observation.images.{name}": PolicyFeature(FeatureType.VISUAL, (3, *size)) for name, size in CAMERAS.items()
    }
    inputs["observation.state"] = PolicyFeature(FeatureType.STATE, (STATE,))
    config = getattr(configuration, f"{kind}Config")(
        input_features=inputs,
        output_features={"action": PolicyFeature(FeatureType.ACTION, (DIMS,))},
        device="cpu",
        chunk_size=HORIZON,
        n_action_steps=HORIZON,
        num_inference_steps=STEPS,
        image_resolution=(TOWER.image_size, TOWER.image_size),
        empty_cameras=1,
    )
    policy = getattr(modeling, f"{kind}Policy")(config).eval()
    paligemma = policy.model.paligemma_with_expert.paligemma.model
    paligemma.multi_modal_projector.linear = torch.nn.Linear(TOWER.hidden_size, GEMMA["gemma_2b"].hidden)
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            fan_in = parameter[0].numel() if parameter.dim() > 1 and "embed_tokens" not in name else 100
            parameter.add_(torch.randn(parameter.shape, generator=generator) * fan_in**-0.5)
    return policy


def processors_of(variant, module, config, monkeypatch):
    """lerobot's processors with statistics and, since PaliGemma's is not at hand, the bundled tokenizer."""
    from transformers import PreTrainedTokenizerFast

    text = Tokenizer.from_file(str(TOKENIZER))
    bos = text.token_to_id("<s>")
    text.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    fast = PreTrainedTokenizerFast(tokenizer_object=text, pad_token="<unk>", bos_token="<s>")
    step = module.TokenizerProcessorStep
    monkeypatch.setattr(module, "TokenizerProcessorStep", lambda tokenizer_name, **given: step(tokenizer=fast, **given))
    rng = np.random.default_rng(7)

    def numbers(size):
        low, high = rng.normal(-1, 0.2, size), rng.normal(1, 0.2, size)
        return {"q01": low, "q99": high, "mean": rng.normal(size=size), "std": rng.uniform(0.5, 2, size)}

    stats = {"observation.state": numbers(STATE), "action": numbers(DIMS)}
    return getattr(module, f"make_{variant}_pre_post_processors")(config, stats)


@pytest.fixture(params=VARIANTS)
def peers(request, monkeypatch, tmp_path):
    """lerobot's policy with its processors, and ours from what lerobot saved."""
    variant = request.param
    modeling, processing, configuration = modules(variant)
    shrink(monkeypatch, modeling)
    policy = policy_of(variant, modeling, configuration)
    before, after = processors_of(variant, processing, policy.config, monkeypatch)
    for part in (policy, before, after):
        part.save_pretrained(tmp_path)
    shutil.copy(TOKENIZER, tmp_path)
    return variant, policy, before, after, tmp_path


def frames(config):
    """Frames of each camera, and their pixels as our policy sees them."""
    rng = np.random.default_rng(2)
    images = {name: rng.integers(0, 256, (*size, 3), dtype=np.uint8) for name, size in CAMERAS.items()}
    return images, {name: config.transform.cropped(image) for name, image in images.items()}


def batch_of(pixels, state):
    images = {f"observation.images.{name}": values.float() / 255 for name, values in pixels.items()}
    return {**images, "observation.state": torch.tensor(state, dtype=torch.float32), "task": INSTRUCTION}


def asked(backbone, images, state):
    """Our chunk, and the noise it began with."""
    seen = {}
    noise = Query.noise

    def kept(query, *shape):
        seen["noise"] = noise(query, *shape)
        return seen["noise"]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Query, "noise", kept)
        return chunk(backbone, images=images, state=state), seen["noise"]


def test_same_actions(peers):
    variant, policy, before, after, folder = peers
    ours = loaded(variant, folder)
    state = np.random.default_rng(5).uniform(-1.2, 1.2, STATE)
    images, pixels = frames(ours.config)
    batch = before(batch_of(pixels, state))
    tokens = batch["observation.language.tokens"][batch["observation.language.attention_mask"].bool()]
    assert tokens.tolist() == list(ours.prompt(INSTRUCTION, state).ids)

    found, noise = asked(ours, images, state)
    normalised = sampled(policy, batch, noise)
    difference = np.abs(found.normalised - normalised[0].numpy()).max()
    scaled = np.abs(found.actions - after(normalised)[0].numpy()).max()
    print(f"\n{variant}: normalised actions differ by {difference:.2g}, actions by {scaled:.2g}")
    assert normalised.abs().max() > 0.5
    assert difference < TOLERANCE
    assert scaled < TOLERANCE


def sampled(policy, batch, noise):
    """lerobot's normalised chunk for a given noise."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(policy.model, "sample_noise", lambda shape, device: noise)
        return policy.predict_action_chunk(batch)


def test_the_whole_folder_is_accounted_for(peers):
    variant, _, _, _, folder = peers
    found = verify_pi0(variant, folder, {})
    assert found.clean
    assert json.loads((folder / "config.json").read_text())["type"] == variant
