"""The promises of a backbone, one function each; the first line of its docstring says what holds.

A check raises `CheckFailed` with what was found, or `NotApplicable` with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from tokenprune.engine.adapter import Backbone, Observation
from tokenprune.engine.executor import GraphExecutor
from tokenprune.errors import ConfigError, ObservationError, TokenPruneError
from tokenprune.model.device import DTYPES
from tokenprune.model.flops import layer_weights, query_flops
from tokenprune.pipelines.config import DENSE, PipelineConfig
from tokenprune.policy import ActionChunk
from tokenprune.registry.specs import CAPABILITIES
from tokenprune.testing.backbone_subject import INSTRUCTIONS, BackboneSubject
from tokenprune.testing.cycles import caught_in_cycles
from tokenprune.testing.masked_query import MaskedQuery
from tokenprune.testing.query_spy import Exchange, spied
from tokenprune.testing.tape import taped
from tokenprune.testing.verdicts import CheckFailed, NotApplicable
from tokenprune.testing.waiting import no_waiting

CLOSE = 1e-4
"""Greatest difference, of the largest number compared, that rounding explains: norms may compute in float32."""
ROUGHLY = 0.2
"""Mean difference, of the mean size, that bfloat16 explains."""


def answers(subject: BackboneSubject) -> None:
    """It answers with a chunk of finite actions in two episodes side by side, whatever the instruction's length."""
    action = subject.backbone.info.action
    policy = subject.policy()
    for slot, instruction in enumerate(INSTRUCTIONS[1:]):
        policy.reset(instruction, slot)
    for query in range(2):
        for chunk in policy.act_batch({slot: subject.observation(2 * query + slot) for slot in (0, 1)}).values():
            if chunk.actions.shape != (action.horizon, action.dims):
                raise CheckFailed(
                    f"actions have the shape {list(chunk.actions.shape)}; "
                    f"info.action says [{action.horizon}, {action.dims}]"
                )
            if not np.isfinite(chunk.actions).all():
                raise CheckFailed("actions are not finite")


def it_is_what_it_says(subject: BackboneSubject) -> None:
    """Its name, preset, dtype, decoder, actions and capabilities are those it says it has."""
    info = subject.backbone.info
    _same("info.name", info.name, subject.name)
    _same("info.source", info.source, subject.preset)
    for name in ("float32", "float64"):
        _same(f"the dtype of a backbone built in {name}", subject.built(name).dtype, DTYPES[name])
    if unknown := sorted(info.capabilities - set(CAPABILITIES)):
        raise CheckFailed(f"info.capabilities has {unknown}; valid: {', '.join(CAPABILITIES)}")
    dims = sorted(dim for group in info.action.groups.values() for dim in group)
    _same("the dimensions that info.action.groups name", dims, list(range(info.action.dims)))
    decoder, embeddings = (found[0] for found in _exchanged(subject, lambda seen: (seen.decoders, seen.embeddings)))
    for what, found, said in (
        ("layers", len(decoder.layers), info.decoder.depth),
        ("head_dim", decoder.head_dim, info.decoder.head_dim),
        ("causal", decoder.causal, info.decoder.causal),
        ("the width of the embeddings", embeddings.shape[2], info.decoder.hidden),
    ):
        _same(f"{what} of the decoder", found, said)


def the_layout_covers_the_sequence(subject: BackboneSubject) -> None:
    """The layout names every token that enters the decoder, each view's grid, and the rows of the prompt."""
    backbone, lengths = subject.backbone, []
    for instruction in INSTRUCTIONS:
        observation = subject.observation(0)
        layout = backbone.layout(instruction, observation.get("state"))
        with spied() as seen:
            try:
                subject.ask(observations=[observation], instructions=[instruction])
            finally:
                # Where they differ, the query fails too, and does not say why.
                _same("tokens that the layout names", layout.n_tokens, _decoded(seen)[0].shape[1])
        _same("views of the layout", tuple(layout.views), backbone.info.views)
        for view, segment in layout.views.items():
            if segment.grid is None:
                raise CheckFailed(f"the segment of view '{view}' has no grid")
        if not layout.prunable:
            raise CheckFailed("no token is prunable")
        for name in ("text", "instruction"):
            if name not in layout.row_names:
                raise CheckFailed(f"the layout names no rows '{name}'; stages ask for them")
        text, words = layout.span("text"), layout.span("instruction")
        if not (text.start <= words.start < words.stop <= text.stop):
            raise CheckFailed(f"rows 'instruction' = {words} are no part of rows 'text' = {text}")
        lengths.append((len(instruction), len(words)))
    ordered = [words for _, words in sorted(lengths)]
    if ordered != sorted(ordered):
        raise CheckFailed("a longer instruction has fewer rows 'instruction'")


def pixels_reach_their_own_tokens(subject: BackboneSubject) -> None:
    """The pixels of a view reach every token that the layout gives to it, and no others."""
    first, other = subject.observation(0), subject.observation(1)
    for view in subject.backbone.info.views:
        changed = {**first, "images": {**first["images"], view: other["images"][view]}}
        with spied() as seen:
            subject.ask(observations=[first])
            subject.ask(observations=[changed])
        before, after = _decoded(seen)
        found = (before != after).any(2)[0].nonzero()[:, 0].tolist()
        span = subject.backbone.layout(INSTRUCTIONS[0], first.get("state")).views[view].span
        _same(f"tokens that the pixels of view '{view}' change", found, list(span))


def every_input_is_read(subject: BackboneSubject) -> None:
    """Each view, and the state where there is one, changes what is read at the end."""
    first, other = subject.observation(0), subject.observation(1)
    before = _asked(subject, subject.backbone, first)
    changes = {f"view '{v}'": {**first, "images": {**first["images"], v: other["images"][v]}} for v in first["images"]}
    if subject.backbone.info.state_size is not None:
        changes["the state"] = {**first, "state": other["state"]}
    for what, observation in changes.items():
        if _are_equal(before, _asked(subject, subject.backbone, observation)):
            raise CheckFailed(f"{what} changes nothing")


def stages_may_change_features(subject: BackboneSubject) -> None:
    """The features of every view go through `query.transform`, a row for each patch, and on as they come back."""
    first, other = subject.observation(0), subject.observation(1)
    with spied(transform=torch.zeros_like) as seen:
        subject.ask(observations=[first])
        subject.ask(observations=[{**first, "images": other["images"]}])
    layout = subject.backbone.layout(INSTRUCTIONS[0], first.get("state"))
    found = [(view, features.shape[1]) for view, features in seen.features]
    expected = 2 * [(view, segment.length) for view, segment in layout.views.items()]
    _same("views and patches that go through query.transform", found, expected)
    if not torch.equal(*_decoded(seen)):
        raise CheckFailed("pixels reach the decoder although query.transform returned zeros")


def the_same_query_gives_the_same_actions(subject: BackboneSubject) -> None:
    """What a query answers depends on what it is given, not on the queries before it or the process's own chance."""
    first = _asked(subject, subject.backbone)
    subject.ask(observations=[subject.observation(5)])
    torch.rand(1)
    _equal(first, _asked(subject, subject.backbone), "the same query, asked again, gives others")


def batch_rows_are_independent(subject: BackboneSubject) -> None:
    """What it answers in one environment does not depend on the others in the batch, dense or pruned."""
    if "batch" not in subject.backbone.info.capabilities:
        raise NotApplicable("info.capabilities has no 'batch'")
    observations, instructions = subject.alike(3)
    for config in (DENSE, subject.thinned):
        with spied() as seen:
            together = subject.ask(config, observations, instructions)
        _same("rows of one pass over three environments of one layout", len(_decoded(seen)[0]), 3)
        for row in range(3):
            one = slice(row, row + 1)
            with spied() as own:
                (alone,) = subject.ask(config, observations[one], instructions[one], first_slot=row)
            pairs = [*zip([hidden[one] for hidden in seen.hidden], own.hidden, strict=True)]
            for found, expected in (*pairs, (_normalised(together[row]), _normalised(alone))):
                _near(found, expected, f"pipeline '{config.name}': row {row} of a batch, and the same query alone,")


def dropping_equals_masking(subject: BackboneSubject) -> None:
    """Tokens dropped by a pipeline equal tokens that stay and are masked, in everything that is read."""
    backbone = subject.backbone
    real = type(backbone).infer
    observations, instructions = subject.alike(2 if "batch" in backbone.info.capabilities else 1)

    def infer(self: Backbone, inputs: Any, query: Any) -> Tensor:  # noqa: ANN401
        actions = real(self, inputs, query)
        reference: Any = MaskedQuery(query.trace.plan.layout, query.trace.kept, seen.noise)
        expected = real(self, inputs, reference)
        _same("how often hidden states are read", len(seen.hidden), len(reference.hidden))
        for found, wanted in zip([*seen.hidden, actions], [*reference.hidden, expected], strict=True):
            _near(found, wanted, f"pipeline '{query.trace.pipeline}': what is read, and the same of a masked model,")
        return actions

    for config in (DENSE, subject.thinned):
        with spied() as seen, patch.object(type(backbone), "infer", infer):
            subject.ask(config, observations, instructions)
        _decoded(seen)


def keeping_everything_is_dense(subject: BackboneSubject) -> None:
    """A pipeline that is told to keep everything gives what dense gives, bit for bit."""
    kept = _asked(subject, subject.backbone, config=subject.keeping_everything)
    _equal(kept, _asked(subject, subject.backbone), "what is read differs from dense although every token was kept")


def no_query_waits(subject: BackboneSubject) -> None:
    """No query waits for the device."""
    for config in (DENSE, subject.thinned):
        with no_waiting(subject.backbone):
            subject.ask(config)


def a_replay_is_the_query(subject: BackboneSubject) -> None:
    """Captured once, as for a CUDA graph, it answers later queries as if they were run."""
    for config in (DENSE, subject.thinned):
        eager, recorded = subject.policy(config), subject.policy(config)
        recorded.executor = GraphExecutor(recorded.backbone, taped)
        for policy in (eager, recorded):
            policy.reset(INSTRUCTIONS[0])
        for query in range(3):
            observation = subject.observation(query)
            found, expected = (_normalised(policy.act(observation)) for policy in (recorded, eager))
            _equal([found], [expected], f"query {query} of pipeline '{config.name}' was replayed and gives others")


def flops_are_those_that_run(subject: BackboneSubject) -> None:
    """The FLOPs that its description adds up to are those torch counts, dense and pruned."""
    for config in (DENSE, subject.thinned):
        # The kernels of a CPU are not counted; this one is.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            (chunk,) = subject.ask(config)
        told = query_flops(subject.backbone.info, chunk.trace.plan)
        if told.total != counter.get_total_flops():
            parts = {**told.other, "decoder": told.decoder, "follow_up": told.follow_up}
            raise CheckFailed(
                f"pipeline '{config.name}': torch counts {counter.get_total_flops()}, info tells {told.total}: "
                + ", ".join(f"{name} {number}" for name, number in parts.items())
            )


def described_without_weights(subject: BackboneSubject) -> None:
    """It is described without weights, and is built as described: its facts, its layouts, its pixels."""
    with _Sizes() as made:
        described = subject.factory.describe(subject.preset, None, subject.options)
        layouts = [described.layout(instruction) for instruction in INSTRUCTIONS]
    if made.numbers >= layer_weights(described.info.decoder):
        raise CheckFailed(f"describing it makes {made.numbers} numbers, as many as a layer of the decoder has")
    backbone = subject.backbone
    _same("the info that is described", described.info, backbone.info)
    for instruction, layout in zip(INSTRUCTIONS, layouts, strict=True):
        _same(f"the layout that is described for '{instruction}'", layout, backbone.layout(instruction))
    observation = subject.observation(0)
    pixels = backbone.pixels([observation["images"]])
    prepared = backbone.prepare([observation], INSTRUCTIONS[:1]).images
    for view in backbone.info.views:
        known = {"described": described.pixels(observation["images"][view]), "prepared": prepared[view][0]}
        for what, found in known.items():
            if pixels[view].dtype != torch.uint8 or not torch.equal(found, pixels[view][0]):
                raise CheckFailed(f"view '{view}': the {what} pixels are not those of `pixels`, uint8 [3, S, S]")


def the_seed_decides_the_weights(subject: BackboneSubject) -> None:
    """The same seed gives the same weights, whatever else draws numbers, and another seed others."""
    torch.rand(1)
    first, again = (_asked(subject, subject.built()) for _ in range(2))
    _equal(first, again, "built twice with one seed, it gives others")
    if not subject.backbone.info.untrained:
        raise NotApplicable("its weights are trained")
    other = _asked(subject, subject.built(seed=1))
    if _are_equal(first, other):
        raise CheckFailed("built with another seed, it answers the same")


def statistics_go_both_ways(subject: BackboneSubject) -> None:
    """Actions keep their shape in the environment's units, row by row, and statistics undo themselves."""
    backbone = subject.backbone
    action = backbone.info.action
    rng = np.random.default_rng(0)
    values = rng.uniform(-0.99, 0.99, (2, action.horizon, action.dims))
    observations, given = [subject.observation(seed) for seed in range(2)], values.copy()
    found = backbone.unnormalise(given, observations)
    _same("the shape of actions in the environment's units", found.shape, values.shape)
    if not np.array_equal(given, values):
        raise CheckFailed("`unnormalise` writes to the actions it is given")
    for row in range(2):
        alone = backbone.unnormalise(values[row : row + 1].copy(), observations[row : row + 1])[0]
        _near(torch.from_numpy(found[row]), torch.from_numpy(alone), f"row {row} un-normalised in a batch and alone")
    statistics = getattr(backbone, "statistics", None)
    for name, size in (("action", action.dims), ("state", backbone.info.state_size)):
        known = getattr(statistics, name, None)
        if known is not None and callable(getattr(known, "normalise", None)):
            numbers = rng.uniform(-0.99, 0.99, (5, size or 0))
            back = torch.from_numpy(known.normalise(known.unnormalise(numbers.copy())))
            _near(back, torch.from_numpy(numbers), f"statistics of the {name}: numbers sent there and back")


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
    policy, wrong = subject.policy(), ("", " \n", None, 7)
    for instruction in (*wrong, "push it " * 5000):
        try:
            policy.reset(instruction)  # type: ignore[arg-type] - on purpose
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
        for what, make in (
            ("describe", lambda p, o: subject.factory.describe(p, None, o)),
            ("build", lambda p, o: subject.factory.build(p, None, o, cpu, torch.float32, 0)),
        ):
            where = f"{what} with the {'preset' if preset == 'no_such_key' else 'option'} 'no_such_key'"
            try:
                make(preset, options)
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
        with spied(**dict.fromkeys(("decode", "repeat", "follow"), lambda found, value=value: found * 0 + value)):
            try:
                subject.ask()
            except TokenPruneError as error:
                if "not finite" in str(error):
                    continue
                raise
        raise CheckFailed(f"hidden states that are all {value} become finite actions")


def nothing_waits_for_the_garbage_collector(subject: BackboneSubject) -> None:
    """When a query has ended, its tensors are freed at once."""
    for config in (DENSE, subject.thinned):
        policy = subject.policy(config)
        policy.reset(INSTRUCTIONS[0])
        first, *rest = (subject.observation(seed) for seed in range(3))
        policy.act(first)
        if left := caught_in_cycles(lambda policy=policy, rest=rest: [policy.act(one) for one in rest] and None):
            raise CheckFailed(
                f"{left} tensors of two queries hang on cycles; let nothing that holds a tensor be reached from itself"
            )


def it_works_in_bfloat16(subject: BackboneSubject) -> None:
    """It works in bfloat16, dense and pruned, and reads nearly what it reads in float64."""
    backbone = subject.built("bfloat16")
    subject.ask(subject.thinned, backbone=backbone)
    with spied() as seen:
        subject.ask(backbone=backbone)
    _same("the dtype of what enters the decoder", _decoded(seen)[0].dtype, torch.bfloat16)
    # Later passes may go on from another token.
    found, expected = seen.hidden[0].double(), _asked(subject, subject.backbone)[0].double()
    gap = ((found - expected).abs().mean() / expected.abs().mean()).item()
    if not gap < ROUGHLY:
        raise CheckFailed(f"what is read first differs from float64 by {gap:.2g} of its size")


BACKBONE_CHECKS: tuple[Callable[[BackboneSubject], None], ...] = (
    answers,
    it_is_what_it_says,
    the_layout_covers_the_sequence,
    pixels_reach_their_own_tokens,
    every_input_is_read,
    stages_may_change_features,
    the_same_query_gives_the_same_actions,
    batch_rows_are_independent,
    dropping_equals_masking,
    keeping_everything_is_dense,
    no_query_waits,
    a_replay_is_the_query,
    flops_are_those_that_run,
    described_without_weights,
    the_seed_decides_the_weights,
    statistics_go_both_ways,
    wrong_observations_are_refused,
    wrong_instructions_are_refused,
    unknown_options_are_refused,
    broken_states_are_no_action,
    nothing_waits_for_the_garbage_collector,
    it_works_in_bfloat16,
)


class _Sizes(TorchDispatchMode):
    """Counts the numbers of tensors that take memory."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        made = func(*args, **(kwargs or {}))
        tensors = [one for one in tree_leaves(made) if isinstance(one, Tensor) and one.device.type != "meta"]
        self.numbers += sum(one.numel() for one in tensors)
        return made


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


def _exchanged(subject: BackboneSubject, part: Callable[[Exchange], Any]) -> Any:  # noqa: ANN401
    with spied() as seen:
        subject.ask()
    _decoded(seen)
    return part(seen)


def _decoded(seen: Exchange) -> list[Tensor]:
    if not seen.embeddings:
        raise CheckFailed("it does not call `query.decode`, so that no pipeline can prune it")
    return seen.embeddings


def _asked(
    subject: BackboneSubject,
    backbone: Backbone,
    observation: Observation | None = None,
    config: PipelineConfig = DENSE,
) -> list[Tensor]:
    """Everything that is read in the first query of an episode, and its actions."""
    with spied() as seen:
        (chunk,) = subject.ask(config, None if observation is None else [observation], backbone=backbone)
    return [*seen.hidden, _normalised(chunk)]


def _normalised(chunk: ActionChunk) -> Tensor:
    assert chunk.normalised is not None  # no controller is there to answer
    return torch.from_numpy(chunk.normalised)


def _same(what: str, found: object, expected: object) -> None:
    if found != expected:
        raise CheckFailed(f"{what}: {found!r:.200}, expected {expected!r:.200}")


def _equal(first: Sequence[Tensor], second: Sequence[Tensor], said: str) -> None:
    if not _are_equal(first, second):
        raise CheckFailed(said)


def _are_equal(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    return len(first) == len(second) and all(torch.equal(*pair) for pair in zip(first, second, strict=True))


def _near(found: Tensor, expected: Tensor, what: str) -> None:
    if found.shape != expected.shape:
        raise CheckFailed(f"{what}: shapes {list(found.shape)} and {list(expected.shape)}")
    if not found.numel():
        return
    gap = (found.double() - expected.double()).abs().max().item()
    if not gap <= CLOSE * max(1.0, expected.double().abs().max().item()):
        raise CheckFailed(f"{what} differ by {gap:.3g}")
