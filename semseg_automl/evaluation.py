"""Judging predictions on labelled images and writing them to files, one image at a time, whatever their number."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray

from semseg_automl.data.images import read_mask, write_png
from semseg_automl.data.table import MaskTable, RowCheck
from semseg_automl.errors import DataError
from semseg_automl.inference import FailedPrediction, Predictor
from semseg_automl.metrics import build_metrics
from semseg_automl.models.segmentation_model import hard_labels
from semseg_automl.task import SegmentationTask

LISTED_ROWS = 20


def check_values(task: SegmentationTask, table: MaskTable, checks: Sequence[RowCheck]) -> None:
    """Refuse masks with values that the task does not know, before anything is computed.

    Raises:
        DataError: names every such row (the first twenty), its values and their pixels.
    """
    known = {*task.values, *task.ignore_values}
    problems = []
    for row, check in enumerate(checks):
        unknown = {value: pixels for value, pixels in check.value_counts.items() if value not in known}
        if unknown:
            listed = ", ".join(f"{value} ({pixels} pixels)" for value, pixels in sorted(unknown.items())[:LISTED_ROWS])
            problems.append(f"{table.row_name(row)}: {listed}")
    if problems:
        more = f"\n... and {len(problems) - LISTED_ROWS} more" if len(problems) > LISTED_ROWS else ""
        raise DataError(
            f"{len(problems)} masks hold values that no class has; known are {sorted(known)}. Correct the masks, or "
            "fit again with class_names= or ignore_label= naming these values.\n"
            + "\n".join(problems[:LISTED_ROWS])
            + more
        )


def score_table(
    predictor: Predictor, table: MaskTable, task: SegmentationTask, *, metrics: Sequence[str], threshold: float
) -> dict[str, float]:
    """Score predictions at each image's own resolution.

    Args:
        predictor: gives class scores.
        table: images and masks.
        task: encodes the masks.
        metrics: names of metrics.
        threshold: foreground probability above which a pixel is foreground.

    Returns:
        Values by name; a metric with one value per class gives ``name[class]`` for each.
    """
    if table.masks is None:
        raise DataError("scoring needs masks; give a table with a label column")
    built = build_metrics(metrics, kind=task.kind, num_classes=task.num_classes)
    for row, scores in enumerate(predictor.scores(table)):
        if isinstance(scores, FailedPrediction):
            raise DataError(scores.reason)
        name = table.row_name(row)
        target = torch.from_numpy(task.encode(read_mask(table.masks[row], name=name), name=name)).long()
        labels = hard_labels(scores, threshold)
        for metric in built.values():
            metric.update(scores, labels, target)
    results: dict[str, float] = {}
    for name, metric in built.items():
        value = metric.compute()
        if value.ndim:
            per_class = zip(task.class_names, value.tolist(), strict=True)
            results.update({f"{name}[{class_name}]": figure for class_name, figure in per_class})
        else:
            results[name] = float(value)
    return results


def save_masks(
    table: MaskTable, masks: Iterable[NDArray[Any] | FailedPrediction], folder: Path
) -> list[Mapping[str, str | None]]:
    """Write one PNG per row; a name that came before gets the row's position behind it.

    Args:
        table: what was predicted.
        masks: one per row, in order.
        folder: made if need be.

    Returns:
        Per row: ``image``, ``mask`` (the file, None where it failed) and ``error`` (None where it did not).
    """
    rows: list[Mapping[str, str | None]] = []
    taken: set[str] = set()
    for position, mask in enumerate(masks):
        source = table.images[position]
        image = fspath(source) if isinstance(source, str | PathLike) else None
        if isinstance(mask, FailedPrediction):
            rows.append({"image": image, "mask": None, "error": mask.reason})
            continue
        stem = f"image_{position}" if image is None else Path(image).stem
        while stem.lower() in taken:
            stem = f"{stem}_{position}"
        taken.add(stem.lower())
        write_png(folder / f"{stem}.png", mask)
        rows.append({"image": image, "mask": str(folder / f"{stem}.png"), "error": None})
    return rows
