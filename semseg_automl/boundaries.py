"""Boundary IoU: the overlap of the rims of two masks, which no large interior outvotes. Computed on the processor."""

from __future__ import annotations

import math

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from semseg_automl.confusion import check_indices
from semseg_automl.task import IGNORE_INDEX

RIM = 0.02
"""Width of the rim as a share of the image's diagonal, as in the paper."""


def boundary_counts(labels: Tensor, target: Tensor, num_classes: int) -> Tensor:
    """Count what the rims of each class in truth and prediction have in common, and what they cover together.

    Boundary IoU of Cheng, Girshick, Dollar, Berg, Kirillov, CVPR 2021: a class's rim is the part of its mask within
    `RIM` of the diagonal, one pixel at least, of a pixel outside the mask. Distances are those of a square; outside the
    image counts as outside the mask, both as in the authors' code.

    A pixel whose target is 255 is in no class, neither in truth nor in prediction: both masks end where labels end.

    Args:
        labels: ``(H, W)``, integers, predicted class index in [0, num_classes).
        target: ``(H, W)``, integers, true class index in [0, num_classes) or 255.
        num_classes: Number of classes K.

    Returns:
        ``(2, K)`` int64 on the device of `target`: pixels in both rims, pixels in either.

    Raises:
        DataError: An index that is not ignored is outside [0, num_classes).

    >>> labels = torch.zeros(9, 9, dtype=torch.int64)
    >>> labels[2:7, 2:7] = 1  # the rim of the square is 16 of its 25 pixels
    >>> boundary_counts(labels, labels, 2)[:, 1].tolist()
    [16, 16]
    """
    valid = target != IGNORE_INDEX
    check_indices("target", target[valid], num_classes)
    check_indices("labels", labels[valid], num_classes)
    width = max(1, round(RIM * math.hypot(*target.shape)))
    truth = torch.where(valid, target, -1).cpu().numpy()
    guess = torch.where(valid, labels, -1).cpu().numpy()
    counts = torch.zeros(2, num_classes, dtype=torch.int64)
    for index in np.union1d(truth, guess):
        if index >= 0:
            rims = _rim(truth == index, width), _rim(guess == index, width)
            counts[0, index] = int(np.count_nonzero(rims[0] & rims[1]))
            counts[1, index] = int(np.count_nonzero(rims[0] | rims[1]))
    return counts.to(target.device)


def boundary_iou(counts: Tensor) -> Tensor:
    """Boundary IoU of each class, ``(..., K)`` float64 from ``(..., 2, K)`` counts; NaN where both masks are empty."""
    both, either = counts.to(torch.float64).unbind(dim=-2)
    return both / either


def _rim(mask: NDArray[np.bool_], width: int) -> NDArray[np.uint8]:
    """Pixels of ``mask (H, W)`` within `width` pixels of one outside it."""
    whole = mask.view(np.uint8)
    square = np.ones((3, 3), dtype=np.uint8)
    core = cv2.erode(whole, square, iterations=width, borderType=cv2.BORDER_CONSTANT, borderValue=0)
    return np.asarray(whole - core, dtype=np.uint8)
