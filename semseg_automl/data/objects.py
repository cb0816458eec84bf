"""How large the objects in a mask are: connected areas of one value, and what is left of them at the model's input.

Not here: which values are classes (:mod:`semseg_automl.task`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components

from semseg_automl.data.encodings import count_values

SMALL = 4.0
"""Pixels at the model's input below which an object is small: scores are computed on every fourth pixel, so it is
less than one of them."""


MOST_RUNS = 2**20
"""Runs of equal pixels, some 200 bytes each, beyond which a mask is looked at value by value."""

SHORT_RUNS = 8
"""Mean pixels of a run below which that is also faster."""


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
    # Row by row in runs of one value: all values at once, and of what counts there are hundreds of times fewer than
    # pixels. An image library would look at all pixels once for each value.
    height, width = values.shape
    starts_run = np.ones((height, width), np.bool_)
    np.not_equal(values[:, 1:], values[:, :-1], out=starts_run[:, 1:])
    starts = np.flatnonzero(starts_run)
    if len(starts) > min(MOST_RUNS, values.size // SHORT_RUNS):
        return _extents_by_value(values)
    row, first = np.divmod(starts, width)
    last = np.append(starts[1:], height * width) - 1 - row * width
    value = values.reshape(-1)[starts]
    label = _joined(row, first, last, value, width)
    order = np.argsort(label, kind="stable")
    groups = np.flatnonzero(np.append(True, label[order][1:] != label[order][:-1]))
    high = row[order][np.append(groups[1:], len(order)) - 1] - row[order][groups] + 1  # runs lie in order of their rows
    wide = np.maximum.reduceat(last[order], groups) - np.minimum.reduceat(first[order], groups) + 1
    # One number for value and sides: NumPy sorts numbers faster than triples.
    kinds, numbers = np.unique(
        (value[order][groups].astype(np.int64) * (height + 1) + high) * (width + 1) + wide, return_counts=True
    )
    found: dict[int, list[Extent]] = {}
    for kind, number in zip(kinds.tolist(), numbers.tolist(), strict=True):
        side, across = divmod(kind, width + 1)
        of_value, down = divmod(side, height + 1)
        found.setdefault(of_value, []).append(Extent(down, across, number))
    return {each: tuple(sizes) for each, sizes in found.items()}


def _extents_by_value(values: NDArray[Any]) -> dict[int, tuple[Extent, ...]]:
    """Do as `extents` does with memory and time that do not grow with the number of runs, for masks that are noise."""
    found: dict[int, tuple[Extent, ...]] = {}
    for value in count_values(values):
        of_value = (values == value).astype(np.uint8)
        left, top, width, height = cv2.boundingRect(of_value)
        part = of_value[top : top + height, left : left + width]
        stats = cv2.connectedComponentsWithStats(part, connectivity=8)[2][1:]  # the first is all other values
        pairs = stats[:, [cv2.CC_STAT_HEIGHT, cv2.CC_STAT_WIDTH]]
        sizes, numbers = np.unique(pairs, axis=0, return_counts=True)
        found[value] = tuple(
            Extent(high, wide, number) for (high, wide), number in zip(sizes.tolist(), numbers.tolist(), strict=True)
        )
    return found


def _joined(
    row: NDArray[np.int64], first: NDArray[np.int64], last: NDArray[np.int64], value: NDArray[Any], width: int
) -> NDArray[np.int32]:
    """Return for each run the number of the area that it belongs to."""
    # Rows side by side with a gap, so that one search over all runs finds neighbours in the next row only.
    apart = width + 2
    begin, end = row * apart + first, row * apart + last
    low = np.searchsorted(end, begin + apart - 1, side="left")
    high = np.searchsorted(begin, end + apart + 1, side="right")
    numbers = np.maximum(high - low, 0)
    above = np.repeat(np.arange(len(row)), numbers)
    below = np.arange(len(above)) - np.repeat(np.cumsum(numbers) - numbers, numbers) + np.repeat(low, numbers)
    same = value[above] == value[below]
    # The rows of the matrix are in order already; its constructor would sort pairs of indices.
    ends = np.concatenate(([0], np.cumsum(same)))[np.concatenate(([0], np.cumsum(numbers)))]
    shape = len(row), len(row)
    links = csr_array((np.ones(int(ends[-1])), below[same].astype(np.int32), ends.astype(np.int32)), shape=shape)
    label: NDArray[np.int32] = connected_components(links, connection="weak")[1]
    return label


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
