"""Makes a torchvision built for another torch importable, for packages that need only its Python part.

transformers' model classes and open_clip import torchvision where it is installed. Beside a CPU build of torch, pip
installs a torchvision whose compiled operators cannot be loaded, so that its import fails. Nothing here uses these
operators: they are declared without an implementation, and calling one raises an error that names it. A torchvision
that works, or fails for another reason, is left alone.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import warnings

import torch

BROKEN = "operator torchvision::nms does not exist"

SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)

# Declarations last as long as the object that made them.
_declared: list[torch.library.Library] = []


def mend_torchvision() -> bool:
    """Import torchvision where it is installed; declare its missing operators if the import fails without them.

    Call it before transformers' model classes or open_clip are imported.

    Returns:
        Whether operators were declared, now or earlier.
    """
    if not _declared and importlib.util.find_spec("torchvision") is not None and _broken():
        library = torch.library.Library("torchvision", "FRAGMENT")
        for schema in SCHEMAS:
            library.define(schema)
        _declared.append(library)
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        with warnings.catch_warnings():
            # It warns about its missing compiled part.
            warnings.simplefilter("ignore")
            importlib.import_module("torchvision")
    return bool(_declared)


def _broken() -> bool:
    try:
        importlib.import_module("torchvision")
    except Exception as error:  # whoever needs torchvision reports other failures
        return BROKEN in str(error)
    return False
