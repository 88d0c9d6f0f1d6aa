"""The control that keeps one camera."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from tests.helpers.backbones import BACKBONES
from tests.helpers.planting import REGISTRY, pipeline
from tests.helpers.tiny_oft import INSTRUCTION, observation, tiny_config, tiny_policy_parts
from tokenprune.cli import app
from tokenprune.errors import LayoutError
from tokenprune.pipelines.config import DENSE
from tokenprune.pipelines.loader import load_pipeline
from tokenprune.policy import Policy
from tokenprune_plugins.baselines.keep_view import ViewConfig
from tokenprune_plugins.shared.grid import grid_scores


def asked(backbone: Any, seen: dict[str, Any], *configs: Any) -> list[Any]:
    chunks = []
    for config in configs:
        policy = Policy(backbone, config, REGISTRY)
        policy.reset(INSTRUCTION)
        chunks.append(policy.act(seen))
    return chunks


@pytest.mark.parametrize("name", ["oft", "pi0", "pi05"])
def test_it_keeps_the_third_person_view(name: str) -> None:
    backbone, seen, _ = BACKBONES[name]()
    (chunk,) = asked(backbone, seen, load_pipeline("keep_view", REGISTRY).config)
    plan = chunk.trace.plan
    assert chunk.trace.kept[-1][0].tolist() == list(plan.layout.views["primary"].span)
    assert plan.graph_safe
    assert [cut.keep for cut in plan.cuts] == [plan.layout.views["primary"].length]


def test_the_actions_do_not_depend_on_the_other_view() -> None:
    backbone = tiny_policy_parts(tiny_config())
    seen, config = observation(backbone.config), load_pipeline("keep_view", REGISTRY).config
    black = {**seen, "images": {**seen["images"], "wrist": np.zeros_like(seen["images"]["wrist"])}}
    (one,), (other, dense) = asked(backbone, seen, config), asked(backbone, black, config, DENSE)
    assert np.array_equal(one.normalised, other.normalised)
    assert not np.array_equal(one.normalised, dense.normalised)


@pytest.mark.parametrize("keep", [0, 5, 0.25])
@pytest.mark.parametrize("view", ["wrist", ("wrist",), ("left", "wrist")])
def test_views_can_be_named_and_a_few_of_the_others_kept(view: Any, keep: Any) -> None:
    backbone = tiny_policy_parts(tiny_config(views=("primary", "left", "wrist")))
    named = {view} if isinstance(view, str) else set(view)
    stage = ViewConfig(use="keep_view", view=view, keep=keep)
    (chunk,) = asked(backbone, observation(backbone.config), pipeline(stage))
    layout = backbone.layout(INSTRUCTION)
    whole = [token for name in named for token in layout.views[name].span]
    rest = [token for name in set(layout.views) - named for token in layout.views[name].span]
    scores = grid_scores(layout)
    few = sorted(rest, key=lambda token: (-float(scores[token]), token))
    few = few[: keep if isinstance(keep, int) else int(keep * len(rest))]
    assert chunk.trace.kept[-1][0].tolist() == sorted([*whole, *few])


def test_a_file_says_the_views_and_may_vary_them() -> None:
    config = load_pipeline("keep_view", REGISTRY, ("stages.0.view=[wrist]", "stages.0.keep=3")).config
    again = type(config.stages[0]).model_validate(config.stages[0].model_dump())
    assert config.stages[0].view == ("wrist",)
    assert set(config.stages[0].views) == {"wrist"}
    assert again == config.stages[0]


@pytest.mark.parametrize(
    ("views", "view", "said"),
    [
        (("primary",), "primary", "no view besides primary, so nothing could leave"),
        (("primary", "wrist"), ("wrist", "primary"), "no view besides wrist, primary, so nothing could leave"),
        (("primary", "wrist"), "wirst", "has no view 'wirst'.*'wrist'"),
    ],
)
def test_what_could_not_run_is_refused(views: tuple[str, ...], view: Any, said: str) -> None:
    backbone = tiny_policy_parts(tiny_config(views=views))
    with pytest.raises(LayoutError, match=said):
        Policy(backbone, pipeline(ViewConfig(use="keep_view", view=view)), REGISTRY)


def test_the_command_line_knows_it(tmp_path: Any) -> None:
    words = ["--preset", "tiny", "--queries", "1", "--out", str(tmp_path), "--json"]
    done = CliRunner().invoke(app, ["compare", "keep_view", *words])
    assert done.exit_code == 0, done.output
    assert "keep_view" in json.loads(done.stdout)["queries"]
    alone = CliRunner().invoke(app, ["run", "keep_view", "--backbone", "openvla", *words])
    assert isinstance(alone.exception, LayoutError)
    assert "no view besides primary" in str(alone.exception)
    every = CliRunner().invoke(app, ["compare", "--all", "--backbone", "openvla", *words[:-1]])
    assert every.exit_code == 0, every.output
    assert "left out: 'keep_view'" in every.output
