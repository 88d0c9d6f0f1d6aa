"""A worker's process: loads a backbone once, binds every variant's pipeline to it, and runs episodes."""

from __future__ import annotations

import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tokenprune import errors
from tokenprune.engine.executor import Execution
from tokenprune.errors import ConfigError, RolloutError, SimulatorError, TokenPruneError
from tokenprune.evaluation.environment import Environment, Suite
from tokenprune.evaluation.fingerprint import fingerprint
from tokenprune.evaluation.jobs import Crash, Job, Outcome
from tokenprune.evaluation.records import EpisodeRecord
from tokenprune.evaluation.run import check_fit, run_episode
from tokenprune.evaluation.starts import Start
from tokenprune.evaluation.variant import OTHER_INSTRUCTION, Variant, instruction_of
from tokenprune.loading import load_backbone
from tokenprune.model.device import native_dtype
from tokenprune.pipelines.loader import parse_pipeline
from tokenprune.policy import Policy
from tokenprune.registry.discovery import Registry


@dataclass(frozen=True)
class WorkerSpec:
    """Everything a worker needs, as plain data that can be sent to any process.

    Attributes:
        backbone: Registered name.
        checkpoint: Folder or hub id, or None.
        preset: What the backbone offers without a checkpoint, or None.
        options: The backbone's own options.
        device: torch device.
        dtype: As in `tokenprune.load`.
        seed: Seed of a preset's weights.
        variants: What is compared, with distinct labels.
        environments: Registered names of the environments, each with its options.
        tasks: Indices of the tasks evaluated in each environment, in order.
        execute: Actions of each chunk that are executed; all where None.
        replan: Whether a controller may request a new query within a chunk.
        execution: As in `tokenprune.load`.
        threads: torch threads.
        plugins: Plugin files.
        videos: Folder for videos, or None.
        filmed: Starts whose episodes are filmed, for every variant.
    """

    backbone: str
    checkpoint: str | None
    preset: str | None
    options: Mapping[str, Any]
    device: str
    dtype: str
    seed: int
    variants: tuple[Variant, ...]
    environments: Mapping[str, Mapping[str, Any]]
    tasks: Mapping[str, Sequence[int]]
    execute: int | None = None
    replan: bool = True
    execution: str = Execution.EAGER
    threads: int = 1
    plugins: tuple[str, ...] = ()
    videos: str | None = None
    filmed: tuple[Start, ...] = ()

    def __post_init__(self) -> None:
        """Check the labels.

        Raises:
            ConfigError: If two variants have the same label.
        """
        labels = [variant.label for variant in self.variants]
        for label in labels:
            if labels.count(label) > 1:
                raise ConfigError(f"two variants are called '{label}'; name each once")

    def settings(self, suites: Mapping[str, Suite], weights: Path | None) -> dict[str, Any]:
        """Return everything that changes results, except the variants: what the header of a results file holds.

        Args:
            suites: What each environment offers, by name.
            weights: Folder of the weights; see `Description`.
        """
        device = torch.device(self.device)
        auto = str(native_dtype(device)).removeprefix("torch.")
        # The default execution is left out, so that files without the key can be resumed.
        execution = {} if self.execution == Execution.EAGER else {"execution": self.execution}
        return execution | {
            "backbone": self.backbone,
            "checkpoint": self.checkpoint,
            "weights": None if weights is None else fingerprint(weights),
            "preset": self.preset,
            "options": dict(self.options),
            "device": device.type,
            "dtype": auto if self.dtype == "auto" else self.dtype,
            "seed": self.seed,
            "execute": self.execute,
            "replan": self.replan,
            "environments": {
                name: {
                    "options": dict(options),
                    "views": list(suites[name].views),
                    "horizon": suites[name].horizon,
                    "control_hz": suites[name].control_hz,
                    "settings": dict(suites[name].settings),
                }
                for name, options in self.environments.items()
            },
        }

    def describe(self, variant: Variant, suites: Mapping[str, Suite]) -> dict[str, Any]:
        """Return everything that makes up a variant: what its line in a results file holds.

        Args:
            variant: One of the variants.
            suites: What each environment offers, by name.

        Raises:
            ConfigError: If its condition needs another task.
        """
        described = {"pipeline": variant.pipeline, "condition": variant.condition}
        if variant.condition == OTHER_INSTRUCTION:
            described["instructions"] = {
                name: {str(task): instruction_of(variant, suites[name], tasks, task) for task in tasks}
                for name, tasks in self.tasks.items()
            }
        return described


class Worker:
    """Runs episodes one after the other, with one open simulator."""

    def __init__(self, spec: WorkerSpec) -> None:
        """Load the backbone and bind every variant's pipeline to it.

        Raises:
            PluginError: If the backbone, a stage or an environment is unknown.
            ConfigError: If a pipeline, a condition or an option is wrong.
            CheckpointError: If the checkpoint cannot be used.
        """
        torch.set_num_threads(spec.threads)
        self._spec = spec
        self._registry = Registry.discover(plugin_files=tuple(map(Path, spec.plugins)))
        self._factories = {name: self._registry.environment_factory(name) for name in spec.environments}
        backbone = load_backbone(
            spec.backbone,
            self._registry,
            spec.checkpoint,
            spec.preset,
            spec.device,
            spec.dtype,
            spec.seed,
            spec.options,
        )
        self._variants = {variant.label: variant for variant in spec.variants}
        configs = {v.label: parse_pipeline(v.pipeline, self._registry, v.label).config for v in spec.variants}
        self._policies = {
            label: Policy(backbone, config, self._registry, spec.execution) for label, config in configs.items()
        }
        for name, options in spec.environments.items():
            suite = self._factories[name].describe(name, options)
            for label, policy in self._policies.items():
                check_fit(policy, suite, self._variants[label], spec.execute)
        self._environment: Environment | None = None

    def run(self, job: Job) -> EpisodeRecord:
        """Run one episode, and film it if its start is in `filmed`; raises as `run_episode` does."""
        name, spec = job.start.environment, self._spec
        if self._environment is None or self._environment.suite.name != name:
            self.close()
            self._environment = self._factories[name].build(name, spec.environments[name])
        policy, variant, film = self._policies[job.variant], self._variants[job.variant], None
        if spec.videos is not None and job.start in spec.filmed:
            from tokenprune.evaluation.video import Video, video_path

            path = video_path(Path(spec.videos), job.start, job.variant)
            film = Video(path, policy.backbone, job.variant, self._environment.suite.control_hz)
        try:
            return run_episode(
                policy, self._environment, job.start, variant, spec.tasks[name], spec.execute, spec.replan, film
            )
        finally:
            if film is not None:
                film.close()

    def close(self) -> None:
        """Release the simulator."""
        if self._environment is not None:
            self._environment.close()
            self._environment = None


class SafeWorker:
    """A worker that returns errors instead of raising them; engines run it in their processes."""

    def __init__(self, spec: WorkerSpec) -> None:
        """Make the worker with the first job, so that its errors are returned too."""
        self._spec = spec
        self._worker: Worker | None = None

    def run(self, job: Job) -> Outcome:
        """Run one episode; return its record or the error."""
        try:
            if self._worker is None:
                self._worker = Worker(self._spec)
            return self._worker.run(job)
        except SimulatorError as error:
            return Crash(str(error))
        except TokenPruneError as error:
            # The reading process may not know a plugin's own error class.
            known = vars(errors).get(type(error).__name__) is type(error)
            return (type(error) if known else RolloutError)(str(error))
        except Exception as error:
            details = "".join(traceback.format_exception(error))
            return RolloutError(f"{job}: {type(error).__name__}: {error}\n{details}")

    def close(self) -> None:
        """Release the simulator."""
        if self._worker is not None:
            self._worker.close()
