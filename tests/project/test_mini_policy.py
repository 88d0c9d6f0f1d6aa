"""How the mini policy is trained, against how it is run: both must see and say the same."""

import json

import numpy as np
import pytest
import torch
from export import DATASET, assemble, read_back
from learner import Learner
from samples import Batch, statistics_of
from tower import CELLS, LabelledTower, by_patch

import tokenprune
from tokenprune_adapters.backbones.openvla_oft.config import MINI
from tokenprune_adapters.backbones.openvla_oft.export import export_oft
from tokenprune_adapters.backbones.prismatic.prompt import PromptTokenizer
from tokenprune_adapters.inputs.tokenizer import BUNDLED

INSTRUCTION = "put the bowl on the stove"


def demonstrations():
    draw = np.random.default_rng(0)
    actions = draw.uniform(-0.8, 0.8, (200, 7)).astype(np.float32)
    actions[:, 3:6] = 0.0
    actions[:, 6] = draw.integers(0, 2, 200)
    return [{"actions": actions, "state": draw.normal(size=(200, 8)).astype(np.float32)}]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """An untrained policy as training leaves it, and the folder it is exported to."""
    folder = tmp_path_factory.mktemp("mini")
    torch.manual_seed(0)
    labelled, learner = LabelledTower(), Learner()
    torch.save({"model": labelled.state_dict()}, folder / "tower.pt")
    torch.save({"average": learner.state_dict()}, folder / "policy.pt")
    (folder / "statistics.json").write_text(json.dumps(statistics_of(demonstrations())))
    model = assemble(folder / "tower.pt", folder / "policy.pt")
    statistics = {DATASET: json.loads((folder / "statistics.json").read_text())}
    export_oft(folder / "mini", MINI, model, BUNDLED, statistics, dtype=torch.float32)
    return labelled, learner, folder / "mini"


@torch.no_grad()
def test_what_is_trained_is_what_acts(trained):
    labelled, learner, folder = trained
    policy = tokenprune.load("openvla-oft", checkpoint=folder, center_crop=False, dtype="float32")
    policy.reset(INSTRUCTION)
    draw = np.random.default_rng(1)
    images = {view: draw.integers(0, 256, (224, 224, 3), np.uint8) for view in ("primary", "wrist")}
    state = draw.normal(size=8)
    chunk = policy.act({"images": images, "state": state})

    pixels = torch.from_numpy(np.stack(list(images.values())).transpose(0, 3, 1, 2).copy())
    features = labelled.tower(MINI.transform.normalise(pixels, 0, torch.float32))[None]
    normalised = policy.backbone.statistics.state.normalise(state)
    batch = Batch(
        features=features,
        state=torch.from_numpy(normalised).float()[None],
        text=torch.tensor([PromptTokenizer.bundled().encode(INSTRUCTION).ids]),
        chunk=torch.zeros(1, 8, 7),
        places=torch.zeros(1, 6),
    )
    actions, _ = learner(batch, pool=1)
    assert np.allclose(actions[0].numpy(), chunk.normalised, atol=1e-4)
    assert np.abs(chunk.actions[:, 3:6]).max() < 1e-6, "what no demonstration does, the policy cannot do"


def test_an_exported_policy_is_read_back_to_go_on_from(trained):
    labelled, learner, folder = trained
    model, statistics = read_back(folder)
    tower = model.vision_backbone.featurizer.state_dict()
    assert all(torch.equal(tower[name], labelled.tower.state_dict()[name]) for name in tower)
    del model.vision_backbone
    assert model.state_dict().keys() == learner.model.state_dict().keys()
    assert all(torch.equal(value, learner.model.state_dict()[name]) for name, value in model.state_dict().items())
    assert statistics == json.loads((folder.parent / "statistics.json").read_text())


@torch.no_grad()
def test_pooled_patches_stand_where_the_first_of_them_does(trained):
    _, learner, _ = trained
    seen = []
    run = learner.decoder.run

    def spy(hidden, tokens, **options):
        seen.append((hidden.shape[1], tokens.ids[0].tolist(), tokens.n_source))
        return run(hidden, tokens, **options)

    learner.decoder.run = spy
    try:
        text = torch.tensor([PromptTokenizer.bundled().encode(INSTRUCTION).ids])
        batch = Batch(torch.randn(1, 2, 256, 192), torch.zeros(1, 8), text, torch.zeros(1, 8, 7), torch.zeros(1, 6))
        learner(batch, pool=2)
    finally:
        learner.decoder.run = run
    (held, ids, source), words = seen[0], text.shape[1]
    first = [1 + 256 * view + 16 * row + col for view in (0, 1) for row in range(0, 16, 2) for col in range(0, 16, 2)]
    assert ids == [0, *first, *range(513, 513 + 1 + words + 56 + 1)]
    assert held == len(ids)
    assert source == 513 + 1 + words + 56 + 1


def test_labels_of_a_patch_are_the_places_inside_it():
    labels = torch.arange(112 * 112).view(1, 112, 112)
    found = by_patch(labels)
    assert found.shape == (1, 256, CELLS * CELLS)
    row, col = 3, 5
    inside = labels[0, CELLS * row : CELLS * (row + 1), CELLS * col : CELLS * (col + 1)]
    assert torch.equal(found[0, 16 * row + col], inside.flatten())
