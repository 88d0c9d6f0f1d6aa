"""Files against parameters: every tensor accounted for, then read or shared; and the config of a loaded model."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from tests.helpers.release_format import CONFIG
from tests.helpers.tiny_oft import tiny_config
from tokenprune.errors import CheckpointError
from tokenprune_adapters.backbones.prismatic.release import parse_config, prismatic_body
from tokenprune_adapters.weights.folder import config_mapping
from tokenprune_adapters.weights.inventory import Inventory, take_inventory
from tokenprune_adapters.weights.loading import load_weights, share_weights
from tokenprune_adapters.weights.tensor_files import StoredTensor, stored_module, stored_safetensors

CPU = torch.device("cpu")
FOLDER = Path("folder")
UNUSED = re.compile(r"old\.(x|y\.z)")


def small_model(device="meta"):
    with torch.device(device):
        return nn.ModuleDict({"a": nn.Linear(3, 2), "b": nn.Linear(2, 4, bias=False)})


def values(**shapes):
    generator = torch.Generator().manual_seed(1)
    return {key.replace("__", "."): torch.randn(shape, generator=generator) for key, shape in shapes.items()}


def whole():
    return values(a__weight=(2, 3), a__bias=(2,), b__weight=(4, 2))


def module(state, where="folder/x.pt"):
    return stored_module(state, where)


def rejected(inventory, *fragments):
    with pytest.raises(CheckpointError) as caught:
        inventory.check()
    assert [fragment for fragment in fragments if fragment not in str(caught.value)] == []


def untouchable(file="x.pt", key="k", shape=(2, 2), dtype=torch.float32):
    def fetch():
        raise AssertionError("the values were read")

    return StoredTensor(Path(file), key, shape, dtype, fetch)


# Taking stock.


@given(
    st.dictionaries(
        st.sampled_from([f"p{n}" for n in range(6)]), st.sampled_from(["fits", "shape", "absent"]), min_size=1
    ),
    st.sets(st.sampled_from(["old.x", "old.y.z"])),
    st.sets(st.sampled_from(["stray", "p9", "old", "old.x_scale"])),
)
def test_every_tensor_and_parameter_is_in_one_place(parameters, known, strays):
    wanted = {name: torch.empty(2, 2, device="meta") for name in parameters}
    stored = {f"net.{name}": untouchable(key=f"net.{name}") for name, how in parameters.items() if how == "fits"}
    stored |= {
        f"net.{name}": untouchable(key=f"net.{name}", shape=(2, 2, 1))
        for name, how in parameters.items()
        if how == "shape"
    }
    stored |= {key: untouchable(key=key) for key in (*known, *strays)}
    found = take_inventory(
        wanted, stored, FOLDER, lambda key: key.removeprefix("net.") if key.startswith("net.") else None, UNUSED
    )
    by = {how: {name for name, state in parameters.items() if state == how} for how in ("fits", "shape", "absent")}
    assert {name: tensor.key for name, tensor in found.tensors.items()} == {name: f"net.{name}" for name in by["fits"]}
    assert {tensor.key for tensor, shape in found.misshapen if shape == (2, 2)} == {f"net.{n}" for n in by["shape"]}
    assert {name for _, name in found.missing} == by["absent"]
    assert {tensor.key for tensor in found.unused} == known
    assert {tensor.key for tensor in found.unmapped} == strays
    assert sorted(tensor.key for tensor in found.stored) == sorted(stored)
    if strays or by["absent"] or by["shape"]:
        rejected(found)
    else:
        found.check()


def test_each_fault_names_file_and_keys():
    wanted = small_model().state_dict()
    state = whole()
    extra = {f"c{n}": torch.zeros(1) for n in range(7)}
    rejected(
        take_inventory(wanted, module(state | extra), FOLDER),
        "folder/x.pt: the model has no place for 'c0', 'c1', 'c2', 'c3', 'c4' and 2 more",
    )
    del state["a.bias"]
    rejected(take_inventory(wanted, module(state), FOLDER), "folder: the model also needs 'a.bias'")
    state["a.bias"] = torch.zeros(2, 1)
    rejected(
        take_inventory(wanted, module(state), FOLDER), "folder/x.pt: 'a.bias' has shape [2, 1]; the model wants [2]"
    )


def test_one_parameter_from_two_keys_names_both():
    stored = {"a.bias": untouchable("one.pt", "a.bias"), "A.bias": untouchable("two.pt", "A.bias")}
    wanted = {"a.bias": torch.empty(2, 2)}
    with pytest.raises(CheckpointError, match=r"two\.pt: 'A\.bias' and 'a\.bias' of one\.pt are both .*'a\.bias'"):
        take_inventory(wanted, stored, FOLDER, str.lower)


@pytest.mark.parametrize(
    ("held", "taken", "unused"),
    [
        (("embed",), "embed", []),
        (("head",), "head", []),
        (("embed", "head"), "embed", ["head"]),
        (("head", "embed"), "embed", ["head"]),
        ((), None, []),
    ],
)
def test_a_tied_key_stands_in_where_its_parameter_is_absent(held, taken, unused):
    stored = {key: untouchable(key=key) for key in held}
    found = take_inventory({"embed": torch.empty(2, 2)}, stored, FOLDER, ties={"embed": "head"})
    assert [tensor.key for tensor in found.tensors.values()] == ([taken] if taken else [])
    assert [tensor.key for tensor in found.unused] == unused
    assert [name for _, name in found.missing] == ([] if taken else ["embed"])
    assert found.unmapped == ()


def test_a_tied_key_must_have_the_shape_too():
    found = take_inventory(
        {"embed": torch.empty(2, 2)}, {"head": untouchable(key="head", shape=(3, 2))}, FOLDER, ties={"embed": "head"}
    )
    rejected(found, "x.pt: 'head' has shape [3, 2]; the model wants [2, 2]")


def test_parts_are_joined_under_their_prefix():
    model, state = small_model(), whole()
    one = {"weight": state["a.weight"], "bias": state["a.bias"]}
    parts = [
        take_inventory(model["a"].state_dict(), module(one, "one.pt"), Path("one.pt")).under("a."),
        take_inventory(model["b"].state_dict(), module({"weight": state["b.weight"]}), FOLDER).under("b."),
    ]
    joined = parts[0] + parts[1]
    load_weights(model, joined, CPU, torch.float32)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    with pytest.raises(CheckpointError, match=r"one\.pt: 'weight' and 'weight' of one\.pt are both the model's 'a\."):
        joined + take_inventory({"weight": torch.empty(2, 3)}, module(one, "one.pt"), FOLDER).under("a.")


@pytest.mark.parametrize("fault", ["stray", "missing", "shape"])
def test_a_fault_of_a_part_is_told_in_the_terms_of_its_file(fault):
    state = {"weight": torch.zeros(2, 3), "bias": torch.zeros(2)}
    if fault == "stray":
        state["c"] = torch.zeros(1)
    elif fault == "missing":
        del state["bias"]
    else:
        state["bias"] = torch.zeros(3)
    wanted = small_model()["a"].state_dict()
    part = take_inventory(wanted, module(state, "part.pt"), Path("part.pt")).under("a.")
    said = {"stray": "no place for 'c'", "missing": "needs 'bias'", "shape": "'bias' has shape [3]"}[fault]
    for joined in (Inventory({}) + part, part + Inventory({})):
        rejected(joined, "part.pt: ", said)


def test_findings_count_and_name_everything(tmp_path):
    save_file({"p": torch.zeros(2, 2), "q": torch.zeros(3), "old.x": torch.zeros(1)}, tmp_path / "model.safetensors")
    wanted = {"p": torch.empty(2, 2), "q": torch.empty(2), "r": torch.empty(1), "h.w": torch.empty(1)}
    body = take_inventory({k: wanted[k] for k in "pqr"}, stored_safetensors(tmp_path), tmp_path, unused=UNUSED)
    head = module({"s": torch.zeros(1, dtype=torch.bfloat16)}, "there/head.pt")
    found = (body + take_inventory({"w": wanted["h.w"]}, head, Path("there/head.pt")).under("h.")).findings(["data"], 8)
    assert not found.clean
    assert found.files == ("head.pt", "model.safetensors")
    assert found.dtypes == {"float32": 3, "bfloat16": 1}
    assert (found.unused, found.unmapped) == (("model.safetensors: old.x",), ("head.pt: s",))
    assert found.missing == ("r", "head.pt: w")
    assert found.misshapen == ("model.safetensors: q has shape [3]; the model wants [2]",)
    assert (found.statistics, found.state_size) == (("data",), 8)


# Reading and sharing.


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_filled_from_files(stored, dtype, tmp_path):
    state = {key: value.to(stored) for key, value in whole().items()}
    save_file(state, tmp_path / "model.safetensors")
    held = stored_safetensors(tmp_path)
    assert {key: tensor.dtype for key, tensor in held.items()} == dict.fromkeys(state, stored)
    model = small_model()
    load_weights(model, take_inventory(model.state_dict(), held, tmp_path), CPU, dtype)
    for name, value in model.named_parameters():
        assert value.dtype == dtype
        assert torch.equal(value, state[name].to(dtype))


def test_nothing_is_read_or_assigned_where_something_is_wrong():
    model = small_model()
    found = take_inventory(model.state_dict(), {"a.bias": untouchable(key="a.bias", shape=(2,))}, FOLDER)
    for use in (lambda: load_weights(model, found, CPU, torch.float32), lambda: share_weights(model, found)):
        with pytest.raises(CheckpointError, match=r"needs 'a\.weight', 'b\.weight'"):
            use()
    assert all(value.is_meta for value in model.parameters())


def test_adopted_weights_are_the_loaded_models_own():
    source = small_model("cpu").half()
    model = small_model()
    share_weights(model, take_inventory(model.state_dict(), module(source.state_dict()), FOLDER))
    model.requires_grad_(False)
    for name, value in model.named_parameters():
        theirs = source.get_parameter(name)
        assert value.data_ptr() == theirs.data_ptr()
        assert value.dtype == theirs.dtype
        assert theirs.requires_grad
    assert model["b"].weight.dtype == torch.float16
    with torch.no_grad():
        source["a"].bias.fill_(7)
    assert model["a"].bias.tolist() == [7, 7]


def test_parameters_may_be_given_in_place_of_a_state_dict():
    source, model = small_model("cpu"), small_model()
    share_weights(model, take_inventory(model.state_dict(), module(dict(source.named_parameters())), FOLDER))
    model.requires_grad_(False)
    assert all(value.requires_grad for value in source.parameters())


def test_a_model_of_several_types_is_refused():
    source, model = small_model("cpu"), small_model()
    source["b"].half()
    with pytest.raises(
        CheckpointError, match=r"'a\.weight' is torch.float32, 'b\.weight' is torch.float16; valid: one"
    ):
        share_weights(model, take_inventory(model.state_dict(), module(source.state_dict()), FOLDER))
    assert model["a"].weight.is_meta


def test_a_model_spread_over_devices_is_refused():
    stored = module(whole())
    stored["b.weight"] = StoredTensor(
        Path("x.pt"), "b.weight", (4, 2), torch.float32, lambda: torch.empty(4, 2, device="meta")
    )
    model = small_model()
    with pytest.raises(CheckpointError, match=r"'a\.weight' is on cpu, 'b\.weight' on meta"):
        share_weights(model, take_inventory(model.state_dict(), stored, FOLDER))
    assert model["a"].weight.is_meta


@pytest.mark.parametrize(
    ("state", "fragments"),
    [
        ({"w": torch.zeros(2, dtype=torch.int8)}, ["model: 'w' is torch.int8", "bfloat16"]),
        ({"w": torch.zeros(2, device="meta")}, ["'w'", "meta", "with values"]),
        ({"w": torch.zeros(2, 2).to_sparse()}, ["'w'", "sparse"]),
        ({"w": 3}, ["'w' is a int"]),
        ({3: torch.zeros(1)}, ["3 is a Tensor", "name"]),
    ],
)
def test_what_a_loaded_model_cannot_share(state, fragments):
    with pytest.raises(CheckpointError) as caught:
        stored_module(state, "model")
    assert [fragment for fragment in fragments if fragment not in str(caught.value)] == []


# The config of a loaded model.


def test_a_loaded_models_config_reads_as_its_file_does():
    from transformers import LlamaConfig, PretrainedConfig

    text = {key: value for key, value in CONFIG["text_config"].items() if key not in ("model_type", "torch_dtype")}
    fields = {key: value for key, value in CONFIG.items() if key not in ("model_type", "torch_dtype", "text_config")}

    class Released(PretrainedConfig):
        model_type = "openvla"

    live = Released(**fields, text_config=LlamaConfig(**text))
    for given_config in (live, live.to_dict(), CONFIG):
        fields = parse_config(config_mapping(given_config), "the model")
        assert prismatic_body(fields, "the model", causal=False) == tiny_config().body
        assert prismatic_body(fields, "the model", causal=True).decoder.causal
    assert parse_config(config_mapping(live), "the model").norm_stats == CONFIG["norm_stats"]


@pytest.mark.parametrize(
    ("config", "fragments"),
    [
        ({**CONFIG, "model_type": "pi0"}, ["the model: 'model_type' is 'pi0'", "looks like a checkpoint of 'pi0'"]),
        ({**CONFIG, "image_sizes": None}, ["the model: 'image_sizes' is None"]),
        (SimpleNamespace(to_dict=lambda: [1]), ["SimpleNamespace", "to_dict"]),
        (3, ["int", "mapping"]),
    ],
)
def test_faults_of_a_loaded_models_config(config, fragments):
    with pytest.raises(CheckpointError) as caught:
        parse_config(config_mapping(config), "the model")
    assert [fragment for fragment in fragments if fragment not in str(caught.value)] == []
