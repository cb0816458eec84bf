"""The only reader and writer of image files: pixels in, pixels out, or an error that names the file.

Formats are recognised by their first bytes, never by the suffix, and only JPEG, PNG, BMP, TIFF and WebP are
opened. Pillow reads the header, so a size is known and checked before anything is decoded; the common kinds
of JPEG and PNG are then decoded by OpenCV, which is faster, the others by Pillow. JPEG and PNG are walked
segment by segment before, because some OpenCV versions fill the missing part of a truncated file with grey
and say nothing.

Not here: what mask values mean (:mod:`semseg_automl.task`), resizing (:mod:`semseg_automl.data.transforms`),
colour masks, tables of paths (:mod:`semseg_automl.data.table`).
"""

from __future__ import annotations

import io
import os
import re
import secrets
import stat
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from PIL.BmpImagePlugin import BmpImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from semseg_automl.errors import DataError

ImageSource: TypeAlias = str | os.PathLike[str] | np.ndarray[Any, Any] | Image.Image
"""One image or mask: a path, an array, or a Pillow image."""

MAX_PIXELS = 400_000_000
"""Images of more pixels are refused before they are decoded: as RGB this many take 1.2 GB. TIFF and WebP also have
to keep to Pillow's own limit, twice ``PIL.Image.MAX_IMAGE_PIXELS``."""

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"})
"""The suffixes, in lower case, by which a folder is searched for images."""

# First bytes -> reader. The classes are used directly, not through Image.open, which warns from 89
# megapixels on, offers every format Pillow knows, and takes the several pictures of a phone's JPEG for a
# format of its own.
_SIGNATURES: tuple[tuple[re.Pattern[bytes], type[ImageFile]], ...] = (
    (re.compile(rb"\xff\xd8\xff"), JpegImageFile),
    (re.compile(rb"\x89PNG\r\n\x1a\n"), PngImageFile),
    (re.compile(rb"BM"), BmpImageFile),
    (re.compile(rb"II[*+]\0|MM\0[*+]"), TiffImageFile),
    (re.compile(rb"RIFF....WEBP", re.DOTALL), WebPImageFile),
)

# What decoders are seen to raise on damaged bytes. Pillow's plugins parse with plain indexing and struct, so
# errors of the language reach the caller.
_LANGUAGE = (SyntaxError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError, EOFError)
# UserWarning: Pillow's about a damaged TIFF, where the caller turns warnings into errors.
_LIBRARIES = (OSError, UserWarning, struct.error, zlib.error, cv2.error, Image.DecompressionBombError)
_DAMAGE = (*_LANGUAGE, *_LIBRARIES)

_EXIF_ORIENTATION = 0x0112
_TIFF_BITS_PER_SAMPLE = 258
_TIFF_SUBFILE_TYPE = 254
# A JPEG marker that is neither a stuffed zero, nor a restart, nor a fill byte (ITU-T T.81, B.1.1.2).
_JPEG_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
_JPEG_END = 0xD9
_ALLOWED = "allowed are JPEG, PNG, BMP, TIFF and WebP"


def read_image(source: ImageSource, *, name: str | None = None) -> NDArray[np.uint8]:
    """Return an image as ``(H, W, 3)`` uint8 RGB, upright.

    The EXIF orientation is applied, grey is repeated, palettes are looked up, alpha is dropped, and 16 bits
    are divided by 257 so that white stays white. Arrays are taken as RGB (not BGR), ``(H, W)``, ``(H, W,
    1)``, ``(H, W, 3)`` or ``(H, W, 4)``, uint8 or uint16.

    Args:
        source: A path, an array, or a Pillow image.
        name: What errors call the image, its path added where it lacks it; by default the path alone.

    Raises:
        DataError: The file is missing, of another format, truncated, damaged or too large, or the array has
            another shape or type.

    >>> read_image(np.zeros((4, 6), np.uint8)).shape
    (4, 6, 3)
    """
    name = _name(source, name)
    if isinstance(source, np.ndarray):
        return _rgb(source, name)
    if isinstance(source, Image.Image):
        _check_pixels(source.size, name)
        return _rgb(_pixels_of(_upright(source, name), name, as_stored=False), name)
    data, header = _open(source, name)
    return _rgb(_orient(_decode(header, data, name), _orientation(header, name)), name)


def read_mask(source: ImageSource, *, name: str | None = None) -> NDArray[np.uint8] | NDArray[np.int32]:
    """Return a mask as ``(H, W)`` of the numbers it stores: uint8 where they fit, otherwise int32.

    Grey of any depth gives its levels, a palette image its indices (not its colours), two-valued images 0
    and 1, and three equal channels count as one. The EXIF orientation is applied as for images.

    Raises:
        DataError: As in :func:`read_image`; also for a colour mask, varying transparency, or fractions.

    >>> read_mask(np.array([[False, True]]))
    array([[0, 1]], dtype=uint8)
    """
    name = _name(source, name)
    if isinstance(source, np.ndarray):
        return _whole_numbers(_one_channel(source, name), name)
    if isinstance(source, Image.Image):
        _check_pixels(source.size, name)
        pixels = _pixels_of(_upright(source, name), name, as_stored=True)
        return _whole_numbers(_one_channel(pixels, name), name)
    data, header = _open(source, name)
    pixels = _decode_deep(data, name) if _is_deep(header, data) else _pixels_of(header, name, as_stored=True)
    if isinstance(header, PngImageFile) and data[25] == 0 and data[24] in (2, 4):
        # Pillow spreads 2 and 4 bits of grey over 0..255; the file stores 0..3 and 0..15.
        pixels = pixels // (255 // (2 ** data[24] - 1))
    return _whole_numbers(_one_channel(_orient(pixels, _orientation(header, name)), name), name)


def image_size(source: ImageSource, *, name: str | None = None) -> tuple[int, int]:
    """Return height and width as :func:`read_image` would give them, from the header alone.

    Raises:
        DataError: The file is missing, or of a format that is not read here.

    >>> image_size(np.zeros((4, 6, 3), np.uint8))
    (4, 6)
    """
    name = _name(source, name)
    if isinstance(source, np.ndarray):
        if source.ndim not in (2, 3):
            raise DataError(f"{name}: an array of shape {source.shape}; pass (H, W) or (H, W, channels)")
        return source.shape[0], source.shape[1]
    if isinstance(source, Image.Image):
        turned = not isinstance(source, TiffImageFile) and source.getexif().get(_EXIF_ORIENTATION, 1) >= 5
        width, height = source.size
        return (width, height) if turned else (height, width)
    _check_plain_file(source, name)
    try:
        with open(source, "rb") as stream:
            header = _open_header(stream, name)
            width, height = header.size
            return (width, height) if _orientation(header, name) >= 5 else (height, width)
    except OSError as error:
        raise DataError(f"{name}: cannot be read ({error.strerror}); check its permissions and the disk") from error


def write_png(path: str | os.PathLike[str], array: NDArray[np.uint8] | NDArray[np.uint16]) -> None:
    """Write uint8 ``(H, W)``, uint8 RGB ``(H, W, 3)`` or uint16 ``(H, W)`` as PNG, whole or not at all.

    The file is written beside its place under another name and renamed, so an interrupted program leaves no
    half file. Missing folders are created; an existing file is replaced.

    Raises:
        DataError: The array has another shape or type, or the file cannot be written.
    """
    grey = array.ndim == 2 and array.dtype in (np.uint8, np.uint16)
    if array.size == 0 or not (grey or (array.ndim == 3 and array.shape[2] == 3 and array.dtype == np.uint8)):
        raise DataError(
            f"{path}: an array of {array.dtype} and shape {array.shape} cannot be written as PNG; "
            "pass uint8 (H, W) or (H, W, 3), or uint16 (H, W)"
        )
    ok, encoded = cv2.imencode(".png", array if grey else np.ascontiguousarray(array[:, :, ::-1]))
    if not ok:
        raise DataError(f"{path}: OpenCV could not encode an array of {array.dtype} and shape {array.shape} as PNG")
    target = Path(path)
    part = target.with_name(f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            part.write_bytes(encoded.tobytes())
            os.replace(part, target)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror}); check the folder and its free space") from error


def _name(source: ImageSource, name: str | None) -> str:
    if name is not None:
        missing = isinstance(source, (str, os.PathLike)) and os.fspath(source) not in name
        return f"{name}, {source}" if missing else name  # a row is named by its image, an error may be the mask's
    if isinstance(source, np.ndarray):
        return "array in memory"
    if isinstance(source, Image.Image):
        return "Pillow image in memory"
    if isinstance(source, (str, os.PathLike)):
        return os.fspath(source)
    raise DataError(f"{type(source).__name__} is not an image; pass a path, a NumPy array or a Pillow image")


def _check_plain_file(path: str | os.PathLike[str], name: str) -> None:
    try:
        found = os.stat(path)
    except FileNotFoundError as error:
        raise DataError(f"{name}: no such file; check the path, and base_dir= if it is relative") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{name}: cannot be opened ({error}); check the path and its permissions") from error
    if stat.S_ISDIR(found.st_mode):
        raise DataError(f"{name}: is a folder; give the path of one image file")
    if not stat.S_ISREG(found.st_mode):
        raise DataError(f"{name}: is a device or a pipe; give the path of an image file")
    if found.st_size == 0:
        raise DataError(f"{name}: is empty (0 bytes); copy the file again or remove the row")


def _open(path: str | os.PathLike[str], name: str) -> tuple[bytes, ImageFile]:
    """Read a file and its header, and check what can be checked before decoding."""
    _check_plain_file(path, name)
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"{name}: cannot be read ({error.strerror}); check its permissions and the disk") from error
    header = _open_header(io.BytesIO(data), name)
    _check_pixels(header.size, name)
    if isinstance(header, JpegImageFile) and not _jpeg_is_complete(data):
        raise _damaged(name, "the JPEG ends before its end marker")
    if isinstance(header, PngImageFile) and (flaw := _png_flaw(data)):
        raise _damaged(name, flaw)
    return data, header


def _open_header(stream: BinaryIO, name: str) -> ImageFile:
    start = stream.read(16)
    stream.seek(0)
    reader = next((reader for signature, reader in _SIGNATURES if signature.match(start)), None)
    if reader is None:
        raise DataError(f"{name}: not an image that is read here (it starts with {start[:8]!r}); {_ALLOWED}")
    try:
        header = reader(stream)
        pages = _pages(header)
    except _DAMAGE as error:
        raise _damaged(name, error) from error
    if pages > 1:
        raise DataError(f"{name}: a TIFF of {pages} pages; write each page to a file of its own")
    return header


def _pages(header: ImageFile) -> int:
    """Count the pages of a TIFF; reduced copies of the first (as in cloud-optimised GeoTIFF) are none."""
    if not isinstance(header, TiffImageFile) or header.n_frames == 1:
        return 1
    header.seek(1)
    reduced = int(header.tag_v2.get(_TIFF_SUBFILE_TYPE, 0)) & 1
    header.seek(0)
    return 1 if reduced else header.n_frames


def _damaged(name: str, error: BaseException | str) -> DataError:
    if isinstance(error, Image.DecompressionBombError):
        return DataError(f"{name}: {error}; cut the image into smaller ones, or raise PIL.Image.MAX_IMAGE_PIXELS")
    kind = ", or a TIFF of a rare kind" if isinstance(error, SyntaxError) else ""
    return DataError(f"{name}: truncated or damaged{kind} ({error}); copy the file again or remove the row")


def _check_pixels(size: tuple[int, int], name: str) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise DataError(f"{name}: {height} x {width} pixels; an image needs at least one")
    if width * height > MAX_PIXELS:
        raise DataError(
            f"{name}: {height} x {width} pixels (height x width) are more than the {MAX_PIXELS:,} that are "
            "opened; cut the image into smaller ones"
        )


def _jpeg_is_complete(data: bytes) -> bool:
    """Walk the segments up to the end marker; one inside an embedded thumbnail does not count."""
    position = 2
    while True:
        marker = _JPEG_MARKER.search(data, position)
        if marker is None:
            return False
        if data[marker.end() - 1] == _JPEG_END:
            return True
        if marker.end() + 2 > len(data):
            return False
        position = marker.end() + int.from_bytes(data[marker.end() : marker.end() + 2], "big")


def _png_flaw(data: bytes) -> str:
    """Return what is wrong with the chunks of a PNG, or an empty string."""
    position = 8
    while position + 12 <= len(data):
        length = int.from_bytes(data[position : position + 4], "big")
        end = position + 8 + length
        if end + 4 > len(data):
            break
        if zlib.crc32(memoryview(data)[position + 4 : end]) != int.from_bytes(data[end : end + 4], "big"):
            return "a checksum of the PNG is wrong"
        if data[position + 4 : position + 8] == b"IEND":
            return ""
        position = end + 4
    return "the PNG ends before its last chunk"


def _is_deep(header: ImageFile, data: bytes) -> bool:
    """Whether the file stores 16 bits per channel, of which Pillow keeps eight when there are several."""
    if isinstance(header, PngImageFile):
        return data[24] == 16
    if isinstance(header, TiffImageFile):
        return set(header.tag_v2.get(_TIFF_BITS_PER_SAMPLE, (1,))) == {16} and header.mode not in ("I", "F")
    return False


def _decode_deep(data: bytes, name: str) -> NDArray[Any]:
    pixels = _opencv(data, cv2.IMREAD_UNCHANGED, name)  # leaves the orientation of a PNG to us, unlike other flags
    if pixels.ndim == 3 and pixels.shape[2] >= 3:
        pixels = pixels[:, :, [2, 1, 0, *range(3, pixels.shape[2])]]
    return pixels


def _decode(header: ImageFile, data: bytes, name: str) -> NDArray[Any]:
    if _is_deep(header, data):
        return _decode_deep(data, name)
    if isinstance(header, (JpegImageFile, PngImageFile)) and header.mode in ("L", "RGB", "RGBA"):
        return _opencv(data, cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION, name)
    return _pixels_of(header, name, as_stored=False)


def _opencv(data: bytes, flags: int, name: str) -> NDArray[Any]:
    try:
        pixels = cv2.imdecode(np.frombuffer(data, dtype=np.uint8), flags)
    except cv2.error as error:
        raise _damaged(name, error) from error
    if pixels is None:
        raise _damaged(name, "OpenCV could not decode it")
    return pixels


def _pixels_of(image: Image.Image, name: str, *, as_stored: bool) -> NDArray[Any]:
    """Decode a Pillow image; `as_stored` keeps palette indices and the two values of a bitmap."""
    try:
        if not as_stored and image.mode not in ("F", "I") and not image.mode.startswith("I;"):
            if "transparency" in image.info:
                image = image.convert("RGBA")  # Pillow warns when a palette's transparency is dropped at once
            image = image.convert("RGB")
        pixels = np.asarray(image)
    except _DAMAGE as error:
        raise _damaged(name, error) from error
    return pixels.astype(pixels.dtype.newbyteorder("="), copy=False)


def _upright(image: Image.Image, name: str) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except _DAMAGE as error:
        raise _damaged(name, error) from error


def _orientation(header: ImageFile, name: str) -> int:
    """Return the EXIF orientation, 1 to 8, that the decoders leave to us (both turn a TIFF themselves)."""
    block = header.info.get("exif")
    if isinstance(header, TiffImageFile) or not block:
        return 1
    exif = Image.Exif()
    try:
        exif.load(block)
        value = exif.get(_EXIF_ORIENTATION, 1)
    except _DAMAGE:
        warnings.warn(f"{name}: its EXIF block is damaged, so the image is read unturned", stacklevel=2)
        return 1
    return value if value in range(1, 9) else 1


def _orient(pixels: NDArray[Any], orientation: int) -> NDArray[Any]:
    """Undo an EXIF orientation (CIPA DC-008, 4.6.4): 5 to 8 are mirrored along the diagonal as well."""
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


def _rgb(pixels: NDArray[Any], name: str) -> NDArray[np.uint8]:
    """Bring an array of one, three or four channels to ``(H, W, 3)`` uint8."""
    shape = pixels.shape
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    if pixels.ndim != 3 or pixels.shape[2] not in (1, 3, 4):
        if pixels.ndim == 3 and shape[0] in (1, 3, 4):
            hint = "it looks channels first, so pass array.transpose(1, 2, 0)"
        elif pixels.ndim == 4:
            hint = "pass a list of images instead of a batch"
        else:
            hint = "pass (H, W), (H, W, 3) or (H, W, 4), and choose three channels where there are more"
        raise DataError(f"{name}: an image of shape {shape}; {hint}")
    _check_pixels((shape[1], shape[0]), name)
    if pixels.dtype == np.uint16:
        pixels = ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)
    elif pixels.dtype != np.uint8:
        raise DataError(
            f"{name}: pixels of type {pixels.dtype}; only uint8 (0 to 255) and uint16 (0 to 65535) are read, "
            "so scale and convert them, such as (255 * image).round().astype('uint8') from fractions"
        )
    if pixels.shape[2] == 1:
        return np.repeat(pixels, 3, axis=2)
    return np.ascontiguousarray(pixels[:, :, :3])


def _one_channel(pixels: NDArray[Any], name: str) -> NDArray[Any]:
    if pixels.ndim == 2:
        return pixels
    if pixels.ndim != 3 or pixels.shape[2] not in (1, 2, 3, 4):
        raise DataError(f"{name}: a mask of shape {pixels.shape}; pass (H, W), one number per pixel")
    if pixels.shape[2] in (2, 4):
        alpha = pixels[:, :, -1]
        if alpha.size and (alpha != alpha.flat[0]).any():
            raise DataError(
                f"{name}: a mask with varying transparency; write one number per pixel to a one-channel PNG"
            )
        pixels = pixels[:, :, :-1]
    first = pixels[:, :, 0]
    if any((pixels[:, :, channel] != first).any() for channel in range(1, pixels.shape[2])):
        colours = len(np.unique(pixels.reshape(-1, 3), axis=0))
        raise DataError(
            f"{name}: a colour mask ({colours} colours); colour masks are not supported yet: give each "
            "colour a number, ids[(mask == colour).all(axis=-1)] = number, and write ids to a one-channel PNG"
        )
    return first


def _whole_numbers(pixels: NDArray[Any], name: str) -> NDArray[np.uint8] | NDArray[np.int32]:
    _check_pixels((pixels.shape[1], pixels.shape[0]), name)
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
