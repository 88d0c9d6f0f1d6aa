"""The configuration of a pipeline. `loader.py` reads it from a file; `binding.py` binds it to a backbone."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from tokenprune.errors import nearest
from tokenprune.stages.config import StageConfig, Strict
from tokenprune.tokens.positions import Positions

_NAME = r"^[a-z0-9][a-z0-9_.\-]*$"


def _version(value: object) -> object:
    # In Python, True equals 1.
    if isinstance(value, bool):
        raise ValueError(f"must be 1, got {value}")
    return value


def _one_each(names: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(names)) != len(names):
        raise ValueError("modes must have distinct names")
    if {"ratio", "count"} & set(names):
        raise ValueError("a mode cannot be called 'ratio' or 'count'")
    return names


class PipelineConfig(Strict):
    """A resolved pipeline: `extends` is applied, and each stage is checked by its own class."""

    version: Annotated[Literal[1], BeforeValidator(_version)] = Field(description="Format of the file.")
    name: str = Field(pattern=_NAME, description="Lower-case name shown in tables and results.")
    description: str = Field(default="", description="What the pipeline is, one line.")
    modes: Annotated[tuple[str, ...], AfterValidator(_one_each)] = Field(
        default=("default",), min_length=1, description="Modes a controller may choose; the first is the default."
    )
    positions: Annotated[Positions, WithJsonSchema({"enum": list(Positions), "type": "string"})] = Field(
        default=Positions.PRESERVE,
        description="Whether kept tokens keep their original position or are renumbered at each cut.",
    )
    seed: int = Field(default=0, ge=0, description="Seed of stages that draw random numbers.")
    on_error: Literal["raise", "dense"] = Field(
        default="raise",
        description="What a failing stage does in a query: raise, or fall back to a query without pruning.",
    )
    stages: tuple[Any, ...] = Field(default=(), description="Stages in the order in which they are asked.")

    @field_validator("stages")
    @classmethod
    def _are_stages(cls, stages: tuple[Any, ...]) -> tuple[Any, ...]:
        for stage in stages:
            if not isinstance(stage, StageConfig):
                raise ValueError("stages must be read by the loader, which knows each stage's own configuration")
        return stages

    @model_validator(mode="after")
    def _modes_are_declared(self) -> PipelineConfig:
        for index, stage in enumerate(self.stages):
            for key, named in stage.modes().items():
                if named != set(self.modes):
                    wrong = sorted(named ^ set(self.modes))
                    raise ValueError(
                        f"stages.{index}.{key} must name the modes {list(self.modes)}, and only those; see {wrong}"
                    )
            for mode in sorted(stage.chooses() - set(self.modes)):
                raise ValueError(
                    f"stages.{index} chooses mode '{mode}', which the pipeline does not declare"
                    f"{nearest(mode, self.modes)}"
                )
        return self


DENSE = PipelineConfig(version=1, name="dense", description="No stages: every lossless saving, nothing dropped.")
