"""The results file: one line of JSON per episode, appended as it ends, so that nothing is lost or run twice."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pydantic import TypeAdapter, ValidationError

from tokenprune.errors import ResultError, RolloutError
from tokenprune.evaluation.records import EpisodeRecord, Header, VariantEntry
from tokenprune.evaluation.starts import Start
from tokenprune.report.record import Provenance

_EPISODE = TypeAdapter(EpisodeRecord)
_HEAD = b'{"kind": "header"'


@dataclass
class Results:
    """What a results file holds, as plain data but for the episodes.

    Attributes:
        settings: Everything that changes results.
        provenance: Versions, machine and command of the process that began the file.
        variants: By label, the resolved pipeline and the condition; see `VariantEntry`.
        records: The episodes, in the order in which they ended.
    """

    settings: dict[str, Any]
    provenance: dict[str, Any]
    variants: dict[str, dict[str, Any]] = field(default_factory=dict)
    records: list[EpisodeRecord] = field(default_factory=list)


def read_results(path: Path) -> Results:
    """Read a results file. A last line without a line end is still being written, and is left out.

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
    """A results file opened for writing, and locked against other writers.

    Attributes:
        path: The file.
        results: What it holds.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], provenance: Provenance) -> None:
        """Create the file, or resume one that has the same settings.

        An unfinished last line, which a killed writer leaves, is cut off.

        Raises:
            RolloutError: If another process is writing to the file.
            ResultError: If it is not a results file, a line is damaged, or its settings differ.
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
            header = Header(settings=_plain(settings), provenance=provenance)
            if found is None:
                self.results = Results(header.settings, header.provenance.to_json())
                self._write(header.to_json())
            else:
                self.results = found
                _compare(path, "settings", found.settings, header.settings)
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
        """Close and unlock the file."""
        self._file.close()

    def declare(self, label: str, variant: Mapping[str, Any]) -> None:
        """Write what a label stands for, before any episode of it.

        Args:
            label: Of the variant.
            variant: The other fields of its `VariantEntry`, as plain data.

        Raises:
            ResultError: If the label stands for something else in the file; descriptions of pipelines are not compared.
        """
        plain = _plain(variant)
        if label in self.results.variants:
            pair = (_without_description(known) for known in (self.results.variants[label], plain))
            _compare(self.path, f"variant '{label}'", *pair)
            return
        self._write(VariantEntry(label=label, **plain).to_json())
        self.results.variants[label] = plain

    def holds(self, start: Start, label: str) -> bool:
        """Return whether the file has the episode of a variant from a start."""
        return (start, label) in self._done

    def append(self, record: EpisodeRecord) -> None:
        """Append an episode; it is on the disk when this returns.

        Raises:
            ResultError: If the file already has the episode, or its variant was not declared.
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
    """Return the data as it would be read from a file."""
    plain: dict[str, Any] = json.loads(json.dumps(data, allow_nan=False))
    return plain


def _without_description(variant: Mapping[str, Any]) -> Mapping[str, Any]:
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
    """Return what all finished lines hold; None where there are none.

    Raises:
        ResultError: If a line is damaged.
    """
    *lines, rest = data.split(b"\n")
    if not lines and rest and not _HEAD.startswith(rest[: len(_HEAD)]):
        raise ResultError(f"{path}: is not a results file")
    results: Results | None = None
    line_of: dict[tuple[Start, str], int] = {}
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
            kind = entry["kind"]
            if results is None:
                results = _header(kind, entry)
            elif kind == "variant":
                _add_variant(results, entry)
            elif kind == "episode":
                record = _add_episode(results, entry)
                key = (record.start, record.variant)
                if key in line_of:
                    raise ValueError(f"the same episode as in line {line_of[key]}")
                line_of[key] = number
            else:
                raise ValueError(f"no line is of the kind {kind!r:.40}")
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ResultError(f"{path}:{number}: {_damage(error, number)}") from error
    return results


def _header(kind: object, entry: dict[str, Any]) -> Results:
    if kind != "header":
        raise ValueError("the first line is not a header")
    valid = Header.model_fields["format_version"].default
    if entry["format_version"] != valid:
        raise ValueError(f"only format version {valid} can be read")
    header = Header.model_validate(entry)
    return Results(header.settings, header.provenance.to_json())


def _add_variant(results: Results, entry: dict[str, Any]) -> None:
    variant = VariantEntry.model_validate(entry)
    if variant.label in results.variants:
        raise ValueError(f"variant '{variant.label}' is declared twice")
    results.variants[variant.label] = {key: value for key, value in entry.items() if key not in ("kind", "label")}


def _add_episode(results: Results, entry: dict[str, Any]) -> EpisodeRecord:
    # From JSON, because strict validation takes a whole number for a float only there.
    record = _EPISODE.validate_json(json.dumps({key: value for key, value in entry.items() if key != "kind"}))
    if record.variant not in results.variants:
        raise ValueError(f"variant '{record.variant}' is not declared before it")
    results.records.append(record)
    return record


def _damage(error: Exception, number: int) -> str:
    """Return what is wrong with a line, and what to do."""
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        problem = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    else:
        problem = f"missing key {error}" if isinstance(error, KeyError) else str(error)
    if number == 1:
        return f"this is not a results file, or its header is damaged: {problem}"
    return f"the line is damaged: {problem}; delete it, and its episode will be run again"
