"""The example package is installed as a stranger's would be, and found by its own name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter

import pytest

from tests.helpers.paths import ROOT

EXAMPLE = ROOT / "examples" / "frame_change"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Install the package in a folder, and return how to run a program that sees it and prints JSON."""
    folder = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--no-build-isolation", "--target", folder, EXAMPLE], check=True)
    elsewhere = tmp_path_factory.mktemp("elsewhere")

    def run(program):
        path = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
        env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "2"}
        command = [sys.executable, "-c", f"import json\n{program}"]
        done = subprocess.run(command, cwd=elsewhere, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    yield run
    assert not {path.name for path in EXAMPLE.iterdir()} & {"build", "dist"}, (
        "installing leaves the sources as they are"
    )


def test_the_registry_finds_it_by_distribution_and_version_without_torch(run):
    found = run("""
import sys
from tests.helpers.paths import ROOT
from tokenprune.registry.discovery import Registry
found = Registry.discover()
owners = [found.stage("frame_change").owner, found.pipeline("frame_change").owner]
owners = [[owner.distribution, owner.version, owner.module] for owner in owners]
print(json.dumps([owners, [q.error for q in found.quarantined], "torch" in sys.modules]))
""")
    owner = ["tokenprune-frame-change", "0.1.0", "tokenprune_frame_change"]
    assert found == [[owner, owner], [], False]


def test_its_stage_and_its_pipeline_load(run):
    found = run("""
from tokenprune.pipelines.loader import load_pipeline, pipeline_schema
from tokenprune.registry.discovery import Registry
found = Registry.discover()
stage = found.stage_class("frame_change")
(config,) = load_pipeline("frame_change@keep=0.25", found).config.stages
in_schema = "frame_change" in pipeline_schema(found)["$defs"]
print(json.dumps([stage.__module__, isinstance(config, stage.Config), config.keep, in_schema]))
""")
    assert found == ["tokenprune_frame_change.stage", True, 0.25, True]


def test_disabled_by_its_distribution_it_is_gone(run):
    found = run("""
from tokenprune.errors import PluginError
from tokenprune.registry.discovery import Registry
found = Registry.discover(disable=["tokenprune-frame-change"])
try:
    found.stage("frame_change")
except PluginError as error:
    print(json.dumps([sorted(found.unknown_disabled), str(error)]))
""")
    assert found[0] == []
    assert "no stage is called 'frame_change'" in found[1]
    assert "'frame_change' (disabled)" in found[1]


def test_patches_that_changed_score_highest_and_a_first_query_is_spread_evenly(run):
    found = run("""
from types import SimpleNamespace
import torch
from tokenprune.tokens.layout import Role, Segment, TokenLayout
from tokenprune_frame_change.stage import FrameChange, FrameChangeConfig

def vision(name):
    return Segment(Role.VISION, 0, 256, name, (16, 16), True)

layout = TokenLayout.build([Segment(Role.BOS, 0, 1), vision("primary"), vision("wrist"), Segment(Role.TEXT, 0, 3)])
previous = {view: torch.full((2, 3, 32, 32), 255, dtype=torch.uint8) for view in ("primary", "wrist")}
images = {view: pixels.clone() for view, pixels in previous.items()}
for view in images:
    images[view][1, :, :16] = 0          # half dark, half bright, and zeros where nothing came before
    previous[view][1] = 0
images["primary"][:, :, 2:4, 6:8] = 0    # row 1, column 3: all of it, downwards
images["wrist"][:, 1, 31, 0] = 254       # row 15, column 0: one pixel of one channel by one level
had_one = torch.tensor([True, False])
prunable = torch.tensor([i for i in layout.prunable if i != 5]).expand(2, -1)
ctx = SimpleNamespace(
    layout=layout, images=images, prunable=prunable, previous_images=lambda view: (previous[view], had_one)
)
proposal = FrameChange(FrameChangeConfig(use="frame_change")).select_tokens(ctx)
assert proposal.protect is None and proposal.drop is None
best = prunable.gather(1, proposal.score.argsort(1, descending=True))
print(json.dumps([list(proposal.score.shape), best[0, :2].tolist(), best[1, :256].tolist()]))
""")
    shape, changed, half = found
    assert shape == [2, 511]
    assert changed == [1 + 1 * 16 + 3, 257 + 15 * 16 + 0]
    quarters = Counter(((token - 1) // 128, (token - 1) % 16 // 8) for token in half)
    assert len(quarters) == 8
    assert set(quarters.values()) <= set(range(29, 36)), "half of each quarter of each view, give or take a tenth"


def test_in_a_policy_it_keeps_its_count_of_the_patches_that_changed(run):
    found = run("""
import numpy as np
import tokenprune
from tokenprune.registry.discovery import Registry

policy = tokenprune.load(
    "openvla-oft", preset="small", pipeline="frame_change@keep=0.25", registry=Registry.discover(), views=["primary"]
)
policy.reset(instruction="pick up the bowl")
image = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
changed = image.copy()
changed[:64] = 255 - changed[:64]
state = np.zeros(8, dtype=np.float32)
chunks = [policy.act({"images": {"primary": frame}, "state": state}) for frame in (image, changed)]
kept = [chunk.trace.to_json(with_ids=True)["kept_ids"]["embedding"][0] for chunk in chunks]
print(json.dumps([policy.backbone.layout("pick up the bowl").views["primary"].start, kept]))
""")
    start, (first, second) = found
    patches = [[token - start for token in kept] for kept in (first, second)]
    assert Counter((patch // 128, patch % 16 // 8) for patch in patches[0]).keys() == {(0, 0), (0, 1), (1, 0), (1, 1)}
    assert patches[1] == list(range(64)), "the top quarter changed, and a quarter is kept"
