"""Options that verbs share: declared once, and given to each verb as one object."""

from __future__ import annotations

from collections import defaultdict
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from tokenprune.cli import app
from tokenprune.cli.options import ModelOptions, key_values, takes_model
from tokenprune.errors import ConfigError

MODEL_FLAGS = ("--backbone", "--preset", "--checkpoint", "--option", "--device", "--dtype", "--execution", "--seed")
# Of its own: several backbones in one run, a backbone that must be named, one that need not be.
OTHERWISE = {
    "bench": {"--backbone", "--preset", "--dtype"},
    "verify": {"--backbone"},
    "validate": {"--backbone"},
    "check": {"--backbone"},
}


def one_verb(received: list[tuple[str, ModelOptions, bool]]) -> typer.Typer:
    own = typer.Typer()

    @own.command()
    @takes_model("seed", "backbone", "options")
    def verb(name: Annotated[str, typer.Argument()], *, model: ModelOptions, loud: bool = False) -> None:
        received.append((name, model, loud))

    return own


def test_a_verb_receives_the_model_options_as_one_object() -> None:
    received: list[tuple[str, ModelOptions, bool]] = []
    words = ["x", "--seed", "3", "--backbone", "pi0", "--loud", "--option", "steps=2", "--option", "views=[a]"]
    done = CliRunner().invoke(one_verb(received), words)
    assert done.exit_code == 0, done.output
    ((name, model, loud),) = received
    assert (name, loud) == ("x", True)
    assert model == ModelOptions(backbone="pi0", seed=3, options=["steps=2", "views=[a]"])
    assert model.own() == {"steps": 2, "views": ["a"]}


def test_what_is_left_out_keeps_its_default() -> None:
    received: list[tuple[str, ModelOptions, bool]] = []
    assert CliRunner().invoke(one_verb(received), ["x"]).exit_code == 0
    assert received == [("x", ModelOptions(), False)]


def test_a_verb_offers_the_options_it_names_and_no_other() -> None:
    assert CliRunner().invoke(one_verb([]), ["x", "--device", "cpu"]).exit_code == 2
    printed = CliRunner().invoke(one_verb([]), ["--help"]).output
    assert printed.index("--seed") < printed.index("--backbone") < printed.index("--option") < printed.index("--loud")


def test_a_model_option_is_the_same_in_every_verb() -> None:
    declared: defaultdict[str, set[tuple[str, object]]] = defaultdict(set)
    verbs: defaultdict[str, set[str]] = defaultdict(set)
    for verb, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        for parameter in command.params:
            for flag in set(parameter.opts) & set(MODEL_FLAGS) - OTHERWISE.get(verb, set()):
                declared[flag].add((parameter.help, str(parameter.default)))
                verbs[flag].add(verb)
    assert {flag: len(forms) for flag, forms in declared.items()} == dict.fromkeys(MODEL_FLAGS, 1)
    assert verbs["--seed"] == {"run", "compare", "eval", "bench"}
    assert verbs["--option"] == {"run", "compare", "eval", "bench", "explain", "verify", "validate", "check"}


@pytest.mark.parametrize("pair", ["proprio", "=1", "views=[a"])
def test_a_pair_that_cannot_be_read_is_refused(pair: str) -> None:
    with pytest.raises(ConfigError, match="--option"):
        key_values("--option", [pair])
