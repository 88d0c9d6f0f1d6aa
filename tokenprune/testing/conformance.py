"""All checks of a stage on all backbones, for the command line and for test files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from tokenprune.errors import CapabilityError, LayoutError, MissingError, TokenPruneError
from tokenprune.registry.discovery import Registry
from tokenprune.testing.checks import CHECKS, CheckFailed, NotApplicable
from tokenprune.testing.subject import Subject, subjects

Outcome = Literal["holds", "fails", "does not apply", "refused"]


@dataclass(frozen=True)
class Verdict:
    """What came of one check on one backbone.

    Attributes:
        check: Name of the check.
        promise: What holds if it holds.
        backbone: Name of the backbone.
        outcome: `refused` where the backbone cannot offer what the stage requires, or the stage lacks what only the
            user can give.
        why: What was found, or why it does not apply.
    """

    check: str
    promise: str
    backbone: str
    outcome: Outcome
    why: str = ""


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
        for check in CHECKS:
            yield verdict(check, subject)


def verdict(check: Callable[[Subject], None], subject: Subject) -> Verdict:
    """Run one check."""
    promise = (check.__doc__ or "").strip().splitlines()[0]
    said = partial(Verdict, check.__name__, promise, subject.backbone_name)
    try:
        subject.policy()
    except (CapabilityError, LayoutError, MissingError) as error:
        return said("refused", str(error))
    except TokenPruneError as error:
        return said("fails", str(error))
    try:
        check(subject)
    except NotApplicable as reason:
        return said("does not apply", str(reason))
    except (CheckFailed, TokenPruneError) as error:
        return said("fails", str(error))
    return said("holds")


def parametrize_with_checks(
    *stages: str, registry: Registry | None = None, settings: Mapping[str, Any] | None = None
) -> Callable[[Any], Any]:
    """Parametrise a pytest function with one `check` to call for each stage, backbone and promise.

    A check that does not apply, or that the backbone cannot run, passes; `tokenprune check` says why. `settings` are
    keys of the stages' configuration.
    """
    import pytest

    found = registry or Registry.discover()
    cases = [(check, subject) for stage in stages for subject in subjects(stage, found, settings) for check in CHECKS]
    return pytest.mark.parametrize(
        "check",
        [pytest.param(partial(_demand, *case), id=_name(*case)) for case in cases],
    )


def _name(check: Callable[[Subject], None], subject: Subject) -> str:
    return f"{subject.stage}-{subject.backbone_name}-{check.__name__}"


def _demand(check: Callable[[Subject], None], subject: Subject) -> None:
    found = verdict(check, subject)
    assert found.outcome != "fails", f"{found.promise} {found.why}"
