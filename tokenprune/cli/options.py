"""Options that several verbs share; those that name the model are declared once, in `ModelOptions`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from tokenprune.errors import ConfigError
from tokenprune.registry.discovery import Registry

if TYPE_CHECKING:
    from tokenprune.engine.adapter import Backbone, Description
    from tokenprune.report.result import RunSettings

Plugins = Annotated[list[Path] | None, typer.Option("--plugin", help="A python file with stages; may be repeated.")]
Json = Annotated[bool, typer.Option("--json", help="Print plain data instead of tables.")]
Sets = Annotated[
    list[str] | None, typer.Option("--set", help="stages.1.keep=0.5 and the like, for every pipeline named.")
]
EpisodePath = Annotated[
    Path | None, typer.Option("--episode", help="A recorded episode; the bundled one when left out.")
]
BackboneName = Annotated[str, typer.Option("--backbone", help="A registered backbone.")]


@dataclass(frozen=True)
class ModelOptions:
    """The options that name a model; `takes_model` adds them to a verb."""

    backbone: BackboneName = "openvla-oft"
    preset: Annotated[
        str | None,
        typer.Option(help="What the backbone offers without a checkpoint; its first when neither is given."),
    ] = None
    checkpoint: Annotated[str | None, typer.Option(help="Folder in the release's format, or a hub id.")] = None
    options: Annotated[
        list[str] | None,
        typer.Option("--option", help="The backbone's own: views=[primary], proprio=false, unnorm_key=…"),
    ] = None
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:0.")] = "cpu"
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16, float16 or float64; auto: bfloat16 where it is native.")
    ] = "auto"
    execution: Annotated[
        str, typer.Option(help="eager, compile, or on a CUDA device cuda_graph and compiled_cuda_graph.")
    ] = "eager"
    seed: Annotated[int, typer.Option(help="Seed of an untrained preset's random weights.")] = 0

    def own(self) -> dict[str, Any]:
        """The backbone's own options, `--option`, as a mapping.

        Raises:
            ConfigError: If one is not `key=value`.
        """
        return key_values("--option", self.options)

    def describe(self, found: Registry) -> Description:
        """Describe the backbone without its weights; raises as `tokenprune.loading.describe_backbone`."""
        from tokenprune.loading import describe_backbone

        return describe_backbone(self.backbone, found, self.checkpoint, self.preset, self.own())

    def load(self, found: Registry) -> Backbone:
        """Load the backbone; raises as `tokenprune.loading.load_backbone`."""
        from tokenprune.loading import load_backbone

        return load_backbone(
            self.backbone,
            found,
            self.checkpoint,
            self.chosen_preset(found),
            self.device,
            self.dtype,
            self.seed,
            self.own(),
        )

    def chosen_preset(self, found: Registry) -> str | None:
        """The preset that is loaded; see `tokenprune.loading.chosen_preset`."""
        from tokenprune.loading import chosen_preset

        return chosen_preset(self.backbone, found, self.checkpoint, self.preset)

    def run_settings(self, found: Registry, episode: Path | None) -> RunSettings:
        """What a result file of `run` and `compare` records of the options."""
        from tokenprune.report.result import RunSettings

        return RunSettings(
            preset=self.chosen_preset(found),
            checkpoint=self.checkpoint,
            device=self.device,
            dtype=self.dtype,
            seed=self.seed,
            options=self.own(),
            episode=str(episode or "bundled"),
            execution=self.execution,
        )


def takes_model(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Replace the parameter `model` of a verb by the options of `ModelOptions`, which the verb gets as one object.

    Args:
        *names: Fields of `ModelOptions` that the verb offers, in the order of its help; all when left out. The others
            keep their defaults.
    """
    hints = get_type_hints(ModelOptions, include_extras=True)
    defaults = {field.name: field.default for field in fields(ModelOptions)}
    offered = names or tuple(defaults)
    options = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=defaults[name], annotation=hints[name])
        for name in offered
    ]

    def decorate(verb: Callable[..., None]) -> Callable[..., None]:
        @wraps(verb)
        def call(**values: Any) -> None:  # noqa: ANN401 - whatever typer parsed
            model = ModelOptions(**{name: values.pop(name) for name in offered})
            verb(model=model, **values)

        parameters = []
        for parameter in inspect.signature(verb, eval_str=True).parameters.values():
            if parameter.name == "model":
                parameters += options
            else:
                parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
        # typer reads both.
        call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return call

    return decorate


def registry(plugins: Sequence[Path] | None) -> Registry:
    """Discover what is installed, and read the plugin files given."""
    return Registry.discover(plugin_files=tuple(plugins or ()))


def key_values(option: str, pairs: Sequence[str] | None) -> dict[str, Any]:
    """Read the `key=value` pairs of an option that may be repeated; values are YAML.

    Args:
        option: The option's name, for messages.
        pairs: What was given.

    Raises:
        ConfigError: If a pair has no `=` or its value is not YAML.
    """
    from tokenprune.pipelines.yaml_document import Document

    parsed = {}
    for pair in pairs or ():
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise ConfigError(f"{option} {pair}: write key=value, such as views=[primary]")
        document = Document.parse(value, f"{option} {pair}")
        if document.problems:
            raise ConfigError(f"{option} {pair}: {'; '.join(problem.text for problem in document.problems)}")
        parsed[key.strip()] = document.data
    return parsed
