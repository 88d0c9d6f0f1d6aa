"""The results file: a line of JSON for each episode, appended as it ends, so that nothing is lost or done twice."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self

from pydantic import ConfigDict, TypeAdapter, ValidationError

from tokenprune.errors import ResultError, RolloutError
from tokenprune.evaluation.starts import Start

FORMAT_VERSION = 1


@dataclass(frozen=True)
class EpisodeRecord:
    """One episode; all but the names that end in `_s` and `_ms` is the same whatever engine ran it.

    Attributes:
        variant: Label of the variant.
        environment: Registered name.
        task: Index of the task.
        init_state: Initial state it began in.
        seed: Seed it began with.
        success: Whether the task was done.
        steps: Executed control steps.
        queries: Times the policy was asked.
        replans: Queries a controller asked for before the chunk had ended.
        fallbacks: Queries that ran dense because a stage failed.
        modes: Queries per mode; `replayed` where a controller answered in place of the model.
        tokens_mean: Visual tokens held, mean over layers and queries.
        tokens_last: Visual tokens the last layer holds, mean over queries.
        gflops: Per query, the whole policy.
        action_change: Mean L1 distance of successive executed actions without the gripper, in the policy's units; None
            with one step.
        seam_change: The same where a new chunk begins; None with one query.
        gripper_switches: Times the executed gripper command changed its meaning.
        crashes: Times the simulator had to be restarted for this episode.
        query_ms: Each query, from observation to actions.
        phases_ms: Mean over queries of each phase.
        simulator_s: Resetting, stepping and drawing.
        policy_s: Queries, and what the policy does after each action.
        episode_s: From the reset to the last step.
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


_RECORD = TypeAdapter(EpisodeRecord)


_HEAD = b'{"kind": "header"'


@dataclass
class Results:
    """What a results file holds.

    Attributes:
        settings: Everything that changes results.
        provenance: Versions, machine and command of the process that began the file.
        variants: Per label, the resolved pipeline and what else makes up the variant.
        records: The episodes, in the order in which they ended.
    """

    settings: dict[str, Any]
    provenance: dict[str, Any]
    variants: dict[str, dict[str, Any]] = field(default_factory=dict)
    records: list[EpisodeRecord] = field(default_factory=list)


def read_results(path: Path) -> Results:
    """Read a results file; a last line without an end is one being written, and left out.

    Raises:
        ResultError: If it cannot be read or a line is damaged, with its number and what to do.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ResultError(f"{path}: cannot be read: {error.strerror}") from error
    results = _parse(path, data)
    if results is None:
        raise ResultError(f"{path}: holds no results")
    return results


class ResultsFile:
    """A results file opened for writing; nobody else can write to it meanwhile.

    Attributes:
        path: The file.
        results: What it holds.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], provenance: Mapping[str, Any]) -> None:
        """Create the file, or go on with one that has the same settings.

        An unfinished last line, which is what a killed writer leaves, is cut off.

        Raises:
            RolloutError: If someone else is writing to the file.
            ResultError: If it is not a results file, a line is damaged, or its settings are others.
        """
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "a+b", buffering=0)  # noqa: SIM115 - open for as long as this object
        try:
            self._lock()
            self._file.seek(0)
            data = self._file.read()
            found = _parse(path, data)
            self._file.truncate(data.rfind(b"\n") + 1)
            plain = _plain(settings)
            if found is None:
                self.results = Results(plain, _plain(provenance))
                header = {"kind": "header", "format_version": FORMAT_VERSION}
                self._write({**header, "settings": plain, "provenance": self.results.provenance})
            else:
                self.results = found
                _compare(path, "settings", found.settings, plain)
        except BaseException:
            self._file.close()
            raise
        self._done = {(record.start, record.variant) for record in self.results.records}

    def __enter__(self) -> Self:
        """Return the file."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close it, and let others write."""
        self._file.close()

    def declare(self, label: str, variant: Mapping[str, Any]) -> None:
        """Say what a label stands for, before any episode of it.

        Args:
            label: Of the variant.
            variant: Its resolved pipeline and what else makes it up, as plain data.

        Raises:
            ResultError: If the file says that the label stands for something else; what a pipeline's description
                says does not matter.
        """
        plain = _plain(variant)
        if label in self.results.variants:
            _compare(self.path, f"variant '{label}'", _undescribed(self.results.variants[label]), _undescribed(plain))
            return
        self._write({"kind": "variant", "label": label, **plain})
        self.results.variants[label] = plain

    def holds(self, start: Start, label: str) -> bool:
        """Whether the episode of a variant from a start has been run."""
        return (start, label) in self._done

    def append(self, record: EpisodeRecord) -> None:
        """Add an episode; it is on the disk when this returns.

        Raises:
            ResultError: If the file has the episode already, or its variant was not declared.
        """
        if record.variant not in self.results.variants:
            raise ResultError(f"{self.path}: variant '{record.variant}' was not declared")
        if self.holds(record.start, record.variant):
            raise ResultError(f"{self.path}: '{record.variant}' from {record.start} is there already")
        self._write({"kind": "episode", **asdict(record)})
        self._done.add((record.start, record.variant))
        self.results.records.append(record)

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RolloutError(
                f"{self.path}: another evaluation is writing to this file; wait for it, or name another with --out"
            ) from error

    def _write(self, entry: Mapping[str, Any]) -> None:
        line = json.dumps(entry, allow_nan=False).encode() + b"\n"
        try:
            written = self._file.write(line)
            os.fsync(self._file.fileno())
        except OSError as error:
            raise RolloutError(f"{self.path}: cannot be written: {error.strerror}") from error
        if written != len(line):
            raise RolloutError(f"{self.path}: cannot be written: the disk is full")


def _plain(data: Mapping[str, Any]) -> dict[str, Any]:
    """The data as it would be read from a file."""
    plain: dict[str, Any] = json.loads(json.dumps(data, allow_nan=False))
    return plain


def _undescribed(variant: Mapping[str, Any]) -> Mapping[str, Any]:
    pipeline = variant.get("pipeline", {})
    return {**variant, "pipeline": {key: value for key, value in pipeline.items() if key != "description"}}


def _compare(path: Path, where: str, old: object, new: object) -> None:
    """Refuse the first difference.

    Raises:
        ResultError: Naming the key and both values.
    """
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(key for key in new if key not in old)]:
            _compare(path, f"{where}.{key}", old.get(key, "(absent)"), new.get(key, "(absent)"))
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for index, pair in enumerate(zip(old, new, strict=True)):
            _compare(path, f"{where}.{index}", *pair)
    elif old != new:
        raise ResultError(
            f"{path}: {where} is {old!r} there and {new!r} now, and episodes of both cannot be compared; "
            "evaluate as the file says, or name another with --out"
        )


def _parse(path: Path, data: bytes) -> Results | None:
    """All finished lines; None where there are none.

    Raises:
        ResultError: If a line is damaged.
    """
    *lines, rest = data.split(b"\n")
    if not lines and rest and not _HEAD.startswith(rest[: len(_HEAD)]):
        raise ResultError(f"{path}: is not a results file")
    results: Results | None = None
    seen: dict[tuple[Start, str], int] = {}
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
            kind = entry.pop("kind")
            if results is None:
                results = _header(kind, entry)
            elif kind == "variant":
                _add_variant(results, entry)
            elif kind == "episode":
                record = _add_episode(results, entry)
                key = (record.start, record.variant)
                if key in seen:
                    raise ValueError(f"the same episode as in line {seen[key]}")
                seen[key] = number
            else:
                raise ValueError(f"no line is of the kind {kind!r:.40}")
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ResultError(f"{path}:{number}: {_damage(error, number)}") from error
    return results


def _header(kind: object, entry: dict[str, Any]) -> Results:
    if kind != "header":
        raise ValueError("the first line is not a header")
    if entry.pop("format_version") != FORMAT_VERSION:
        raise ValueError(f"only format version {FORMAT_VERSION} can be read")
    return Results(**entry)


def _add_variant(results: Results, entry: dict[str, Any]) -> None:
    label = entry.pop("label")
    if label in results.variants:
        raise ValueError(f"variant '{label}' is declared twice")
    results.variants[label] = entry


def _add_episode(results: Results, entry: dict[str, Any]) -> EpisodeRecord:
    record = _RECORD.validate_json(json.dumps(entry))
    if record.variant not in results.variants:
        raise ValueError(f"variant '{record.variant}' is not declared before it")
    results.records.append(record)
    return record


def _damage(error: Exception, number: int) -> str:
    """What is wrong with a line, and what to do."""
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        said = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    else:
        said = f"missing key {error}" if isinstance(error, KeyError) else str(error)
    if number == 1:
        return f"this is not a results file, or its header is damaged: {said}"
    return f"the line is damaged: {said}; delete it, and its episode will be run again"
