"""semseg_automl: from a table of images and masks to a fitted semantic segmenter.

Public names only, imported on first use: ``import semseg_automl`` itself loads nothing heavy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from semseg_automl.version import __version__

if TYPE_CHECKING:
    from semseg_automl.comparison import compare
    from semseg_automl.config import list_presets
    from semseg_automl.data.synthetic import draw_dataset
    from semseg_automl.estimator import SemanticSegmentor
    from semseg_automl.inference import FailedPrediction
    from semseg_automl.task import SegmentationTask

__all__ = [
    "FailedPrediction",
    "SegmentationTask",
    "SemanticSegmentor",
    "__version__",
    "compare",
    "draw_dataset",
    "list_presets",
]

_HOMES = {
    "FailedPrediction": "semseg_automl.inference",
    "SegmentationTask": "semseg_automl.task",
    "SemanticSegmentor": "semseg_automl.estimator",
    "compare": "semseg_automl.comparison",
    "draw_dataset": "semseg_automl.data.synthetic",
    "list_presets": "semseg_automl.config",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module 'semseg_automl' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    """List the public names."""
    return sorted(__all__)
