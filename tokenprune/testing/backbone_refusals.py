"""Promises of a backbone about what it refuses: bad input and broken numbers never become an action.

The first line of each docstring says what holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from tokenprune.errors import ConfigError, ObservationError, TokenPruneError
from tokenprune.testing.backbone_subject import INSTRUCTIONS, BackboneSubject
from tokenprune.testing.query_spy import PASSES, spied
from tokenprune.testing.verdicts import CheckFailed


def wrong_observations_are_refused(subject: BackboneSubject) -> None:
    """An observation it was not made for is an ObservationError that names the view or the state, before it runs."""
    policy, right = subject.policy(), subject.observation(0)
    policy.reset(INSTRUCTIONS[0])
    for what, word, wrong in _wrong(right, subject.backbone.info.views[0], subject.backbone.info.state_size):
        with spied() as seen:
            try:
                policy.act(wrong)
            except ObservationError as error:
                if word not in str(error):
                    raise CheckFailed(f"{what}: the message does not name '{word}': {error}") from error
            except Exception as error:
                raise CheckFailed(f"{what}: {type(error).__name__} instead of an ObservationError: {error}") from error
            else:
                raise CheckFailed(f"{what} is accepted")
        if seen.features or seen.embeddings:
            raise CheckFailed(f"{what}: the model ran before it was refused")
    policy.act(right)


def wrong_instructions_are_refused(subject: BackboneSubject) -> None:
    """An instruction that is no text, blank, or too long for the sequence is an ObservationError."""
    policy = subject.policy()
    wrong: tuple[Any, ...] = ("", " \n", None, 7)
    for instruction in (*wrong, "push it " * 5000):
        try:
            policy.reset(instruction)
        except ObservationError:
            continue
        except Exception as error:
            raise CheckFailed(
                f"{instruction!r:.40}: {type(error).__name__} instead of an ObservationError: {error}"
            ) from error
        if instruction in wrong:
            raise CheckFailed(f"the instruction {instruction!r} is accepted")


def unknown_options_are_refused(subject: BackboneSubject) -> None:
    """An option or preset it does not know is a ConfigError that names it, described or built."""
    cpu = torch.device("cpu")
    for preset, options in ((subject.preset, {**subject.options, "no_such_key": 1}), ("no_such_key", subject.options)):
        for what in ("describe", "build"):
            where = f"{what} with the {'preset' if preset == 'no_such_key' else 'option'} 'no_such_key'"
            try:
                if what == "describe":
                    subject.factory.describe(preset, None, options)
                else:
                    subject.factory.build(preset, None, options, cpu, torch.float32, 0)
            except ConfigError as error:
                if "no_such_key" not in str(error):
                    raise CheckFailed(f"{where}: the message does not name it: {error}") from error
            except Exception as error:
                raise CheckFailed(f"{where}: {type(error).__name__} instead of a ConfigError: {error}") from error
            else:
                raise CheckFailed(f"{where} is accepted")


def broken_states_are_no_action(subject: BackboneSubject) -> None:
    """Hidden states that are NaN or infinite never become an action."""
    for value in (torch.nan, torch.inf):
        with spied(**dict.fromkeys(PASSES, lambda found, value=value: found * 0 + value)):
            try:
                subject.ask()
            except TokenPruneError as error:
                if "not finite" in str(error):
                    continue
                raise
        raise CheckFailed(f"hidden states that are all {value} become finite actions")


def _wrong(right: Mapping[str, Any], view: str, state_size: int | None) -> list[tuple[str, str, Any]]:
    """What is wrong, a word that the message must hold, and the observation."""
    image = right["images"][view]

    def seeing(other: object) -> dict[str, Any]:
        return {**right, "images": {**right["images"], view: other}}

    blind = {name: pixels for name, pixels in right["images"].items() if name != view}
    wrong: list[tuple[str, str, Any]] = [
        ("an observation that is no mapping", "observation", [right]),
        ("an observation without images", "images", {key: value for key, value in right.items() if key != "images"}),
        ("an observation without a view", view, {**right, "images": blind}),
        ("a view it does not have", "no_such_view", {**right, "images": {**right["images"], "no_such_view": image}}),
        ("an image of floats", view, seeing(image.astype(np.float32) / 255)),
        ("an image with channels first", view, seeing(image.transpose(2, 0, 1))),
        ("a batch of images", view, seeing(image[None])),
        ("an image without colours", view, seeing(image[..., 0])),
        ("an image that is a list", view, seeing(image.tolist())),
    ]
    if state_size is not None:
        state = np.asarray(right["state"], dtype=np.float64)
        spoilt = [np.where(np.arange(state_size) == 0, value, state) for value in (np.nan, np.inf)]
        wrong += [
            ("an observation without a state", "state", {"images": right["images"]}),
            ("a state with a number too many", "state", {**right, "state": np.append(state, 0.0)}),
            ("a batch of states", "state", {**right, "state": state[None]}),
            ("a state of words", "state", {**right, "state": ["here"] * state_size}),
            ("a state with NaN", "state", {**right, "state": spoilt[0]}),
            ("a state with an infinite number", "state", {**right, "state": spoilt[1]}),
        ]
    return wrong
