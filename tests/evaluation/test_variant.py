"""Variants: a pipeline, and a condition that takes something away from what the policy is given."""

from __future__ import annotations

from pathlib import Path

import pytest

from tokenprune.errors import ConfigError, PluginError
from tokenprune.evaluation.environment import Suite, Task
from tokenprune.evaluation.variant import Variant, black_views, instruction_of, parse_variant
from tokenprune.registry.discovery import Registry


@pytest.fixture(scope="module")
def registry():
    return Registry.discover()


def keeps(variant):
    return [stage["keep"] for stage in variant.pipeline["stages"] if "keep" in stage]


@pytest.mark.parametrize(
    ("text", "condition"),
    [("fastv@keep=0.25+no-wrist", "no-wrist"), ("fastv@keep=0.25+blind", "blind"), ("fastv@keep=0.25", "")],
)
def test_a_variant_is_what_was_written(registry, text, condition):
    variant = parse_variant(text, registry)
    assert (variant.label, variant.condition, keeps(variant)) == (text, condition, [0.25])


def test_overrides_are_for_every_pipeline_but_dense(registry):
    assert keeps(parse_variant("fastv+blind", registry, ["stages.0.keep=0.125"])) == [0.125]
    dense = parse_variant("dense+other-instruction", registry, ["stages.0.keep=0.125"])
    assert (dense.pipeline.get("stages", []), dense.condition) == ([], "other-instruction")


def test_a_plus_that_begins_no_condition_belongs_to_the_pipeline(registry, tmp_path):
    path = Path(tmp_path, "a+b.yaml")
    path.write_text("version: 1\nname: mine\nstages:\n  - {use: fastv, keep: 0.5}\n")
    assert parse_variant(str(path), registry).condition == ""
    assert parse_variant(f"{path}+blind", registry).condition == "blind"
    assert keeps(parse_variant("fastv@keep=2.5e+0", registry, ["stages.0.keep=0.5"])) == [0.5]


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        (
            "dense+blnd",
            ConfigError,
            r"'dense\+blnd': unknown condition 'blnd'; did you mean 'blind'\? valid: blind, no-<",
        ),
        ("dense+nowrist", ConfigError, "unknown condition 'nowrist'"),
        ("dense+blind+no-wrist", ConfigError, "one condition at a time, not 'blind' and 'no-wrist'"),
        ("dens+blind", PluginError, "no pipeline is called 'dens'; did you mean 'dense'"),
        ("fastv@kep=1+blind", ConfigError, "no stage of this pipeline has a field 'kep'"),
    ],
)
def test_what_is_wrong_in_a_variant_is_named(registry, text, error, message):
    with pytest.raises(error, match=message):
        parse_variant(text, registry)


def test_a_condition_blackens_the_views_it_names():
    views = ("primary", "wrist")
    black = {c: black_views(Variant("v", {}, c), views) for c in ("", "blind", "no-wrist", "other-instruction")}
    assert black == {"": set(), "blind": {"primary", "wrist"}, "no-wrist": {"wrist"}, "other-instruction": set()}
    with pytest.raises(
        ConfigError, match=r"'v': the policy has no view 'wirst'; did you mean 'wrist'\? valid: primary"
    ):
        black_views(Variant("v", {}, "no-wirst"), views)


def test_another_instruction_is_that_of_the_next_evaluated_task_told_differently():
    tasks = tuple(Task(i, str(i), text, 1) for i, text in enumerate(["left", "right", "right", "up", "left"]))
    suite = Suite("toy", tasks, (), 1, 1.0, {}, True)
    other, own = (Variant("v", {}, condition) for condition in ("other-instruction", "blind"))
    assert [instruction_of(other, suite, (0, 1, 2, 3), task) for task in range(4)] == ["right", "up", "up", "left"]
    assert [instruction_of(other, suite, (3, 1), task) for task in (3, 1)] == ["right", "up"]
    assert [instruction_of(own, suite, (0, 1), task) for task in (0, 1)] == ["left", "right"]
    for evaluated in ((1,), (1, 2), (0, 4)):
        with pytest.raises(ConfigError, match="'v': the evaluated tasks of 'toy' all have the instruction"):
            instruction_of(other, suite, evaluated, evaluated[0])
