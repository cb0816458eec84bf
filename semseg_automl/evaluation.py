"""Judging predictions on labelled images and writing them to files, one image at a time, whatever their number."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from semseg_automl.data.images import read_mask, write_png
from semseg_automl.data.table import MaskTable, RowCheck, check_rows
from semseg_automl.errors import ConfigError, DataError
from semseg_automl.inference import FailedPrediction, Predictor
from semseg_automl.metrics import MetricChoice, build_metrics
from semseg_automl.models.segmentation_model import hard_labels
from semseg_automl.task import SegmentationTask
from semseg_automl.uncertainty import ImageTallies, Interval

LISTED_ROWS = 20


def check_values(task: SegmentationTask, table: MaskTable, checks: Sequence[RowCheck]) -> None:
    """Refuse masks with values that the task does not know, before anything is computed.

    Raises:
        DataError: names every such row (the first twenty), its values and their pixels.
    """
    problems = []
    for row, check in enumerate(checks):
        unknown = task.unknown_values(check.value_counts, check.encoding)
        if unknown:
            listed = ", ".join(f"{value} ({pixels} pixels)" for value, pixels in list(unknown.items())[:LISTED_ROWS])
            problems.append(f"{table.row_name(row)}: {listed}")
    if problems:
        more = f"\n... and {len(problems) - LISTED_ROWS} more" if len(problems) > LISTED_ROWS else ""
        raise DataError(
            f"{len(problems)} masks hold values that no class has; known are {task.known_text()}. Correct the masks, "
            "or fit again with class_names=, color_map= or ignore_label= naming these values.\n"
            + "\n".join(problems[:LISTED_ROWS])
            + more
        )


def score_table(
    predictor: Predictor, table: MaskTable, task: SegmentationTask, *, metrics: Sequence[MetricChoice], threshold: float
) -> dict[str, float]:
    """Score predictions at each image's own resolution; memory does not grow with the number of images.

    Args:
        predictor: gives class scores.
        table: images and masks.
        task: encodes the masks.
        metrics: names of metrics, or metrics.
        threshold: foreground probability above which a pixel is foreground.

    Returns:
        Values by name; a metric with one value per class gives ``name[class]`` for each.

    Raises:
        DataError: there are no masks, an image or mask cannot be used, or the network's scores are not finite.
    """
    built = build_metrics(metrics, kind=task.kind, num_classes=task.num_classes)
    for scores, labels, target in _judged(predictor, table, task, threshold):
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


def tally_table(
    predictor: Predictor, table: MaskTable, task: SegmentationTask, *, metrics: Sequence[MetricChoice], threshold: float
) -> ImageTallies:
    """Keep what each image adds to each metric, for figures per image and intervals; otherwise as `score_table`."""
    tallies = ImageTallies(build_metrics(metrics, kind=task.kind, num_classes=task.num_classes), task.class_names)
    for scores, labels, target in _judged(predictor, table, task, threshold):
        tallies.add(scores, labels, target)
    return tallies


def _judged(
    predictor: Predictor, table: MaskTable, task: SegmentationTask, threshold: float
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield scores ``(C, H, W)``, hard labels ``(H, W)`` and true class indices ``(H, W)``, row by row."""
    if table.masks is None:
        raise DataError("scoring needs masks; give a table with a label column")
    for row, scores in enumerate(predictor.scores(table)):
        if isinstance(scores, FailedPrediction):
            raise DataError(scores.reason)
        name = table.row_name(row)
        if not bool(scores.isfinite().all()):
            raise DataError(
                f"{name}: the network's scores are not finite and cannot be judged. Its weights are damaged or its "
                "computation overflowed: fit again, with env.precision 32-true if it was lower"
            )
        stored = read_mask(table.masks[row], name=name, colours=task.colours)
        target = torch.from_numpy(task.encode(stored, name=name)).long()
        yield scores, hard_labels(scores, threshold), target


def evaluate_table(
    predictor: Predictor,
    table: MaskTable,
    task: SegmentationTask,
    *,
    metrics: Sequence[MetricChoice],
    threshold: float,
    return_per_image: bool = False,
    intervals: bool = False,
) -> dict[str, float] | pd.DataFrame:
    """Check masks and score predictions, in one of the forms that ``SemanticSegmentor.evaluate`` returns.

    Raises:
        ConfigError: `return_per_image` and `intervals` are both asked for.
        DataError: as for `check_values` and `score_table`.
    """
    if return_per_image and intervals:
        raise ConfigError("return_per_image and intervals are both True; they return different tables: ask for one.")
    check_values(task, table, check_rows(table))
    if not (return_per_image or intervals):
        return score_table(predictor, table, task, metrics=metrics, threshold=threshold)
    tallies = tally_table(predictor, table, task, metrics=metrics, threshold=threshold)
    if return_per_image:
        return pd.DataFrame(tallies.per_image(), index=table.index)
    return pd.DataFrame.from_dict(tallies.intervals(), orient="index", columns=list(Interval._fields))


def save_masks(
    table: MaskTable, masks: Iterable[NDArray[Any] | FailedPrediction], folder: Path, *, palette: Sequence[int] = ()
) -> list[Mapping[str, str | None]]:
    """Write one PNG per row; a name that came before gets the row's position behind it.

    Args:
        table: what was predicted.
        masks: one per row, in order.
        folder: made if need be.
        palette: the packed colour of each value, where the files are to be palette images.

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
        write_png(folder / f"{stem}.png", mask, palette=palette)
        rows.append({"image": image, "mask": str(folder / f"{stem}.png"), "error": None})
    return rows
