"""Every built-in stage keeps every promise, and every broken one is caught for what it breaks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.helpers import broken_stages
from tests.helpers.broken_stages import broken
from tests.helpers.tiny_clip import write_clip
from tokenprune.cli import app
from tokenprune.errors import ConfigError
from tokenprune.registry.discovery import Registry
from tokenprune.testing import STAGE_CHECKS, parametrize_with_checks
from tokenprune.testing.conformance import stage_verdict
from tokenprune.testing.stage_subject import subjects

BUILT_IN = sorted(Registry.discover().stages)
BROKEN = broken_stages.registry()


def promises(stage: str, backbones: tuple[str, ...], tmp_path: Path) -> set[str]:
    """Outcomes of every check of a stage on some backbones, none of which fails."""
    # No CLIP comes with the strategy that needs one.
    settings = write_clip(tmp_path) if stage == "trim" else None
    fitting = [one for one in subjects(stage, Registry.discover(), settings) if one.backbone_name in backbones]
    verdicts = [stage_verdict(check, subject) for subject in fitting for check in STAGE_CHECKS]
    assert [one for one in verdicts if one.outcome == "fails"] == []
    return {one.outcome for one in verdicts}


@pytest.mark.parametrize("stage", BUILT_IN)
def test_a_built_in_stage_keeps_every_promise(stage: str, tmp_path: Path) -> None:
    assert "holds" in promises(stage, ("openvla-oft", "pi0"), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("stage", BUILT_IN)
def test_a_built_in_stage_keeps_every_promise_on_the_siblings(stage: str, tmp_path: Path) -> None:
    promises(stage, ("openvla", "pi05"), tmp_path)


@pytest.mark.parametrize("stage", broken(), ids=lambda stage: stage.__name__)
def test_a_broken_stage_is_caught_for_what_it_breaks(stage: type[broken_stages.Sound]) -> None:
    name, why = stage.BREAKS
    (check,) = [check for check in STAGE_CHECKS if check.__name__ == name]
    found = [stage_verdict(check, subject) for subject in subjects(f"broken.{stage.__name__.lower()}", BROKEN)]
    assert any(one.outcome == "fails" and why in one.why for one in found), found


def test_every_check_has_a_stage_that_breaks_it() -> None:
    assert {stage.BREAKS[0] for stage in broken()} == {check.__name__ for check in STAGE_CHECKS}


@parametrize_with_checks("broken.sound", registry=BROKEN)
def test_parametrised(check) -> None:
    check()


def test_a_parametrised_check_fails_with_the_promise() -> None:
    marked = parametrize_with_checks("broken.waits", registry=BROKEN)
    (case,) = [param for param in marked.args[1] if param.id == "broken.waits-openvla-oft-no_query_waits"]
    with pytest.raises(AssertionError, match=r"No query waits for the device\. .*waits for the device"):
        case.values[0]()


def test_the_command_says_what_holds() -> None:
    done = CliRunner().invoke(app, ["check", "head_cache"])
    assert done.exit_code == 0, done.output
    assert "head_cache: keeps every promise; run on pi0, pi05" in done.output
    assert "not on openvla: " in done.output
    assert "it has no cut" in done.output
    assert max(map(len, done.output.splitlines())) <= 80


def test_settings_go_over_what_the_shipped_pipeline_says() -> None:
    for settings in ({"keep": 7}, {"keep": 7, "after": ["embedding"]}, {"rows": "text"}):
        subject = next(subjects("fastv" if "rows" in settings else "divprune", Registry.discover(), settings))
        (stage,) = subject.config.stages
        assert stage.model_dump(mode="json").items() >= settings.items()
    (stage,) = next(subjects("specprune.static", Registry.discover(), {"floor": 2})).config.stages
    assert isinstance(stage.keep, dict), "the rest is the shipped pipeline's"
    with pytest.raises(ConfigError, match=r"divprune: stages\.0.*unknown key 'kep'; did you mean 'keep'"):
        next(subjects("divprune", Registry.discover(), {"kep": 7}))


def test_the_command_configures_the_stage() -> None:
    done = CliRunner().invoke(app, ["check", "trim", "--set", "checkpoint=nowhere.safetensors", "--json"])
    assert done.exit_code == 1
    assert all("there is no file 'nowhere.safetensors'" in one["why"] for one in json.loads(done.output))


def test_what_lacks_a_file_of_the_users_is_refused_not_blamed() -> None:
    done = CliRunner().invoke(app, ["check", "trim"])
    assert done.exit_code == 1
    assert "FAILS" not in done.output
    assert "give its weights" in " ".join(done.output.split())
    assert "not on openvla, openvla-oft, pi0, pi05: " in done.output
    assert "trim: nothing could be checked; --set KEY=VALUE configures it" in done.output
    found = CliRunner().invoke(app, ["check", "trim", "--json"])
    assert (found.exit_code, {one["outcome"] for one in json.loads(found.output)}) == (1, {"refused"})


def test_the_command_says_what_is_broken(tmp_path) -> None:
    plugin = tmp_path / "waiting.py"
    plugin.write_text("""
from tokenprune.stages.config import CutConfig, Keep
from tokenprune.registry.hookspecs import hookimpl
from tokenprune.tokens.proposal import Proposal
from tokenprune.registry.specs import StageSpec
from tokenprune.stages.stage import Stage

class WaitingConfig(CutConfig):
    keep: Keep = 0.5

class Waiting(Stage):
    Config = WaitingConfig

    @hookimpl
    def select_tokens(self, ctx):
        score = ctx.patches.float().mean(-1)
        return Proposal(score=score / float(score.max()))

@hookimpl
def tokenprune_register():
    return [StageSpec("waiting", "selector", "reads a number back", f"{__name__}:Waiting")]
""")
    done = CliRunner().invoke(app, ["check", "waiting", "--plugin", str(plugin)])
    assert done.exit_code == 1
    assert "FAILS  No query waits for the device." in done.output
    assert "waiting: breaks a promise" in done.output
    found = CliRunner().invoke(app, ["check", "waiting", "--plugin", str(plugin), "--json"])
    assert found.exit_code == 1
    assert {one["check"] for one in json.loads(found.output) if one["outcome"] == "fails"} == {"no_query_waits"}
