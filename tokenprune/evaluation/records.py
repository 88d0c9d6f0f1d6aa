"""The lines of a results file: a header, what each variant is, and an episode each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from pydantic import ConfigDict

from tokenprune.evaluation.starts import Start
from tokenprune.report.record import PipelineData, Provenance, Record


class Header(Record):
    """The first line: everything that changes results, and where the file comes from.

    Attributes:
        settings: Episodes are comparable only where these are equal.
        provenance: Of the process that began the file.
    """

    kind: Literal["header"] = "header"
    format_version: Literal[1] = 1
    settings: dict[str, Any]
    provenance: Provenance


class VariantEntry(Record):
    """What a label stands for.

    Attributes:
        label: Of the variant.
        pipeline: The resolved pipeline.
        condition: `blind`, `no-<view>`, `other-instruction`, or an empty string.
        instructions: By environment and task, where the condition gives the policy other ones.
    """

    kind: Literal["variant"] = "variant"
    label: str
    pipeline: PipelineData
    condition: str
    instructions: dict[str, dict[str, str]] | None = None

    def to_json(self) -> dict[str, Any]:
        """Return plain data that JSON can hold; `instructions` is absent where the condition gives none."""
        plain = super().to_json()
        if self.instructions is None:
            del plain["instructions"]
        return plain


@dataclass(frozen=True)
class EpisodeRecord:
    """One episode. Everything is the same whatever engine ran it, except what ends in `_s` or `_ms`.

    Attributes:
        variant: Label of the variant.
        environment: Registered name.
        task: Index of the task.
        init_state: Initial state it began in.
        seed: Seed of its start.
        success: Whether the task was done.
        steps: Executed control steps.
        queries: Queries of the policy.
        replans: Queries that a controller requested before the chunk had ended.
        fallbacks: Queries that ran dense because a stage failed.
        modes: Queries per mode; `replayed` where a controller answered in place of the model.
        tokens_mean: Visual tokens held, mean over layers and queries.
        tokens_last: Visual tokens the last layer holds, mean over queries.
        gflops: Per query, the whole policy.
        action_change: Mean L1 distance of successive executed actions without the gripper, in the policy's units; None
            with one step.
        seam_change: The same where a new chunk begins; None with one query.
        gripper_switches: Times the executed gripper command crossed its threshold.
        crashes: Times the simulator had to be restarted for this episode.
        query_ms: Milliseconds of each query, from observation to actions.
        phases_ms: Milliseconds of each phase, mean over queries.
        simulator_s: Seconds of resetting, stepping and rendering.
        policy_s: Seconds of queries, and of what the policy does after each action.
        episode_s: Seconds from the reset to the last step.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    variant: str
    environment: str
    task: int
    init_state: int
    seed: int
    success: bool
    steps: int
    queries: int
    replans: int
    fallbacks: int
    modes: dict[str, int]
    tokens_mean: float
    tokens_last: float
    gflops: float
    action_change: float | None
    seam_change: float | None
    gripper_switches: int
    crashes: int
    query_ms: list[float]
    phases_ms: dict[str, float]
    simulator_s: float
    policy_s: float
    episode_s: float

    @property
    def start(self) -> Start:
        """Where it began."""
        return Start(self.environment, self.task, self.init_state, self.seed)
