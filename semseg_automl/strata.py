"""Figures of parts of a data set: by a column of the table, object size, distance to a boundary, or class.

Every figure comes with its 95 % bootstrap interval over the images of its part. Memory is that of one image beside
what each image adds to each figure. Not here: the figures themselves, which are in `semseg_automl.metrics`, and the
resampling, which is in `semseg_automl.uncertainty`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import cv2
import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from semseg_automl.calibration import Judged
from semseg_automl.confusion import confusion_matrix
from semseg_automl.errors import ConfigError, DataError, nearest
from semseg_automl.metrics import MetricChoice, SegmentationMetric, build_metrics
from semseg_automl.task import IGNORE_INDEX, SegmentationTask
from semseg_automl.uncertainty import ImageTallies, Interval

MISSING = "missing"
NO_OBJECT = "no object"
SIZES = ("small", "medium", "large")
MAX_VALUES = 10
"""Different numbers that a column may hold before its rows are split at the quartiles."""
DISTANCES = (2.0, 5.0, 10.0, 20.0)
"""Where the strata of distances to a boundary end, in pixels."""
DISTANCE_NAMES = ("0-2 px", "2-5 px", "5-10 px", "10-20 px", ">20 px")
BUILT_IN = ("class", "object_size", "boundary_distance")

COLUMNS = ["images", *Interval._fields]
_BOTH = frozenset({"binary", "multiclass"})


def stratified(
    images: Iterable[Judged], frame: pd.DataFrame, task: SegmentationTask, *, by: str, metrics: Sequence[MetricChoice]
) -> pd.DataFrame:
    """Score the strata of a data set.

    Args:
        images: predictions and their labels, one per row of `frame`.
        frame: the table with all its columns.
        task: kind and names of the classes.
        by: what `check_stratum` lets pass; where a column has the name of a built-in one, the column is meant.
        metrics: what to compute in each stratum; classes and distances have figures of their own.

    Returns:
        One row per stratum and figure: ``images`` (that have a labelled pixel in it), ``value``, and the ends ``low``
        and ``high`` of its 95 % bootstrap interval, NaN with less than two images.

    Raises:
        ConfigError: a metric is unknown.
        DataError: the column cannot be grouped by, or an image or mask cannot be used.
    """
    if by in frame.columns:
        found = _by_rows(images, task, metrics, column_strata(frame[by]))
    elif by == "object_size":
        found = _by_rows(images, task, metrics, None)
    else:
        found = _by_class(images, task) if by == "class" else _by_distance(images, task.num_classes)
    rows = [(stratum, figure, each) for stratum, figures in found.items() for figure, each in figures.items()]
    index = pd.MultiIndex.from_tuples([row[:2] for row in rows], names=[by, "figure"])
    return pd.DataFrame([row[2] for row in rows], index=index, columns=COLUMNS)


def check_stratum(by: object, frame: pd.DataFrame, *, with_metrics: bool) -> None:
    """Refuse strata that are neither a column nor built in, and metrics for those with figures of their own.

    Raises:
        ConfigError: so it is; the nearest name is told.
        DataError: two columns have that name.
    """
    known = [*(str(column) for column in frame.columns), *BUILT_IN]
    if not isinstance(by, str) or by not in known:
        raise ConfigError(
            f"by is {by!r}{nearest(str(by), known)}; use a column of the table, {', '.join(map(str, frame.columns))}, "
            f"or one of {', '.join(BUILT_IN)}"
        )
    if by in frame.columns and isinstance(frame[by], pd.DataFrame):
        raise DataError(f"the table has {frame[by].shape[1]} columns named {by!r}; rename all but one")
    if with_metrics and by not in frame.columns and by != "object_size":
        raise ConfigError(f"metrics are given with by={by!r}, which has figures of its own; leave them out")


def column_strata(column: pd.Series[Any]) -> dict[Hashable, NDArray[np.int64]]:
    """Return the positions of the rows of each stratum: one for each value, and `MISSING` for no value.

    Numbers of more than `MAX_VALUES` different values are split at their quartiles, into strata named
    ``lowest to highest``. Strata come in the order of the values, `MISSING` last.

    Raises:
        DataError: the values cannot be grouped, or one of them is the word that stands for none.

    >>> {name: rows.tolist() for name, rows in column_strata(pd.Series(["b", None, "a", "b"])).items()}
    {'a': [2], 'b': [0, 3], 'missing': [1]}
    """
    present = column.notna().to_numpy()
    values = column[present]
    try:
        distinct = list(values.unique())
    except TypeError as error:
        kind = type(values.iloc[0]).__name__
        raise DataError(
            f"column {column.name!r} holds {kind} objects, which cannot be grouped; use words or numbers"
        ) from error
    if MISSING in distinct and not present.all():
        raise DataError(
            f"column {column.name!r} holds the word {MISSING!r} beside cells without a value; fill these or rename it"
        )
    rows = np.flatnonzero(present)
    numeric = pd.api.types.is_numeric_dtype(values) and not pd.api.types.is_bool_dtype(values)
    strata: dict[Hashable, NDArray[np.int64]] = {}
    if numeric and len(distinct) > MAX_VALUES:
        numbers = values.to_numpy(dtype=np.float64)
        quartile = np.searchsorted(np.quantile(numbers, [0.25, 0.5, 0.75]), numbers, side="left")
        for place in np.unique(quartile):
            within = values[quartile == place]
            strata[f"{within.min()} to {within.max()}"] = rows[quartile == place]
    else:
        strata = {value: rows[(values == value).to_numpy()] for value in _ordered(values, distinct)}
    if not present.all():
        strata[MISSING] = np.flatnonzero(~present)
    return strata


def object_share(target: Tensor, *, binary: bool) -> float:
    """Return the mean area of an image's objects as a share of its labelled pixels; 0 without an object.

    Objects are the connected regions, corners included, of the foreground, or of every class but the first.

    >>> object_share(torch.tensor([[1, 0, 1, 1], [0, 0, 0, 255]]), binary=True)  # of 1 and 2 pixels of 7
    0.21428571428571427
    """
    indices = target.numpy()
    labelled = indices != IGNORE_INDEX
    objects = 0
    classes = [1] if binary else [index for index in np.unique(indices[labelled]) if index]
    for index in classes:
        objects += cv2.connectedComponents((indices == index).astype(np.uint8), connectivity=8)[0] - 1
    pixels = np.count_nonzero(labelled & (indices > 0))
    return float(pixels / objects / np.count_nonzero(labelled)) if objects else 0.0


def boundary_distance(target: Tensor) -> NDArray[np.float64]:
    """Return how far each pixel's centre is from the nearest true boundary, ``(H, W)`` in pixels.

    The distance to the centre of the nearest pixel of another class, less the half pixel on its side of the boundary:
    0.5 beside one. Pixels without a label are no other class. Infinite where there is no other class.

    >>> boundary_distance(torch.tensor([[0, 0, 0, 1]])).tolist()
    [[2.5, 1.5, 0.5, 0.5]]
    """
    indices = target.numpy()
    labelled = indices != IGNORE_INDEX
    distance = np.full(indices.shape, np.inf)
    for index in np.unique(indices[labelled]):
        same = indices == index
        other = labelled & ~same
        if other.any():
            exact = cv2.distanceTransform((~other).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
            distance[same] = exact[same] - 0.5
    return distance


_Strata = dict[Hashable, dict[str, tuple[float, ...]]]


def _ordered(values: pd.Series[Any], distinct: list[Any]) -> list[Any]:
    """The different values in their order: a category's own, else sorted, else as they come."""
    if isinstance(values.dtype, pd.CategoricalDtype):
        return [category for category in values.cat.categories if category in distinct]
    try:
        return sorted(distinct)
    except TypeError:
        return distinct


def _by_rows(
    images: Iterable[Judged],
    task: SegmentationTask,
    metrics: Sequence[MetricChoice],
    strata: Mapping[Hashable, NDArray[np.int64]] | None,
) -> _Strata:
    """Score each stratum of images; without `strata` those of the objects' size."""
    tallies = ImageTallies(
        build_metrics(metrics, kind=task.kind, num_classes=task.num_classes), class_names=task.class_names
    )
    shares: list[float] = []
    for scores, labels, target in images:
        tallies.add(scores, labels, target)
        if strata is None:
            shares.append(object_share(target, binary=task.kind == "binary"))
    found: _Strata = {}
    for name, rows in (_size_strata(np.array(shares)) if strata is None else strata).items():
        part = tallies.take(rows)
        found[name] = {figure: (part.counted, *each) for figure, each in part.intervals().items()}
    return found


def _size_strata(shares: NDArray[np.float64]) -> dict[Hashable, NDArray[np.int64]]:
    """Positions of images without an object, and of the thirds of the others; equal sizes stay together."""
    strata: dict[Hashable, NDArray[np.int64]] = {}
    if (shares > 0).any():
        third = np.searchsorted(np.quantile(shares[shares > 0], [1 / 3, 2 / 3]), shares, side="left")
        for place, name in enumerate(SIZES):
            strata[name] = np.flatnonzero((shares > 0) & (third == place))
    strata[NO_OBJECT] = np.flatnonzero(shares == 0)
    return {name: rows for name, rows in strata.items() if len(rows)}


class _Counted(SegmentationMetric):
    """A figure per class or stratum of counts that each image adds, ``(parts, strata)``."""

    tasks = _BOTH
    counts: Tensor

    def __init__(self, shape: tuple[int, int], formula: Callable[[Tensor], Tensor], num_classes: int = 2) -> None:
        super().__init__(num_classes)
        self.formula = formula
        self.add_state("counts", default=torch.zeros(shape, dtype=torch.int64), dist_reduce_fx="sum")

    def figure(self, sums: Mapping[str, Tensor]) -> Tensor:
        return self.formula(sums["counts"].to(torch.float64))


class _ClassCounts(_Counted):
    """Pixels of each class that are right, predicted, and true: ``(3, K)``."""

    formulas: ClassVar[dict[str, Callable[[Tensor], Tensor]]] = {
        "iou": lambda c: c[..., 0, :] / (c[..., 1, :] + c[..., 2, :] - c[..., 0, :]),
        "dice": lambda c: 2 * c[..., 0, :] / (c[..., 1, :] + c[..., 2, :]),
        "precision": lambda c: c[..., 0, :] / c[..., 1, :],
        "recall": lambda c: c[..., 0, :] / c[..., 2, :],
        "support": lambda c: c[..., 2, :],
    }

    def _tally(self, scores: Tensor, labels: Tensor, target: Tensor) -> dict[str, Tensor]:
        counts = confusion_matrix(labels, target, self.num_classes)
        return {"counts": torch.stack([counts.diagonal(), counts.sum(dim=0), counts.sum(dim=1)])}


class _DistanceCounts(_Counted):
    """Wrong pixels and all pixels at each distance from a boundary: ``(2, strata)``."""

    formulas: ClassVar[dict[str, Callable[[Tensor], Tensor]]] = {
        "error_rate": lambda c: c[..., 0, :] / c[..., 1, :],
        "pixels": lambda c: c[..., 1, :],
    }

    def _tally(self, scores: Tensor, labels: Tensor, target: Tensor) -> dict[str, Tensor]:
        labelled = target != IGNORE_INDEX
        place = torch.from_numpy(np.searchsorted(DISTANCES, boundary_distance(target), side="left"))[labelled]
        wrong = place[(labels != target)[labelled]]
        counted = [torch.bincount(each, minlength=len(DISTANCE_NAMES)) for each in (wrong, place)]
        return {"counts": torch.stack(counted)}


def _by_class(images: Iterable[Judged], task: SegmentationTask) -> _Strata:
    """IoU, Dice, precision, recall and true pixels of each class, over the pixels of all images together."""
    shape = (3, task.num_classes)
    metrics = {name: _ClassCounts(shape, made, task.num_classes) for name, made in _ClassCounts.formulas.items()}
    return _by_parts(images, metrics, task.class_names)


def _by_distance(images: Iterable[Judged], num_classes: int) -> _Strata:
    """Share of wrong pixels at each distance from the nearest true boundary, over all images together."""
    shape = (2, len(DISTANCE_NAMES))
    metrics = {name: _DistanceCounts(shape, made, num_classes) for name, made in _DistanceCounts.formulas.items()}
    return _by_parts(images, metrics, DISTANCE_NAMES)


def _by_parts(images: Iterable[Judged], metrics: Mapping[str, _Counted], names: Sequence[str]) -> _Strata:
    """Score the parts that each image's own pixels fall into; the last row of the counts says whether there are any."""
    tallies = ImageTallies(metrics, names)
    seen = torch.zeros(len(names), dtype=torch.int64)
    first = next(iter(metrics.values()))
    for scores, labels, target in images:
        tallies.add(scores, labels, target)
        seen += first.tally(scores, labels, target)["counts"][-1] > 0
    intervals = tallies.intervals()
    return {
        name: {figure: (int(count), *intervals[f"{figure}[{name}]"]) for figure in metrics}
        for name, count in zip(names, seen, strict=True)
    }
