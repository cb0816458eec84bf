"""How a mask stores its classes - numbers, palette indices or colours - and what of it decides on their meaning.

Not here: files (:mod:`semseg_automl.data.images`), counting (:mod:`semseg_automl.data.counting`), what the values mean
(:mod:`semseg_automl.task`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from semseg_automl.data.colours import pack
from semseg_automl.data.counting import Values, count_values
from semseg_automl.data.forms import OPAQUE
from semseg_automl.errors import DataError

LISTED_COLOURS = 256
"""Colours of one mask that are counted one by one; label masks have fewer, JPEG ones thousands."""

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

    def values(self) -> Values:
        """Return the values ``(H, W)`` as they are counted: numbers, or packed colours."""
        return Values(pack(self.pixels.astype(np.uint8, copy=False)) if self.pixels.ndim == 3 else self.pixels)

    def survey(self, values: Values | None = None) -> tuple[dict[int, int], MaskEncoding]:
        """Return how many pixels have each value, and what else decides on the meaning of a set of masks.

        Args:
            values: What `values` gives, where the caller goes on with what is counted of them.
        """
        colours = self.pixels.ndim == 3
        values = self.values() if values is None else values
        counts = values.counts
        # Two values cannot be told from one another by smoothing; most masks have one or two.
        areas = counts if len(counts) <= 2 else values.areas
        unlisted = 0
        if colours and len(counts) > LISTED_COLOURS:
            kept = dict(Counter(counts).most_common(LISTED_COLOURS))
            unlisted = sum(counts.values()) - sum(kept.values())
            counts = kept
        areas = {value: areas[value] for value in counts if value in areas}
        written: dict[str, Any] = {"palette": self.palette, "form": self.form, "alpha": self.alpha}
        return counts, MaskEncoding(colours=colours, areas=areas, unlisted=unlisted, **written)


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
