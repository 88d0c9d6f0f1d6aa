"""Dataset statistics: every map against its formula, number by number; every file format, and every refusal."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from tokenprune.errors import CheckpointError
from tokenprune_adapters.backbones.pi0.statistics import read_lerobot, read_openpi
from tokenprune_adapters.inputs.statistics import Bounds, Quantiles, Standard, Statistics

DIMS, STATE = 7, 8
VALUES = np.linspace(-3, 3, 4 * DIMS).reshape(2, 2, DIMS)


def per_number(formula, values, *parameters):
    out = np.empty(values.shape)
    for index in np.ndindex(values.shape):
        out[index] = formula(values[index], *(parameter[index[-1]] for parameter in parameters))
    return out


LOW, HIGH = np.linspace(-2, -0.5, DIMS), np.linspace(0.25, 2, DIMS)
MASK = np.array([True] * (DIMS - 1) + [False])


@pytest.mark.parametrize("epsilon", [0.0, 1e-8, 0.25])
def test_bounds(epsilon):
    def scaled(x, low, high, mask):
        return min(max(2 * (x - low) / (high - low + epsilon) - 1, -1), 1) if mask else x

    def back(a, low, high, mask):
        return (a + 1) / 2 * (high - low + epsilon) + low if mask else a

    bounds = Bounds(LOW, HIGH, MASK, epsilon)
    np.testing.assert_allclose(bounds.normalise(VALUES), per_number(scaled, VALUES, LOW, HIGH, MASK), rtol=1e-13)
    np.testing.assert_allclose(bounds.unnormalise(VALUES), per_number(back, VALUES, LOW, HIGH, MASK), rtol=1e-13)


def test_bounds_use_openvla_ofts_epsilon_by_default():
    flat = Bounds(np.zeros(1), np.zeros(1), np.array([True]))
    assert flat.unnormalise(np.ones(1)).tolist() == [1e-8]
    assert Bounds(np.zeros(1), np.zeros(1), np.array([True]), 0.0).unnormalise(np.ones(1)).tolist() == [0]


def test_standard():
    mean, std = LOW, HIGH
    ours = Standard(mean, std)
    scores = per_number(lambda x, m, s: (x - m) / (s + 0.000001), VALUES, mean, std)
    back = per_number(lambda z, m, s: z * (s + 0.000001) + m, VALUES, mean, std)
    np.testing.assert_allclose(ours.normalise(VALUES), scores, rtol=1e-13)
    np.testing.assert_allclose(ours.unnormalise(VALUES), back, rtol=1e-13)
    assert Standard(np.zeros(1), np.zeros(1)).normalise(np.ones(1)) == pytest.approx([1e6])


def test_quantiles():
    ours = Quantiles(LOW, HIGH)
    scaled = per_number(lambda x, q01, q99: (x - q01) / (q99 - q01 + 0.000001) * 2 - 1, VALUES, LOW, HIGH)
    back = per_number(lambda a, q01, q99: (a + 1) / 2 * (q99 - q01 + 0.000001) + q01, VALUES, LOW, HIGH)
    np.testing.assert_allclose(ours.normalise(VALUES), scaled, rtol=1e-13)
    np.testing.assert_allclose(ours.unnormalise(VALUES), back, rtol=1e-13)
    assert abs(ours.normalise(VALUES)).max() > 1, "nothing is clipped"
    assert Quantiles(np.zeros(1), np.zeros(1)).unnormalise(np.ones(1)) == pytest.approx([1e-6])


@given(st.integers(0, 2**32 - 1))
def test_unnormalising_undoes_normalising(seed):
    rng = np.random.default_rng(seed)
    low, values = rng.normal(size=DIMS), rng.normal(size=(3, DIMS))
    high = low + rng.uniform(0.01, 5, DIMS)
    for ours in (Standard(low, high - low), Quantiles(low, high)):
        np.testing.assert_allclose(ours.unnormalise(ours.normalise(values)), values, atol=1e-9)
    inside = low + rng.uniform(size=(3, DIMS)) * (high - low)
    bounds = Bounds(low, high, MASK)
    np.testing.assert_allclose(bounds.unnormalise(bounds.normalise(inside)), inside, atol=1e-9)


def part(size: int, shift: float = 0.0) -> dict[str, list[float]]:
    fields = {"min": -4.0, "q01": -3.0, "mean": 0.5, "std": 1.5, "q99": 3.0, "max": 4.0}
    return {name: [value + shift + 0.125 * d for d in range(size)] for name, value in fields.items()}


def openvla(**action) -> dict:
    return {"kitchen": {"action": part(DIMS) | action, "proprio": part(STATE, 0.25)}}


def test_openvlas_quantiles():
    read = Statistics.read(openvla(mask=MASK.tolist()), None, DIMS, STATE, "s.json")
    assert read.key == "kitchen"
    assert (read.action.low.tolist(), read.action.high.tolist()) == (part(DIMS)["q01"], part(DIMS)["q99"])
    assert read.action.mask.tolist() == MASK.tolist()
    assert (read.action.epsilon, read.state.epsilon) == (1e-8, 1e-8)
    assert (read.state.low.tolist(), read.state.mask.tolist()) == (part(STATE, 0.25)["q01"], [True] * STATE)


def test_openvla_reads_no_state_and_adds_no_epsilon():
    data = openvla()
    del data["kitchen"]["proprio"]
    read = Statistics.read(data, "kitchen", DIMS, None, "s.json", epsilon=0.0)
    assert (read.state, read.action.epsilon) == (None, 0.0)


def test_openvlas_bounds():
    read = Statistics.read(openvla(), None, DIMS, STATE, "s.json", fields=("min", "max"))
    assert (read.action.low.tolist(), read.action.high.tolist()) == (part(DIMS)["min"], part(DIMS)["max"])
    assert (read.state.low.tolist(), read.state.high.tolist()) == (part(STATE, 0.25)["min"], part(STATE, 0.25)["max"])


def test_a_dataset_is_chosen():
    data = openvla() | {"garden": openvla(q01=[-9.0] * DIMS)["kitchen"]}
    assert Statistics.read(data, "garden", DIMS, STATE, "s.json").action.low.tolist() == [-9.0] * DIMS
    with pytest.raises(CheckpointError, match=r"s\.json: .* several datasets; give unnorm_key, one of garden, kitchen"):
        Statistics.read(data, None, DIMS, STATE, "s.json")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "s.json: holds no dataset statistics"),
        ([], "s.json: holds no dataset statistics"),
        (openvla() | {"k": 0}, "no statistics for 'kitchn'; did you mean 'kitchen'?"),
        ({"kitchn": 3}, "s.json: kitchn: holds a int; valid: an object with 'action'"),
        ({"kitchn": {"actions": {}}}, "s.json: kitchn: 'action' is missing; did you mean 'actions'?"),
        ({"kitchn": {"action": 3}}, "s.json: kitchn: 'action' is a int; valid: an object"),
        ({"kitchn": {"action": {"q1": []}}}, "s.json: kitchn: action.q01 is missing; did you mean 'q1'?"),
        ({"kitchn": openvla(q99=None)["kitchen"]}, "action.q99 is missing"),
        ({"kitchn": openvla(q01=["a"] * 7)["kitchen"]}, "action.q01 is malformed; valid: 7 finite numbers"),
        ({"kitchn": openvla(q01=[[0.0]] * 7)["kitchen"]}, "action.q01 must be 7 finite numbers, got shape (7, 1)"),
        ({"kitchn": openvla(q01=[0.0] * 8)["kitchen"]}, "action.q01 must be 7 finite numbers, got shape (8,)"),
        ({"kitchn": openvla(q01=[float("nan")] * 7)["kitchen"]}, "action.q01 must be 7 finite numbers"),
        ({"kitchn": openvla(q01=[0.0] * 6 + [9.0])["kitchen"]}, "action: q01 is above q99 at [6]"),
        ({"kitchn": openvla(mask=[True] * 6)["kitchen"]}, "action.mask is [True, True, True, True, True, True]; valid"),
        ({"kitchn": openvla(mask=["False"] * 7)["kitchen"]}, "action.mask is ['False',"),
        ({"kitchn": openvla(mask=None)["kitchen"]}, "action.mask is None; valid: 7 booleans"),
        ({"kitchn": {"action": part(7)}}, "s.json: kitchn: 'proprio' is missing; valid: action"),
    ],
)
def test_openvlas_faults(data, message):
    with pytest.raises(CheckpointError, match=re.escape(message)):
        Statistics.read(data, "kitchn", DIMS, STATE, "s.json")


def openpi(folder, asset_id="physical-intelligence/libero", entries=None, size=DIMS):
    path = folder / asset_id / "norm_stats.json"
    path.parent.mkdir(parents=True)
    written = {"actions": part(size), "state": part(STATE, 0.25)} if entries is None else entries
    path.write_text(json.dumps({"norm_stats": written}))
    return folder


def test_openpis_standard_scores(tmp_path):
    read = read_openpi(openpi(tmp_path), None, DIMS, STATE, quantiles=False)
    assert read.key == "physical-intelligence/libero"
    for got, expected in ((read.action, part(DIMS)), (read.state, part(STATE, 0.25))):
        assert isinstance(got, Standard)
        assert (got.mean.tolist(), got.std.tolist(), got.epsilon) == (expected["mean"], expected["std"], 1e-6)


def test_openpis_quantiles(tmp_path):
    read = read_openpi(openpi(tmp_path), "physical-intelligence/libero", DIMS, None, quantiles=True)
    assert isinstance(read.action, Quantiles)
    assert (read.action.low.tolist(), read.action.high.tolist()) == (part(DIMS)["q01"], part(DIMS)["q99"])
    assert (read.action.epsilon, read.state) == (1e-6, None)


def test_padded_statistics_are_cut(tmp_path):
    read = read_openpi(openpi(tmp_path, size=32), None, DIMS, STATE, quantiles=True)
    assert read.action.low.tolist() == part(32)["q01"][:DIMS]


def test_an_asset_is_chosen(tmp_path):
    openpi(tmp_path, "trossen", {"actions": part(DIMS, 1.0), "state": part(STATE)})
    openpi(tmp_path)
    assert read_openpi(tmp_path, "trossen", DIMS, None, quantiles=False).action.mean[0] == 1.5
    with pytest.raises(CheckpointError, match="several datasets; give one of physical-intelligence/libero, trossen"):
        read_openpi(tmp_path, None, DIMS, None, quantiles=False)
    with pytest.raises(CheckpointError, match=r"no norm_stats\.json for 'trosen'; did you mean 'trossen'"):
        read_openpi(tmp_path, "trosen", DIMS, None, quantiles=False)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({}, "norm_stats.json: norm_stats: 'actions' is missing"),
        ({"action": {}}, "norm_stats: 'actions' is missing; did you mean 'action'?"),
        ({"actions": part(DIMS)}, "norm_stats: 'state' is missing"),
        ({"actions": part(6), "state": part(STATE)}, "actions.q01 must be at least 7 finite numbers, got shape (6,)"),
        ({"actions": part(DIMS) | {"q99": None}}, "norm_stats.actions.q99 is missing"),
        ({"actions": part(DIMS) | {"q99": [-9.0] * DIMS}}, "actions: q01 is above q99 at [0, 1, 2, 3, 4, 5, 6]"),
        (3, "'norm_stats' is a int; valid: an object"),
    ],
)
def test_openpis_faults(tmp_path, entries, message):
    with pytest.raises(CheckpointError, match=re.escape(message)):
        read_openpi(openpi(tmp_path, entries=entries), None, DIMS, STATE, quantiles=True)


def test_openpis_missing_and_negative(tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere: holds no <asset_id>/norm_stats\.json"):
        read_openpi(tmp_path / "nowhere", None, DIMS, STATE, quantiles=True)
    openpi(tmp_path, entries={"actions": part(DIMS) | {"std": [1.0] * 6 + [-1.0]}})
    with pytest.raises(CheckpointError, match=r"actions\.std is negative at \[6\]"):
        read_openpi(tmp_path, None, DIMS, None, quantiles=False)


RELATIVE = {"enabled": False, "exclude_joints": [], "action_names": None}


def lerobot(folder, state="QUANTILES", action="QUANTILES", *, change=None, stats=None):
    """A checkpoint's processor files, as lerobot 0.6 writes them for pi0.5; `change` edits one before it is written."""
    norm_map = {"VISUAL": "IDENTITY", "STATE": state, "ACTION": action}
    config = {"eps": 1e-08, "features": {}, "norm_map": norm_map}
    before, after = "policy_preprocessor", "policy_postprocessor"
    files = {
        before: [
            {"registry_name": "rename_observations_processor", "config": {"rename_map": {}}},
            {"registry_name": "to_batch_processor", "config": {}},
            {"registry_name": "relative_actions_processor", "config": dict(RELATIVE)},
            {"registry_name": "normalizer_processor", "config": config, "state_file": f"{before}_step_3.safetensors"},
            {"registry_name": "pi05_prepare_state_tokenizer_processor_step", "config": {}},
            {"registry_name": "tokenizer_processor", "config": {"max_length": 200}},
            {"registry_name": "device_processor", "config": {"device": "cuda"}},
        ],
        after: [
            {"registry_name": "unnormalizer_processor", "config": config, "state_file": f"{after}_step_0.safetensors"},
            {"registry_name": "absolute_actions_processor", "config": {"enabled": False}},
            {"registry_name": "device_processor", "config": {"device": "cpu"}},
        ],
    }
    files = json.loads(json.dumps(files))
    if change is not None:
        change(files)
    values = {"action": part(DIMS), "observation.state": part(STATE, 0.25)} if stats is None else stats
    tensors = {f"{key}.{name}": torch.tensor(x) for key, entry in values.items() for name, x in entry.items()}
    for name, steps in files.items():
        (folder / f"{name}.json").write_text(json.dumps({"name": name, "steps": steps}))
    for name in (f"{before}_step_3", f"{after}_step_0"):
        save_file(tensors | {"observation.images.top.mean": torch.zeros(3, 1, 1)}, folder / f"{name}.safetensors")
    return folder


@pytest.mark.parametrize("mode", ["MEAN_STD", "QUANTILES"])
def test_lerobots_modes(tmp_path, mode):
    read = read_lerobot(lerobot(tmp_path, mode, mode), DIMS, STATE)
    first, second = ("mean", "std") if mode == "MEAN_STD" else ("low", "high")
    names = ("mean", "std") if mode == "MEAN_STD" else ("q01", "q99")
    for got, expected in ((read.action, part(DIMS)), (read.state, part(STATE, 0.25))):
        assert isinstance(got, Standard if mode == "MEAN_STD" else Quantiles)
        assert [getattr(got, first).tolist(), getattr(got, second).tolist()] == [expected[name] for name in names]
        assert got.epsilon == 1e-8


def test_lerobots_state_and_action_may_differ(tmp_path):
    read = read_lerobot(lerobot(tmp_path, "IDENTITY", "MEAN_STD"), DIMS, STATE)
    assert isinstance(read.action, Standard)
    assert (read.action.normalise(VALUES) != VALUES).all()
    state = np.linspace(-5, 5, STATE)
    assert (read.state.normalise(state) == state).all()


def drop_from_norm_map(files):
    for steps in files.values():
        for step in steps:
            step["config"].get("norm_map", {}).pop("ACTION", None)


def leave_state_alone(files):
    files["policy_preprocessor"][3]["config"]["normalize_observation_keys"] = ["observation.images.top"]


@pytest.mark.parametrize(("change", "part_name"), [(drop_from_norm_map, "action"), (leave_state_alone, "state")])
def test_lerobot_passes_through_what_it_does_not_name(tmp_path, change, part_name):
    read = read_lerobot(lerobot(tmp_path, change=change), DIMS, STATE)
    passed, other = (read.action, read.state) if part_name == "action" else (read.state, read.action)
    values = np.linspace(-5, 5, DIMS if part_name == "action" else STATE)
    assert (passed.unnormalise(values) == values).all()
    assert isinstance(other, Quantiles)


def test_lerobots_padded_statistics_are_cut_and_no_state_is_read(tmp_path):
    folder = lerobot(tmp_path, stats={"action": part(32)})
    (folder / "policy_preprocessor.json").unlink()
    read = read_lerobot(folder, DIMS, None)
    assert (read.action.low.tolist(), read.state) == (part(32)["q01"][:DIMS], None)


def in_step(name, index, **config):
    return lambda files: files[name][index]["config"].update(config)


def in_entry(name, index, **entries):
    return lambda files: files[name][index].update(entries)


PRE, POST = "policy_preprocessor", "policy_postprocessor"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (in_step(POST, 0, norm_map={"ACTION": "MIN_MAX"}), "postprocessor.json: steps[0].config.norm_map.ACTION is"),
        (in_step(PRE, 3, norm_map={"STATE": "QUANTILE"}), "STATE is 'QUANTILE'; did you mean 'QUANTILES'?"),
        (in_step(POST, 0, eps=0.1), "config.eps is 0.1; valid"),
        (in_step(POST, 0, eps="a"), "config.eps is 'a'; valid"),
        (in_step(POST, 1, enabled=True), "steps[1] 'absolute_actions_processor' is enabled"),
        (in_step(PRE, 2, enabled=True), "steps[2] 'relative_actions_processor' is enabled"),
        (in_entry(PRE, 2, config={}), "steps[2] 'relative_actions_processor' is enabled"),
        (in_entry(PRE, 1, registry_name="clip_processor"), "preprocessor.json: steps[1] is 'clip_processor', which is"),
        (in_entry(PRE, 6, registry_name="normalizer_processor"), "has 2 steps 'normalizer_processor'; valid: one"),
        (lambda files: files[POST].pop(0), "has 0 steps 'unnormalizer_processor'; valid: one"),
        (lambda files: files[POST].insert(0, "step"), "steps[0] is 'None', which is not supported"),
        (lambda files: files.update({POST: {}}), "postprocessor.json: 'steps' must be a list"),
        (lambda files: files[POST][0].pop("config"), "steps[0]: 'config' is missing"),
        (in_entry(POST, 0, config={}), "steps[0].config: 'norm_map' is missing"),
        (lambda files: files[POST][0].pop("state_file"), "steps[0] has no 'state_file'"),
        (in_entry(POST, 0, state_file="../x.safetensors"), "state_file is '../x.safetensors'; valid"),
        (in_entry(POST, 0, state_file="x.pt"), "state_file is 'x.pt'; valid"),
        (in_entry(POST, 0, state_file="x.safetensors"), "x.safetensors: missing, truncated"),
    ],
)  # fmt: skip
def test_lerobots_faults(tmp_path, change, message):
    with pytest.raises(CheckpointError, match=re.escape(message)):
        read_lerobot(lerobot(tmp_path, change=change), DIMS, STATE)


@pytest.mark.parametrize(
    ("stats", "message"),
    [
        ({}, "postprocessor_step_0.safetensors: action.q01 is missing"),
        ({"action": part(DIMS)}, "preprocessor_step_3.safetensors: observation.state.q01 is missing"),
        ({"action": {"q1": [0.0] * DIMS}}, "action.q01 is missing; did you mean 'q1'?"),
        ({"action": part(6)}, "action.q01 must be at least 7 finite numbers, got shape (6,)"),
        ({"action": part(DIMS) | {"q99": [-9.0] * DIMS}}, "action: q01 is above q99"),
    ],
)
def test_lerobots_faults_in_the_numbers(tmp_path, stats, message):
    with pytest.raises(CheckpointError, match=re.escape(message)):
        read_lerobot(lerobot(tmp_path, stats=stats), DIMS, STATE)


@pytest.mark.parametrize("name", [PRE, POST])
def test_lerobots_missing_and_truncated_files(tmp_path, name):
    folder = lerobot(tmp_path)
    step = folder / (f"{name}_step_3.safetensors" if name == PRE else f"{name}_step_0.safetensors")
    step.write_bytes(step.read_bytes()[:40])
    with pytest.raises(CheckpointError, match=rf"{step.name}: missing, truncated"):
        read_lerobot(folder, DIMS, STATE)
    (folder / f"{name}.json").unlink()
    with pytest.raises(CheckpointError, match=rf"{name}\.json: cannot be read"):
        read_lerobot(folder, DIMS, STATE)
