"""For plugin authors: every promise a stage must keep, as checks that run on tiny backbones.

`tokenprune check NAME` runs them from the command line; in a test file,

    from tokenprune.testing import parametrize_with_checks

    @parametrize_with_checks("my_stage")
    def test_my_stage(check):
        check()
"""

from tokenprune.testing.checks import CHECKS, CheckFailed, NotApplicable
from tokenprune.testing.conformance import Verdict, check_stage, parametrize_with_checks
from tokenprune.testing.subject import Subject

__all__ = [
    "CHECKS",
    "CheckFailed",
    "NotApplicable",
    "Subject",
    "Verdict",
    "check_stage",
    "parametrize_with_checks",
]
