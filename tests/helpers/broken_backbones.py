"""Backbones that each break one promise, and the check that must notice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from tokenprune.engine.adapter import Description, Observation
from tokenprune.engine.query import Query
from tokenprune.model.decoder import Decoded, Decoder
from tokenprune.model.info import BackboneInfo
from tokenprune.registry.discovery import Registry
from tokenprune.registry.plugin_checks import Owner
from tokenprune.registry.specs import BackboneSpec
from tokenprune.tokens.layout import TokenLayout
from tokenprune.tokens.positions import Positions
from tokenprune.tokens.prompt import EncodedPrompt
from tokenprune_adapters.backbones.openvla_oft.backbone import OFTInputs, OFTSetup, OFTTokens, OpenVLAOFT
from tokenprune_adapters.backbones.openvla_oft.factory import OFTFactory


class Sound(OpenVLAOFT):
    """Breaks nothing; the others differ from it, or their factory from its own, in one thing."""

    BREAKS: ClassVar[tuple[str, str]]

    @classmethod
    def named(cls, info: BackboneInfo) -> BackboneInfo:
        return replace(info, name=f"broken.{cls.__name__.lower()}")

    @classmethod
    def describe(cls, preset: str | None, checkpoint: Path | None, options: Mapping[str, Any]) -> Description:
        described = OFTFactory.describe(preset, checkpoint, options)
        return replace(described, info=cls.named(described.info))

    @classmethod
    def build(
        cls,
        preset: str | None,
        checkpoint: Path | None,
        options: Mapping[str, Any],
        device: torch.device,
        dtype: torch.dtype,
        seed: int,
    ) -> Sound:
        made = OFTFactory.build(preset, checkpoint, options, device, dtype, seed)
        setup = OFTSetup(made.config, made.tokenizer, made.statistics)
        return cls(setup, made.model, cls.named(made.info))


class DropsTheLastAction(Sound):
    """Returns a chunk that is too short."""

    BREAKS = "answers", "actions have the shape [7, 7]; info.action says [8, 7]"

    def infer(self, inputs: OFTInputs, query: Query) -> Tensor:
        return super().infer(inputs, query)[:, :-1]


class CallsItselfAnother(Sound):
    """Has another name than the one it is registered under."""

    BREAKS = "it_is_what_it_says", "info.name: 'openvla-oft', expected 'broken.callsitselfanother'"

    @classmethod
    def named(cls, info: BackboneInfo) -> BackboneInfo:
        return info


class SaysItIsCausal(Sound):
    """Has a decoder in which tokens see each other both ways, and says otherwise."""

    BREAKS = "it_is_what_it_says", "causal of the decoder: False, expected True"

    @classmethod
    def named(cls, info: BackboneInfo) -> BackboneInfo:
        return replace(super().named(info), decoder=replace(info.decoder, causal=True))


class ForgetsTheStop(Sound):
    """Has one token more than its layout."""

    BREAKS = "the_layout_covers_the_sequence", "tokens that the layout names"

    def encode(self, instruction: str, state: object = None) -> EncodedPrompt:
        whole = super().encode(instruction, state)
        layout = TokenLayout.build(whole.layout.segments[:-1], dict(whole.layout.rows))
        return replace(whole, layout=layout)


class NamesNoInstruction(Sound):
    """Leaves a row out that stages ask for."""

    BREAKS = "the_layout_covers_the_sequence", "names no rows 'instruction'"

    def encode(self, instruction: str, state: object = None) -> EncodedPrompt:
        whole = super().encode(instruction, state)
        rows = tuple(row for row in whole.layout.rows if row[0] != "instruction")
        return replace(whole, layout=TokenLayout(whole.layout.segments, rows))


class SwapsViews(Sound):
    """Puts the patches of the wrist camera where the layout has the other's."""

    BREAKS = "pixels_reach_their_own_tokens", "tokens that the pixels of view 'primary' change"

    def _patches(self, inputs: OFTInputs, query: Query, heard: Tensor | None) -> list[Tensor]:
        return super()._patches(inputs, query, heard)[::-1]


class IgnoresTheState(Sound):
    """Puts zeros in the place of the robot state."""

    BREAKS = "every_input_is_read", "the state changes nothing"

    def prepare(self, observations: Sequence[Observation], prompts: Sequence[EncodedPrompt]) -> OFTInputs:
        inputs = super().prepare(observations, prompts)
        assert inputs.state is not None
        return replace(inputs, state=torch.zeros_like(inputs.state))


class IgnoresStages(Sound):
    """Shows stages the features and goes on with its own."""

    BREAKS = "stages_may_change_features", "pixels reach the decoder although query.transform returned zeros"

    def _patches(self, inputs: OFTInputs, query: Query, heard: Tensor | None) -> list[Tensor]:
        super()._patches(inputs, query, heard)
        pixels = torch.cat([inputs.images[view] for view in self.config.views])
        features = self.model.vision_backbone(pixels, self.config.transform, self.dtype)
        return list(self.model.projector(features).chunk(len(self.config.views)))


class ShowsViewsAtOnce(Sound):
    """Passes the features of all views to stages as those of the first."""

    BREAKS = "stages_may_change_features", "views and patches that go through query.transform"

    def _patches(self, inputs: OFTInputs, query: Query, heard: Tensor | None) -> list[Tensor]:
        views = self.config.views
        pixels = torch.cat([inputs.images[view] for view in views])
        features = self.model.vision_backbone(pixels, self.config.transform, self.dtype)
        changed = query.transform(views[0], torch.cat(features.chunk(len(views)), dim=1))
        return list(self.model.projector(changed).chunk(len(views), dim=1))


class DrawsByItself(Sound):
    """Draws from the process's random numbers instead of the query's."""

    BREAKS = "the_same_query_gives_the_same_actions", "the same query, asked again, gives others"

    def infer(self, inputs: OFTInputs, query: Query) -> Tensor:
        actions = super().infer(inputs, query)
        return actions + torch.randn_like(actions)


class CentresTheBatch(Sound):
    """Takes the mean of the batch from every row."""

    BREAKS = "batch_rows_are_independent", "row 0 of a batch, and the same query alone, differ"

    def embed(self, inputs: OFTInputs, query: Query) -> OFTTokens:
        tokens = super().embed(inputs, query)
        spread = tokens.context - tokens.context.mean(0)
        return replace(tokens, context=spread if len(spread) > 1 else tokens.context)


def renumbering(*given: Any, **named: Any) -> Decoded:
    """Close the gaps that dropped tokens leave in the positions."""
    return Decoder.run(*given, **{**named, "positions": Positions.COMPACT})


class RenumbersWhatIsKept(Sound):
    """Runs a decoder loop of its own."""

    BREAKS = "dropping_equals_masking", "pipeline 'thinning': what is read, and the same of a masked model, differ"

    def infer(self, inputs: OFTInputs, query: Query) -> Tensor:
        query.runner = renumbering
        return super().infer(inputs, query)


def coarse(decoder: Decoder, hidden: Tensor, tokens: Any, pruner: Any, *given: Any, **named: Any) -> Decoded:
    """Round where there are cuts."""
    cut = pruner.acts_after(len(decoder.layers) // 2 - 1)
    return Decoder.run(decoder, hidden.float().double() if cut else hidden, tokens, pruner, *given, **named)


class RoundsWhereItCuts(Sound):
    """Runs a decoder loop that computes otherwise where a pipeline cuts."""

    BREAKS = "keeping_everything_is_dense", "differs from dense although every token was kept"

    def infer(self, inputs: OFTInputs, query: Query) -> Tensor:
        query.runner = coarse
        return super().infer(inputs, query)


class NeverAsks(Sound):
    """Runs its decoder without the query."""

    BREAKS = "dropping_equals_masking", "it does not call `query.decode`"

    def infer(self, inputs: OFTInputs, query: Query) -> Tensor:
        return torch.zeros(len(inputs.text), 8, 7)


class ReadsTheState(Sound):
    """Decides on the host by a number that is on the device."""

    BREAKS = "no_query_waits", "a tensor is read, which waits for the device (broken_backbones.py:"

    def infer(self, inputs: OFTInputs, query: Query) -> Tensor:
        assert inputs.state is not None
        actions = super().infer(inputs, query)
        return actions if inputs.state.abs().max() < 9 else -actions


class RemembersOnTheHost(Sound):
    """Multiplies by a number that it read while it prepared the query."""

    BREAKS = "a_replay_is_the_query", "of pipeline 'dense' was replayed and gives others"
    brightness = 0.0

    def prepare(self, observations: Sequence[Observation], prompts: Sequence[EncodedPrompt]) -> OFTInputs:
        self.brightness = float(observations[0]["images"]["primary"].mean())
        return super().prepare(observations, prompts)

    def infer(self, inputs: OFTInputs, query: Query) -> Tensor:
        return super().infer(inputs, query) * self.brightness


class ForgetsItsHead(Sound):
    """Leaves a part out of its FLOPs."""

    BREAKS = "flops_are_those_that_run", "pipeline 'dense': torch counts"

    @classmethod
    def named(cls, info: BackboneInfo) -> BackboneInfo:
        parts = {name: flops for name, flops in info.other_flops.items() if name == "vision"}
        return replace(super().named(info), other_flops=parts)


class DescribesByBuilding(Sound):
    """Makes all weights to say how many there are."""

    BREAKS = "described_without_weights", "as many as a layer of the decoder has"

    @classmethod
    def describe(cls, preset: str | None, checkpoint: Path | None, options: Mapping[str, Any]) -> Description:
        cls.build(preset, checkpoint, options, torch.device("cpu"), torch.float32, 0)
        return super().describe(preset, checkpoint, options)


class DescribesAnother(Sound):
    """Is built with other cameras than described."""

    BREAKS = "described_without_weights", "the info that is described"

    @classmethod
    def describe(cls, preset: str | None, checkpoint: Path | None, options: Mapping[str, Any]) -> Description:
        return super().describe(preset, checkpoint, {**options, "views": ["primary"]})


class HasOneSeed(Sound):
    """Fills its weights from a seed of its own."""

    BREAKS = "the_seed_decides_the_weights", "built with another seed, it answers the same"

    @classmethod
    def build(cls, *given: Any) -> Sound:
        return super().build(*given[:-1], 7)


class HasNoSeed(Sound):
    """Adds what the process's random numbers give."""

    BREAKS = "the_seed_decides_the_weights", "built twice with one seed, it gives others"

    @classmethod
    def build(cls, *given: Any) -> Sound:
        made = super().build(*given)
        made.model.projector.fc1.weight += torch.randn_like(made.model.projector.fc1.weight)
        return made


class ScalesInPlace(Sound):
    """Writes to what it is given."""

    BREAKS = "statistics_go_both_ways", "`unnormalise` writes to the actions it is given"

    def unnormalise(self, actions: np.ndarray, observations: Sequence[Observation]) -> np.ndarray:
        actions *= 0.5
        return actions


class TakesAnything(Sound):
    """Looks at no observation before the model does."""

    BREAKS = "wrong_observations_are_refused", "instead of an ObservationError"

    def check(self, observation: Observation) -> None:
        """Takes it."""


class SaysSomething(Sound):
    """Makes an instruction up where there is none."""

    BREAKS = "wrong_instructions_are_refused", "the instruction '' is accepted"

    def prompt(self, instruction: str, state: object = None) -> Any:
        return super().prompt(instruction or "push it", state)


class IgnoresOptions(Sound):
    """Takes no notice of what it does not know."""

    BREAKS = "unknown_options_are_refused", "describe with the option 'no_such_key' is accepted"

    @classmethod
    def describe(cls, preset: str | None, checkpoint: Path | None, options: Mapping[str, Any]) -> Description:
        return super().describe(preset, checkpoint, {})


class HidesNaN(Sound):
    """Turns what is not finite into zeros."""

    BREAKS = "broken_states_are_no_action", "hidden states that are all nan become finite actions"

    def infer(self, inputs: OFTInputs, query: Query) -> Tensor:
        return super().infer(inputs, query).nan_to_num()


class GoesInCircles(Sound):
    """Puts its embeddings into a list that is part of itself."""

    BREAKS = "nothing_waits_for_the_garbage_collector", "hang on cycles"

    def embed(self, inputs: OFTInputs, query: Query) -> OFTTokens:
        tokens = super().embed(inputs, query)
        circle: list[Any] = [tokens.context]
        circle.append(circle)
        return tokens


class NeedsFloat64(Sound):
    """Uses what has no half-precision kernel."""

    BREAKS = "it_works_in_bfloat16", "not implemented for 'BFloat16' (broken_backbones.py:"

    def embed(self, inputs: OFTInputs, query: Query) -> OFTTokens:
        tokens = super().embed(inputs, query)
        return replace(tokens, context=tokens.context + 0 * torch.linalg.qr(tokens.context)[0].sum())


def broken() -> list[type[Sound]]:
    """Every class above but the sound one."""
    return Sound.__subclasses__()


def registry() -> Registry:
    """The backbones above, and the sound one."""
    tiny = {"tiny": "for tests, untrained"}
    specs = [
        BackboneSpec(f"broken.{one.__name__.lower()}", "for tests", f"{__name__}:{one.__name__}", tiny)
        for one in (Sound, *broken())
    ]
    return Registry().with_specs(*specs, owner=Owner("tests", "0", __name__))
