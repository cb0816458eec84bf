"""Of which format a file is, and its header opened by Pillow, without a warning but ours; nothing is decoded.

Formats are recognised by their first bytes, never by the suffix.

Not here: files and pixels (:mod:`semseg_automl.data.images`), ``.npy`` (:mod:`semseg_automl.data.npy`).
"""

from __future__ import annotations

import re
import struct
import warnings
import zlib
from typing import BinaryIO

import cv2
from PIL import Image
from PIL.BmpImagePlugin import BmpImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from semseg_automl.data import completeness
from semseg_automl.data.channels import Tiff
from semseg_automl.errors import DataError


class _Jpeg(JpegImageFile):
    """A JPEG whose resolution is not asked for: Pillow would look into the EXIF block, and warn where it is damaged."""

    def _read_dpi_from_exif(self) -> None:
        pass


# First bytes -> reader. The classes are used directly, not through Image.open, which warns from 89
# megapixels on, offers every format Pillow knows, and takes the several pictures of a phone's JPEG for a
# format of its own.
_SIGNATURES: tuple[tuple[re.Pattern[bytes], type[ImageFile]], ...] = (
    (re.compile(rb"\xff\xd8\xff"), _Jpeg),
    (re.compile(rb"\x89PNG\r\n\x1a\n"), PngImageFile),
    (re.compile(rb"BM"), BmpImageFile),
    (re.compile(rb"II[*+]\0|MM\0[*+]"), Tiff),
    (re.compile(rb"RIFF....WEBP", re.DOTALL), WebPImageFile),
)

# Pillow's plugins parse with plain indexing and struct, so errors of the language reach the caller.
_LANGUAGE = (SyntaxError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError, EOFError)
# The warnings: Pillow's about damaged and large files, where the caller turns warnings into errors.
_TOO_LARGE = (Image.DecompressionBombError, Image.DecompressionBombWarning)
_LIBRARIES = (OSError, UserWarning, struct.error, zlib.error, cv2.error, *_TOO_LARGE)
DAMAGE = (*_LANGUAGE, *_LIBRARIES)
"""What decoders are seen to raise on damaged bytes."""

_TIFF_SUBFILE_TYPE = 254
_TIFF_ORIENTATION = 274
_ALLOWED = "allowed are JPEG, PNG, BMP, TIFF, WebP and .npy"


def open_header(stream: BinaryIO, name: str) -> ImageFile:
    """Open the header of an image file.

    Raises:
        DataError: It is of another format, damaged, or a TIFF of several pages.
    """
    start = stream.read(16)
    reader = next((reader for signature, reader in _SIGNATURES if signature.match(start)), None)
    if reader is None:
        raise DataError(f"{name}: not an image that is read here (it starts with {start[:8]!r}); {_ALLOWED}")
    if reader is Tiff and (flaw := completeness.tiff_flaw(stream)):
        raise damaged(name, flaw)
    stream.seek(0)
    try:
        header = reader(stream)
        pages = _pages(header)
    except DAMAGE as error:
        raise damaged(name, error) from error
    if pages > 1:
        raise DataError(f"{name}: a TIFF of {pages} pages; write each page to a file of its own")
    return header


def amount_flaw(header: ImageFile, data: bytes) -> str:
    """Return what is wrong with the amount of pixels in a JPEG or TIFF, or an empty string."""
    if isinstance(header, JpegImageFile):
        return completeness.jpeg_flaw(data, header.size, header.layer, progressive="progressive" in header.info)
    return completeness.tiff_pixels_flaw(header.tag_v2) if isinstance(header, Tiff) else ""


def orientation(header: ImageFile, name: str) -> int:
    """Return the EXIF orientation, 1 to 8, that the decoders leave to us (both turn a TIFF that they read)."""
    if isinstance(header, Tiff) and header.many:
        turned = header.tag_v2.get(_TIFF_ORIENTATION, 1)
        return turned if turned in range(1, 9) else 1
    block = header.info.get("exif")
    if isinstance(header, Tiff) or not block:
        return 1
    value = completeness.exif_orientation(block)
    if value is None:
        warnings.warn(f"{name}: its EXIF block is damaged, so the image is read unturned", stacklevel=2)
    return value or 1


def damaged(name: str, error: BaseException | str) -> DataError:
    """Return the error that says so of the file `name`."""
    if isinstance(error, _TOO_LARGE):
        return DataError(f"{name}: {error}; cut the image into smaller ones, or raise PIL.Image.MAX_IMAGE_PIXELS")
    kind = ", or a TIFF of a rare kind" if isinstance(error, SyntaxError) else ""
    return DataError(f"{name}: truncated or damaged{kind} ({error}); copy the file again or remove the row")


def _pages(header: ImageFile) -> int:
    """Count the pages of a TIFF; reduced copies of the first (as in cloud-optimised GeoTIFF) are none."""
    if not isinstance(header, Tiff) or header.n_frames == 1:
        return 1
    header.seek(1)
    reduced = int(header.tag_v2.get(_TIFF_SUBFILE_TYPE, 0)) & 1
    header.seek(0)
    return 1 if reduced else header.n_frames
