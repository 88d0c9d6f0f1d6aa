"""The parts that result files share, as models: where a number comes from, the backbone, the tokens, each query."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from tokenprune.engine.trace import ProbeRecord
from tokenprune.model.info import ActionSpec, DecoderShape

Ids = list[list[int]]
"""Original token ids, one list per batch row."""


class Record(BaseModel):
    """A part of a result file. Unknown keys are refused, so that no writer adds one that the model does not have."""

    # Attributes: records are made from the objects that they describe. Constants: JSON's `Infinity` stays a number.
    model_config = ConfigDict(
        extra="forbid", frozen=True, from_attributes=True, protected_namespaces=(), ser_json_inf_nan="constants"
    )

    def to_json(self) -> dict[str, Any]:
        """Return plain data that JSON can hold."""
        return self.model_dump(mode="json")


def _is_pipeline(data: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(data.get("name"), str):
        raise ValueError("a pipeline needs a 'name'")
    modes = data.get("modes", [])
    if not isinstance(modes, list | tuple) or not all(isinstance(mode, str) for mode in modes):
        raise ValueError("'modes' of a pipeline must be a list of names")
    return data


PipelineData = Annotated[dict[str, Any], AfterValidator(_is_pipeline)]
"""A resolved pipeline, as `LoadedPipeline.resolved`; `parse_pipeline` reads it."""


class GitState(Record):
    """The checkout that ran."""

    commit: str
    changed: bool


class Provenance(Record):
    """Where a number comes from: versions, machine, source state and command."""

    created: str
    command: list[str]
    tokenprune: str
    git: GitState | None
    python: str
    packages: dict[str, str | None]
    platform: str
    cpu: str
    cpus: int | None
    torch_threads: int
    device: str
    gpu: str | None
    cuda: str | None

    @property
    def machine(self) -> str:
        """The GPU, or the CPU and its threads."""
        return self.gpu or f"{self.cpu}, {self.torch_threads} threads"


class BackboneRecord(Record):
    """The backbone that was measured."""

    name: str
    source: str
    untrained: bool
    dtype: str
    decoder: DecoderShape
    views: list[str]
    action: ActionSpec
    capabilities: list[str]


class SegmentRecord(Record):
    """A run of tokens with one role; see `tokenprune.tokens.layout.Segment`."""

    role: str
    start: int = Field(ge=0)
    length: int = Field(ge=0)
    view: str | None
    grid: tuple[int, int] | None
    prunable: bool


class LayoutRecord(Record):
    """The tokens of a query."""

    segments: list[SegmentRecord]


class QueriedEpisode(Record):
    """The recorded episode, and the control steps at which the policies were queried."""

    name: str
    instruction: str
    steps: list[int] = Field(min_length=1)


class HeadPasses(Record):
    """Passes behind the layout that ran through every layer, and those that a head cache spared."""

    ran: int
    spared: int


class TraceRecord(Record):
    """What one query did, as `QueryTrace.to_json` says it."""

    pipeline: str
    mode: str
    tokens_held: list[int] = Field(min_length=1)
    tokens_planned: list[int]
    keys_cached: list[int]
    layers_skipped: list[int]
    head_passes: HeadPasses
    kept_per_view: dict[str, dict[str, list[int]]]
    query_ms: float
    phases_ms: dict[str, float]
    attention_kernel: str
    probes: list[ProbeRecord]
    encoder_attention: list[str]
    protected_over_budget: dict[str, int]
    looked_back: dict[str, list[int | None]]
    fallback: str
    replayed: bool
    execution: str


class TraceWithIds(TraceRecord):
    """What one query did, with the original ids kept at each cut, and those kept for each reason."""

    kept_ids: dict[str, Ids]
    reasons: dict[str, dict[str, Ids]]
