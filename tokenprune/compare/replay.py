"""Replays a recorded episode to policies as a host loop would call them: one query per chunk."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tokenprune.compare.episode import Episode
from tokenprune.errors import EpisodeError
from tokenprune.policy import ActionChunk, Policy

Tick = Callable[[], None]


def query_steps(episode: Episode, horizon: int, queries: int | None) -> list[int]:
    """Return the control steps at which a policy with chunks of `horizon` actions is queried.

    Raises:
        EpisodeError: If the episode has fewer queries than `queries`.
    """
    steps = list(range(0, len(episode), horizon))
    if queries is not None and not 1 <= queries <= len(steps):
        raise EpisodeError(
            f"episode '{episode.name}' holds 1 to {len(steps)} queries of {horizon} actions, not {queries}"
        )
    return steps[:queries]


def replay(
    policies: Sequence[Policy], episode: Episode, steps: Sequence[int], tick: Tick = lambda: None
) -> list[list[ActionChunk]]:
    """Query every policy at every step, in turn, and report the executed actions to each.

    The recorded actions are what the robot did; the policies' own actions are only compared.

    Args:
        policies: Queried in turn at each step, so that a drift of the machine's speed meets all of them.
        episode: Recorded observations and actions.
        steps: Control steps to query at, ascending.
        tick: Called after each query.

    Returns:
        The action chunks, by policy and step.
    """
    chunks: list[list[ActionChunk]] = [[] for _ in policies]
    for policy in policies:
        policy.reset(episode.instruction)
    for index, step in enumerate(steps):
        observation = observe(episode, step, policies[0])
        for policy, own in zip(policies, chunks, strict=True):
            own.append(policy.act(observation))
            tick()
        until = steps[index + 1] if index + 1 < len(steps) else step
        hz = float(str(episode.meta.get("control_hz", 20)))
        for executed in range(step, until):
            after = observe(episode, executed + 1, policies[0])
            for policy in policies:
                policy.executed(episode.actions[executed], episode.state[executed], executed / hz, after)
    return chunks


def observe(episode: Episode, step: int, policy: Policy) -> dict[str, object]:
    """Return the observation of a step, with the views of the policy only.

    Raises:
        EpisodeError: If the episode lacks a view.
    """
    views = policy.backbone.info.views
    check_views(episode, views)
    return {"images": {view: episode.frame(step, view) for view in views}, "state": episode.state[step]}


def check_views(episode: Episode, views: Sequence[str]) -> None:
    """Refuse an episode that lacks one of these views.

    Raises:
        EpisodeError: If the episode lacks a view.
    """
    missing = [view for view in views if view not in episode.views]
    if missing:
        raise EpisodeError(
            f"episode '{episode.name}' has the views {', '.join(episode.views)}; "
            f"the policy also looks at {', '.join(missing)}"
        )
