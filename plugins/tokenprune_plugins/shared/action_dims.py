"""Dimensions of an action that strategies read."""

from __future__ import annotations

from tokenprune import BackboneInfo


def three_dims(info: BackboneInfo, group: str) -> tuple[int, ...]:
    """Dimensions of a group of the action that has three numbers, such as `translation` or `rotation`.

    Raises:
        ValueError: If the backbone's actions have no such group, or not with three numbers.
    """
    dims = info.action.groups.get(group, ())
    if len(dims) != 3:
        raise ValueError(
            f"it needs actions with a {group} of three numbers; "
            f"'{info.name}' moves {', '.join(f'{n} {list(d)}' for n, d in info.action.groups.items())}"
        )
    return dims
