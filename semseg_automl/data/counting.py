"""Which values a mask has, how many pixels each of them, and in what runs: everything that is found by counting.

Not here: how files store values (:mod:`semseg_automl.data.encodings`), how large their areas are
(:mod:`semseg_automl.data.objects`) and how wide (:mod:`semseg_automl.data.widths`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

MOST_RUNS = 2**20
"""Runs of equal pixels, some 200 bytes each, beyond which pixels are looked at instead."""

SHORT_RUNS = 8
"""Mean pixels of a run below which that is also faster."""

_KEPT_PLACES = 2
"""Values of which is kept where they are: as many as most masks have."""

_PROBES = 64
"""Pixels, evenly spread, that show most masks of many values as such."""


@dataclass(frozen=True)
class Values:
    """The values of a mask; each thing that is asked of them is looked for once.

    What was found is kept, and is larger than the mask: not for masks that are kept themselves.

    >>> Values(np.array([[7, 7], [300, 7]])).counts
    {7: 3, 300: 1}
    """

    array: NDArray[Any]
    """``(H, W)``, of any whole numbers."""
    _places: dict[int, NDArray[np.bool_]] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def counts(self) -> dict[int, int]:
        """How many pixels have each value."""
        if self._few is not None:
            return self._few
        return _count_many(self.array) if self.runs is None else self.runs.counts()

    @cached_property
    def areas(self) -> dict[int, int]:
        """For each value its pixels in blocks of 2 x 2 with that value; where there are none, it is left out."""
        return count_areas(self.array) if self.runs is None else self.runs.areas()

    @cached_property
    def noisy(self) -> bool:
        """Whether equal pixels lie together so rarely that to follow areas or runs takes much memory and time."""
        return int(np.count_nonzero(self._begins)) > min(MOST_RUNS, self.array.size // SHORT_RUNS)

    @cached_property
    def runs(self) -> Runs | None:
        """The runs of the mask; None where it is noisy."""
        if self.noisy:
            return None
        starts = np.flatnonzero(self._begins)
        height, width = self.array.shape
        return Runs((height, width), starts, self.array.reshape(-1)[starts])

    def where(self, value: int) -> NDArray[np.bool_]:
        """Return where the mask has a value, ``(H, W)``."""
        if value in self._places:
            return self._places[value]
        place: NDArray[np.bool_] = self.array == value
        if len(self._places) < _KEPT_PLACES:
            self._places[value] = place
        return place

    def digest(self) -> str:
        """Return a digest of shape, type and values.

        >>> Values(np.zeros((2, 3), np.uint8)).digest() == Values(np.zeros((3, 2), np.uint8)).digest()
        False
        """
        digest = hashlib.blake2b(f"{self.array.shape} {self.array.dtype.str}".encode(), digest_size=16)
        if self._few is not None:  # an eighth to go through, at least
            digest.update(f"{list(self._few)}".encode())
            digest.update(np.packbits(self.where(max(self._few))).data)
        elif self.runs is not None:
            digest.update(self.runs.starts.data)
            digest.update(self.runs.value.data)
        else:
            digest.update(np.ascontiguousarray(self.array).data)
        return digest.hexdigest()

    @cached_property
    def _few(self) -> dict[int, int] | None:
        return _two_values(self.array, self.where)

    @cached_property
    def _begins(self) -> NDArray[np.bool_]:
        """``(H, W)``, where a run begins."""
        begins = np.empty(self.array.shape, np.bool_)
        begins[:, 0] = True
        np.not_equal(self.array[:, 1:], self.array[:, :-1], out=begins[:, 1:])
        return begins


@dataclass(frozen=True)
class Runs:
    """A mask ``(H, W)`` row by row in runs of one value, of which there are hundreds of times fewer than pixels."""

    shape: tuple[int, int]
    """Height and width."""
    starts: NDArray[np.int64]
    """``(N,)``, the first pixel of each run, counted row by row."""
    value: NDArray[Any]
    """``(N,)``, of each run."""

    @cached_property
    def row(self) -> NDArray[np.int64]:
        """``(N,)``, of each run."""
        rows: NDArray[np.int64] = self.starts // self.shape[1]
        return rows

    @cached_property
    def length(self) -> NDArray[np.int64]:
        """``(N,)``, the pixels of each run."""
        length = np.empty_like(self.starts)
        np.subtract(self.starts[1:], self.starts[:-1], out=length[:-1])
        length[-1] = self.shape[0] * self.shape[1] - self.starts[-1]
        return length

    @cached_property
    def first(self) -> NDArray[np.int64]:
        """``(N,)``, the first column of each run."""
        return self.starts - self.row * self.shape[1]

    @cached_property
    def last(self) -> NDArray[np.int64]:
        """``(N,)``, the last column of each run."""
        return self.first + self.length - 1

    @cached_property
    def pairs(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """``(M,)`` twice, the upper and the lower of runs of one value that touch, if only at a corner; in order."""
        width, runs = self.shape[1], len(self.starts)
        begins = np.flatnonzero(self.first == 0)  # the first run of each row
        upper = int(begins[-1])  # runs that have a row below
        under = self.starts[:upper] + width
        at = np.searchsorted(self.starts, under, side="right") - 1  # the run below the first pixel of each
        # From the run below the pixel before the first one, to that below the pixel behind the last.
        low = at - ((self.starts[at] == under) & (self.first[:upper] > 0))
        high = np.append(at[1:], runs - 1)
        high[begins[1:] - 1] = np.append(begins[2:], runs) - 1
        numbers = high - low + 1
        above = np.repeat(np.arange(upper), numbers)
        below = np.arange(len(above)) - np.repeat(np.cumsum(numbers) - numbers - low, numbers)
        same = np.flatnonzero(self.value[above] == self.value[below])
        return above[same], below[same]

    def counts(self) -> dict[int, int]:
        """Do as :func:`count_values`."""
        return _summed(self.value, self.length)

    def areas(self) -> dict[int, int]:
        """Do as :func:`count_areas`."""
        above, below = self.pairs
        both = np.minimum(self.last[above], self.last[below]) - np.maximum(self.first[above], self.first[below])
        return _summed(self.value[above], np.maximum(both, 0))


def count_values(values: NDArray[Any]) -> dict[int, int]:
    """Return how many pixels have each value.

    >>> count_values(np.array([[7, 7], [300, 7]]))
    {7: 3, 300: 1}
    """
    few = _two_values(values, lambda value: values == value)
    return _count_many(values) if few is None else few


def _count_many(values: NDArray[Any]) -> dict[int, int]:
    if values.dtype == np.uint8:
        counts = _histogram(values)
        return {int(value): int(counts[value]) for value in np.flatnonzero(counts)}
    flat = values.ravel()
    # Runs of equal pixels first: labels have few, and sorting them is what takes the time.
    starts = np.flatnonzero(np.concatenate(([True], flat[1:] != flat[:-1]))) if flat.size else np.zeros(0, np.int64)
    return _summed(flat[starts], np.diff(starts, append=flat.size))


def count_areas(values: NDArray[Any]) -> dict[int, int]:
    """Return for each value its pixels in blocks of 2 x 2 with that value, counted at the lower right one.

    >>> count_areas(np.array([[7, 7, 1], [7, 7, 2]], np.uint8))
    {7: 1}
    """
    beside = values[:, 1:] == values[:, :-1]
    above = values[1:] == values[:-1]
    inside = beside[1:] & beside[:-1] & above[:, 1:]
    if values.dtype != np.uint8:
        return count_values(values[1:, 1:][inside])
    # To gather what lies inside takes longer than to count all and correct the zeros.
    counts = _histogram(values[1:, 1:] * inside)
    counts[0] -= inside.size - np.count_nonzero(inside)
    return {int(value): int(counts[value]) for value in np.flatnonzero(counts)}


def _summed(values: NDArray[Any], numbers: NDArray[np.int64]) -> dict[int, int]:
    """Return the sum of the numbers of each value, none of which is negative, where it is not 0."""
    if values.dtype == np.uint8:
        sums = np.bincount(values, weights=numbers)
        found = np.flatnonzero(sums)
        return dict(zip(found.tolist(), sums[found].astype(np.int64).tolist(), strict=True))
    found, place = np.unique(values, return_inverse=True)
    sums = np.bincount(place, weights=numbers, minlength=len(found)).astype(np.int64)
    return {value: total for value, total in zip(found.tolist(), sums.tolist(), strict=True) if total}


def _two_values(values: NDArray[Any], where: Callable[[int], NDArray[np.bool_]]) -> dict[int, int] | None:
    """Count the values where there are one or two, None where there are more; a third of a histogram's time."""
    if not values.size or len(set(values.reshape(-1)[:: -(-values.size // _PROBES)].tolist())) > 2:
        return None
    low, high = int(values.min()), int(values.max())
    found = {value: int(np.count_nonzero(where(value))) for value in (low, high)}
    return found if sum(found.values()) == values.size else None


def _histogram(values: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Count each of the 256 values. `numpy.bincount` would make eight bytes of each pixel first; twice the time."""
    if not values.size:
        return np.zeros(256, np.int64)
    return np.array(Image.fromarray(values.reshape(1, -1)).histogram(), np.int64)
