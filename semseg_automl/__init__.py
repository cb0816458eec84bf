"""semseg_automl: from a table of images and masks to a fitted semantic segmenter.

Public names only, imported on first use: ``import semseg_automl`` itself loads nothing heavy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from semseg_automl.version import __version__

if TYPE_CHECKING:
    from semseg_automl.checking import DataReport, check_data
    from semseg_automl.comparison import compare
    from semseg_automl.config import list_presets
    from semseg_automl.data.annotations import read_annotations
    from semseg_automl.data.splits import kfold
    from semseg_automl.data.synthetic import draw_dataset
    from semseg_automl.estimator import SemanticSegmentor
    from semseg_automl.grid import comparison_grid
    from semseg_automl.inference import FailedPrediction
    from semseg_automl.task import SegmentationTask

__all__ = [
    "DataReport",
    "FailedPrediction",
    "SegmentationTask",
    "SemanticSegmentor",
    "__version__",
    "check_data",
    "compare",
    "comparison_grid",
    "draw_dataset",
    "kfold",
    "list_presets",
    "read_annotations",
]

_HOMES = {
    "DataReport": "semseg_automl.checking",
    "FailedPrediction": "semseg_automl.inference",
    "SegmentationTask": "semseg_automl.task",
    "SemanticSegmentor": "semseg_automl.estimator",
    "check_data": "semseg_automl.checking",
    "compare": "semseg_automl.comparison",
    "comparison_grid": "semseg_automl.grid",
    "draw_dataset": "semseg_automl.data.synthetic",
    "kfold": "semseg_automl.data.splits",
    "list_presets": "semseg_automl.config",
    "read_annotations": "semseg_automl.data.annotations",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module 'semseg_automl' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    """List the public names."""
    return sorted(__all__)
