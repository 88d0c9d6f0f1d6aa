"""Every shipped stage and pipeline on every backbone, by running them; and what happens to one that cannot run."""

from __future__ import annotations

from functools import cache

from typer.testing import CliRunner

from tests.helpers.planting import REGISTRY
from tokenprune.cli import app
from tokenprune.testing.matrix import Cell, alone, matrix

USERS = {"trim": "give its weights"}
"""What runs only with something of the user's own, and what it says."""

NEEDS = {"action_rows": {"specprune.static_c3", "specprune-c3"}, "head_cache": {"head_cache", "efficientvla"}}
OFFERED = {"action_rows": {"openvla-oft"}, "head_cache": {"pi0", "pi05"}}


@cache
def cells() -> list[Cell]:
    return matrix(REGISTRY)


def test_every_backbone_is_there() -> None:
    assert {cell.backbone for cell in cells()} == set(REGISTRY.backbones)


def test_everything_shipped_runs_or_is_refused_for_what_the_backbone_lacks() -> None:
    shipped = [cell for cell in cells() if not cell.name.startswith("test.")]
    assert shipped
    for cell in shipped:
        if cell.name in USERS:
            assert cell.verdict == "refused"
            assert USERS[cell.name] in cell.why
            continue
        lacking = [
            capability
            for capability, names in NEEDS.items()
            if cell.name in names and cell.backbone not in OFFERED[capability]
        ]
        if cell.name == "keep_view" and cell.backbone == "openvla":
            lacking = ["no view besides primary"]
        assert cell.verdict == ("refused" if lacking else "runs"), cell
        assert (cell.why != "") == bool(lacking), cell
        assert all(capability in cell.why for capability in lacking), cell


def test_fastv_says_which_rows_it_reads() -> None:
    said = {cell.backbone: " ".join(cell.notes) for cell in cells() if (cell.kind, cell.name) == ("stage", "fastv")}
    assert "'last' rows, as in the released code" in said["openvla"]
    for bidirectional in ("openvla-oft", "pi0", "pi05"):
        assert "'text' rows in place of the last one" in said[bidirectional]


def test_a_stage_that_raises_is_told_from_one_that_is_refused() -> None:
    assert {cell.verdict for cell in cells() if cell.name == "test.broken"} == {"fails"}


def test_a_stage_in_no_pipeline_runs_with_its_defaults() -> None:
    config = alone("test.protector", (), REGISTRY)
    assert [stage.use for stage in config.stages] == ["test.protector"]


def test_the_table_fits_a_terminal() -> None:
    shown = CliRunner().invoke(app, ["list", "uniform*", "--matrix"])
    assert shown.exit_code == 0, shown.output
    assert max(map(len, shown.output.splitlines())) <= 80
    assert "uniform_grid" in shown.output
    assert "runs" in shown.output
