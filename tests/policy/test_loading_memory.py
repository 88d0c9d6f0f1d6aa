"""Loading takes little more memory than the weights themselves."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import torch

from tests.helpers.release_format import CONFIG, write_release
from tests.helpers.tiny_oft import tiny_config, tiny_policy_parts

# Not getrusage: its peak is inherited from the process that started this one.
LOAD = """
import json, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from tokenprune_adapters.backbones.openvla_oft.release import load_oft

def kibibytes(field):
    return int(Path("/proc/self/status").read_text().split(field + ":")[1].split()[0])

def load(folder):
    return load_oft(Path(folder), {}, torch.device("cpu"), torch.float32)

load(sys.argv[1])  # whatever is imported on the way
before = kibibytes("VmRSS")
model = load(sys.argv[2]).model
weights = sum(value.nbytes for value in model.state_dict().values())
print(json.dumps({"before": before * 1024, "peak": kibibytes("VmHWM") * 1024, "weights": weights}))
"""


def test_loading_needs_less_than_a_fifth_more_than_the_weights(tmp_path):
    tiny = tiny_config()
    decoder = replace(tiny.body.decoder, hidden=512, head_dim=128, mlp=8192)
    wide = tiny_policy_parts(replace(tiny, body=replace(tiny.body, decoder=decoder)), dtype=torch.float32)
    config = {**CONFIG, "text_config": {**CONFIG["text_config"], "hidden_size": 512, "intermediate_size": 8192}}
    folders = [
        write_release(tmp_path / "tiny", tiny_policy_parts(tiny, dtype=torch.float32)),
        write_release(tmp_path / "wide", wide, shards=2, config=config),
    ]
    done = subprocess.run([sys.executable, "-c", LOAD, *folders], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["weights"] == sum(value.nbytes for value in wide.model.parameters()) > 150e6
    # It must have been resident for the measure to mean anything.
    assert found["weights"] < found["peak"] - found["before"] < 1.2 * found["weights"], found
