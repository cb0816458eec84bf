"""From the bytes of an image file, whose header is open already, to pixels.

The common kinds of JPEG and PNG are decoded by OpenCV, which is faster, the others by Pillow.

Not here: files, limits and what callers get (:mod:`semseg_automl.data.images`), headers
(:mod:`semseg_automl.data.headers`).
"""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile

from semseg_automl.data import completeness
from semseg_automl.data.channels import Channels, Tiff, choice_needed, read_channels
from semseg_automl.data.headers import DAMAGE, damaged
from semseg_automl.errors import DataError

PLAIN_MODES = frozenset({"L", "LA", "RGB", "RGBA", "RGBX"})
"""Pillow's modes whose channels are numbers of their own, not steps on the way to colours."""

_TIFF_BITS_PER_SAMPLE = 258


def is_deep(header: ImageFile, data: bytes) -> bool:
    """Whether the file stores 16 bits per channel, of which Pillow keeps eight when there are several."""
    if isinstance(header, PngImageFile):
        return data[24] == 16
    if isinstance(header, TiffImageFile):
        return set(header.tag_v2.get(_TIFF_BITS_PER_SAMPLE, (1,))) == {16} and header.mode not in ("I", "F")
    return False


def decode_deep(data: bytes, name: str) -> NDArray[Any]:
    """Decode 16 bits per channel, or any other kind as it is stored, in the order red, green, blue, alpha."""
    # Unlike other flags, this one leaves the orientation of a PNG to us.
    pixels = decode_opencv(data, cv2.IMREAD_UNCHANGED, name)
    if pixels.ndim == 3 and pixels.shape[2] >= 3:
        pixels = pixels[:, :, [2, 1, 0, *range(3, pixels.shape[2])]]
    return pixels


def decode_usual(header: ImageFile, data: bytes, name: str) -> NDArray[Any]:
    """Decode colours, grey perhaps once, alpha perhaps dropped."""
    if is_deep(header, data):
        return decode_deep(data, name)
    if isinstance(header, (JpegImageFile, PngImageFile)) and header.mode in ("L", "RGB", "RGBA"):
        return decode_opencv(data, cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION, name)
    return pixels_of(header, name, as_stored=False, data=data)


def decode_all(header: ImageFile, data: bytes, name: str) -> NDArray[Any]:
    """Decode with every channel that the file stores: grey once, alpha too."""
    if header.mode in PLAIN_MODES and not is_deep(header, data):
        return pixels_of(header, name, as_stored=True, data=data)
    return decode_usual(header, data, name)


def decode_many(header: Tiff, data: bytes, channels: Channels | None, name: str) -> NDArray[Any]:
    """Decode the chosen channels of a TIFF of many; :func:`semseg_automl.data.channels.read_channels`."""
    if channels is None:
        raise choice_needed(header.many, name)
    try:
        return read_channels(header, data, channels, name)
    except DataError:  # which is a ValueError, too
        raise
    except DAMAGE as error:
        raise damaged(name, error) from error


def decode_opencv(data: bytes, flags: int, name: str) -> NDArray[Any]:
    """Decode by OpenCV, whose failures name the file."""
    try:
        pixels = cv2.imdecode(np.frombuffer(data, dtype=np.uint8), flags)
    except cv2.error as error:
        raise damaged(name, error) from error
    if pixels is None:
        flaw = completeness.png_pixels_flaw(data) if data.startswith(completeness.PNG_START) else ""
        raise damaged(name, flaw or "OpenCV could not decode it")
    return pixels


def pixels_of(image: Image.Image, name: str, *, as_stored: bool, data: bytes = b"") -> NDArray[Any]:
    """Decode a Pillow image, of the file `data`; `as_stored` keeps palette indices and the two values of a bitmap."""
    if data and isinstance(image, PngImageFile) and (flaw := completeness.png_pixels_flaw(data)):
        raise damaged(name, flaw)
    try:
        if not as_stored and image.mode not in ("F", "I") and not image.mode.startswith("I;"):
            image.load()  # a PNG may say only behind its pixels what is transparent
            if "transparency" in image.info:
                image = image.convert("RGBA")  # Pillow warns when a palette's transparency is dropped at once
            image = image.convert("RGB")
        pixels = np.asarray(image)
    except DAMAGE as error:
        raise damaged(name, error) from error
    return pixels.astype(pixels.dtype.newbyteorder("="), copy=False)


def upright(image: Image.Image, name: str) -> Image.Image:
    """Return a Pillow image turned as its EXIF orientation says."""
    try:
        return ImageOps.exif_transpose(image)
    except DAMAGE as error:
        raise damaged(name, error) from error


def orient(pixels: NDArray[Any], turned: int) -> NDArray[Any]:
    """Undo an EXIF orientation (CIPA DC-008, 4.6.4): 5 to 8 are mirrored along the diagonal as well."""
    if turned >= 5:
        pixels = pixels.swapaxes(0, 1)
    if turned in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if turned in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)
