"""The registry: plugins found through entry points or named as files, with their owners.

Plugins that ship with tokenprune are found in the same way as all others. A broken plugin is quarantined as a whole;
the others still work. Imports no torch; a class is imported when it is first used.
"""

from __future__ import annotations

import copy
import importlib
import importlib.metadata
import importlib.util
import itertools
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import TYPE_CHECKING, Any, get_args

from tokenprune.errors import PluginError, nearest
from tokenprune.registry.hookspecs import PluginHooks
from tokenprune.registry.plugin_checks import (
    DENSE,
    FAILURES,
    FILE_VERSION,
    Owner,
    Registered,
    SpecT,
    check_spec,
    checked_factory,
    checked_stage,
    implementations,
    import_target,
    one_line,
)
from tokenprune.registry.specs import (
    BackboneSpec,
    EnvironmentSpec,
    PipelineSpec,
    Spec,
    StageSpec,
)

if TYPE_CHECKING:
    from tokenprune.stages.stage import Stage

GROUP = "tokenprune"
DISABLE = "TOKENPRUNE_DISABLE"
OWN_DISTRIBUTION = "tokenprune-vla"

_file_numbers = itertools.count(1)


@dataclass(frozen=True, slots=True)
class Quarantined:
    """A plugin that could not be used; nothing of it is registered.

    Attributes:
        name: Entry-point name.
        owner: Distribution it belongs to.
        error: What is wrong, one line.
        traceback: The full traceback.
    """

    name: str
    owner: Owner
    error: str
    traceback: str


class Registry:
    """Stages, pipelines, backbones and environments by name; `discover` finds the installed ones.

    Attributes:
        quarantined: Broken plugins.
        disabled: Entry points that were not imported on request.
        unknown_disabled: Names to disable that match no entry point.
    """

    def __init__(self) -> None:
        """Make an empty registry."""
        self.quarantined: tuple[Quarantined, ...] = ()
        self.disabled: tuple[str, ...] = ()
        self.unknown_disabled: tuple[str, ...] = ()
        self._tables: dict[type, dict[str, Registered[Any]]] = {kind: {} for kind in get_args(Spec)}
        self._imported: dict[tuple[type, str], Any] = {}

    @classmethod
    def discover(cls, *, plugin_files: Sequence[Path] = (), disable: Iterable[str] | None = None) -> Registry:
        """Find the installed plugins and read plugin files.

        Args:
            plugin_files: Python files that implement `tokenprune_register`; their targets may be `:Class`.
            disable: Entry points or distributions not to import; by default the comma-separated names in the
                environment variable `TOKENPRUNE_DISABLE`.

        Raises:
            PluginError: If a plugin file is broken. A broken installed plugin is quarantined instead.
        """
        found = cls()
        wanted = os.environ.get(DISABLE, "").split(",") if disable is None else disable
        unwanted = {name.strip() for name in wanted} - {""}
        known: set[str] = set()
        for entry in sorted(importlib.metadata.entry_points(group=GROUP), key=_entry_order):
            owner = _owner(entry)
            names = {entry.name, _canonical(owner.distribution)}
            named = {name for name in unwanted if names & {name, _canonical(name)}}
            if named:
                known |= named
                found.disabled += (entry.name,)
                continue
            try:
                found._add(owner, _specs_of(entry.load()))
            except FAILURES as error:
                trace = "".join(traceback.format_exception(error))
                found.quarantined += (Quarantined(entry.name, owner, one_line(error), trace),)
        found.unknown_disabled = tuple(sorted(unwanted - known))
        for path in plugin_files:
            owner = Owner(str(path), FILE_VERSION, f"_tokenprune_file_{next(_file_numbers)}_{path.stem}")
            try:
                found._add(owner, _specs_of(_import_file(path, owner.module)))
            except FAILURES as error:
                raise PluginError(f"plugin file {_place(path, error)}: {one_line(error)}") from error
        return found

    def with_specs(self, *specs: Spec, owner: Owner) -> Registry:
        """Return a copy of this registry with these specs added.

        Raises:
            PluginError: If a spec is wrong or its name is taken.
        """
        more = copy.copy(self)
        more._imported = {}
        more._add(owner, specs)
        return more

    @property
    def stages(self) -> Mapping[str, Registered[StageSpec]]:
        """Stages by name."""
        return MappingProxyType(self._tables[StageSpec])

    @property
    def pipelines(self) -> Mapping[str, Registered[PipelineSpec]]:
        """Shipped pipeline files by name, without `dense`, which has no file."""
        return MappingProxyType(self._tables[PipelineSpec])

    @property
    def backbones(self) -> Mapping[str, Registered[BackboneSpec]]:
        """Backbones by name."""
        return MappingProxyType(self._tables[BackboneSpec])

    @property
    def environments(self) -> Mapping[str, Registered[EnvironmentSpec]]:
        """Simulated environments by name."""
        return MappingProxyType(self._tables[EnvironmentSpec])

    def stage(self, name: str) -> Registered[StageSpec]:
        """The stage of this name.

        Raises:
            PluginError: If there is none.
        """
        return self._get(StageSpec, name)

    def pipeline(self, name: str) -> Registered[PipelineSpec]:
        """The shipped pipeline of this name.

        Raises:
            PluginError: If there is none.
        """
        return self._get(PipelineSpec, name)

    def backbone(self, name: str) -> Registered[BackboneSpec]:
        """The backbone of this name.

        Raises:
            PluginError: If there is none.
        """
        return self._get(BackboneSpec, name)

    def environment(self, name: str) -> Registered[EnvironmentSpec]:
        """The simulated environment of this name.

        Raises:
            PluginError: If there is none.
        """
        return self._get(EnvironmentSpec, name)

    def stage_class(self, name: str) -> type[Stage[Any]]:
        """Import a stage's class, once.

        Raises:
            PluginError: If there is no such stage, it cannot be imported, it is no `Stage`, its `Config` is no
                `StageConfig`, or its hooks do not fit `StageHooks`.
        """
        found: type[Stage[Any]] = self._import(StageSpec, name, checked_stage)
        return found

    def backbone_factory(self, name: str) -> Any:  # noqa: ANN401 - a BackboneFactory, whose module needs torch
        """Import a backbone's factory, once.

        Raises:
            PluginError: If there is no such backbone, it cannot be imported, or it cannot describe and build.
        """
        return self._import(BackboneSpec, name, checked_factory)

    def environment_factory(self, name: str) -> Any:  # noqa: ANN401 - an EnvironmentFactory, whose module needs torch
        """Import an environment's factory, once.

        Raises:
            PluginError: If there is no such environment, it cannot be imported, or it cannot describe and build.
        """
        return self._import(EnvironmentSpec, name, checked_factory)

    def _get(self, kind: type[SpecT], name: str) -> Registered[SpecT]:
        table: dict[str, Registered[SpecT]] = self._tables[kind]
        if name in table:
            return table[name]
        valid = [*table, DENSE] if kind is PipelineSpec else table
        message = f"no {_kind_name(kind)} is called '{name}'{nearest(name, valid)}"
        absent = [f"'{q.name}' (broken)" for q in self.quarantined]
        absent += [f"'{entry}' (disabled)" for entry in self.disabled]
        if absent:
            message += f"; plugins that are not loaded: {', '.join(absent)}; `tokenprune doctor` tells more"
        raise PluginError(message)

    def _import(self, kind: type[SpecT], name: str, check: Callable[[Any, str], Any]) -> Any:  # noqa: ANN401
        registered: Registered[Any] = self._get(kind, name)
        if (kind, name) not in self._imported:
            label = f"{_kind_name(kind)} '{name}' of {registered.owner}, {registered.spec.target}"
            self._imported[kind, name] = check(import_target(registered, label), label)
        return self._imported[kind, name]

    def _add(self, owner: Owner, specs: Iterable[Spec]) -> None:
        """Register all of these specs, or none."""
        tables = {kind: dict(table) for kind, table in self._tables.items()}
        for spec in specs:
            check_spec(spec, owner)
            table = tables[type(spec)]
            if spec.name in table:
                taken = table[spec.name].owner
                raise PluginError(f"{_kind_name(type(spec))} '{spec.name}' of {owner} is already registered by {taken}")
            table[spec.name] = Registered(spec, owner)
        self._tables = tables


def _kind_name(kind: type) -> str:
    return kind.__name__.removesuffix("Spec").lower()


def _specs_of(plugin: object) -> Iterable[Spec]:
    """Call `tokenprune_register` of a plugin module."""
    implementation = implementations(plugin, PluginHooks).get("tokenprune_register")
    if implementation is None:
        raise PluginError("it has no hook 'tokenprune_register' decorated with @hookimpl")
    if implementation.wrapper or implementation.hookwrapper:
        raise PluginError("'tokenprune_register' cannot be a wrapper; let it return specs")
    specs = implementation.function()
    if not isinstance(specs, Iterable):
        raise PluginError(f"'tokenprune_register' must return specs, got {type(specs).__name__}")
    return specs


def _entry_order(entry: importlib.metadata.EntryPoint) -> tuple[bool, str, str]:
    distribution = _canonical(_owner(entry).distribution)
    return distribution != OWN_DISTRIBUTION, distribution, entry.name


def _owner(entry: importlib.metadata.EntryPoint) -> Owner:
    module = entry.value.partition(":")[0].strip()
    if entry.dist is None:
        return Owner("unknown", "unknown", module)
    return Owner(entry.dist.name, entry.dist.version or "unknown", module)


def _canonical(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


def _import_file(path: Path, name: str) -> ModuleType:
    if not path.is_file():
        raise PluginError("there is no such file")
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise PluginError("a plugin file is python source and ends in .py")
    module = importlib.util.module_from_spec(spec)
    # Dataclasses and pydantic resolve annotations through sys.modules.
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _place(path: Path, error: BaseException) -> str:
    """The file, and its line that raised, if known."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    line = error.lineno if isinstance(error, SyntaxError) else (lines[-1] if lines else None)
    return f"{path}:{line}" if line else str(path)
