"""Train the mini policy's decoder, projectors and head by behaviour cloning.

    python train.py --demos data/demos --features data/features --out data/policy --hours 2 --pool 2
    python train.py --demos data/demos --features data/features --out data/policy --hours 1 --decay

With `--pool 2`, four patches are pooled to one token in most batches, at the position of the first patch, which is
three times as fast; the other batches keep the policy usable without pooling. No token is pruned. In a quarter of the
samples the wrist camera is black, so that the policy does not rely on it alone. An auxiliary head predicts the
positions of item and target; it is discarded.

An interrupted training continues when started again. Each validation is a line of `curve.jsonl`.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from export import read_back
from learner import Learner
from muon import Muon
from precision import mixed_precision
from samples import Batch, Samples
from torch import Tensor, nn
from torch.nn import functional

BATCH, ACCUMULATED = 16, 2
LR, WARMUP = 1.0e-3, 100
NO_WRIST = 0.25
PLACES_WEIGHT = 0.3
AVERAGED = 0.998
VALIDATED = 96


def losses(learner: Learner, batch: Batch, pool: int) -> tuple[Tensor, Tensor]:
    """Mean absolute error of the actions, without rotations, and of the places."""
    with mixed_precision():
        actions, places = learner(batch, pool)
    moving = [0, 1, 2, 6]
    return (
        functional.l1_loss(actions[..., moving].float(), batch.chunk[..., moving]),
        functional.l1_loss(places.float(), batch.places),
    )


def drop_wrist(batch: Batch, black: Tensor, generator: np.random.Generator) -> Batch:
    """Make the wrist camera black in some samples."""
    batch.features[torch.from_numpy(generator.random(len(batch.text)) < NO_WRIST), 1] = black
    return batch


@torch.no_grad()
def validate(learner: Learner, samples: Samples) -> dict[str, float]:
    """Errors on held-out demonstrations: unchanged, without each camera, and with another instruction."""
    errors: dict[str, list[tuple[float, int]]] = {}

    def evaluate(name: str, batch: Batch) -> None:
        action, places = losses(learner, batch, 1)
        errors.setdefault(name, []).append((action.item(), len(batch.text)))
        if name == "l1":
            errors.setdefault("places", []).append((places.item(), len(batch.text)))

    for rows in samples.groups.values():
        chosen = rows[:: max(1, len(rows) // VALIDATED)]
        for part in np.array_split(chosen, max(1, len(chosen) // 32)):
            batch = samples.batch(part)
            evaluate("l1", batch)
            for view, name in enumerate(("no_primary", "no_wrist")):
                features = batch.features[:, view].clone()
                batch.features[:, view] = samples.black
                evaluate(name, batch)
                batch.features[:, view] = features
            batch.text = batch.text.roll(len(part) // 2, 0)
            evaluate("other_words", batch)
    return {key: sum(v * n for v, n in values) / sum(n for _, n in values) for key, values in errors.items()}


def make_optimisers(learner: Learner) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the network, AdamW for everything else."""
    inner, other = [], []
    for name, parameter in learner.named_parameters():
        matrix = parameter.dim() == 2 and not any(part in name for part in ("embed", "places", "fc1", "model.fc2"))
        (inner if matrix else other).append(parameter)
    return [
        Muon(inner, lr=LR),
        torch.optim.AdamW(other, lr=LR, weight_decay=0.01, betas=(0.9, 0.98)),
    ]


@torch.no_grad()
def update_average(average: dict[str, Tensor], learner: Learner, step: int) -> None:
    """Update the moving average of the weights, with less inertia in the first steps."""
    weight = 1 - min(AVERAGED, step / (step + 20))
    for name, value in learner.state_dict().items():
        average[name].lerp_(value, weight)


def main() -> None:
    """Train for some hours from the last checkpoint on."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    for name in ("--demos", "--features", "--out"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--hours", type=float, default=1.0)
    parser.add_argument("--pool", type=int, choices=(1, 2, 4), default=1, help="side of the patches that share a token")
    parser.add_argument("--whole", type=float, default=0.2, help="share of the batches with a token for every patch")
    parser.add_argument("--decay", action="store_true", help="let the learning rate fall to zero over these hours")
    parser.add_argument("--every", type=int, default=500, help="steps between validations")
    parser.add_argument("--begin", type=Path, help="an exported policy to begin with; features must be of its tower")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    learner = Learner()
    statistics = arguments.out / "statistics.json"
    if arguments.begin and not statistics.exists():
        exported, exported_statistics = read_back(arguments.begin)
        del exported.vision_backbone
        learner.model.load_state_dict(exported.state_dict())
        statistics.write_text(json.dumps(exported_statistics))
    average = {name: value.detach().clone() for name, value in learner.state_dict().items()}
    optimisers = make_optimisers(learner)
    checkpoint, step, seen = arguments.out / "checkpoint.pt", 0, 0
    if checkpoint.exists():
        saved: dict[str, Any] = torch.load(checkpoint, weights_only=True)
        learner.load_state_dict(saved["learner"])
        average = saved["average"]
        for optimiser, state in zip(optimisers, saved["optimisers"], strict=True):
            optimiser.load_state_dict(state)
        step, seen = saved["step"], saved["seen"]
    # Demonstrations that are added later must not change the normalisation.
    initial_statistics = json.loads(statistics.read_text()) if statistics.exists() else None
    training = Samples(arguments.demos, arguments.features, False, initial_statistics)
    held_out = Samples(arguments.demos, arguments.features, True, training.raw_statistics)
    statistics.write_text(json.dumps(training.raw_statistics))
    print(f"{len(training)} samples, {len(held_out)} held out, from step {step}", flush=True)
    started, budget = time.time(), arguments.hours * 3600
    recent: list[tuple[float, float]] = []
    since = started
    while (spent := time.time() - started) < budget:
        generator = np.random.default_rng((1, step))
        rate = LR * min(1.0, (step + 1) / WARMUP) * ((1 - spent / budget) if arguments.decay else 1.0)
        for optimiser in optimisers:
            for group in optimiser.param_groups:
                group["lr"] = rate
            optimiser.zero_grad()
        for _ in range(ACCUMULATED):
            batch = drop_wrist(training.draw(generator, BATCH), training.black, generator)
            pool = 1 if generator.random() < arguments.whole else arguments.pool
            action, places = losses(learner, batch, pool)
            ((action + PLACES_WEIGHT * places) / ACCUMULATED).backward()
            recent.append((action.item(), places.item()))
        nn.utils.clip_grad_norm_(learner.parameters(), 1.0)
        for optimiser in optimisers:
            optimiser.step()
        step, seen = step + 1, seen + ACCUMULATED * BATCH
        update_average(average, learner, step)
        if step % 50 == 0:
            action_l1, places_l1 = np.mean(recent, axis=0)
            speed = len(recent) * BATCH / (time.time() - since)
            print(f"{step} l1 {action_l1:.4f} places {places_l1:.4f} {speed:.1f} samples/s", flush=True)
            recent, since = [], time.time()
        if step % arguments.every == 0 or time.time() - started >= budget:
            point = {"step": step, "samples": seen, "pool": arguments.pool, "rate": rate}
            live = {name: value.clone() for name, value in learner.state_dict().items()}
            learner.load_state_dict(average)
            point |= validate(learner, held_out)
            learner.load_state_dict(live)
            print(json.dumps(point), flush=True)
            with (arguments.out / "curve.jsonl").open("a") as file:
                file.write(json.dumps(point) + "\n")
            states = [optimiser.state_dict() for optimiser in optimisers]
            partial = checkpoint.with_suffix(".partial")
            torch.save({"learner": live, "average": average, "optimisers": states, "step": step, "seen": seen}, partial)
            partial.rename(checkpoint)


if __name__ == "__main__":
    main()
