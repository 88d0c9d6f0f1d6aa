"""How every test runs: the same hypothesis examples each time, and one thread."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import settings

from tokenprune.compat import mend_torchvision

# The tensors here are tiny: on a busy machine, waiting for a second thread costs ten times what it saves.
torch.set_num_threads(1)

# Tests import transformers' models themselves, beside whatever torchvision is installed.
mend_torchvision()

# "ci" is hypothesis's own name for a profile that draws the same examples every time; here it draws fewer.
settings.register_profile("ci", derandomize=True, deadline=None, database=None, max_examples=50)
settings.register_profile("nightly", deadline=None, database=None, print_blob=True, max_examples=1000)
settings.load_profile("ci")


@pytest.hookimpl(trylast=True)
def pytest_configure() -> None:
    """Let HYPOTHESIS_PROFILE win over the profile named in pyproject.toml."""
    if profile := os.environ.get("HYPOTHESIS_PROFILE"):
        settings.load_profile(profile)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """A test of what only a GPU shows is never passed over for want of one: it fails."""
    if item.get_closest_marker("cuda") and not torch.cuda.is_available():
        pytest.fail("this test was asked for with `-m cuda`, and torch sees no CUDA device", pytrace=False)
