"""The one door to ``lightning``, ``timm``, ``segment_anything`` and ``torchmetrics``: all four import torchvision.

A torchvision built for another torch than the installed one fails at import with "operator torchvision::nms does not
exist": it registers shape functions for compiled operators that were not loaded. On that very error, and on no other,
the missing operators are declared here (a plain-torch ``nms`` behind the one that has to run) and the import is tried
again. Where torchvision works nothing happens.

Nothing else of torchvision is used or repaired here.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import lightning
    import segment_anything
    import timm
    import torchmetrics
    from torch import Tensor

__all__ = ["lightning", "segment_anything", "timm", "torchmetrics"]

_MISSING_OPERATOR = "operator torchvision::nms does not exist"

# Schemas as torchvision declares them in its C++ sources: the two operators whose shape functions its Python side
# registers without asking whether the compiled library was loaded.
_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)

_libraries: list[object] = []  # of operators, whose registrations vanish when they are collected
_ready = False


def _nms(dets: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Greedy non-maximum suppression of boxes ``(N, 4)`` as x1, y1, x2, y2; returns the kept indices, best first."""
    import torch

    order = scores.argsort(descending=True, stable=True)
    area = (dets[:, 2] - dets[:, 0]) * (dets[:, 3] - dets[:, 1])
    alive = torch.ones_like(order, dtype=torch.bool)
    kept = []
    for i in order.tolist():
        if not alive[i]:
            continue
        kept.append(i)
        top_left = torch.maximum(dets[i, :2], dets[:, :2])
        bottom_right = torch.minimum(dets[i, 2:], dets[:, 2:])
        overlap = (bottom_right - top_left).clamp(min=0).prod(dim=1)
        alive &= overlap / (area[i] + area - overlap) <= iou_threshold
    return torch.tensor(kept, dtype=torch.int64, device=dets.device)


def _declare_operators() -> None:
    """Declare torchvision's compiled operators to torch, those that exist already left alone."""
    import torch
    from torch import library

    operators = library.Library("torchvision", "FRAGMENT")  # noqa: TOR901
    for schema in _SCHEMAS:
        name = schema.partition("(")[0]
        if not hasattr(torch.ops.torchvision, name):
            operators.define(schema)
    operators.impl("nms", _nms, "CPU")
    _libraries.append(operators)


def make_torchvision_importable() -> None:
    """Import torchvision, declaring its missing operators first where a foreign torch left them out.

    A missing torchvision is not an error here: the package that needs it says so itself.

    Raises:
        RuntimeError: torchvision's own error, when it is any other than the one described above.
    """
    global _ready
    if _ready:
        return
    try:
        importlib.import_module("torchvision")
    except ModuleNotFoundError as error:
        if error.name != "torchvision":
            raise
    except RuntimeError as error:
        if _MISSING_OPERATOR not in str(error):
            raise
        for name in [n for n in sys.modules if n == "torchvision" or n.startswith("torchvision.")]:
            del sys.modules[name]  # half-imported modules of the failed try
        _declare_operators()
        importlib.import_module("torchvision")
    _ready = True


def __getattr__(name: str) -> ModuleType:
    """Import one of the four packages on first use (PEP 562), torchvision made importable before it."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    make_torchvision_importable()
    return importlib.import_module(name)
