"""Crops of large images for training: where to cut, with rare classes seen as often as common ones, and cutting.

Pure: arrays and a generator of random numbers in, positions and arrays out. The size of a crop is the plan's, tiles
that cover an image for validation and prediction are :mod:`semseg_automl.tiling`'s.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from semseg_automl.task import IGNORE_INDEX

Size = tuple[int, int]
"""Height and width in pixels."""

BALANCED_SHARE = 0.5
"""Share of the crops that are laid around a pixel of a class drawn evenly; the rest lie anywhere, so that the network
also sees how common the classes are."""


@dataclass(frozen=True)
class CropRule:
    """How training crops are drawn."""

    size: Size
    """Height and width in pixels of the image."""
    balanced: bool = False
    """Lay `BALANCED_SHARE` of them around a class of the image drawn evenly, so rare ones come up more often."""


def draw_corner(mask: NDArray[np.uint8], rule: CropRule, rng: np.random.Generator) -> tuple[int, int]:
    """Draw where a crop lies: top and left, negative where the image is smaller than the crop.

    A balanced crop holds a pixel that was drawn evenly among those of its class, anywhere in the crop. As many random
    numbers are drawn in all cases but for the pixel.

    Args:
        mask: ``(H, W)`` class indices; 255 is no class.
        rule: size of the crop, and whether classes are balanced.
        rng: the only source of chance.
    """
    height, width = mask.shape
    anywhere = _draw(rng, height, rule.size[0]), _draw(rng, width, rule.size[1])
    if not rule.balanced or rng.random() >= BALANCED_SHARE:
        return anywhere
    # OpenCV counts without a copy of the mask in a wider type, which for a large image takes a gigabyte.
    counts = cv2.calcHist([mask], [0], None, [256], [0, 256]).ravel()[:IGNORE_INDEX]
    present = np.flatnonzero(counts)
    if not len(present):
        return anywhere
    row, column = _draw_pixel(mask, int(rng.choice(present)), rng)
    return (
        _around(rng, row, height, rule.size[0]),
        _around(rng, column, width, rule.size[1]),
    )


def cut(array: NDArray[Any], corner: tuple[int, int], size: Size, *, fill: int | None = None) -> NDArray[Any]:
    """Return a window of an image or mask; what lies outside is mirrored, or `fill`.

    Args:
        array: ``(H, W)`` or ``(H, W, 3)``, uint8.
        corner: top and left of the window; may be negative.
        size: height and width of the window.
        fill: value outside; None mirrors the array at its border pixels.

    Returns:
        A window of `size`: a view where it lies inside, else an array of its own.
    """
    ends = [start + length for start, length in zip(corner, size, strict=True)]
    outside = [
        (max(0, -start), max(0, end - length)) for start, end, length in zip(corner, ends, array.shape, strict=False)
    ]
    inside = array[max(0, corner[0]) : ends[0], max(0, corner[1]) : ends[1]]
    if not any(map(any, outside)):
        return inside
    (top, bottom), (left, right) = outside
    if fill is None:
        return np.asarray(cv2.copyMakeBorder(inside, top, bottom, left, right, cv2.BORDER_REFLECT_101))
    return np.asarray(cv2.copyMakeBorder(inside, top, bottom, left, right, cv2.BORDER_CONSTANT, value=[fill] * 3))


def _draw(rng: np.random.Generator, length: int, crop: int) -> int:
    """Draw the start of a crop evenly: inside the image, or around it where it is shorter than the crop."""
    return int(rng.integers(min(0, length - crop), max(0, length - crop), endpoint=True))


def _around(rng: np.random.Generator, pixel: int, length: int, crop: int) -> int:
    """Draw the start of a crop that holds `pixel` evenly, within the same bounds."""
    low = max(min(0, length - crop), pixel - crop + 1)
    return int(rng.integers(low, min(max(0, length - crop), pixel), endpoint=True))


def _draw_pixel(mask: NDArray[np.uint8], index: int, rng: np.random.Generator) -> tuple[int, int]:
    """Draw one of the pixels of a class, each as likely; the class must be there."""
    per_row = np.count_nonzero(mask == index, axis=1).cumsum()
    chosen = int(rng.integers(per_row[-1]))
    row = int(np.searchsorted(per_row, chosen, side="right"))
    before = int(per_row[row - 1]) if row else 0
    return row, int(np.flatnonzero(mask[row] == index)[chosen - before])
