"""LIBERO (arXiv 2306.03310) with the conventions of OpenVLA-OFT's evaluation in it."""

from __future__ import annotations

import os
import sys

if sys.platform == "linux":
    # Software or GPU, but never a window; MuJoCo reads it when it is first imported.
    os.environ.setdefault("MUJOCO_GL", "egl")
