"""Checks of what a plugin registers: its specs before more of it is imported, then its classes and hooks."""

from __future__ import annotations

import importlib
import inspect
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar, get_args

import pluggy

from tokenprune.errors import PluginError, nearest
from tokenprune.registry.hookspecs import PROJECT, StageHooks
from tokenprune.registry.specs import CAPABILITIES, PipelineSpec, Spec, StageKind, StageSpec

if TYPE_CHECKING:
    from tokenprune.stages.stage import Stage

FILE_VERSION = "(file)"
DENSE = "dense"
"""The pipeline without stages: always there, part of no plugin."""

_NAME = re.compile(r"[a-z0-9][a-z0-9_.\-]*")
_DOTTED = r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*"
_TARGET = re.compile(f"(?P<module>{_DOTTED})?:{_DOTTED}")

# A plugin that calls sys.exit at import must not end the program.
FAILURES = (Exception, SystemExit)

SpecT = TypeVar("SpecT", bound=Spec)


@dataclass(frozen=True, slots=True)
class Owner:
    """The distribution a plugin belongs to; for a plugin file, its path and the version `(file)`."""

    distribution: str
    version: str
    module: str

    def __str__(self) -> str:
        return f"{self.distribution} {self.version}"


@dataclass(frozen=True, slots=True)
class Registered(Generic[SpecT]):
    """A spec and its owner."""

    spec: SpecT
    owner: Owner


def check_spec(spec: Spec, owner: Owner) -> None:
    """Check a spec without importing its target."""
    if type(spec) not in get_args(Spec):
        valid = ", ".join(kind.__name__ for kind in get_args(Spec))
        raise PluginError(f"'tokenprune_register' returned {spec!r:.80}, which is none of {valid}")
    if not isinstance(spec.name, str) or not _NAME.fullmatch(spec.name):
        raise PluginError(f"{spec.name!r} is not a name: write lower-case letters, digits, '_', '-' and '.'")
    if isinstance(spec, PipelineSpec):
        if spec.name == DENSE:
            raise PluginError(f"pipeline '{DENSE}' is part of tokenprune and cannot be registered")
        if spec.name.endswith((".yaml", ".yml")):
            raise PluginError(f"pipeline '{spec.name}' cannot end as a file does")
        return
    target = _TARGET.fullmatch(spec.target) if isinstance(spec.target, str) else None
    if target is None or (target["module"] is None and owner.version != FILE_VERSION):
        raise PluginError(f"target {spec.target!r} of '{spec.name}' is not of the form 'package.module:Class'")
    if isinstance(spec, StageSpec):
        kinds = get_args(StageKind)
        if spec.kind not in kinds:
            raise PluginError(f"stage '{spec.name}' has the unknown kind '{spec.kind}'{nearest(str(spec.kind), kinds)}")
        if not isinstance(spec.requires, frozenset | set):
            raise PluginError(f"stage '{spec.name}': requires must be a frozenset of names, got {spec.requires!r}")
        for name in sorted(map(str, spec.requires - set(CAPABILITIES))):
            raise PluginError(
                f"stage '{spec.name}' requires an unknown capability '{name}'{nearest(name, CAPABILITIES)}"
            )


def import_target(registered: Registered[Any], label: str) -> Any:  # noqa: ANN401 - whatever the plugin names
    """Import what a spec names.

    Raises:
        PluginError: If it cannot be imported, beginning with the label.
    """
    module_name, _, attribute = registered.spec.target.partition(":")
    try:
        module = importlib.import_module(module_name or registered.owner.module)
    except FAILURES as error:
        raise PluginError(f"{label}: cannot be imported: {one_line(error)}") from error
    found: Any = module
    for part in attribute.split("."):
        if not hasattr(found, part):
            public = [name for name in vars(found) if not name.startswith("_")]
            raise PluginError(f"{label}: there is no '{part}'{nearest(part, public)}")
        found = getattr(found, part)
    return found


def checked_factory(factory: Any, label: str) -> Any:  # noqa: ANN401 - whatever the plugin names
    """Return a factory of backbones or environments.

    Raises:
        PluginError: If it cannot describe and build, beginning with the label.
    """
    for method in ("describe", "build"):
        if not callable(getattr(factory, method, None)):
            raise PluginError(f"{label}: a factory has a method '{method}'")
    return factory


def checked_stage(stage: Any, label: str) -> type[Stage[Any]]:  # noqa: ANN401 - whatever the plugin names
    """Return a stage's class.

    Raises:
        PluginError: If it is none, or its configuration or hooks are wrong, beginning with the label.
    """
    from tokenprune.stages.config import StageConfig
    from tokenprune.stages.stage import Stage

    if not isinstance(stage, type) or not issubclass(stage, Stage):
        raise PluginError(f"{label}: it must be a subclass of tokenprune.Stage")
    if not isinstance(stage.Config, type) or not issubclass(stage.Config, StageConfig):
        raise PluginError(f"{label}: its Config must be a subclass of tokenprune.StageConfig")
    try:
        implementations(stage, StageHooks)
    except PluginError as error:
        raise PluginError(f"{label}: {error}") from error
    return stage


def implementations(plugin: object, hooks: type) -> dict[str, pluggy.HookImpl]:
    """Hook implementations of a module or class, by hook.

    Raises:
        PluginError: If a hook is unknown, has wrong arguments, or lacks its decorator.
    """
    manager = pluggy.PluginManager(PROJECT)
    manager.register(plugin, name="plugin")
    found = {caller.name: caller.get_hookimpls()[0] for caller in manager.get_hookcallers(plugin) or ()}
    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(hooks)
    specified = {name: caller.spec.argnames for name, caller in vars(manager.hook).items() if caller.spec is not None}
    for name, implementation in found.items():
        if name not in specified:
            raise PluginError(f"unknown hook '{name}'{nearest(name, specified)}")
        if implementation.argnames != specified[name]:
            actual, valid = ", ".join(implementation.argnames), ", ".join(specified[name])
            raise PluginError(f"hook '{name}' takes the arguments ({valid}), not ({actual})")
    for name in specified:
        if name not in found and inspect.isroutine(inspect.getattr_static(plugin, name, None)):
            raise PluginError(f"'{name}' has the name of a hook and is not one; decorate it with @hookimpl")
    try:
        manager.register(plugin, name="plugin")
    except pluggy.PluginValidationError as error:
        raise PluginError(one_line(error)) from error
    return found


def one_line(error: BaseException) -> str:
    """The message of an error on one line, with its type unless it is a `PluginError`."""
    message = " ".join(str(error).split())
    return message if isinstance(error, PluginError) else f"{type(error).__name__}: {message}"
