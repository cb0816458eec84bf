"""Masks that were smoothed or saved as JPEG: which of their many values are classes, which only lie between.

A class fills areas; a value that an interpolation or a JPEG made stands alone at an edge. So a value is a mode when
many of its pixels lie in blocks of equal pixels. On drawn masks, resized or as JPEG of quality 50 to 99, that share
was 0.8 to 0.99 for classes and below 0.3 for all other values.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from semseg_automl.data.colours import unpack

MIN_BETWEEN = 8
"""So many values between the modes at least, and twice as many as modes: a few may be thin classes."""

MIN_BEYOND = 3
"""The same where the user gave the classes and masks hold more, and as many as modes: one or two may be void."""

MAX_FAR = 0.2
"""Share of the pixels that may be further than `NEAR` from every mode; beyond it the modes explain too little."""

NEAR = 8
"""Steps of grey, or of colour as a distance in RGB, that JPEG shifts a value without it being anything else."""

MAX_MODES = 254
"""More are photographs, whose bright sky fills areas too; a task has no more classes."""

_MODE_SHARE = 0.4
_BETWEEN_SHARE = 0.15


@dataclass(frozen=True)
class Modes:
    """The classes of smoothed masks."""

    values: tuple[int, ...]
    """The modes, increasing."""
    pixels: dict[int, int]
    """Each mode with the pixels that are it or snap to it."""
    moved: float
    """Share of the pixels that are none of the modes."""
    far: float
    """Share of the pixels further than :data:`NEAR` from every mode."""
    close: tuple[int, ...]
    """Modes within :data:`NEAR` of another, as wide blurs make them: classes, or shades of one class."""

    @property
    def ambiguous(self) -> bool:
        """Whether too many pixels are far from every mode, or modes too close to tell what a pixel between is."""
        return self.far > MAX_FAR or bool(self.close)


def find_modes(
    pixels: Mapping[int, int],
    areas: Mapping[int, int],
    *,
    colours: bool,
    given: Collection[int] = (),
    unlisted: int = 0,
    known: bool = False,
) -> Modes | None:
    """Return the modes of all masks together, or None where the values are not those of smoothed masks.

    Args:
        pixels: Each value and its pixels.
        areas: Each value and its pixels in areas, see :class:`semseg_automl.data.encodings.MaskEncoding`.
        colours: Whether the values are packed colours; if not, they are grey levels.
        given: Values known to be classes or void; with them only what is between is judged.
        unlisted: Pixels of further colours.
        known: Whether the user gave the number of classes or their names.
    """
    if not colours and any(not 0 <= value <= 255 for value in pixels):
        return None
    wide = [value for value, n in pixels.items() if areas.get(value, 0) >= _MODE_SHARE * n and value not in given]
    if given:  # what is close to a known class is that class
        wide = [
            value for value, d in zip(wide, snap(wide, given, colours=colours)[1].tolist(), strict=True) if d > NEAR
        ]
    modes = sorted({*given, *wide})
    between = [value for value in pixels if value not in modes]
    number = len(between) + unlisted  # every unlisted pixel may be a colour of its own
    alone = sum(areas.get(value, 0) for value in between) < _BETWEEN_SHARE * sum(pixels[v] for v in between)
    enough = max(MIN_BEYOND, len(modes)) if known else max(MIN_BETWEEN, 2 * len(modes))
    if not 2 <= len(modes) <= MAX_MODES or number < enough or (between and not alone):
        return None
    nearest, distance = snap(between, modes, colours=colours)
    snapped = {mode: pixels.get(mode, 0) for mode in modes}
    for value, mode in zip(between, nearest.tolist(), strict=True):
        snapped[mode] += pixels[value]
    total = sum(pixels.values()) + unlisted
    far = sum(pixels[value] for value, d in zip(between, distance.tolist(), strict=True) if d > NEAR) + unlisted
    moved = sum(pixels[value] for value in between) + unlisted
    close = tuple(mode for mode in wide if snap([mode], {*modes} - {mode}, colours=colours)[1][0] <= NEAR)
    return Modes(tuple(modes), {m: n for m, n in snapped.items() if n}, moved / total, far / total, close)


def snap(
    values: Iterable[int] | NDArray[np.integer], modes: Collection[int], *, colours: bool
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return for each value the nearest mode, the lower of two, and how far it is: both ``(N,)``.

    >>> snap([3, 130, 200], [0, 255], colours=False)[0].tolist()
    [0, 255, 255]
    """
    listed = np.asarray(list(values), dtype=np.int64)
    ordered = np.array(sorted(modes), dtype=np.int64)
    points = (unpack(listed) if colours else listed[:, None]).astype(np.float64)
    best = np.zeros(len(listed), dtype=np.int64)
    distance = np.full(len(listed), np.inf)
    for mode in ordered:
        target = (unpack([mode])[0] if colours else np.array([mode])).astype(np.float64)
        d = np.sqrt(((points - target) ** 2).sum(axis=1))
        closer = d < distance
        best[closer] = mode
        distance[closer] = d[closer]
    return best, distance
