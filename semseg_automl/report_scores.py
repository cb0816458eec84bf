"""What a report judges a segmentor by: one pass over labelled images, within a time limit, and the images worth seeing.

Drawing and writing are `semseg_automl.report_page`'s.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import cv2
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from semseg_automl.calibration import Calibration, Judged, measure_calibration
from semseg_automl.confusion import confusion_matrix
from semseg_automl.data.images import read_image
from semseg_automl.data.table import MaskTable
from semseg_automl.evaluation import judged
from semseg_automl.inference import Predictor
from semseg_automl.metrics import MetricChoice, build_metrics
from semseg_automl.report import confidence_map, error_map, overlay
from semseg_automl.review import class_confidence
from semseg_automl.task import SegmentationTask
from semseg_automl.uncertainty import ImageTallies

LONGEST_SIDE = 480
"""Of the pictures in a report, in pixels."""
GROUPS = ("worst", "median", "best")
VIEWS = ("image", "truth", "prediction", "errors", "confidence")

_GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass
class Scored:
    """What one pass over labelled images found.

    Attributes:
        tallies: what each image added to each metric.
        confusion: ``(K, K)`` pixels, truth in the rows.
        rows: positions in the table of the images that were judged, in the order of `tallies`.
        ranked_by: the figure that orders images.
        ranking: ``(N,)`` that figure of each image, larger is better; NaN where undefined.
        calibration: how far the probabilities can be believed; None without an image.
    """

    tallies: ImageTallies
    confusion: NDArray[np.int64]
    ranked_by: str
    rows: list[int] = field(default_factory=list)
    ranking: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    calibration: Calibration | None = None


@dataclass(frozen=True)
class Case:
    """An image worth seeing: how it was chosen, and its pictures in the order of `VIEWS`, RGB."""

    group: str
    name: str
    score: float
    pictures: tuple[NDArray[np.uint8], ...]


def spread_order(rows: int) -> NDArray[np.int64]:
    """Return all positions in an order whose every beginning is spread evenly over the table.

    >>> spread_order(5).tolist()
    [0, 2, 4, 1, 3]
    """
    return np.argsort((np.arange(rows) * _GOLDEN) % 1.0, kind="stable")


def score_rows(
    predictor: Predictor,
    table: MaskTable,
    task: SegmentationTask,
    *,
    metrics: Sequence[MetricChoice],
    threshold: float,
    deadline: float | None = None,
) -> Scored:
    """Judge a table's rows at their own resolution, spread evenly over it where the time does not do for all.

    Args:
        predictor: gives class scores.
        table: images and masks.
        task: encodes the masks.
        metrics: names of metrics, or metrics; the first with one figure per image orders the images.
        threshold: foreground probability above which a pixel is foreground.
        deadline: `time.monotonic` seconds after which no further image is begun, or None.

    Raises:
        DataError: as for `semseg_automl.evaluation.judged`.
        ConfigError: a metric is unknown or of the other kind of task.
    """
    built = build_metrics(metrics, kind=task.kind, num_classes=task.num_classes)
    name = next((name for name, metric in built.items() if metric.compute().ndim == 0), "")
    scored = Scored(
        ImageTallies(built, task.class_names), np.zeros((task.num_classes, task.num_classes), np.int64), name
    )
    if deadline is not None:
        predictor = replace(predictor, batch_size=1)  # a batch that is under way cannot be stopped
        if time.monotonic() >= deadline:
            return scored
    scored.calibration = measure_calibration(_tallied(predictor, table, task, scored, threshold, deadline))
    if name:
        sign = 1.0 if built[name].higher_is_better else -1.0
        scored.ranking = sign * scored.tallies.per_image()[name]
    return scored


def _tallied(
    predictor: Predictor,
    table: MaskTable,
    task: SegmentationTask,
    scored: Scored,
    threshold: float,
    deadline: float | None,
) -> Iterator[Judged]:
    """Add rows to `scored` until the time is over, and pass them on."""
    order = spread_order(len(table)) if deadline is not None else np.arange(len(table))
    images = judged(predictor, table.take(order), task, threshold)
    for row, (scores, labels, target) in zip(order.tolist(), images, strict=True):
        scored.tallies.add(scores, labels, target)
        scored.confusion += confusion_matrix(labels, target, task.num_classes).numpy()
        scored.rows.append(row)
        yield scores, labels, target
        if deadline is not None and time.monotonic() >= deadline:
            return


def choose_cases(ranking: NDArray[np.float64], each: int) -> list[tuple[str, int]]:
    """Choose images by their score: the worst, those around the median and the best, each image once.

    Args:
        ranking: ``(N,)``, larger is better; images without a score are left out.
        each: how many of each group at most.

    Returns:
        Group and position in `ranking`: worst first, then median, then best, the extreme one first in its group.

    >>> choose_cases(np.array([0.3, 0.9, np.nan, 0.1, 0.5]), 4)
    [('worst', 3), ('median', 0), ('best', 1)]
    """
    order = [int(i) for i in np.argsort(ranking, kind="stable") if math.isfinite(ranking[i])]
    count = min(each, len(order) // 3)
    if count == 0 and each:  # one or two images
        ends = [("worst", order[0])] if order else []
        return [*ends, ("best", order[-1])] if len(order) == 2 else ends
    start = (len(order) - count) // 2
    groups = (order[:count], order[start : start + count], order[::-1][:count])
    return [(group, row) for group, rows in zip(GROUPS, groups, strict=True) for row in rows]


def draw_cases(
    predictor: Predictor,
    table: MaskTable,
    task: SegmentationTask,
    scored: Scored,
    *,
    threshold: float,
    each: int,
    deadline: float | None = None,
) -> list[Case]:
    """Predict the images worth seeing once more, and draw them; at `deadline` the rest is left out, extremes last.

    Args and errors are those of `score_rows`; `each` is the number of images per group.
    """
    chosen = choose_cases(scored.ranking, each)
    groups = [[entry for entry in chosen if entry[0] == group] for group in GROUPS]
    by_rank = [group[i] for i in range(each) for group in groups if i < len(group)]
    sign = 1.0 if scored.ranked_by and scored.tallies.metrics[scored.ranked_by].higher_is_better else -1.0
    drawn: dict[tuple[str, int], Case] = {}
    for group, position in by_rank:
        if deadline is not None and time.monotonic() >= deadline:
            break
        row = scored.rows[position]
        one = table.take([row])
        scores, labels, target = next(judged(predictor, one, task, threshold))
        image = read_image(one.images[0], name=one.row_name(0), channels=one.channels)
        pictures = _pictures(image, scores, labels, target, binary=task.kind == "binary")
        drawn[group, position] = Case(group, one.row_name(0), float(sign * scored.ranking[position]), pictures)
    return [drawn[entry] for entry in chosen if entry in drawn]


def _pictures(
    image: NDArray[np.uint8], scores: Tensor, labels: Tensor, target: Tensor, *, binary: bool
) -> tuple[NDArray[np.uint8], ...]:
    """Draw the five views of an image, no side longer than `LONGEST_SIDE`."""
    confidence = class_confidence(scores, labels).float().numpy()
    shrink = min(1.0, LONGEST_SIDE / max(image.shape[:2]))
    size = (max(1, round(image.shape[1] * shrink)), max(1, round(image.shape[0] * shrink)))
    small, sure = (
        cv2.resize(each, size, interpolation=cv2.INTER_AREA).astype(each.dtype, copy=False)
        for each in (image, confidence)
    )
    truth, found = (
        cv2.resize(each.numpy().astype(np.uint8), size, interpolation=cv2.INTER_NEAREST_EXACT).astype(np.uint8)
        for each in (target, labels)
    )
    return (
        small,
        overlay(small, truth, binary=binary),
        overlay(small, found, binary=binary),
        error_map(small, truth, found, binary=binary),
        confidence_map(sure, lowest=1 / max(2, scores.shape[0])),
    )
