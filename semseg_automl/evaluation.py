"""Judging predictions on labelled images, one image at a time, whatever their number."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, get_args

import pandas as pd
import torch
from torch import Tensor

from semseg_automl.bundle import Bundle
from semseg_automl.calibration import Judged
from semseg_automl.capacity import images_room
from semseg_automl.data.checks import RowCheck, check_rows
from semseg_automl.data.images import read_mask
from semseg_automl.data.kept import DecodedFiles
from semseg_automl.data.table import MaskTable
from semseg_automl.data.transforms import resize_mask
from semseg_automl.errors import ConfigError, DataError, check_known
from semseg_automl.hardware import detect_hardware
from semseg_automl.inference import FailedPrediction, MetricSize, Predictor
from semseg_automl.metrics import MetricChoice, build_metrics
from semseg_automl.models.segmentation_model import hard_labels
from semseg_automl.soft_map import shared_maps
from semseg_automl.strata import stratified
from semseg_automl.task import SegmentationTask
from semseg_automl.uncertainty import ImageTallies, Interval

LISTED_ROWS = 20
KEPT_BYTES = 2**30
"""Of decoded images and masks between their check and their prediction, at most."""


def predictor_of(bundle: Bundle, *, temperature: float = 1.0, mirrored: bool | None = None) -> Predictor:
    """Return what predicts with a bundle's network, which goes to this machine's device.

    Args:
        bundle: of a fit.
        temperature: what the logits of all scores are divided by.
        mirrored: average the scores with those of the mirrored image; None: as the plan has it.
    """
    plan, device = bundle.plan, torch.device(detect_hardware().device)
    return Predictor(
        bundle.model.eval().to(device),
        plan.input_size,
        plan.micro_batch_size,
        device,
        temperature=temperature,
        tile=plan.tile,
        mirrored=plan.mirrored if mirrored is None else mirrored,
    )


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
    predictor: Predictor,
    table: MaskTable,
    task: SegmentationTask,
    *,
    metrics: Sequence[MetricChoice],
    threshold: float,
    metric_size: MetricSize = "original",
) -> dict[str, float]:
    """Score predictions; memory does not grow with the number of images.

    Args:
        predictor: gives class scores.
        table: images and masks.
        task: encodes the masks.
        metrics: names of metrics, or metrics.
        threshold: foreground probability above which a pixel is foreground.
        metric_size: at which resolution, as for `judged`.

    Returns:
        Values by name; a metric with one value per class gives ``name[class]`` for each.

    Raises:
        DataError: there are no masks, an image or mask cannot be used, or the network's scores are not finite.
    """
    built = build_metrics(metrics, kind=task.kind, num_classes=task.num_classes)
    for scores, labels, target in judged(predictor, table, task, threshold, metric_size):
        with shared_maps():
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
    predictor: Predictor,
    table: MaskTable,
    task: SegmentationTask,
    *,
    metrics: Sequence[MetricChoice],
    threshold: float,
    metric_size: MetricSize = "original",
) -> ImageTallies:
    """Keep what each image adds to each metric, for figures per image and intervals; otherwise as `score_table`."""
    tallies = ImageTallies(build_metrics(metrics, kind=task.kind, num_classes=task.num_classes), task.class_names)
    for scores, labels, target in judged(predictor, table, task, threshold, metric_size):
        with shared_maps():
            tallies.add(scores, labels, target)
    return tallies


def finite_scores(predictor: Predictor, table: MaskTable, size: MetricSize = "original") -> Iterator[Tensor]:
    """Yield scores ``(C, H, W)`` that can be judged, row by row; arguments as for `Predictor.scores`.

    Raises:
        DataError: an image cannot be used, or the network's scores are not finite.
    """
    for row, scores in enumerate(predictor.scores(table, size=size)):
        if isinstance(scores, FailedPrediction):
            raise DataError(scores.reason)
        if not bool(scores.isfinite().all()):
            raise DataError(
                f"{table.row_name(row)}: the network's scores are not finite and cannot be judged. Its weights are "
                "damaged or its computation overflowed: fit again, with env.precision 32-true if it was lower"
            )
        yield scores


def judged(
    predictor: Predictor,
    table: MaskTable,
    task: SegmentationTask,
    threshold: float,
    metric_size: MetricSize = "original",
) -> Iterator[Judged]:
    """Yield scores ``(C, H, W)``, hard labels ``(H, W)`` and true class indices ``(H, W)``, row by row.

    Args:
        predictor: gives class scores.
        table: images and masks.
        task: encodes the masks.
        threshold: foreground probability above which a pixel is foreground.
        metric_size: ``original``, each image's own resolution; ``model``, that of the network's input, to which masks
            are squashed by the nearest pixel, as in the Conv-LoRA paper.

    Raises:
        ConfigError: `metric_size` is neither.
        DataError: there are no masks, an image or mask cannot be used, or the network's scores are not finite.
    """
    check_known("metric_size", metric_size, get_args(MetricSize))
    if table.masks is None:
        raise DataError("scoring needs masks; give a table with a label column")
    for row, scores in enumerate(finite_scores(predictor, table, metric_size)):
        name = table.row_name(row)
        stored = read_mask(table.masks[row], name=name, colours=task.colours)
        encoded = task.encode(stored, name=name)
        if metric_size == "model":
            encoded = resize_mask(encoded, (scores.shape[1], scores.shape[2]))
        target = torch.from_numpy(encoded).long()
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
    metric_size: MetricSize = "original",
    strata: tuple[str, pd.DataFrame] | None = None,
) -> dict[str, float] | pd.DataFrame:
    """Check masks and score predictions, in one of the forms that ``SemanticSegmentor.evaluate`` returns.

    What the check decodes is predicted from, as far as it fits a quarter of the free memory and 1 GiB.

    Args:
        predictor: gives class scores.
        table: images and masks.
        task: encodes the masks.
        metrics: names of metrics, or metrics.
        threshold: foreground probability above which a pixel is foreground.
        return_per_image: a row per image.
        intervals: a row per figure, with the ends of its interval.
        metric_size: at which resolution, as for `judged`.
        strata: what to split the images by, and the table with all its columns, for `stratified`.

    Raises:
        ConfigError: more than one form is asked for.
        DataError: as for `check_values` and `score_table`.
    """
    if return_per_image and intervals:
        raise ConfigError("return_per_image and intervals are both True; they return different tables: ask for one.")
    if strata is not None and (return_per_image or intervals):
        raise ConfigError("by gives a table of its own, with intervals: leave out return_per_image and intervals.")
    kept = DecodedFiles(min(KEPT_BYTES, images_room("auto", detect_hardware())))
    check_values(task, table, check_rows(table, keep=kept))
    table = kept.as_table(table)
    if strata is not None:
        images = judged(predictor, table, task, threshold, metric_size)
        return stratified(images, strata[1], task, by=strata[0], metrics=metrics)
    settings: dict[str, Any] = {"metrics": metrics, "threshold": threshold, "metric_size": metric_size}
    if not (return_per_image or intervals):
        return score_table(predictor, table, task, **settings)
    tallies = tally_table(predictor, table, task, **settings)
    if return_per_image:
        return pd.DataFrame(tallies.per_image(), index=table.index)
    return pd.DataFrame.from_dict(tallies.intervals(), orient="index", columns=list(Interval._fields))
