"""`tokenprune verify`: what fits, what does not, and whether the policy looks at its images."""

from __future__ import annotations

import json
import shutil
import sys
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.checkpoint_faults import HEAD, PROPRIO, QUERY, WEIGHTS, ZERO, cut, drop, edit, put
from tests.helpers.release_format import BODY_KEYS, UNUSED_KEYS, write_release
from tests.helpers.tiny_oft import tiny_config, tiny_policy_parts
from tokenprune.cli import main
from tokenprune_adapters.backbones.openvla_oft import release
from tokenprune_adapters.backbones.openvla_oft.factory import OFTFactory

DATASET = "libero_spatial_no_noops"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return write_release(
        tmp_path_factory.mktemp("verify") / "written", tiny_policy_parts(tiny_config(), dtype=torch.float32)
    )


@pytest.fixture
def folder(written, tmp_path):
    return shutil.copytree(written, tmp_path / "release")


@pytest.fixture
def call(monkeypatch, capsys):
    def run(*words):
        monkeypatch.setattr(sys, "argv", ["tokenprune", "verify", *map(str, words)])
        with pytest.raises(SystemExit) as exit_:
            main()
        said = capsys.readouterr()
        return exit_.value.code or 0, said.out, said.err

    return run


@pytest.fixture
def verify(call):
    """The verb on this backbone: exit code and JSON."""

    def run(folder, *words):
        code, out, err = call(folder, "--backbone", "openvla-oft", "--dtype", "float32", "--json", *words)
        assert err == ""
        return code, json.loads(out)

    return run


def no_projector(folder):
    """The body's projector is all zeros: whatever the image, the same tokens come out."""
    zero = {key for key in BODY_KEYS if key.startswith("projector.")}
    edit(folder / WEIGHTS, lambda data: data.update({key: torch.zeros_like(data[key]) for key in zero}))


# What fits.


def test_a_good_checkpoint(folder, verify):
    code, found = verify(folder)
    assert code == 0
    assert found["clean"]
    assert found["files"] == [HEAD, WEIGHTS, PROPRIO]
    assert found["dtypes"] == {"float32": len(BODY_KEYS) + len(UNUSED_KEYS) + 16 + 4}
    assert sorted(found["unused"]) == sorted(f"{WEIGHTS}: {key}" for key in UNUSED_KEYS)
    assert [found[name] for name in ("unmapped", "missing", "misshapen", "views_ignored")] == [[], [], [], []]
    assert found["statistics"] == [DATASET]


def test_what_is_printed_fits_a_terminal(folder, call):
    code, out, _ = call(folder, "--backbone", "openvla-oft", "--dtype", "float32")
    assert code == 0
    lines = out.splitlines()
    assert max(map(len, lines)) <= 80
    assert f"statistics   {DATASET}" in lines
    for group, count in Counter(".".join(key.split(".")[:2]) for key in UNUSED_KEYS).items():
        assert any(line.endswith(f" {count} {group}") for line in lines)
    assert [line.split()[1] for line in lines if line.startswith(("unmapped", "missing", "misshapen"))] == ["none"] * 3
    assert out.endswith("looks at every view.\n")


def test_options_reach_the_backbone(folder, verify):
    edit(folder / "dataset_statistics.json", lambda data: data.update(other=data[DATASET]))
    (folder / PROPRIO).unlink()
    options = ("--option", "proprio=false", "--option", "views=[wrist]", "--option", "unnorm_key=other")
    code, found = verify(folder, *options)
    assert (code, found["statistics"]) == (0, [DATASET, "other"])
    assert (found["state_size"], list(found["image_changes"])) == (None, ["wrist"])


# What does not.


def test_a_policy_that_sees_nothing_is_found_out(folder, verify, call):
    no_projector(folder)
    code, found = verify(folder)
    assert (code, found["clean"]) == (1, True)
    assert found["image_changes"] == {"primary": 0, "wrist": 0}
    assert found["views_ignored"] == ["primary", "wrist"]
    code, out, _ = call(folder, "--backbone", "openvla-oft")
    assert (code, out.split("The policy ")[1]) == (1, "ignores primary, wrist.\n")


@pytest.mark.parametrize(
    ("plant", "part", "entry"),
    [
        (put(WEIGHTS, "projector.fc4.bias", ZERO), "unmapped", f"{WEIGHTS}: projector.fc4.bias"),
        (drop(WEIGHTS, QUERY), "missing", QUERY),
        (drop(HEAD, "module.model.fc2.bias"), "missing", f"{HEAD}: model.fc2.bias"),
        (
            put(WEIGHTS, QUERY, ZERO),
            "misshapen",
            f"{WEIGHTS}: {QUERY} has shape [2, 2]; the model wants [32, 32]",
        ),
    ],
)
def test_what_does_not_fit_is_told_and_not_loaded(plant, part, entry, folder, verify, call, monkeypatch):
    monkeypatch.setattr(OFTFactory, "build", lambda *_: pytest.fail("was loaded"))
    plant(folder)
    code, found = verify(folder)
    assert (code, found["clean"], found["image_changes"]) == (1, False, None)
    assert {name: found[name] for name in ("unmapped", "missing", "misshapen")} == {
        "unmapped": [], "missing": [], "misshapen": [], part: [entry],
    }  # fmt: skip
    code, out, _ = call(folder, "--backbone", "openvla-oft")
    assert code == 1
    assert "".join(entry.split()) in "".join(out.split())
    assert "was not loaded" in out
    assert max(map(len, out.splitlines())) <= 80


def test_a_long_list_is_cut(folder, call):
    edit(folder / WEIGHTS, lambda data: data.update({f"x.{n:02}": ZERO.clone() for n in range(12)}))
    code, out, _ = call(folder, "--backbone", "openvla-oft")
    assert (code, out.count(f"{WEIGHTS}: x.")) == (1, 10)
    assert "and 2 more" in out


@settings(max_examples=20, deadline=None)
@given(st.dictionaries(st.sampled_from(BODY_KEYS), st.sampled_from(["drop", "rename", "shape"]), min_size=1))
def test_no_tensor_goes_unnoticed_and_none_raises(written, faults):
    changed = written.parent / "changed"
    shutil.copytree(written, changed, dirs_exist_ok=True)

    def plant(data):
        for key, fault in faults.items():
            values = data.pop(key)
            if fault == "rename":
                data[f"{key}_"] = values
            elif fault == "shape":
                data[key] = torch.zeros(*values.shape, 2)

    edit(changed / WEIGHTS, plant)
    found = OFTFactory.verify(changed, {})
    assert set(found.missing) == {key for key, fault in faults.items() if fault in ("drop", "rename")}
    assert set(found.unmapped) == {f"{WEIGHTS}: {key}_" for key, fault in faults.items() if fault == "rename"}
    assert {entry.split()[1] for entry in found.misshapen} == {k for k, fault in faults.items() if fault == "shape"}
    assert not found.clean


# What is no checkpoint, and wrong calls.


@pytest.mark.parametrize(
    ("plant", "words", "fragments"),
    [
        (cut(WEIGHTS, 1), ("--backbone", "openvla-oft"), [WEIGHTS, "truncated"]),
        (put("config.json", "model_type", "pi0"), ("--backbone", "openvla-oft"), ["config.json", "looks like"]),
        (None, ("--backbone", "openvla-oft", "--option", "unnorm_key=libero"), ["dataset_statistics.json", "'libero'"]),
        (None, ("--backbone", "openvla-oft", "--option", "view=[primary]"), ["did you mean 'views'"]),
        (None, ("--backbone", "openvla-oftt"), ["did you mean 'openvla-oft'"]),
        (None, (), ["--backbone"]),
    ],
)  # fmt: skip
def test_mistakes_exit_2(plant, words, fragments, folder, call):
    if plant:
        plant(folder)
    code, _, err = call(folder, *words)
    assert code == 2
    assert [fragment for fragment in fragments if fragment not in err] == []


def test_a_backbone_that_cannot_verify(folder, call, monkeypatch):
    monkeypatch.delattr(OFTFactory, "verify")
    code, _, err = call(folder, "--backbone", "openvla-oft")
    assert code == 2
    assert "'openvla-oft' of tokenprune-vla" in err


def test_no_weight_is_read_to_verify(folder, monkeypatch):
    monkeypatch.setattr(release, "load_weights", lambda *_: pytest.fail("was read"))
    monkeypatch.setattr("tokenprune_adapters.weights.tensor_files._fetch", lambda *_: pytest.fail("was read"))
    assert OFTFactory.verify(folder, {}).clean
