"""Every promise a plugin must keep, as checks that run on tiny models: those of a stage, and those of a backbone.

`tokenprune check NAME` and `tokenprune check --backbone NAME` run them from the command line; in a test file,

    from tokenprune.testing import parametrize_with_checks

    @parametrize_with_checks("my_stage")
    def test_my_stage(check):
        check()

and `parametrize_with_backbone_checks("my_backbone")` for a backbone.
"""

from tokenprune.testing.backbone_checks import BACKBONE_CHECKS
from tokenprune.testing.backbone_subject import BackboneSubject
from tokenprune.testing.conformance import (
    check_backbone,
    check_stage,
    parametrize_with_backbone_checks,
    parametrize_with_checks,
)
from tokenprune.testing.stage_checks import STAGE_CHECKS
from tokenprune.testing.stage_subject import StageSubject
from tokenprune.testing.verdicts import CheckFailed, NotApplicable, Verdict

__all__ = [
    "BACKBONE_CHECKS",
    "STAGE_CHECKS",
    "BackboneSubject",
    "CheckFailed",
    "NotApplicable",
    "StageSubject",
    "Verdict",
    "check_backbone",
    "check_stage",
    "parametrize_with_backbone_checks",
    "parametrize_with_checks",
]
