"""How large the objects in a mask are: connected areas of one value, and what is left of them at the model's input.

Not here: which values are classes (:mod:`semseg_automl.task`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from typing import NamedTuple

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


class Extent(NamedTuple):
    """Objects whose upright bounding boxes have one size."""

    height: int
    width: int
    number: int


def extents(values: Values) -> dict[int, tuple[Extent, ...]]:
    """Return the sizes of the connected areas of each value of a mask, in pixels.

    Pixels that touch at a corner belong together.

    >>> extents(Values(np.array([[1, 0, 0], [0, 1, 0], [0, 0, 0]], np.uint8)))[1]
    (Extent(height=2, width=2, number=1),)
    """
    if len(values.counts) > FEW_VALUES and values.runs is not None:
        return _extents_of_runs(values.runs)
    measure = _boxes if values.noisy else _outlined
    return {value: measure(values.array == value) for value in sorted(values.counts)}


def _outlined(of_value: NDArray[np.bool_]) -> tuple[Extent, ...]:
    """Return the sizes of the connected areas of what is true, from their outlines.

    An outline takes memory for its corners, so that this is not for noise.
    """
    # Outlines of holes have a parent; areas within the holes have none.
    outlines, tree = cv2.findContours(of_value.view(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    parents = tree[0, :, 3].tolist()
    boxes = [cv2.boundingRect(line) for line, parent in zip(outlines, parents, strict=True) if parent < 0]
    numbers = Counter((high, wide) for _, _, wide, high in boxes)
    return tuple(Extent(high, wide, number) for (high, wide), number in sorted(numbers.items()))


def _boxes(of_value: NDArray[np.bool_]) -> tuple[Extent, ...]:
    """Do as `_outlined` does with memory and time that do not grow with the number of areas, for noise."""
    pixels = of_value.view(np.uint8)
    left, top, width, height = cv2.boundingRect(pixels)
    part = pixels[top : top + height, left : left + width]
    stats = cv2.connectedComponentsWithStats(part, connectivity=8)[2][1:]  # the first is all other values
    sizes, numbers = np.unique(stats[:, [cv2.CC_STAT_HEIGHT, cv2.CC_STAT_WIDTH]], axis=0, return_counts=True)
    pairs = zip(sizes.tolist(), numbers.tolist(), strict=True)
    return tuple(Extent(high, wide, number) for (high, wide), number in pairs)


def _extents_of_runs(runs: Runs) -> dict[int, tuple[Extent, ...]]:
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
    found: dict[int, list[Extent]] = {}
    for kind, times in zip(kinds.tolist(), numbers.tolist(), strict=True):
        side, across = divmod(kind, width + 1)
        of_value, down = divmod(side, height + 1)
        found.setdefault(of_value, []).append(Extent(down, across, times))
    return {each: tuple(sizes) for each, sizes in found.items()}


def count_small(
    objects: Collection[Extent], size: tuple[int, int], input_size: tuple[int, int], *, limit: float = SMALL
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
    small = sum(number for height, width, number in objects if height * down < limit and width * across < limit)
    return small, sum(number for _, _, number in objects)
