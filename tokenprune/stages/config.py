"""The configuration of a stage in a pipeline file: base classes, where it cuts, and how much it keeps."""

from __future__ import annotations

import re
from typing import Annotated, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from tokenprune.tokens.budget import UNION, Amount, Budget

EMBEDDING = "embedding"
_SHARE = re.compile(r"^(\d+(?:\.\d+)?)%$")

# JSON schemas of the fields whose validators below accept shorthand.
_RATIO = {"type": "number", "exclusiveMinimum": 0, "maximum": 1}
_COUNT = {"type": "integer", "minimum": 0}
_AMOUNT = {
    "anyOf": [
        _COUNT,
        _RATIO,
        {"const": UNION},
        {"type": "object", "properties": {"ratio": _RATIO}, "required": ["ratio"], "additionalProperties": False},
        {"type": "object", "properties": {"count": _COUNT}, "required": ["count"], "additionalProperties": False},
    ]
}
_AMOUNTS = {"anyOf": [*_AMOUNT["anyOf"], {"type": "array", "items": _AMOUNT, "minItems": 1}]}
_MODES = {
    "type": "object",
    "propertyNames": {"not": {"enum": ["ratio", "count"]}},
    "additionalProperties": _AMOUNTS,
    "minProperties": 1,
}
_LAYER = {"anyOf": [{"type": "integer", "minimum": 0}, {"type": "string", "pattern": r"^\d+(\.\d+)?%$"}]}
_CUT = {"anyOf": [{"const": EMBEDDING}, *_LAYER["anyOf"]]}


class Strict(BaseModel):
    """A frozen model that rejects unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def _amount(value: object) -> object:
    """Accept 128, 0.25, "union", {count: 128} or {ratio: 0.25}; an int is a count, a float a ratio."""
    if isinstance(value, dict) and set(value) & {"ratio", "count"}:
        if len(value) != 1:
            raise ValueError("give a ratio or a count, not both")
        kind, number = next(iter(value.items()))
        if isinstance(number, bool) or not isinstance(number, int | float):
            raise ValueError(f"{kind} must be a number")
        if kind == "count" and not isinstance(number, int):
            raise ValueError(f"count must be a whole number, got {number}")
        value = float(number) if kind == "ratio" else number
    if isinstance(value, bool) or not (isinstance(value, int | float) or value == UNION):
        raise ValueError("keep is a count (128), a ratio (0.25) or 'union'")
    if isinstance(value, float) and not 0 < value <= 1:
        raise ValueError(f"a ratio lies in (0, 1], got {value}; write a count as a whole number")
    if isinstance(value, int) and value < 0:
        raise ValueError(f"a count is at least 0, got {value}")
    return value


KeepAmount = Annotated[Amount, BeforeValidator(_amount), WithJsonSchema(_AMOUNT)]


def _amounts(value: object) -> str:
    """Discriminate a list with one amount per cut from one amount for all cuts."""
    return "per cut" if isinstance(value, list | tuple) else "one amount"


Amounts = Annotated[
    Annotated[KeepAmount, Tag("one amount")] | Annotated[tuple[KeepAmount, ...], Field(min_length=1), Tag("per cut")],
    Discriminator(_amounts),
    WithJsonSchema(_AMOUNTS),
]


def _keep(value: object) -> str:
    """Discriminate a mapping of modes from an amount for every mode."""
    return "per mode" if isinstance(value, dict) and not set(value) & {"ratio", "count"} else "every mode"


Keep = Annotated[
    Annotated[Amounts, Tag("every mode")] | Annotated[dict[str, Amounts], Tag("per mode")],
    Discriminator(_keep),
    WithJsonSchema({"anyOf": [*_AMOUNTS["anyOf"], _MODES]}),
    Field(
        description="A count, a ratio or 'union'; or a list of these, one for each entry of `after`; "
        "or one of either per mode."
    ),
]
"""Type of the field `keep`: how many tokens stay at each cut."""


def _cut(value: object) -> object:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError("a cut is 'embedding', a layer number, or a share of the depth such as '31%'")
    if isinstance(value, int) and value < 0:
        raise ValueError(f"layers count from 0, got {value}")
    if isinstance(value, str) and value != EMBEDDING:
        share = _SHARE.match(value)
        if share is None or not 0 <= float(share.group(1)) <= 100:
            raise ValueError(f"'{value}' is not a cut: write 'embedding', a layer number, or a share such as '31%'")
    return value


def _layer(value: object) -> object:
    if value == EMBEDDING:
        raise ValueError("a layer is a number, or a share of the depth such as '31%'")
    return _cut(value)


def _as_tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list | tuple) else (value,)


CutPoint = Annotated[int | str, BeforeValidator(_cut), WithJsonSchema(_CUT)]

Cuts = Annotated[
    tuple[CutPoint, ...],
    BeforeValidator(_as_tuple),
    WithJsonSchema({"anyOf": [*_CUT["anyOf"], {"type": "array", "items": _CUT, "minItems": 1}]}),
    Field(min_length=1, description="Where to cut: 'embedding', layers, or shares of the depth."),
]
"""Type of the field `after`: where tokens leave; one place or a list of places."""

Layer = Annotated[int | str, BeforeValidator(_layer), WithJsonSchema(_LAYER)]
"""A decoder layer: its number, or a share of the depth such as `47%`, so that one file fits decoders of any depth."""

Layers = Annotated[
    tuple[Layer, ...],
    BeforeValidator(_as_tuple),
    WithJsonSchema({"anyOf": [*_LAYER["anyOf"], {"type": "array", "items": _LAYER}]}),
    Field(description="Layers, or shares of the depth."),
]
"""Several of `Layer`, for a field that names layers; a single one is a list of one."""


def layer_index(layer: int | str, depth: int, key: str, highest: int | None = None) -> int:
    """Index of a `Layer` in a decoder of `depth` layers; a share is rounded to the nearest one up to `highest`.

    Args:
        layer: Number or share.
        depth: Layers of the decoder.
        key: Name of the field, for the error.
        highest: Highest index that is valid; the last layer when left out.

    Raises:
        ValueError: If there is no such layer.
    """
    highest = depth - 1 if highest is None else highest
    index = layer if isinstance(layer, int) else min(round(float(layer.rstrip("%")) / 100 * depth), max(highest, 0))
    if index > highest:
        raise ValueError(f"{key}: {layer} is layer {index}; valid in a decoder of {depth} layers: 0 to {highest}")
    return index


def layer_indices(layers: tuple[int | str, ...], depth: int, key: str) -> tuple[int, ...]:
    """Indices of `Layers`, ascending, each once; see `layer_index`.

    Raises:
        ValueError: If the decoder lacks one of them.
    """
    return tuple(sorted({layer_index(layer, depth, key) for layer in layers}))


def cut_layer(cut: int | str, depth: int) -> int:
    """Index of the layer a cut follows; -1 is before layer 0. A cut after the last layer would save nothing.

    Raises:
        ValueError: If the decoder cannot be cut there.
    """
    return -1 if cut == EMBEDDING else layer_index(cut, depth, "after", depth - 2)


class StageConfig(Strict):
    """Base class of a stage's configuration."""

    use: str = Field(description="Name of the stage, as `tokenprune list` shows it.")

    def modes(self) -> dict[str, set[str]]:
        """Modes named in each per-mode field, by the field's dotted key.

        Each must name exactly the pipeline's modes; fields with one value for every mode are left out.
        """
        return {}

    def chooses(self) -> set[str]:
        """Modes this stage may choose as a controller; the pipeline must declare all of them."""
        return set()


class ViewBudget(Strict):
    """The budget of one view."""

    keep: Keep = Field(description="Tokens of this view to keep.")


class CutConfig(StageConfig):
    """Base class of the configuration of a stage that drops tokens.

    `keep` is a ratio or a count of the tokens before each cut: one amount for every cut, or a list with one amount for
    each entry of `after`. Entries of `after` that mean the same layer are one cut, with the amount of the last of them.
    A view named under `views` has its own budget and does not count in `keep`.
    """

    after: Cuts = (EMBEDDING,)
    keep: Keep
    views: dict[str, ViewBudget] = Field(default_factory=dict, description="Budgets of single views.")
    of: Literal["prunable", "sequence"] = Field(default="prunable", description="What a ratio is a share of.")
    floor: int = Field(default=0, ge=0, description="Tokens under `keep` never to fall below.")
    bucket: int = Field(default=1, ge=1, description="Counts are rounded up to a multiple of this.")
    weight: float = Field(default=1.0, gt=0, description="Weight of this stage's score where several meet at one cut.")

    @model_validator(mode="after")
    def _amounts_fit_the_cuts(self) -> Self:
        errors: list[InitErrorDetails] = []
        for key, keep in self._keeps().items():
            places = {(*key, mode): keep[mode] for mode in keep} if isinstance(keep, dict) else {key: keep}
            for place, amounts in places.items():
                if isinstance(amounts, tuple) and len(amounts) != len(self.after):
                    message = (
                        f"must have as many amounts as 'after' has entries ({len(self.after)}), got {len(amounts)}"
                    )
                    kind = PydanticCustomError("value_error", "{error}", {"error": message})
                    errors.append(InitErrorDetails(type=kind, loc=place, input=amounts))
        if errors:
            # A pydantic error carries the key; a ValueError would blame the whole stage.
            raise ValidationError.from_exception_data(type(self).__name__, errors)
        return self

    def budget(self, mode: str, cut: int, view: str | None = None) -> Budget:
        """The budget in a mode at entry `cut` of `after`: of one view, or of all views without their own."""
        keep = self.views[view].keep if view is not None else self.keep
        amounts = keep[mode] if isinstance(keep, dict) else keep
        amount = amounts[cut] if isinstance(amounts, tuple) else amounts
        return Budget(amount, self.of, self.floor if view is None else 0, self.bucket)

    def modes(self) -> dict[str, set[str]]:
        """Modes named in each per-mode `keep`, by its dotted key."""
        return {".".join(key): set(keep) for key, keep in self._keeps().items() if isinstance(keep, dict)}

    def _keeps(self) -> dict[tuple[str, ...], Keep]:
        return {("keep",): self.keep, **{("views", name, "keep"): view.keep for name, view in self.views.items()}}
