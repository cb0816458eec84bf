"""What a data set looks like in a few figures: rows, image sizes, and how the pixels spread over the classes.

Counted from what the check of the rows found; no image is opened here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from semseg_automl.data.checks import RowCheck
from semseg_automl.errors import BundleError
from semseg_automl.task import IGNORE_INDEX, MAX_CLASSES, SegmentationTask

Size = tuple[int, int]


class ClassShare(BaseModel):
    """How much of a data set one class takes.

    Attributes:
        name: of the class.
        label: its value in the masks: a number, or a colour as ``#rrggbb``.
        share: of the pixels that have a label, 0 to 1.
        images: how many have a pixel of it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    label: int | str
    share: float = Field(ge=0, le=1)
    images: int = Field(ge=0)


class Fingerprint(BaseModel):
    """A data set in a few figures.

    Attributes:
        rows: labelled images.
        validation_rows: how many of them only judge a fit; None where there is no such split.
        smallest: ``(height, width)`` in pixels of the image with the fewest.
        middle: median height and median width.
        largest: of the image with the most.
        classes: one entry per class, in the order of the class indices.
        unlabelled: share of the pixels without a label, 0 to 1.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    rows: int = Field(ge=0)
    validation_rows: int | None = None
    smallest: Size
    middle: Size
    largest: Size
    classes: tuple[ClassShare, ...] = Field(max_length=MAX_CLASSES)
    unlabelled: float = Field(ge=0, le=1)


def fingerprint(
    task: SegmentationTask, checks: Sequence[RowCheck], *, validation_rows: int | None = None
) -> Fingerprint:
    """Count what the check of a table's rows found.

    Args:
        task: says which value is which class. Values that it does not know count as unlabelled.
        checks: one per row, at least one.
        validation_rows: how many of them only judge a fit.
    """
    pixels = np.zeros((len(checks), 256), dtype=np.int64)
    for row, check in enumerate(checks):
        for index, count in _by_class(task, check).items():
            pixels[row, index] += count
    labelled = max(1, int(pixels[:, : task.num_classes].sum()))
    areas = [height * width for height, width in (check.size for check in checks)]
    middle = np.median([check.size for check in checks], axis=0).astype(int).tolist()
    return Fingerprint(
        rows=len(checks),
        validation_rows=validation_rows,
        smallest=checks[int(np.argmin(areas))].size,
        middle=(middle[0], middle[1]),
        largest=checks[int(np.argmax(areas))].size,
        classes=tuple(
            ClassShare(
                name=name,
                label=label,
                share=float(pixels[:, index].sum() / labelled),
                images=int((pixels[:, index] > 0).sum()),
            )
            for index, (name, label) in enumerate(zip(task.class_names, task.labels, strict=True))
        ),
        unlabelled=float(pixels[:, IGNORE_INDEX].sum() / max(1, int(pixels.sum()))),
    )


def read_fingerprint(saved: Mapping[str, Any] | None) -> Fingerprint | None:
    """Read back what ``Fingerprint.model_dump`` gave; None of folders saved before there were fingerprints.

    Raises:
        BundleError: it is something else.
    """
    if saved is None:
        return None
    try:
        return Fingerprint.model_validate(saved)
    except ValidationError as error:
        raise BundleError(
            f"bundle.yaml is damaged: its entry 'data' is no summary of a data set ({error.error_count()} values are "
            "wrong). Save or fit again."
        ) from error


def _by_class(task: SegmentationTask, check: RowCheck) -> dict[int, int]:
    """Return the pixels of each class index of a mask, 255 for those without a label."""
    counts = check.value_counts
    if task.colours:
        counts = check.encoding.as_colours(counts)
    found: dict[int, int] = {}
    for value, count in counts.items():
        index = _class_of(task, value)
        found[index] = found.get(index, 0) + count
    return found


def object_widths(task: SegmentationTask, checks: Sequence[RowCheck]) -> tuple[float, float] | None:
    """Return how wide the objects typically are and what a fifth of them stay below, None where nobody has measured.

    Relative to the root of their image's pixels. Counted is each class once per image, of a binary task the foreground
    alone. Masks that were smoothed tell nothing: the values between two classes lie in thin lines.

    Args:
        task: says which value is which class.
        checks: of rows, some of them with widths.
    """
    found: list[float] = []
    for check in () if task.snapped else checks:
        for value, width in check.widths.items():
            packed = next(iter(check.encoding.as_colours({value: 1}))) if task.colours else value
            index = _class_of(task, packed)
            if index != IGNORE_INDEX and (index > 0 or task.kind != "binary"):
                found.append(width)
    return (float(np.median(found)), float(np.quantile(found, 0.2))) if found else None


def _class_of(task: SegmentationTask, value: int) -> int:
    if not task.snapped and value not in (*task.values, *task.ignore_values):
        return IGNORE_INDEX
    return int(task.encode(np.array([[value]]))[0, 0])
