"""All checks of a stage or a backbone, for the command line and for test files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

from tokenprune.errors import CapabilityError, LayoutError, MissingError, TokenPruneError
from tokenprune.registry.discovery import Registry
from tokenprune.testing.backbone_checks import BACKBONE_CHECKS
from tokenprune.testing.backbone_subject import BackboneSubject, backbone_subject
from tokenprune.testing.stage_checks import STAGE_CHECKS
from tokenprune.testing.stage_subject import StageSubject, subjects
from tokenprune.testing.verdicts import Verdict, demand, promise_of, verdict


def check_stage(stage: str, registry: Registry, settings: Mapping[str, Any] | None = None) -> Iterator[Verdict]:
    """Every check on every backbone, in order.

    Args:
        stage: Its name.
        registry: Installed plugins.
        settings: Keys of the stage's configuration, over what a shipped pipeline or its defaults say; for a stage that
            needs what nobody can ship, such as a checkpoint.

    Raises:
        PluginError: If there is no such stage.
        ConfigError: If neither a shipped pipeline nor the defaults configure it, or not with these settings.
    """
    for subject in subjects(stage, registry, settings):
        for check in STAGE_CHECKS:
            yield stage_verdict(check, subject)


def check_backbone(
    backbone: str,
    registry: Registry,
    preset: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Iterator[Verdict]:
    """Every check of a backbone, in order, on the CPU.

    Args:
        backbone: Its name.
        registry: Installed plugins.
        preset: Which of its presets; `tiny` where it has one, else its first.
        options: The backbone's own options.

    Raises:
        PluginError: If there is no such backbone.
        ConfigError: If it has no preset, or the preset or an option is wrong.
    """
    subject = backbone_subject(backbone, registry, preset, options)
    # What cannot be built breaks no promise: the preset or an option is wrong.
    _ = subject.backbone
    for check in BACKBONE_CHECKS:
        yield verdict(check, subject, backbone)


def stage_verdict(check: Callable[[StageSubject], None], subject: StageSubject) -> Verdict:
    """Run one check of a stage, unless the backbone cannot run it."""
    unbound = partial(Verdict, check.__name__, promise_of(check), subject.backbone_name)
    try:
        subject.policy()
    except (CapabilityError, LayoutError, MissingError) as error:
        return unbound("refused", str(error))
    except TokenPruneError as error:
        return unbound("fails", str(error))
    return verdict(check, subject, subject.backbone_name)


def parametrize_with_checks(
    *stages: str, registry: Registry | None = None, settings: Mapping[str, Any] | None = None
) -> Callable[[Any], Any]:
    """Parametrise a pytest function with one `check` to call for each stage, backbone and promise.

    A check that does not apply, or that the backbone cannot run, passes; `tokenprune check` says why. `settings` are
    keys of the stages' configuration.
    """
    found = registry or Registry.discover()

    def demanded(check: Callable[[StageSubject], None], subject: StageSubject) -> None:
        demand(stage_verdict(check, subject))

    return _parametrize(
        (f"{stage}-{subject.backbone_name}-{check.__name__}", partial(demanded, check, subject))
        for stage in stages
        for subject in subjects(stage, found, settings)
        for check in STAGE_CHECKS
    )


def parametrize_with_backbone_checks(
    *backbones: str,
    registry: Registry | None = None,
    preset: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[[Any], Any]:
    """Parametrise a pytest function with one `check` to call for each backbone and promise.

    A check that does not apply passes; `tokenprune check --backbone` says why. `preset` and `options` are as in
    `check_backbone`.
    """
    found = registry or Registry.discover()

    def demanded(check: Callable[[BackboneSubject], None], subject: BackboneSubject) -> None:
        demand(verdict(check, subject, subject.name))

    made = [backbone_subject(name, found, preset, options) for name in backbones]
    return _parametrize(
        (f"{subject.name}-{check.__name__}", partial(demanded, check, subject))
        for subject in made
        for check in BACKBONE_CHECKS
    )


def _parametrize(cases: Iterable[tuple[str, Callable[[], None]]]) -> Callable[[Any], Any]:
    import pytest

    return pytest.mark.parametrize("check", [pytest.param(case, id=name) for name, case in cases])
