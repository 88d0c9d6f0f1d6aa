"""Every built-in backbone keeps every promise, and every broken one is caught for what it breaks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from tests.helpers import broken_backbones
from tests.helpers.broken_backbones import broken
from tokenprune.cli import app
from tokenprune.errors import ConfigError, PluginError
from tokenprune.loading import from_module
from tokenprune.registry.discovery import Registry
from tokenprune.registry.plugin_checks import Owner
from tokenprune.registry.specs import BackboneSpec
from tokenprune.testing import BACKBONE_CHECKS, check_backbone, parametrize_with_backbone_checks
from tokenprune.testing.backbone_subject import backbone_subject
from tokenprune.testing.verdicts import verdict

BUILT_IN = sorted(Registry.discover().backbones)
BROKEN = broken_backbones.registry()

# What changes the sequence, the passes or the head, besides the presets as they are.
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("openvla", {"restrict": False, "prompt": "vicuna"}),
    ("openvla-oft", {"head": "diffusion", "steps": 4}),
    ("openvla-oft", {"head": "discrete", "restrict": True}),
    ("openvla-oft", {"film": True, "constants": "aloha"}),
    ("openvla-oft", {"proprio": False, "views": ["front"]}),
    ("pi0", {"views": ["front"], "horizon": 4, "steps": 3, "state_size": 6, "dims": 9}),
    ("pi05", {"views": ["front"], "horizon": 4, "steps": 3, "state_size": 6, "dims": 9}),
]

HIDING = """
from dataclasses import replace

from tokenprune import BackboneSpec, hookimpl
from tokenprune_adapters.backbones.openvla.backbone import OpenVLA, OpenVLASetup
from tokenprune_adapters.backbones.openvla.factory import OpenVLAFactory

class Hiding(OpenVLA):
    def infer(self, inputs, query):
        return super().infer(inputs, query).nan_to_num()

class Factory:
    @staticmethod
    def describe(preset, checkpoint, options):
        described = OpenVLAFactory.describe(preset, checkpoint, options)
        return replace(described, info=replace(described.info, name="hiding"))

    @staticmethod
    def build(*given):
        made = OpenVLAFactory.build(*given)
        setup = OpenVLASetup(made.config, made.tokenizer, made.statistics)
        return Hiding(setup, made.model, replace(made.info, name="hiding"))

@hookimpl
def tokenprune_register():
    return [BackboneSpec("hiding", "turns NaN into actions", f"{__name__}:Factory", {"tiny": "untrained"})]
"""


@pytest.fixture
def plugin(tmp_path: Path) -> Path:
    """A file with a backbone that neither reads checkpoints nor adopts models."""
    path = tmp_path / "hiding.py"
    path.write_text(HIDING)
    return path


@parametrize_with_backbone_checks(*BUILT_IN)
def test_a_built_in_backbone_keeps_every_promise(check: Any) -> None:
    check()


@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_so_does_each_of_its_variants(name: str, options: dict[str, Any]) -> None:
    verdicts = list(check_backbone(name, Registry.discover(), options=options))
    assert [one for one in verdicts if one.outcome != "holds"] == []
    assert len(verdicts) == len(BACKBONE_CHECKS)


@pytest.mark.slow
def test_trained_weights_do_not_hang_on_a_seed() -> None:
    verdicts = {one.check: one for one in check_backbone("openvla-oft", Registry.discover(), "mini")}
    seed = verdicts.pop("the_seed_decides_the_weights")
    assert (seed.outcome, seed.why) == ("does not apply", "its weights are trained")
    assert {one.outcome for one in verdicts.values()} == {"holds"}


@parametrize_with_backbone_checks("broken.sound", registry=BROKEN)
def test_the_sound_one_keeps_every_promise(check: Any) -> None:
    check()


@pytest.mark.parametrize("backbone", broken(), ids=lambda backbone: backbone.__name__)
def test_a_broken_backbone_is_caught_for_what_it_breaks(backbone: type[broken_backbones.Sound]) -> None:
    name, why = backbone.BREAKS
    (check,) = [check for check in BACKBONE_CHECKS if check.__name__ == name]
    subject = backbone_subject(f"broken.{backbone.__name__.lower()}", BROKEN)
    found = verdict(check, subject, subject.name)
    assert found.outcome == "fails"
    assert why in found.why


def test_every_check_has_a_backbone_that_breaks_it() -> None:
    assert {backbone.BREAKS[0] for backbone in broken()} == {check.__name__ for check in BACKBONE_CHECKS}


def test_a_parametrised_check_fails_with_the_promise() -> None:
    marked = parametrize_with_backbone_checks("broken.hidesnan", registry=BROKEN)
    (case,) = [param for param in marked.args[1] if param.id == "broken.hidesnan-broken_states_are_no_action"]
    with pytest.raises(AssertionError, match=r"never become an action\. hidden states that are all nan"):
        case.values[0]()


def test_what_cannot_be_built_breaks_no_promise() -> None:
    with pytest.raises(PluginError, match="no backbone is called 'openvla-otf'; did you mean 'openvla-oft'"):
        next(check_backbone("openvla-otf", Registry.discover()))
    with pytest.raises(ConfigError, match="has no preset 'tinny'; did you mean 'tiny'"):
        next(check_backbone("openvla", Registry.discover(), "tinny"))
    with pytest.raises(ConfigError, match="has no option 'heads'; did you mean 'head'"):
        next(check_backbone("openvla-oft", Registry.discover(), options={"heads": "l1"}))
    spec = BackboneSpec("bare", "for tests", f"{broken_backbones.__name__}:Sound")
    found = Registry().with_specs(spec, owner=Owner("tests", "0", __name__))
    with pytest.raises(ConfigError, match="'bare' has no preset, and checks build one; name one in its BackboneSpec"):
        next(check_backbone("bare", found))


def test_the_command_says_what_holds() -> None:
    done = CliRunner().invoke(app, ["check", "--backbone", "openvla", "--option", "restrict=false"])
    assert done.exit_code == 0, done.output
    assert "holds  No query waits for the device.\n" in done.output
    assert "openvla: keeps every promise; run with preset tiny" in done.output
    assert max(map(len, done.output.splitlines())) <= 80


def test_the_command_says_what_is_broken(plugin: Path) -> None:
    words = ["check", "--backbone", "hiding", "--plugin", str(plugin)]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 1
    assert "FAILS  Hidden states that are NaN or infinite never become an action.\n" in done.output
    assert "       hidden states that are all nan become finite actions\n" in done.output
    assert "hiding: breaks a promise; run with preset tiny" in done.output
    found = CliRunner().invoke(app, [*words, "--json", "--preset", "tiny"])
    assert found.exit_code == 1
    assert {one["check"] for one in json.loads(found.output) if one["outcome"] == "fails"} == {
        "broken_states_are_no_action"
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "name a stage, or a backbone with --backbone"),
        (["fastv", "--backbone", "openvla"], "name a stage, or a backbone with --backbone, not both"),
        (["fastv", "--preset", "tiny"], "--preset belongs to --backbone"),
        (["fastv", "--option", "a=1"], "--option belongs to --backbone"),
        (["--backbone", "openvla", "--set", "keep=1"], "--set belongs to a stage"),
    ],
)
def test_a_stage_or_a_backbone(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CliRunner().invoke(app, ["check", *words], catch_exceptions=False)


def test_a_backbone_may_have_no_checkpoints_and_adopt_no_model(plugin: Path) -> None:
    words = ["verify", "x", "--backbone", "hiding", "--plugin", str(plugin)]
    with pytest.raises(PluginError, match=r"backbone 'hiding' of .*hiding\.py .* cannot verify checkpoints"):
        CliRunner().invoke(app, words, catch_exceptions=False)
    found = Registry.discover(plugin_files=(plugin,))
    with pytest.raises(PluginError, match=r"backbone 'hiding' of .*hiding\.py .* cannot adopt a live model"):
        from_module(torch.nn.Linear(1, 1), "hiding", registry=found)
