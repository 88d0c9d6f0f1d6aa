"""Visual-token pruning for vision-language-action policies, as plugins.

Importing this package imports no torch: the names below load on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tokenprune._version import __version__ as __version__

if TYPE_CHECKING:
    from tokenprune.compare.episode import load_episode as load_episode
    from tokenprune.loading import from_module as from_module
    from tokenprune.loading import load as load
    from tokenprune.policy import Policy as Policy
    from tokenprune.registry.hookspecs import hookimpl as hookimpl
    from tokenprune.tokens.proposal import Proposal as Proposal

_LAZY = {
    "load": "tokenprune.loading",
    "from_module": "tokenprune.loading",
    "Policy": "tokenprune.policy",
    "Proposal": "tokenprune.tokens.proposal",
    "hookimpl": "tokenprune.registry.hookspecs",
    "load_episode": "tokenprune.compare.episode",
}
__all__ = ["Policy", "Proposal", "__version__", "from_module", "hookimpl", "load", "load_episode"]


def __getattr__(name: str) -> Any:  # noqa: ANN401 - the module protocol
    if name not in _LAZY:
        raise AttributeError(f"module 'tokenprune' has no attribute '{name}'")
    import importlib

    return getattr(importlib.import_module(_LAZY[name]), name)
