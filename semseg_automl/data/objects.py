"""How large the objects in a mask are: connected areas of one value, and what is left of them at the model's input.

Not here: which values are classes (:mod:`semseg_automl.task`).
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components

from semseg_automl.data.counting import Runs, Values

SMALL = 4.0
"""Pixels at the model's input below which an object is small: scores are computed on every fourth pixel, so it is
less than one of them."""


FEW_VALUES = 4
"""Values up to which it takes less time to follow their outlines than to join runs."""

VALUE, HEIGHT, WIDTH, NUMBER = range(4)
"""Columns of extents."""


def extents(values: Values) -> NDArray[np.int32]:
    """Return the sizes of the connected areas of each value of a mask.

    Pixels that touch at a corner belong together.

    Returns:
        ``(N, 4)``: a value, height and width in pixels of upright bounding boxes, and how many areas have them; in
        order.

    >>> extents(Values(np.array([[1, 0, 0], [0, 1, 0], [0, 0, 0]], np.uint8)))
    array([[0, 3, 3, 1],
           [1, 2, 2, 1]], dtype=int32)
    """
    if len(values.counts) > FEW_VALUES and values.runs is not None:
        return _extents_of_runs(values.runs)
    measure = _boxes if values.noisy else _outlined
    return np.concatenate([measure(values, value) for value in sorted(values.counts)])


def _outlined(values: Values, value: int) -> NDArray[np.int32]:
    """Return the extents of the connected areas of a value, from their outlines.

    An outline takes memory for its corners, so that this is not for noise.
    """
    # Outlines of holes have a parent; areas within the holes have none.
    outlines, tree = cv2.findContours(values.where(value).view(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    parents = tree[0, :, 3].tolist()
    boxes = [cv2.boundingRect(line) for line, parent in zip(outlines, parents, strict=True) if parent < 0]
    numbers = Counter((high, wide) for _, _, wide, high in boxes)
    return np.array([(value, high, wide, number) for (high, wide), number in sorted(numbers.items())], np.int32)


def _boxes(values: Values, value: int) -> NDArray[np.int32]:
    """Do as `_outlined` does with memory and time that do not grow with the number of areas, for noise."""
    pixels = values.where(value).view(np.uint8)
    left, top, width, height = cv2.boundingRect(pixels)
    part = pixels[top : top + height, left : left + width]
    stats = cv2.connectedComponentsWithStats(part, connectivity=8)[2][1:]  # the first is all other values
    sizes, numbers = np.unique(stats[:, [cv2.CC_STAT_HEIGHT, cv2.CC_STAT_WIDTH]], axis=0, return_counts=True)
    return np.column_stack([np.full(len(sizes), value), sizes, numbers]).astype(np.int32)


def _extents_of_runs(runs: Runs) -> NDArray[np.int32]:
    """Do as `extents` does for all values together; to follow outlines takes time for each of them."""
    height, width = runs.shape
    above, below = runs.pairs
    number = len(runs.starts)
    # The rows of the matrix are in order already; its constructor would sort pairs of indices.
    ends = np.zeros(number + 1, np.int32)
    np.cumsum(np.bincount(above, minlength=number), out=ends[1:])
    links = csr_array((np.ones(len(below)), below.astype(np.int32), ends), shape=(number, number))
    areas, label = connected_components(links, connection="weak")
    # Runs lie in order of their rows, so that of several assignments to a place the last one has the last row.
    value, top, bottom = (np.zeros(areas, np.int64) for _ in range(3))
    value[label] = runs.value
    top[label[::-1]] = runs.row[::-1]
    bottom[label] = runs.row
    left, right = np.full(areas, width), np.zeros(areas, np.int64)
    np.minimum.at(left, label, runs.first)
    np.maximum.at(right, label, runs.last)
    # One number for value and sides: NumPy sorts numbers faster than triples.
    high, wide = bottom - top + 1, right - left + 1
    kinds, numbers = np.unique((value * (height + 1) + high) * (width + 1) + wide, return_counts=True)
    sides, wide = np.divmod(kinds, width + 1)
    value, high = np.divmod(sides, height + 1)
    return np.column_stack([value, high, wide, numbers]).astype(np.int32)


def are_small(
    objects: NDArray[np.int32], sizes: NDArray[np.integer[Any]], input_size: tuple[int, int], *, limit: float = SMALL
) -> NDArray[np.bool_]:
    """Return of which :func:`extents` the areas are below `limit` pixels in both directions at the model's input.

    Args:
        objects: ``(N, 4)``.
        sizes: Height and width of the image of each, ``(N, 2)``, or of the image of all, ``(2,)``.
        input_size: Height and width that they are resized to.
        limit: In pixels of the input.

    >>> are_small(np.array([[1, 10, 10, 3], [1, 50, 2, 1]], np.int32), np.array([1000, 1000]), (256, 256))
    array([ True, False])
    """
    seen = objects[:, HEIGHT : WIDTH + 1] * (input_size / sizes)
    small: NDArray[np.bool_] = (seen[:, 0] < limit) & (seen[:, 1] < limit)
    return small
