"""A torchvision that was built for another torch is mended, and nothing else is touched."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

# What the real package runs into beside a torch it was not built for: torch itself raises the error.
BUILT_FOR_ANOTHER = """
import torch
import torchvision.extension
torch._C._dispatch_has_kernel_for_dispatch_key("torchvision::nms", "Meta")
torch._C._dispatch_has_kernel_for_dispatch_key("torchvision::qnms", "Meta")
whole = torchvision.extension.loaded
"""

REPORT = """
import sys, traceback
from tokenprune.compat import _declared, mend_torchvision
print("mended", mend_torchvision(), mend_torchvision(), len(_declared))
try:
    import torchvision
    print("whole", torchvision.whole)
except Exception as error:
    print(type(error).__name__, error)
"""


def run(code: str, folder: Path, package: str | None = None) -> str:
    """Standard output of a fresh interpreter that finds this torchvision first."""
    if package is not None:
        (folder / "torchvision").mkdir()
        (folder / "torchvision" / "__init__.py").write_text(package)
        (folder / "torchvision" / "extension.py").write_text("loaded = True\n")
    code = f"import sys; sys.path.insert(0, {str(folder)!r})\n{code}"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_missing_operators_are_declared_once(tmp_path: Path) -> None:
    assert run(REPORT, tmp_path, BUILT_FOR_ANOTHER) == "mended True True 1\nwhole True\n"


def test_a_declared_operator_still_cannot_be_called(tmp_path: Path) -> None:
    called = """
import torch
try:
    torch.ops.torchvision.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
except NotImplementedError as error:
    print(error)
"""
    assert "Could not run 'torchvision::nms'" in run(REPORT + called, tmp_path, BUILT_FOR_ANOTHER)


@pytest.mark.parametrize("package", ["raise RuntimeError('no such file')", "import no_such_package_anywhere"])
def test_another_failure_is_left_to_who_needs_it(tmp_path: Path, package: str) -> None:
    mended, then = run(REPORT, tmp_path, package).splitlines()
    assert mended == "mended False False 0"
    assert then in ("RuntimeError no such file", "ModuleNotFoundError No module named 'no_such_package_anywhere'")


def test_one_that_works_is_left_alone(tmp_path: Path) -> None:
    assert run(REPORT, tmp_path, "whole = True\n") == "mended False False 0\nwhole True\n"


def test_without_one_nothing_is_imported(tmp_path: Path) -> None:
    absent = "import sys\nsys.modules['torchvision'] = None\n"
    assert run(absent + REPORT, tmp_path).startswith("mended False False 0\nModuleNotFoundError")


def test_the_installed_one_serves_transformers_and_open_clip(tmp_path: Path) -> None:
    code = """
from tokenprune.compat import mend_torchvision
mend_torchvision()
from transformers import LlamaModel, PI0ForConditionalGeneration, SiglipVisionModel
import open_clip
print(LlamaModel.__name__, open_clip.CLIP.__name__)
"""
    assert run(code, tmp_path) == "LlamaModel CLIP\n"


def test_a_policy_is_made_beside_it(tmp_path: Path) -> None:
    # Nobody has mended anything before.
    code = """
import tokenprune
for backbone in ("openvla-oft", "pi0"):
    print(tokenprune.load(backbone, preset="tiny").backbone.info.name)
"""
    assert run(code, tmp_path, None) == "openvla-oft\npi0\n"
