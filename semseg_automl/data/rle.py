"""COCO's run lengths: runs of background and foreground by turns, down the columns, background first.

The compressed form and its sources: ``rleToString`` and ``rleFrString`` of the COCO API's ``maskApi.c``. Each count is
a signed number in characters of six bits from ``'0'`` on: five bits of the number, lowest first, and one that says
whether more follow. From the fourth on, a count is written as its difference to the count two before.

Not here: what a run stands for (:mod:`semseg_automl.data.drawn`).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from semseg_automl.errors import DataError

_OFFSET = 48  # the character '0'
_MORE = 0x20
_SIGN = 0x10
_MAX_CHARACTERS = 8  # of one count: 40 bits, more than any image has pixels


def decode_counts(text: str) -> NDArray[np.int64]:
    """Return the run lengths in a compressed string, unchecked against any size.

    Raises:
        DataError: A character is none of the code's, or the string ends within a count.

    >>> decode_counts("52203").tolist()
    [5, 2, 2, 2, 5]
    """
    try:
        characters = np.frombuffer(text.encode("ascii"), dtype=np.uint8).astype(np.int64) - _OFFSET
    except UnicodeEncodeError as error:
        raise DataError("its counts hold a character that is not ASCII; copy the file again") from error
    if not characters.size:
        raise DataError("its counts are an empty string; write the run lengths of H x W pixels")
    if characters.min() < 0 or characters.max() >= 64:
        odd = chr(int(characters[(characters < 0) | (characters >= 64)][0]) + _OFFSET)
        raise DataError(f"its counts hold {odd!r}, and compressed ones are of '0' to 'o'; copy the file again")
    last = (characters & _MORE) == 0
    if not last[-1]:
        raise DataError("its counts end in the middle of a number; copy the file again")
    starts = np.flatnonzero(np.concatenate(([True], last[:-1])))
    lengths = np.diff(starts, append=characters.size)
    if lengths.max() > _MAX_CHARACTERS:
        raise DataError("its counts hold a number of more than 40 bits; copy the file again")
    place = 5 * (np.arange(characters.size) - np.repeat(starts, lengths))
    numbers = np.add.reduceat((characters & 0x1F) << place, starts)
    numbers -= np.where(characters[last] & _SIGN, np.int64(1) << (5 * lengths), 0)
    numbers[1::2] = np.cumsum(numbers[1::2])  # each is a difference to the one two before; the first two are not
    numbers[2::2] = np.cumsum(numbers[2::2])
    return numbers


def check_counts(counts: object, size: tuple[int, int]) -> NDArray[np.uint32]:
    """Return run lengths, plain or compressed, that fill an image exactly.

    Args:
        counts: A list of whole numbers, or a compressed string.
        size: Height and width in pixels.

    Raises:
        DataError: They are neither, negative, damaged, or sum to another number of pixels.

    >>> check_counts([1, 2, 1], (2, 2)).tolist()
    [1, 2, 1]
    """
    if isinstance(counts, str):
        numbers = decode_counts(counts)
    elif isinstance(counts, list) and all(type(count) is int for count in counts):
        if counts and not 0 <= min(counts) <= max(counts) < 2**40:
            raise DataError(f"its counts go from {min(counts)} to {max(counts)}; run lengths are 0 to H x W")
        numbers = np.array(counts, dtype=np.int64)
    else:
        raise DataError(f"its counts are a {type(counts).__name__}, not whole numbers or a compressed string")
    pixels = size[0] * size[1]
    if numbers.size and numbers.min() < 0:
        raise DataError(f"its counts hold the negative run length {numbers.min()}; copy the file again")
    if int(numbers.sum()) != pixels:
        raise DataError(f"its counts sum to {numbers.sum()}, but {size[0]} x {size[1]} pixels are {pixels}")
    return numbers.astype(np.uint32)


def paint_runs(canvas: NDArray[np.generic], counts: NDArray[np.uint32], value: int) -> None:
    """Set the foreground runs in a flat ``(W * H,)`` image, column after column, to `value`."""
    ends = np.cumsum(counts, dtype=np.int64)
    foreground = np.flatnonzero(counts[1::2]) * 2 + 1
    if not foreground.size:
        return
    first, last = int(foreground[0]), int(foreground[-1])
    inside = np.repeat(np.arange(first, last + 1) % 2 == 1, counts[first : last + 1])
    canvas[ends[first - 1] : ends[last]][inside] = value
