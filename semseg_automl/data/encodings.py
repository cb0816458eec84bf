"""How a mask stores its classes - numbers, palette indices or colours - and what counting it tells.

Not here: files (:mod:`semseg_automl.data.images`), what the values mean (:mod:`semseg_automl.task`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from semseg_automl.data.colours import pack
from semseg_automl.data.forms import OPAQUE
from semseg_automl.errors import DataError

LISTED_COLOURS = 256
"""Colours of one mask that are counted one by one; label masks have fewer, JPEG ones thousands."""

MOST_RUNS = 2**20
"""Runs of equal pixels, some 200 bytes each, beyond which pixels are looked at instead."""

SHORT_RUNS = 8
"""Mean pixels of a run below which that is also faster."""

_PROBES = 64
"""Pixels, evenly spread, that show most masks of many values as such."""

_GREYS = tuple(grey * 0x010101 for grey in range(256))


@dataclass(frozen=True)
class MaskEncoding:
    """How a mask stores its values, and where in the mask they are."""

    colours: bool = False
    """Whether the values are packed colours."""
    palette: tuple[int, ...] = ()
    """The packed colour of each index; empty for masks without a palette."""
    areas: Mapping[int, int] | None = None
    """For each value the pixels that have it together with the three above and to the left of them: many where a
    class fills areas, next to none where smoothing or JPEG made the value. None where nobody has looked."""
    unlisted: int = 0
    """Pixels of colours beyond :data:`LISTED_COLOURS`, which are not counted one by one."""
    form: str = ""
    """Of its file, as :func:`semseg_automl.data.forms.form_of` gives it."""
    alpha: int = OPAQUE
    """Of every pixel."""

    def as_colours(self, counts: Mapping[int, int], name: str = "mask") -> dict[int, int]:
        """Return counts of stored values as counts of packed colours.

        Raises:
            DataError: A value is no grey level and has no palette entry.
        """
        if self.colours:
            return dict(counts)
        table = self.palette or _GREYS
        odd = [value for value in counts if not 0 <= value < len(table)]
        if odd:
            raise DataError(f"{name}: {_no_colour(odd[0], len(self.palette))}")
        colours: Counter[int] = Counter()
        for value, pixels in counts.items():
            colours[table[value]] += pixels
        return dict(colours)


NUMBERS = MaskEncoding()
"""Numbers, of which nothing else is known."""


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
        begins = np.searchsorted(self.starts, np.arange(self.shape[0] + 1) * self.shape[1])
        return np.repeat(np.arange(self.shape[0]), np.diff(begins))

    @cached_property
    def first(self) -> NDArray[np.int64]:
        """``(N,)``, the first column of each run."""
        return self.starts - self.row * self.shape[1]

    @cached_property
    def last(self) -> NDArray[np.int64]:
        """``(N,)``, the last column of each run."""
        return self.first + np.diff(self.starts, append=self.shape[0] * self.shape[1]) - 1

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
        return _summed(self.value, self.last - self.first + 1)

    def areas(self) -> dict[int, int]:
        """Do as :func:`count_areas`."""
        above, below = self.pairs
        both = np.minimum(self.last[above], self.last[below]) - np.maximum(self.first[above], self.first[below])
        found = _summed(self.value[above], np.maximum(both, 0))
        return {value: blocks for value, blocks in found.items() if blocks}


def runs_of(values: NDArray[Any]) -> Runs | None:
    """Return the runs of a mask ``(H, W)``; None where they are so many that pixels take less memory and time."""
    new = np.empty(values.shape, np.bool_)
    new[:, 0] = True
    np.not_equal(values[:, 1:], values[:, :-1], out=new[:, 1:])
    if np.count_nonzero(new) > min(MOST_RUNS, values.size // SHORT_RUNS):
        return None
    starts = np.flatnonzero(new)
    return Runs((values.shape[0], values.shape[1]), starts, values.reshape(-1)[starts])


@dataclass(frozen=True)
class StoredMask:
    """A mask as its file stores it."""

    pixels: NDArray[np.uint8] | NDArray[np.int32]
    """``(H, W)`` of numbers, or ``(H, W, 3)`` of colours."""
    palette: tuple[int, ...] = ()
    """The packed colour of each index; empty for masks without a palette."""
    form: str = ""
    """Of its file, as :func:`semseg_automl.data.forms.form_of` gives it."""
    alpha: int = OPAQUE
    """Of every pixel."""

    def as_numbers(self, name: str) -> NDArray[np.uint8] | NDArray[np.int32]:
        """Return the numbers ``(H, W)``.

        Raises:
            DataError: The mask stores colours.
        """
        if self.pixels.ndim == 3:
            colours = len(count_values(pack(self.pixels.astype(np.uint8, copy=False))))
            raise DataError(
                f"{name}: a colour mask ({colours} colours) where numbers are expected; write all masks in one way, "
                "and read colours with colours=True"
            )
        return self.pixels

    def as_colours(self, name: str) -> NDArray[np.int32]:
        """Return packed colours ``(H, W)``: palette indices are looked up, grey has three equal channels.

        Raises:
            DataError: A number is no grey level, or has no entry in the palette.
        """
        if self.pixels.ndim == 3:
            return pack(self.pixels.astype(np.uint8, copy=False))
        table = np.array(self.palette or _GREYS, dtype=np.int32)
        for extreme in (int(self.pixels.min()), int(self.pixels.max())):
            if not 0 <= extreme < len(table):
                raise DataError(f"{name}: {_no_colour(extreme, len(self.palette))}")
        colours: NDArray[np.int32] = table[self.pixels]
        return colours

    def values(self) -> NDArray[np.uint8] | NDArray[np.int32]:
        """Return the values ``(H, W)`` as they are counted: numbers, or packed colours."""
        return pack(self.pixels.astype(np.uint8, copy=False)) if self.pixels.ndim == 3 else self.pixels

    def survey(self) -> tuple[dict[int, int], MaskEncoding]:
        """Return how many pixels have each value, and what else decides on the meaning of a set of masks."""
        return self.survey_runs()[:2]

    def survey_runs(self) -> tuple[dict[int, int], MaskEncoding, Runs | None]:
        """Return what `survey` does, and the runs of the mask where it was worth the while to look for them."""
        colours = self.pixels.ndim == 3
        values = self.values()
        counts = _two_values(values)
        runs = runs_of(values) if counts is None and values.size else None
        if counts is None:
            counts = count_values(values) if runs is None else runs.counts()
        # Two values cannot be told from one another by smoothing; most masks have one or two.
        areas = counts
        if len(counts) > 2:
            areas = count_areas(values) if runs is None else runs.areas()
        unlisted = 0
        if colours and len(counts) > LISTED_COLOURS:
            kept = dict(Counter(counts).most_common(LISTED_COLOURS))
            unlisted = sum(counts.values()) - sum(kept.values())
            counts = kept
        areas = {value: areas[value] for value in counts if value in areas}
        written: dict[str, Any] = {"palette": self.palette, "form": self.form, "alpha": self.alpha}
        return counts, MaskEncoding(colours=colours, areas=areas, unlisted=unlisted, **written), runs


def count_values(values: NDArray[Any]) -> dict[int, int]:
    """Return how many pixels have each value.

    >>> count_values(np.array([[7, 7], [300, 7]]))
    {7: 3, 300: 1}
    """
    if (both := _two_values(values)) is not None:
        return both
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
    """Return the sum of the numbers of each value."""
    if values.dtype == np.uint8:
        sums = np.bincount(values, weights=numbers, minlength=256)
        found = np.flatnonzero(np.bincount(values, minlength=256))
        return dict(zip(found.tolist(), sums[found].astype(np.int64).tolist(), strict=True))
    found, place = np.unique(values, return_inverse=True)
    sums = np.bincount(place, weights=numbers, minlength=len(found))
    return dict(zip(found.tolist(), sums.astype(np.int64).tolist(), strict=True))


def _two_values(values: NDArray[Any]) -> dict[int, int] | None:
    """Count the values where there are one or two, None where there are more; a third of a histogram's time."""
    if not values.size or len(set(values.reshape(-1)[:: -(-values.size // _PROBES)].tolist())) > 2:
        return None
    low, high = int(values.min()), int(values.max())
    found = {value: int(np.count_nonzero(values == value)) for value in (low, high)}
    return found if sum(found.values()) == values.size else None


def _histogram(values: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Count each of the 256 values. `numpy.bincount` would make eight bytes of each pixel first; twice the time."""
    if not values.size:
        return np.zeros(256, np.int64)
    return np.array(Image.fromarray(values.reshape(1, -1)).histogram(), np.int64)


def plain_mask(pixels: NDArray[Any], name: str) -> NDArray[np.uint8] | NDArray[np.int32]:
    """Return decoded pixels as numbers ``(H, W)``, or colours ``(H, W, 3)`` where the channels differ.

    Raises:
        DataError: The shape or type is no mask's, transparency varies, or numbers are fractions or too large.
    """
    if pixels.ndim == 3 and pixels.shape[2] in (1, 2, 3, 4):
        if pixels.shape[2] in (2, 4):
            alpha = pixels[:, :, -1]
            if alpha.size and (alpha != alpha.flat[0]).any():
                raise DataError(
                    f"{name}: a mask with varying transparency; write one number or one opaque colour per pixel"
                )
            pixels = pixels[:, :, :-1]
        first = pixels[:, :, 0]
        if all((pixels[:, :, channel] == first).all() for channel in range(1, pixels.shape[2])):
            return _whole_numbers(first, name)
        if pixels.dtype != np.uint8:
            raise DataError(f"{name}: a colour mask of type {pixels.dtype}; colours are read in uint8, 0 to 255")
        return np.ascontiguousarray(pixels)
    if pixels.ndim != 2:
        raise DataError(f"{name}: a mask of shape {pixels.shape}; pass (H, W), or (H, W, 3) for colours")
    return _whole_numbers(pixels, name)


def _no_colour(value: int, entries: int) -> str:
    has = f"its palette has {entries} colours" if entries else "grey levels are 0 to 255"
    return f"a mask with the number {value} among colour masks, and {has}; write all masks in one way"


def _whole_numbers(pixels: NDArray[Any], name: str) -> NDArray[np.uint8] | NDArray[np.int32]:
    if pixels.dtype.kind not in "buif":
        raise DataError(f"{name}: a mask of type {pixels.dtype}; use whole numbers, one per pixel")
    if pixels.dtype.kind == "f" and not (np.isfinite(pixels).all() and (pixels == np.rint(pixels)).all()):
        raise DataError(f"{name}: a mask with fractions; use whole numbers, one per class (a threshold gives 0 and 1)")
    if pixels.dtype in (np.uint8, np.bool_):
        return np.ascontiguousarray(pixels, dtype=np.uint8)
    lowest, highest = int(pixels.min()), int(pixels.max())
    limits = np.iinfo(np.int32)
    if lowest < limits.min or highest > limits.max:
        raise DataError(f"{name}: mask values from {lowest} to {highest}; use class numbers of at most {limits.max}")
    if lowest >= 0 and highest <= 255:
        return np.ascontiguousarray(pixels, dtype=np.uint8)
    return np.ascontiguousarray(pixels, dtype=np.int32)
