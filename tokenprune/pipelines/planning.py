"""Plans the cuts of a pipeline for one layout and one mode."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tokenprune.errors import ConfigError, nearest
from tokenprune.stages.config import CutConfig
from tokenprune.stages.needs import StageNeeds
from tokenprune.stages.stage import Stage
from tokenprune.tokens.budget import UNION, Budget
from tokenprune.tokens.layout import TokenLayout
from tokenprune.tokens.plan import Cut, Group, Plan, Removal


def make_plan(
    stages: Sequence[Stage[Any]],
    needs: Sequence[StageNeeds],
    names: Sequence[str],
    layout: TokenLayout,
    mode: str,
    depth: int,
    unions: tuple[int, ...] = (),
) -> Plan:
    """Compute the plan of a pipeline.

    Args:
        stages: The pipeline's stages in order.
        needs: What each of them needs.
        names: Their names, for errors.
        layout: The query's tokens.
        mode: Mode to plan for.
        depth: Decoder layers.
        unions: Counts of the first `keep: union` cuts, as far as known.

    Raises:
        ConfigError: If a budget names an unknown view, or is a ratio of a view whose size at the cut is unknown.
    """
    at_cut: dict[int, dict[int, int]] = {}
    for index, own in enumerate(needs):
        for entry, after in enumerate(own.cuts):
            # Entries of one stage at the same layer are one cut; the last one counts.
            at_cut.setdefault(after, {})[index] = entry
    view_sizes: dict[str, int] | None = {name: s.length for name, s in layout.views.items() if s.prunable}
    held, fixed, cuts, pending = len(layout.prunable), len(layout.fixed), [], list(unions)
    for after in sorted(at_cut):
        keeps, groups, union = [], [], False
        resolved: int | None = None
        for index, entry in at_cut[after].items():
            config = stages[index].config
            assert isinstance(config, CutConfig)
            if config.views:
                per_view = _view_groups(config, names[index], mode, entry, layout, view_sizes)
                groups += per_view
                keeps.append(min(sum(g.keep for g in per_view), held))
                continue
            budget = config.budget(mode, entry)
            if budget.amount == UNION:
                resolved = pending.pop(0) if pending and resolved is None else resolved
                union = resolved is None
            keeps.append(budget.count(held, fixed, resolved))
        keep = min(keeps)
        removals = {needs[index].removal for index in at_cut[after]}
        removal = next((kind for kind in (Removal.REUSE, Removal.MERGE) if kind in removals), Removal.DROP)
        cuts.append(Cut(after, tuple(at_cut[after]), held, keep, tuple(groups), union, removal))
        if keep < held or union:
            of_each = len(at_cut[after]) == 1 and {g.views for g in groups} == {(v,) for v in layout.views}
            if view_sizes is not None and len(view_sizes) == 1:
                view_sizes = dict.fromkeys(view_sizes, keep)
            else:
                view_sizes = {g.views[0]: g.keep for g in groups} if view_sizes is not None and of_each else None
        held = keep
    skipped = frozenset(layer for own in needs for layer in own.skipped_layers)
    flow_interval = max((own.flow_interval for own in needs), default=1)
    return Plan(layout, mode, depth, tuple(cuts), skipped, flow_interval, unions)


def _view_groups(
    config: CutConfig, stage: str, mode: str, entry: int, layout: TokenLayout, sizes: Mapping[str, int] | None
) -> list[Group]:
    for view in config.views:
        if view not in layout.views:
            raise ConfigError(f"stage '{stage}': views.{view} is no view of this policy{nearest(view, layout.views)}")
    rest = tuple(name for name in layout.views if name not in config.views)
    groups: list[tuple[tuple[str, ...], Budget, str]] = []
    groups += [((name,), config.budget(mode, entry, name), f"views.{name}.keep") for name in config.views]
    groups += [(rest, config.budget(mode, entry), "keep")] if rest else []
    result = []
    for views, budget, key in groups:
        if budget.amount == UNION:
            raise ConfigError(
                f"stage '{stage}': {key}: 'union' cannot stand beside budgets of single views; give a count"
            )
        if sizes is None and not isinstance(budget.amount, int):
            raise ConfigError(
                f"stage '{stage}': {key}: {budget.amount} is a share, but how many tokens of {', '.join(views)} "
                "an earlier cut leaves is not known beforehand; give a count"
            )
        held = sum((sizes or {v: layout.views[v].length for v in views}).get(v, 0) for v in views)
        result.append(Group(views, budget.count(held, 0)))
    return result
