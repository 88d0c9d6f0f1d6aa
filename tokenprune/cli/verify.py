"""`tokenprune verify`: whether a checkpoint fits a backbone, and whether the policy it makes looks at its images."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tokenprune.cli.options import BackboneName, Device, Dtype, Json, Options, Plugins, key_values, print_json, registry
from tokenprune.errors import PluginError
from tokenprune.report.text import WIDTH

if TYPE_CHECKING:
    import numpy as np

    from tokenprune.engine.adapter import Backbone, Findings
    from tokenprune.registry.discovery import Registry

_SIDE = 256
_LABEL = 13
_SHOWN = 10


def add_to(app: typer.Typer) -> None:
    """Register the verb."""
    app.command()(verify)


def verify(
    checkpoint: Annotated[str, typer.Argument(help="Folder in the release's format, or a hub id.")],
    backbone: BackboneName,
    options: Options = None,
    instruction: Annotated[str, typer.Option(help="What the policy is told.")] = "put the bowl on the plate",
    device: Device = "cpu",
    dtype: Dtype = "auto",
    plugins: Plugins = None,
    as_json: Json = False,
) -> None:
    """Check a checkpoint tensor by tensor, then load it and see whether its actions depend on the images.

    Exit 1 if a tensor is unmapped, missing or misshapen, or if a view changes nothing.
    """
    from tokenprune.loading import load_backbone

    found = registry(plugins)
    factory = found.backbone_factory(backbone)
    if not callable(getattr(factory, "verify", None)):
        raise PluginError(f"backbone '{backbone}' of {found.backbone(backbone).owner} cannot verify checkpoints")
    chosen = key_values("--option", options)
    findings: Findings = factory.verify(Path(checkpoint), chosen)
    if not as_json:
        print(textwrap.fill(f"{checkpoint} as {backbone}", WIDTH, break_on_hyphens=False))
        _print_findings(findings)
    changes: dict[str, float] | None = None
    if findings.clean:
        loaded = load_backbone(backbone, found, checkpoint, None, device, dtype, 0, chosen)
        changes = view_changes(loaded, found, instruction, findings.state_size)
    blind = [view for view, change in (changes or {}).items() if not change]
    if as_json:
        facts = {"checkpoint": checkpoint, "backbone": backbone, **asdict(findings), "clean": findings.clean}
        print_json({**facts, "image_changes": changes, "views_ignored": blind})
    elif changes is None:
        print("\nThe checkpoint does not fit the model and was not loaded.")
    else:
        _print_changes(changes, blind)
    if blind or not findings.clean:
        raise typer.Exit(1)


def view_changes(backbone: Backbone, found: Registry, instruction: str, state_size: int | None) -> dict[str, float]:
    """How much each view matters: its image all white instead of all black, while the others stay black.

    The same query is asked twice first, so that what differs between equal queries is not taken for the image's doing.

    Args:
        backbone: The policy's backbone; it runs dense.
        found: Discovered plugins.
        instruction: What the policy is told.
        state_size: Zeros of robot state to give, None for none.

    Returns:
        Per view, the greatest change of a normalised action beyond that between equal queries; 0 where there is none.
    """
    import numpy as np

    black, white = (np.full((_SIDE, _SIDE, 3), value, dtype=np.uint8) for value in (0, 255))
    dark = dict.fromkeys(backbone.info.views, black)
    first = _actions(backbone, found, instruction, dark, state_size)

    def change(images: Mapping[str, np.ndarray]) -> float:
        return float(np.abs(_actions(backbone, found, instruction, images, state_size) - first).max())

    repeated = change(dark)
    changes = {view: change({**dark, view: white}) for view in dark}
    return {view: found if found > repeated else 0.0 for view, found in changes.items()}


def _actions(
    backbone: Backbone, found: Registry, instruction: str, images: Mapping[str, np.ndarray], state_size: int | None
) -> np.ndarray:
    """Normalised actions of a new policy's first query: with nothing remembered, every call has the same noise."""
    import numpy as np

    from tokenprune.pipelines.config import DENSE
    from tokenprune.policy import Policy

    policy = Policy(backbone, DENSE, found)
    policy.reset(instruction)
    state = {} if state_size is None else {"state": np.zeros(state_size)}
    actions = policy.act({"images": images, **state}).normalised
    assert actions is not None  # no controller is there to answer
    return actions


def _print_findings(findings: Findings) -> None:
    _line("files", findings.files)
    _line("keys", [f"{count} {dtype}" for dtype, count in findings.dtypes.items()])
    _line("statistics", findings.statistics)
    _line("unused", [f"{count} {group}" for group, count in _grouped(findings.unused).items()])
    for name in ("unmapped", "missing", "misshapen"):
        entries: tuple[str, ...] = getattr(findings, name)
        rest = len(entries) - _SHOWN
        _line(name, [*entries[:_SHOWN], *([f"and {rest} more, which --json lists"] if rest > 0 else [])])


def _print_changes(changes: Mapping[str, float], blind: list[str]) -> None:
    _line("image", [f"{change:.3g} {view}" for view, change in changes.items()])
    print()
    meaning = "image: greatest change of a normalised action when that view is all white instead of all black."
    verdict = f"The policy ignores {', '.join(blind)}." if blind else "The policy looks at every view."
    print(textwrap.fill(f"{meaning} {verdict}", WIDTH))


def _grouped(entries: Iterable[str]) -> dict[str, int]:
    """How many keys there are per module, the first two parts of a key."""
    groups = Counter(".".join(entry.rpartition(": ")[2].split(".")[:2]) for entry in entries)
    return dict(groups.most_common())


def _line(label: str, entries: Iterable[Any]) -> None:
    """A label, and beside it one entry a line."""
    for at, entry in enumerate(list(entries) or ["none"]):
        start = (label if at == 0 else "").ljust(_LABEL)
        indent = " " * (_LABEL + 2)
        print(textwrap.fill(str(entry), WIDTH, initial_indent=start, subsequent_indent=indent, break_on_hyphens=False))
