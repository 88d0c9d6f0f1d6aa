"""Training samples: features of the cameras, robot state, and the expert's next actions."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from pictures import steps_of
from torch import Tensor

from tokenprune_adapters.backbones.prismatic.prompt import PromptTokenizer
from tokenprune_adapters.environments.libero.suites import LiberoSuite
from tokenprune_adapters.inputs.statistics import Statistics

CHUNK = 8
HELD_OUT = 20
REACH = 0.2
"""Scale of the positions that the auxiliary head predicts, in metres."""

Array = npt.NDArray[np.float32]
RawStatistics = dict[str, dict[str, list[float] | list[bool]]]


@dataclass
class Batch:
    """One batch of samples with prompts of equal length.

    Attributes:
        features: Of both views `[B, views, patches, width]`.
        state: Normalised robot state `[B, 8]`.
        text: Prompt ids `[B, T]`.
        chunk: Normalised actions `[B, 8, 7]`; rotations are 0, since no demonstration has any.
        places: Positions of item and target relative to the hand, scaled by `REACH`, `[B, 6]`.
    """

    features: Tensor
    state: Tensor
    text: Tensor
    chunk: Tensor
    places: Tensor


def statistics_of(demos: list[dict[str, Array]]) -> RawStatistics:
    """The content of `dataset_statistics.json`: quantiles per number; the gripper, 0 or 1, is passed through."""
    found = {}
    for name, key in (("action", "actions"), ("proprio", "state")):
        values = np.concatenate([demo[key] for demo in demos]).astype(np.float64)
        found[name] = {
            "mean": values.mean(0), "std": values.std(0), "min": values.min(0), "max": values.max(0),
            "q01": np.quantile(values, 0.01, axis=0), "q99": np.quantile(values, 0.99, axis=0),
        }  # fmt: skip
    plain = {name: {key: value.tolist() for key, value in entry.items()} for name, entry in found.items()}
    plain["action"]["mask"] = [True] * 6 + [False]
    return plain


class Samples:
    """Samples of all demonstrations whose features exist."""

    def __init__(self, demos: Path, features: Path, held_out: bool, statistics: RawStatistics | None = None) -> None:
        """Read the demonstrations for training, or those held out.

        Args:
            demos: Folder of `record.py`.
            features: Folder of `features.py`.
            held_out: Whether to read the held-out demonstrations.
            statistics: The statistics that training began with; by default those of these demonstrations.
        """
        paths = [
            path
            for path in sorted(demos.glob("*.npz"))
            if (features / f"{path.stem}.npy").exists()
            and (int(path.stem.rsplit("-", 1)[1]) % HELD_OUT == HELD_OUT - 1) == held_out
        ]
        loaded = [dict(np.load(path)) for path in paths]
        self.raw_statistics = statistics or statistics_of(loaded)
        self.statistics = Statistics.read({"mini": self.raw_statistics}, "mini", 7, 8, "the demonstrations")
        assert self.statistics.state is not None
        self.black = torch.from_numpy(np.load(features / "black.npy")).float()
        self._features = [np.load(features / f"{path.stem}.npy", mmap_mode="r") for path in paths]
        tokenizer, suites = PromptTokenizer.bundled(), {}
        self.rows: list[tuple[int, int]] = []
        state, chunks, places, texts = [], [], [], []
        for number, (path, demo) in enumerate(zip(paths, loaded, strict=True)):
            suite, task, index = path.stem.rsplit("-", 2)
            if suite not in suites:
                suites[suite] = LiberoSuite(suite)
            text = tokenizer.encode(suites[suite].tasks[int(task)][1]).ids
            actions = self.statistics.action.normalise(demo["actions"])
            actions[:, 3:6] = 0.0
            for row, step in enumerate(steps_of(len(demo["actions"]), int(index))):
                self.rows.append((number, row))
                texts.append(text)
                state.append(self.statistics.state.normalise(demo["state"][step]))
                chunks.append(actions[step : step + CHUNK])
                places.append((demo["places"][step] - np.tile(demo["state"][step, :3], 2)) / REACH)
        self.state, self.chunks, self.places = (
            torch.from_numpy(np.asarray(rows, dtype=np.float32)) for rows in (state, chunks, places)
        )
        self.texts = texts
        self.groups: dict[int, npt.NDArray[np.int64]] = {
            length: np.array([i for i, text in enumerate(texts) if len(text) == length])
            for length in sorted({len(text) for text in texts})
        }

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.rows)

    def draw(self, generator: np.random.Generator, size: int) -> Batch:
        """A random batch of one prompt length, which is drawn in proportion to its samples."""
        sizes = np.array([len(rows) for rows in self.groups.values()])
        group = list(self.groups.values())[generator.choice(len(sizes), p=sizes / sizes.sum())]
        return self.batch(generator.choice(group, size))

    def batch(self, indices: npt.NDArray[np.int64]) -> Batch:
        """The samples with these indices."""
        features = np.stack([self._features[number][row] for number, row in (self.rows[i] for i in indices)])
        at = torch.from_numpy(indices)
        text = torch.tensor([self.texts[i] for i in indices])
        return Batch(torch.from_numpy(features).float(), self.state[at], text, self.chunks[at], self.places[at])
