"""Masks that are drawn from polygons and run lengths whenever they are read, so that a table of them stays small.

The rule of filling is that of the COCO API (``rleFrPoly`` in ``maskApi.c``): corners are rounded to a fifth of a pixel,
edges are lines of such fifths, and a pixel belongs to a polygon if its centre lies inside, by the even-odd rule. Pixel
(0, 0) covers 0 to 1 in x and y, so a rectangle from (2, 3) to (6, 5) has 4 x 2 pixels. OpenCV's ``fillPoly`` is not
used: it adds the border to every polygon, half a pixel all round, which matters for small objects.

Not here: the files that name the shapes (:mod:`semseg_automl.data.annotations`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from semseg_automl.data.rle import check_counts, paint_runs
from semseg_automl.errors import DataError

MAX_POINTS = 1_000_000
"""Corners of one polygon at most."""

MAX_VALUE = 2**31 - 1
"""Largest class value: masks are read as int32."""

_FIFTHS = 5
_SLACK = 0.05  # of the side: tools write corners a little outside the image; another size of image is further off
_SLACK_PIXELS = 2.0
_AT_ONCE = 2**22  # crossings in memory together


@dataclass(frozen=True, eq=False)
class Polygons:
    """One object of one or more polygons; where they overlap, the object is still there."""

    value: int
    rings: tuple[NDArray[np.int32], ...]
    """Corners ``(N, 2)`` of each polygon, x and y in fifths of a pixel."""

    @property
    def area(self) -> float:
        """The area in square pixels, overlaps counted twice."""
        return sum(_area(ring.astype(np.float64)) for ring in self.rings) / _FIFTHS**2


@dataclass(frozen=True, eq=False)
class Runs:
    """One object as run lengths."""

    value: int
    counts: NDArray[np.uint32]
    """Lengths of background and foreground by turns, down the columns."""

    @property
    def area(self) -> float:
        """The pixels."""
        return float(self.counts[1::2].sum(dtype=np.int64))


Shape: TypeAlias = Polygons | Runs


@dataclass(frozen=True, eq=False)
class DrawnMask:
    """A mask of numbers, 0 where no shape is; taken wherever the path or the array of a mask is.

    >>> square = polygons(7, [[1, 0, 3, 0, 3, 2, 1, 2]], (2, 4))
    >>> DrawnMask((2, 4), (square,), "a.jpg").draw()
    array([[0, 7, 7, 0],
           [0, 7, 7, 0]], dtype=uint8)
    """

    size: tuple[int, int]
    """Height and width in pixels."""
    shapes: tuple[Shape, ...]
    """In the order of drawing: a later one hides an earlier one."""
    name: str
    """What errors call the mask."""

    def __str__(self) -> str:
        """Return the name, which is what a printed table shows."""
        return self.name

    def __repr__(self) -> str:
        """Return all that tells this mask from others, its shapes as a digest."""
        digest = hashlib.sha256()
        for shape in self.shapes:
            arrays = shape.rings if isinstance(shape, Polygons) else (shape.counts,)
            digest.update(repr((shape.value, [(array.dtype.str, array.shape) for array in arrays])).encode())
            for array in arrays:
                digest.update(array.tobytes())
        return f"DrawnMask({self.name!r}, size={self.size}, {len(self.shapes)} shapes, {digest.hexdigest()[:16]})"

    def draw(self) -> NDArray[np.uint8] | NDArray[np.uint16] | NDArray[np.int32]:
        """Return the mask ``(H, W)``, in the smallest of uint8, uint16 and int32 that holds its values."""
        height, width = self.size
        values = [shape.value for shape in self.shapes] or [0]
        kinds = (kind for kind in (np.uint8, np.uint16, np.int32) if np.iinfo(kind).max >= max(values))
        kind = np.int32 if min(values) < 0 else next(kinds, np.int32)
        columns: NDArray[Any] = np.zeros((width, height), dtype=kind)
        for shape in self.shapes:
            if isinstance(shape, Runs):
                paint_runs(columns.reshape(-1), shape.counts, shape.value)
                continue
            for ring in shape.rings:
                _paint_ring(columns, ring, shape.value)
        return np.ascontiguousarray(columns.T)


def polygons(value: int, rings: Iterable[object], size: tuple[int, int]) -> Polygons:
    """Return an object of polygons, checked.

    Args:
        value: Of its class.
        rings: Each a list ``[x, y, x, y, ...]`` or ``[[x, y], ...]``, in pixels.
        size: Height and width of the image in pixels. Up to 2 pixels, or 5 % of the side, outside are allowed; what is
            outside is not drawn.

    Raises:
        DataError: There is no polygon, or one has fewer than 3 points, is not finite, or lies outside the image.
    """
    checked = tuple(_ring(ring, size) for ring in rings)
    if not checked:
        raise DataError("it has no polygon; outline the object, or remove the annotation")
    return Polygons(value, checked)


def runs(value: int, counts: object, size: tuple[int, int]) -> Runs:
    """Return an object of run lengths, checked.

    Raises:
        DataError: As in :func:`semseg_automl.data.rle.check_counts`.
    """
    return Runs(value, check_counts(counts, size))


def larger_first(shapes: Sequence[Shape]) -> tuple[Shape, ...]:
    """Return shapes in the order in which small ones stay visible on large ones; equal ones keep their order."""
    return tuple(sorted(shapes, key=lambda shape: -shape.area))


def _ring(points: object, size: tuple[int, int]) -> NDArray[np.int32]:
    if not isinstance(points, (list, tuple, np.ndarray)):
        raise DataError(f"a polygon is a {type(points).__name__}; write its corners as a list of x and y")
    try:
        corners = np.asarray(points, dtype=np.float64)
    except (ValueError, TypeError, OverflowError) as error:
        raise DataError("a polygon whose corners are no pairs of numbers; write x and y of each") from error
    if corners.ndim == 1 and corners.size % 2 == 0:
        corners = corners.reshape(-1, 2)
    if corners.ndim != 2 or corners.shape[1] != 2:
        raise DataError(f"a polygon of {corners.size} coordinates that are no pairs; write x and y of each corner")
    if len(corners) < 3:
        raise DataError(f"a polygon with {len(corners)} points; an area needs 3 at least")
    if len(corners) > MAX_POINTS:
        raise DataError(f"a polygon with {len(corners):,} points; at most {MAX_POINTS:,} are read")
    if not np.isfinite(corners).all():
        raise DataError("a polygon with a coordinate that is not finite; correct or remove it")
    ends = np.array([size[1], size[0]], dtype=np.float64)
    slack = np.maximum(_SLACK_PIXELS, _SLACK * ends)
    low, high = corners.min(axis=0), corners.max(axis=0)
    if (low < -slack).any() or (high > ends + slack).any() or (high < 0).any() or (low > ends).any():
        raise DataError(
            f"a polygon from ({low[0]:.6g}, {low[1]:.6g}) to ({high[0]:.6g}, {high[1]:.6g}) outside the image of "
            f"{size[1]} x {size[0]} (width x height); was it drawn on another size?"
        )
    return np.trunc(corners * _FIFTHS + 0.5).astype(np.int32)


def _area(ring: NDArray[np.float64]) -> float:
    x, y = (ring - ring[0]).T  # from the first corner, so that the edges at it add nothing
    return abs(float(x[:-1] @ y[1:] - y[:-1] @ x[1:])) / 2


def _paint_ring(columns: NDArray[Any], ring: NDArray[np.int32], value: int) -> None:
    """Fill a polygon in an image ``(W, H)``: in each column, each crossing of the border turns inside and outside."""
    width, height = columns.shape
    start = ring.astype(np.int64)
    top, bottom = (int(np.clip((y + 2) // _FIFTHS, 0, height)) for y in (start[:, 1].min() - 1, start[:, 1].max()))
    end = np.roll(start, -1, axis=0)
    turned = start[:, 0] > end[:, 0]
    start[turned], end[turned] = end[turned], start[turned].copy()
    # The centre of column x lies between the fifths 5 x + 2 and 5 x + 3.
    first = np.clip((start[:, 0] + 2) // _FIFTHS, 0, width)
    number = np.maximum(np.clip((end[:, 0] + 2) // _FIFTHS, 0, width) - first, 0)
    if not number.any():
        return
    left, right = int(first[number > 0].min()), int((first + number)[number > 0].max())
    turns = np.zeros((right - left, bottom - top + 1), dtype=np.uint8)
    for edges in _portions(number):
        edge = np.repeat(np.arange(edges.start, edges.stop), number[edges])
        before = np.repeat(np.cumsum(number[edges]) - number[edges], number[edges])
        column = first[edge] + np.arange(len(edge)) - before
        row = np.clip((_crossing(start[edge], end[edge], column) + 2) // _FIFTHS, top, bottom)
        place = (column - left) * turns.shape[1] + row - top
        turns ^= (np.bincount(place, minlength=turns.size) & 1).astype(np.uint8).reshape(turns.shape)
    inside = np.bitwise_xor.accumulate(turns, axis=1)[:, :-1].astype(np.bool_)
    columns[left:right, top:bottom][inside] = value


def _crossing(start: NDArray[np.int64], end: NDArray[np.int64], column: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return y, in fifths, where edges ``(N, 2)`` that go right cross the centre of a column ``(N,)``.

    An edge is the line of whole fifths nearest to it: one for each x if it is flat, one for each y if it is steep. It
    crosses the centre between two of them, and the upper one counts.
    """
    run, rise = (end - start).T
    at = column * _FIFTHS + 2 - start[:, 0]
    flat = [(2 * rise * along + run) // (2 * run) for along in (at, at + 1)]  # rounded, halves up
    height = np.maximum(np.abs(rise), 1)
    # A steep edge is followed downwards: the fifth before the first one that lies right (or left) of the centre.
    falling = -(-(2 * at + 1) * height // (2 * run)) - 1
    rising = (2 * (run - at) - 1) * height // (2 * run)
    steep = np.where(rise > 0, falling, rising - height)
    y: NDArray[np.int64] = start[:, 1] + np.where(run >= np.abs(rise), np.minimum(*flat), steep)
    return y


def _portions(number: NDArray[np.int64]) -> Iterable[slice]:
    """Cut the edges into runs whose crossings fit into memory together."""
    begin = 0
    total = np.cumsum(number)
    while begin < len(number):
        done = total[begin - 1] if begin else 0
        stop = max(begin + 1, int(np.searchsorted(total, done + _AT_ONCE, side="right")))
        yield slice(begin, stop)
        begin = stop
