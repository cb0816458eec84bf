"""Boundary IoU: the definition written out pixel by pixel, hand-computed rims, ignored pixels."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from semseg_automl.boundaries import boundary_counts, boundary_iou
from semseg_automl.errors import DataError
from semseg_automl.metrics import METRICS
from semseg_automl.task import IGNORE_INDEX


def rim_by_definition(mask: npt.NDArray[np.bool_], width: int) -> npt.NDArray[np.bool_]:
    """Pixels of the mask with a pixel outside it, or outside the image, in the square of `width` around them."""
    padded = np.pad(mask, width)
    rim = np.zeros_like(mask)
    for row, column in zip(*np.nonzero(mask), strict=True):
        rim[row, column] = not padded[row : row + 2 * width + 1, column : column + 2 * width + 1].all()
    return rim


def square(size: int, low: int, high: int) -> Tensor:
    """Labels ``(size, size)``: class 1 in rows and columns [low, high), else 0."""
    labels = torch.zeros(size, size, dtype=torch.int64)
    labels[low:high, low:high] = 1
    return labels


@pytest.mark.parametrize(("size", "width"), [((30, 20), 1), ((60, 80), 2), ((120, 90), 3)])
def test_boundary_counts__random_classes__equal_the_definition(size: tuple[int, int], width: int) -> None:
    assert max(1, round(0.02 * math.hypot(*size))) == width
    coarse = torch.randint(3, (2, 1, 5, 5)).float()
    target, labels = torch.nn.functional.interpolate(coarse, size)[:, 0].long()
    counts = boundary_counts(labels, target, 4)
    for index in range(4):
        truth, guess = (rim_by_definition((each == index).numpy(), width) for each in (target, labels))
        assert counts[:, index].tolist() == [int((truth & guess).sum()), int((truth | guess).sum())]


def test_boundary_iou__square_one_pixel_too_large__matches_hand_computation() -> None:
    # Rims of one pixel: the border of 10 x 10 has 36 pixels, that of 12 x 12 has 44, and they are disjoint.
    target, labels = square(20, 5, 15), square(20, 4, 16)
    assert boundary_counts(labels, target, 2)[:, 1].tolist() == [0, 36 + 44]
    # Moved by one pixel: two sides of 10 lie in the other square's interior, and the rims cross in two pixels.
    moved = torch.roll(target, (1, 1), (0, 1))
    assert boundary_counts(moved, target, 2)[:, 1].tolist() == [2, 70]


def test_boundary_iou__interior_wrong__costs_less_than_the_rim() -> None:
    target = square(100, 20, 80)
    hole = target.clone()
    hole[49:51, 49:51] = 0
    shifted = torch.roll(target, 2, 0)
    scores = [float(boundary_iou(boundary_counts(labels, target, 2))[1]) for labels in (target, hole, shifted)]
    assert scores[0] == 1
    assert scores[2] < scores[1] < 1


def test_boundary_iou__class_absent_or_only_predicted__is_nan_or_zero() -> None:
    target, labels = square(12, 3, 9), square(12, 3, 9)
    labels[0, 0] = 3
    iou = boundary_iou(boundary_counts(labels, target, 4))
    assert iou[2].isnan()
    assert iou[3] == 0


def test_boundary_counts__ignored_pixels__belong_to_no_class_of_either() -> None:
    target = square(20, 5, 15)
    target[:, 12:] = IGNORE_INDEX
    labels = torch.randint(2, target.shape)
    labels[:, :12] = target[:, :12]
    counts = boundary_counts(labels, target, 2)
    assert counts[0].tolist() == counts[1].tolist()
    assert counts[1, 1] == 2 * (10 + 7) - 4
    assert boundary_counts(labels, torch.full_like(target, IGNORE_INDEX), 2).sum() == 0


def test_boundary_counts__index_outside_the_classes__raises() -> None:
    target = square(8, 2, 5)
    with pytest.raises(DataError, match="labels holds class indices 0 to 1; 0 to 0 are allowed"):
        boundary_counts(target, torch.zeros_like(target), 1)


def test_boundary_miou__two_images__pools_each_class_over_them() -> None:
    metric = METRICS["boundary_miou"](3)
    pairs = [(square(20, 5, 15), square(20, 5, 15)), (square(20, 4, 16), square(20, 5, 15))]
    counts = torch.zeros(2, 3, dtype=torch.int64)
    for labels, target in pairs:
        metric.update(torch.rand(3, 20, 20), labels, target)
        counts += boundary_counts(labels, target, 3)
    both, either = counts.double()
    assert float(metric.compute()) == pytest.approx(float((both / either)[:2].mean()))
    assert float((both / either)[1]) == pytest.approx(36 / (36 + 80))
