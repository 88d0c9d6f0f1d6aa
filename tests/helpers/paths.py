"""Where things lie in this checkout."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
EPISODE = ROOT / "adapters/tokenprune_adapters/episodes/libero_spatial.npz"
MINI_POLICY = ROOT / "examples" / "mini_policy"
TOOLS = ROOT / "tools"
