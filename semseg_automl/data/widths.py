"""How wide the areas of each value of a mask are: one number that says what the network's input must not lose.

Not here: how large single objects are (:mod:`semseg_automl.data.objects`), which values are classes
(:mod:`semseg_automl.task`).
"""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from semseg_automl.data.counting import count_values

MEASURED_PIXELS = 2**20
"""Widths are measured in a mask made smaller to so many; no network sees more."""


def typical_widths(values: NDArray[Any]) -> dict[int, float]:
    """Return how wide the areas of each value of a mask ``(H, W)`` typically are, relative to the root of its pixels.

    Four times the mean distance of their pixels to their border: the width of a strip, two thirds of the diameter of a
    disc. Long thin objects count as thin, and single stray pixels, being few, for next to nothing. A strip of one pixel
    counts as two.

    >>> strip = np.zeros((100, 100), np.uint8)
    >>> strip[40:50] = 7
    >>> round(typical_widths(strip)[7], 2)
    0.1
    """
    shrink = min(1.0, (MEASURED_PIXELS / values.size) ** 0.5)
    if shrink < 1:
        rows, columns = (np.arange(int(length * shrink)) / shrink for length in values.shape)
        values = values[rows.astype(np.int64)[:, None], columns.astype(np.int64)]
    side = values.size**0.5
    widths: dict[int, float] = {}
    for value in count_values(values):
        inside = (values == value).astype(np.uint8)
        left, top, width, height = cv2.boundingRect(inside)
        around = np.s_[max(0, top - 1) : top + height + 1, max(0, left - 1) : left + width + 1]
        part = np.ascontiguousarray(inside[around])  # with a rim of other values, but for the image's own border
        distance = cv2.mean(cv2.distanceTransform(part, cv2.DIST_L2, 5), part)[0]
        widths[value] = min(4 * distance - 2, side) / side
    return widths
