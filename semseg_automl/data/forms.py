"""In which form of PNG masks are stored, and masks written in the same one: bits, channels, transparency.

A viewer shows one bit, eight bits and eight bits with transparency differently although they hold the same numbers, and
other programs may insist on one of them.

Not here: files (:mod:`semseg_automl.data.images`), palettes (:mod:`semseg_automl.data.palettes`).
"""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from semseg_automl.data.completeness import PNG_START
from semseg_automl.errors import DataError

OPAQUE = 255

FORMS = {
    "1": "of 1 bit",
    "2": "of 2 bits",
    "4": "of 4 bits",
    "I;16": "of 16 bits",
    "LA": "of grey and alpha",
    "RGB": "of three channels",
    "RGBA": "of three channels and alpha",
}
"""The forms besides eight bits of grey, palettes, and colours without alpha, and what they are called."""

_BITS = {"1": 1, "2": 2, "4": 4, "I;16": 16}
_PNG_GREY = 0


def form_of(mode: str, png: bytes = b"") -> str:
    """Return the form of a mask's file, ``"L"`` for eight bits of grey, an empty string where it has none of these.

    Args:
        mode: Pillow's.
        png: The bytes of the file if it is a PNG.

    >>> form_of("1"), form_of("I;16B"), form_of("P")
    ('1', 'I;16', '')
    """
    depth, colour = (png[24], png[25]) if png else (8, -1)
    if colour == _PNG_GREY and depth in (2, 4):
        return str(depth)
    if mode.startswith("I;16") or (colour == _PNG_GREY and depth == 16):
        return "I;16"
    return mode if depth <= 8 and (mode == "L" or mode in FORMS) else ""


def form_to_write(form: str, *, top: int, colours: bool) -> str:
    """Return a form if it can hold values and is not the one that they would be written in anyway, else nothing.

    Args:
        form: What :func:`form_of` gave.
        top: The largest number.
        colours: Whether the values are colours.
    """
    if colours:
        return form if form == "RGBA" else ""
    usual = "L" if top <= 255 else "I;16"
    return form if form in FORMS and form != usual and top < 2 ** _BITS.get(form, 8) else ""


def form_png(array: NDArray[Any], form: str, alpha: int, path: str) -> bytes:
    """Return a mask as the bytes of a PNG of a form.

    Args:
        array: Whole numbers ``(H, W)``, or RGB ``(H, W, 3)`` uint8 for ``"RGB"`` and ``"RGBA"``.
        form: One of :data:`FORMS`.
        alpha: Of every pixel, for ``"LA"`` and ``"RGBA"``.
        path: What errors call the file.

    Raises:
        DataError: The form cannot hold the array.
    """
    rgb = array.ndim == 3 and array.shape[2] == 3 and array.dtype == np.uint8 and form in ("RGB", "RGBA")
    top = 2 ** _BITS.get(form, 8)
    if form not in FORMS or array.size == 0 or not (rgb or (array.ndim == 2 and 0 <= array.min() <= array.max() < top)):
        raise DataError(
            f"{path}: an array of {array.dtype} and shape {array.shape} cannot be written as PNG of the form {form!r}; "
            f"pass (H, W) of numbers below {top}, or RGB (H, W, 3) for three channels; forms are {', '.join(FORMS)}"
        )
    if form in ("1", "2", "4"):
        return _few_bits(array.astype(np.uint8), _BITS[form])
    if form == "I;16":
        return _encoded(array.astype(np.uint16))
    pixels = array.astype(np.uint8)
    opacity = np.full(pixels.shape[:2], alpha, np.uint8)
    if form == "LA":
        stream = io.BytesIO()
        Image.fromarray(np.dstack([pixels, opacity])).save(stream, "PNG")
        return stream.getvalue()
    channels = pixels[:, :, ::-1] if rgb else np.dstack([pixels] * 3)
    return _encoded(np.ascontiguousarray(channels if form == "RGB" else np.dstack([channels, opacity])))


def _encoded(array: NDArray[Any]) -> bytes:
    return cv2.imencode(".png", array)[1].tobytes()


def _few_bits(array: NDArray[np.uint8], bits: int) -> bytes:
    """Return grey of 1, 2 or 4 bits as PNG, which neither OpenCV nor Pillow writes of 2 and 4."""
    height, width = array.shape
    each = 8 // bits
    padded = np.zeros((height, -(-width // each) * each), np.uint8)
    padded[:, :width] = array
    rows = np.zeros((height, 1 + padded.shape[1] // each), np.uint8)  # each begins with its filter, 0 for none
    for position in range(each):
        rows[:, 1:] |= padded[:, position::each] << (8 - bits * (position + 1))
    header = struct.pack(">IIBBBBB", width, height, bits, _PNG_GREY, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(rows.tobytes())), (b"IEND", b""))
    return PNG_START + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in parts
    )
