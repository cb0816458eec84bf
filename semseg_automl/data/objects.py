"""How large the objects in a mask are: connected areas of one value, and what is left of them at the model's input.

Not here: which values are classes (:mod:`semseg_automl.task`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from semseg_automl.data.encodings import count_values

SMALL = 4.0
"""Pixels at the model's input below which an object is small: scores are computed on every fourth pixel, so it is
less than one of them."""


class Extent(NamedTuple):
    """Objects whose upright bounding boxes have one size."""

    height: int
    width: int
    number: int


def extents(values: NDArray[Any]) -> dict[int, tuple[Extent, ...]]:
    """Return the sizes of the connected areas of each value of a mask ``(H, W)``, in pixels.

    Pixels that touch at a corner belong together.

    >>> extents(np.array([[1, 0, 0], [0, 1, 0], [0, 0, 0]], np.uint8))[1]
    (Extent(height=2, width=2, number=1),)
    """
    found: dict[int, tuple[Extent, ...]] = {}
    for value in count_values(values):
        of_value = (values == value).astype(np.uint8)
        left, top, width, height = cv2.boundingRect(of_value)
        part = of_value[top : top + height, left : left + width]
        stats = cv2.connectedComponentsWithStats(part, connectivity=8)[2][1:]  # the first is all other values
        wide = values.shape[1] + 1
        # One number for both sides: NumPy sorts numbers faster than pairs.
        sides = stats[:, cv2.CC_STAT_HEIGHT].astype(np.int64) * wide + stats[:, cv2.CC_STAT_WIDTH]
        sizes, numbers = np.unique(sides, return_counts=True)
        pairs = zip(sizes.tolist(), numbers.tolist(), strict=True)
        found[value] = tuple(Extent(size // wide, size % wide, number) for size, number in pairs)
    return found


def count_small(
    objects: Iterable[Extent], size: tuple[int, int], input_size: tuple[int, int], *, limit: float = SMALL
) -> tuple[int, int]:
    """Return how many objects are smaller than `limit` pixels in both directions at the model's input, and all.

    Args:
        objects: The objects of an image.
        size: Height and width of the image.
        input_size: Height and width that it is resized to.
        limit: In pixels of the input.

    >>> count_small([Extent(10, 10, 3), Extent(50, 2, 1)], (1000, 1000), (256, 256))
    (3, 4)
    """
    down, across = input_size[0] / size[0], input_size[1] / size[1]
    small = total = 0
    for height, width, number in objects:
        total += number
        small += number if max(height * down, width * across) < limit else 0
    return small, total
