"""LIBERO (arXiv 2306.03310) with the conventions of OpenVLA-OFT's evaluation."""

from __future__ import annotations

import os
import sys

if sys.platform == "linux":
    # Renders without a window; MuJoCo reads it when it is first imported.
    os.environ.setdefault("MUJOCO_GL", "egl")
