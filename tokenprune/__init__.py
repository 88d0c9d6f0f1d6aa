"""Visual-token pruning for vision-language-action policies, as plugins.

Importing this package imports no torch: the names below load on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from tokenprune.episode import load_episode as load_episode
    from tokenprune.hookspecs import hookimpl as hookimpl
    from tokenprune.loading import from_module as from_module
    from tokenprune.loading import load as load
    from tokenprune.policy import Policy as Policy
    from tokenprune.selection import Proposal as Proposal

_LAZY = {
    "load": "tokenprune.loading",
    "from_module": "tokenprune.loading",
    "Policy": "tokenprune.policy",
    "Proposal": "tokenprune.selection",
    "hookimpl": "tokenprune.hookspecs",
    "load_episode": "tokenprune.episode",
}
__all__ = ["Policy", "Proposal", "__version__", "from_module", "hookimpl", "load", "load_episode"]


def __getattr__(name: str) -> Any:  # noqa: ANN401 - the module protocol
    if name not in _LAZY:
        raise AttributeError(f"module 'tokenprune' has no attribute '{name}'")
    import importlib

    return getattr(importlib.import_module(_LAZY[name]), name)
