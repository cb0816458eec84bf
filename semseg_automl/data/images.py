"""The only reader and writer of image files: pixels in, pixels out, or an error that names the file.

Only JPEG, PNG, BMP, TIFF, WebP and NumPy's .npy are opened. Pillow reads the header, so a size is known and checked
before anything is decoded. What decoders would fill with grey or black without a word is found before
(:mod:`semseg_automl.data.completeness`).

Not here: decoding (:mod:`semseg_automl.data.decoding`), formats and headers (:mod:`semseg_automl.data.headers`), what
mask values mean (:mod:`semseg_automl.task`), resizing (:mod:`semseg_automl.data.transforms`), how masks store classes
(:mod:`semseg_automl.data.encodings`), tables (:mod:`semseg_automl.data.table`).
"""

from __future__ import annotations

import io
import os
import secrets
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile

from semseg_automl.data import completeness
from semseg_automl.data.channels import MAX_CHANNELS, Channels, Tiff, choice_needed, choose
from semseg_automl.data.decoding import (
    PLAIN_MODES,
    decode_all,
    decode_deep,
    decode_many,
    decode_opencv,
    decode_usual,
    is_deep,
    orient,
    pixels_of,
    upright,
)
from semseg_automl.data.drawn import DrawnMask
from semseg_automl.data.encodings import StoredMask, plain_mask
from semseg_automl.data.forms import OPAQUE, form_of, form_png
from semseg_automl.data.headers import amount_flaw, damaged, open_header, orientation
from semseg_automl.data.npy import NPY_START, npy_shape, read_npy
from semseg_automl.data.palettes import palette_of, palette_png
from semseg_automl.errors import DataError

ImageSource: TypeAlias = str | os.PathLike[str] | np.ndarray[Any, Any] | Image.Image | DrawnMask
"""One image or mask: a path, an array, or a Pillow image; a mask also as one to be drawn."""

MAX_PIXELS = 400_000_000
"""Images of more pixels are refused before they are decoded: as RGB this many take 1.2 GB. TIFF and WebP also have
to keep to Pillow's own limit, twice ``PIL.Image.MAX_IMAGE_PIXELS``."""

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"})
"""The suffixes, in lower case, by which a folder is searched for images."""

_EXIF_ORIENTATION = 0x0112
_AT_ONCE = 2**20
"""Bytes that are read before it is known whether they are an .npy's, which may be far larger than memory."""
_PNG_GREY = 0
_REDUCED = {2: cv2.IMREAD_REDUCED_GRAYSCALE_2, 4: cv2.IMREAD_REDUCED_GRAYSCALE_4, 8: cv2.IMREAD_REDUCED_GRAYSCALE_8}


def read_image(
    source: ImageSource, *, name: str | None = None, channels: Channels | None = None
) -> NDArray[np.uint8]:
    """Return an image as ``(H, W, 3)`` uint8 RGB, upright.

    The EXIF orientation is applied, grey is repeated, palettes are looked up, alpha is dropped, and 16 bits
    are divided by 257 so that white stays white. Arrays are taken as RGB (not BGR), ``(H, W)``, ``(H, W,
    1)``, ``(H, W, 3)`` or ``(H, W, 4)``, uint8 or uint16. Of files and arrays ``(H, W, C)`` with more channels, up to
    64, some have to be chosen.

    Args:
        source: A path, an array, or a Pillow image.
        name: What errors call the image, its path added where it lacks it; by default the path alone.
        channels: Which of the stored channels are red, green and blue, or the one that is grey, counted from 0; None
            for the usual ones. Alpha counts as a channel; palettes and CMYK are colours first.

    Raises:
        DataError: The file is missing, of another format, truncated, damaged or too large, the array has another
            shape or type, a channel is not there, or there are too many and none is chosen.

    >>> read_image(np.zeros((4, 6), np.uint8)).shape
    (4, 6, 3)
    >>> read_image(np.arange(5, dtype=np.uint8).reshape(1, 1, 5), channels=(4, 2, 0))
    array([[[4, 2, 0]]], dtype=uint8)
    """
    name = _name(source, name)
    if isinstance(source, DrawnMask):
        raise DataError(f"{name}: a mask drawn from annotations where an image is expected; check image= and label=")
    if isinstance(source, np.ndarray):
        pixels = source
    elif isinstance(source, Image.Image):
        _check_pixels(source.size, name)
        all_of_them = channels is not None and source.mode in PLAIN_MODES
        pixels = pixels_of(upright(source, name), name, as_stored=all_of_them)
    else:
        opened = _open(source, name)
        if opened is not None:
            return _decoded(*opened, channels, name)
        pixels = read_npy(source, name)
    return _rgb(pixels if channels is None else choose(pixels, channels, name), name)


@dataclass(frozen=True)
class Glance:
    """What a quick look at an image shows."""

    size: tuple[int, int]
    """Height and width, upright."""
    pixels: NDArray[np.uint8]
    """Upright: grey ``(h, w)``, 2, 4 or 8 times smaller, of most JPEGs; else RGB ``(h, w, 3)``, of the size itself."""
    coded: bytes = b""
    """What the image of a smaller JPEG is decoded from; empty where `pixels` are all of it."""


def glance(
    source: ImageSource, side: int, *, name: str | None = None, channels: Channels | None = None
) -> Glance:
    """Look at an image as `read_image` reads it, a JPEG in grey at the least size whose sides are not below `side`.

    Every byte of a file is still read and decoded: to leave out high frequencies (libjpeg's scaled transform) and
    colours saves what `read_image` spends half of its time on.

    Raises:
        DataError: As in :func:`read_image`.
    """
    called = _name(source, name)
    opened = _open(source, called) if isinstance(source, (str, os.PathLike)) else None
    if opened is None:
        pixels = read_image(source, name=name, channels=channels)
        return Glance((pixels.shape[0], pixels.shape[1]), pixels)
    data, header = opened
    scale = next((s for s in (8, 4, 2) if min(header.size) >= s * side), 1)
    if channels is None and isinstance(header, JpegImageFile) and header.mode in ("L", "RGB") and scale > 1:
        turned = orientation(header, called)
        small = decode_opencv(data, _REDUCED[scale] | cv2.IMREAD_IGNORE_ORIENTATION, called)
        width, height = header.size if turned < 5 else header.size[::-1]
        coded = bytes([turned]) + completeness.jpeg_pixel_data(data)
        return Glance((height, width), orient(small, turned), coded)
    pixels = _decoded(data, header, channels, called)
    return Glance((pixels.shape[0], pixels.shape[1]), pixels)


def read_mask(
    source: ImageSource, *, name: str | None = None, colours: bool = False
) -> NDArray[np.uint8] | NDArray[np.int32]:
    """Return a mask as ``(H, W)`` of the numbers it stores: uint8 where they fit, otherwise int32.

    Grey of any depth gives its levels, a palette image its indices (not its colours), two-valued images 0
    and 1, and three equal channels count as one. The EXIF orientation is applied as for images.

    Args:
        source: A path, an array, a Pillow image, or a mask to be drawn.
        name: As in :func:`read_image`.
        colours: Whether the classes are colours: then every mask, also one of a palette or grey, gives packed
            colours ``r << 16 | g << 8 | b``, int32.

    Raises:
        DataError: As in :func:`read_image`; also for varying transparency or fractions, and for a colour mask
            unless `colours`.

    >>> read_mask(np.array([[False, True]]))
    array([[0, 1]], dtype=uint8)
    """
    stored = read_stored_mask(source, name=name)
    name = _name(source, name)
    return stored.as_colours(name) if colours else stored.as_numbers(name)


def read_stored_mask(source: ImageSource, *, name: str | None = None) -> StoredMask:
    """Return a mask as it is stored, with its palette; see :func:`read_mask`.

    Raises:
        DataError: As in :func:`read_mask`, but colours are allowed.
    """
    name = _name(source, name)
    palette: tuple[int, ...] = ()
    form = ""
    if isinstance(source, Image.Image):
        _check_pixels(source.size, name)
        pixels = pixels_of(upright(source, name), name, as_stored=True)
        palette, form = palette_of(source), form_of(source.mode)
    elif isinstance(source, DrawnMask):
        _check_pixels(source.size[::-1], name)
        pixels = source.draw()
    elif isinstance(source, np.ndarray):
        pixels = source
    elif (opened := _open(source, name)) is None:
        pixels = read_npy(source, name)
    else:
        data, header = opened
        if isinstance(header, Tiff) and header.many:
            raise DataError(f"{name}: a TIFF of {header.many} channels as a mask; write one number or colour per pixel")
        if is_deep(header, data):
            pixels = decode_deep(data, name)
        elif isinstance(header, PngImageFile) and data[24] == 8 and data[25] == _PNG_GREY:
            pixels = decode_opencv(data, cv2.IMREAD_GRAYSCALE | cv2.IMREAD_IGNORE_ORIENTATION, name)
        else:
            pixels = pixels_of(header, name, as_stored=True, data=data)
        is_png = isinstance(header, PngImageFile)
        palette, form = palette_of(header), form_of(header.mode, data if is_png else b"")
        if isinstance(header, PngImageFile) and data[25] == 0 and data[24] in (2, 4):
            # Pillow spreads 2 and 4 bits of grey over 0..255; the file stores 0..3 and 0..15.
            pixels = pixels // (255 // (2 ** data[24] - 1))
        pixels = orient(pixels, orientation(header, name))
    if pixels.ndim in (2, 3):
        _check_pixels((pixels.shape[1], pixels.shape[0]), name)
    mask = plain_mask(pixels, name)
    alpha = int(pixels.flat[-1]) if form in ("LA", "RGBA") and pixels.dtype == np.uint8 and pixels.ndim == 3 else OPAQUE
    return StoredMask(mask, palette, form, alpha)


def image_size(source: ImageSource, *, name: str | None = None) -> tuple[int, int]:
    """Return height and width as :func:`read_image` would give them, from the header alone.

    Raises:
        DataError: The file is missing, or of a format that is not read here.

    >>> image_size(np.zeros((4, 6, 3), np.uint8))
    (4, 6)
    """
    name = _name(source, name)
    if isinstance(source, DrawnMask):
        return source.size
    if isinstance(source, np.ndarray) or (not isinstance(source, Image.Image) and _is_npy(source, name)):
        shape = source.shape if isinstance(source, np.ndarray) else npy_shape(source, name)
        if len(shape) not in (2, 3):
            raise DataError(f"{name}: an array of shape {shape}; pass (H, W) or (H, W, channels)")
        return shape[0], shape[1]
    if isinstance(source, Image.Image):
        turned = not isinstance(source, TiffImageFile) and source.getexif().get(_EXIF_ORIENTATION, 1) >= 5
        width, height = source.size
        return (width, height) if turned else (height, width)
    _check_plain_file(source, name)
    try:
        with open(source, "rb") as stream:
            header = open_header(stream, name)
            width, height = header.size
            return (width, height) if orientation(header, name) >= 5 else (height, width)
    except OSError as error:
        raise DataError(f"{name}: cannot be read ({error.strerror}); check its permissions and the disk") from error


def write_png(
    path: str | os.PathLike[str],
    array: NDArray[np.uint8] | NDArray[np.uint16],
    *,
    palette: Sequence[int] = (),
    form: str = "",
    alpha: int = OPAQUE,
) -> None:
    """Write uint8 ``(H, W)``, uint8 RGB ``(H, W, 3)`` or uint16 ``(H, W)`` as PNG, whole or not at all.

    The file is written beside its place under another name and renamed, so an interrupted program leaves no
    half file. Missing folders are created; an existing file is replaced.

    Args:
        path: Of the file.
        array: The pixels.
        palette: The packed colour of each index of a uint8 ``(H, W)`` array, for a palette image.
        form: Of :data:`semseg_automl.data.forms.FORMS`, for masks in another form than their array has; not with a
            palette.
        alpha: Of every pixel, in the forms that have it.

    Raises:
        DataError: The array has another shape or type, or the file cannot be written.
    """
    grey = array.ndim == 2 and array.dtype in (np.uint8, np.uint16)
    if array.size == 0 or not (grey or (array.ndim == 3 and array.shape[2] == 3 and array.dtype == np.uint8)):
        raise DataError(
            f"{path}: an array of {array.dtype} and shape {array.shape} cannot be written as PNG; "
            "pass uint8 (H, W) or (H, W, 3), or uint16 (H, W)"
        )
    if form:
        encoded = form_png(array, form, alpha, os.fspath(path))
    elif palette:
        encoded = palette_png(array, palette, os.fspath(path))
    else:
        ok, coded = cv2.imencode(".png", array if grey else np.ascontiguousarray(array[:, :, ::-1]))
        if not ok:
            raise DataError(f"{path}: OpenCV could not encode {array.dtype} of shape {array.shape} as PNG")
        encoded = coded.tobytes()
    target = Path(path)
    part = target.with_name(f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            part.write_bytes(encoded)
            os.replace(part, target)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror}); check the folder and its free space") from error


def _is_npy(path: str | os.PathLike[str], name: str) -> bool:
    _check_plain_file(path, name)
    try:
        with open(path, "rb") as stream:
            return stream.read(len(NPY_START)) == NPY_START
    except OSError as error:
        raise DataError(f"{name}: cannot be read ({error.strerror}); check its permissions and the disk") from error


def _name(source: ImageSource, name: str | None) -> str:
    if name is not None:
        missing = isinstance(source, (str, os.PathLike)) and os.fspath(source) not in name
        return f"{name}, {source}" if missing else name  # a row is named by its image, an error may be the mask's
    if isinstance(source, np.ndarray):
        return "array in memory"
    if isinstance(source, Image.Image):
        return "Pillow image in memory"
    if isinstance(source, DrawnMask):
        return source.name
    if isinstance(source, (str, os.PathLike)):
        return os.fspath(source)
    raise DataError(f"{type(source).__name__} is not an image; pass a path, a NumPy array or a Pillow image")


def _check_plain_file(path: str | os.PathLike[str], name: str) -> int:
    """Return the bytes of a file that can be opened, more than none."""
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
    return found.st_size


def _bytes_of(path: str | os.PathLike[str], name: str) -> bytes | None:
    """Return what is in a file; None for an .npy, which is read another way."""
    size = _check_plain_file(path, name)
    # Plain calls of the system, as few as can be: in each of them another thread takes Python's lock, and to get it
    # back takes longer than the call.
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        try:
            data = os.read(descriptor, min(size, _AT_ONCE))
        finally:
            os.close(descriptor)
        if data.startswith(NPY_START):
            return None
        return data if len(data) == size else Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"{name}: cannot be read ({error.strerror}); check its permissions and the disk") from error


def _open(path: str | os.PathLike[str], name: str) -> tuple[bytes, ImageFile] | None:
    """Read a file and its header, and check what can be checked before decoding; None for an .npy."""
    data = _bytes_of(path, name)
    if data is None:
        return None
    if data.startswith(completeness.PNG_START) and (flaw := completeness.png_flaw(data)):
        raise damaged(name, flaw)
    header = open_header(io.BytesIO(data), name)
    _check_pixels(header.size, name)
    if flaw := amount_flaw(header, data):
        raise damaged(name, flaw)
    return data, header


def _decoded(data: bytes, header: ImageFile, channels: Channels | None, name: str) -> NDArray[np.uint8]:
    """Return the pixels of an opened image as `read_image` does."""
    if isinstance(header, Tiff) and header.many:
        return _rgb(orient(decode_many(header, data, channels, name), orientation(header, name)), name)
    decode = decode_usual if channels is None else decode_all
    pixels = orient(decode(header, data, name), orientation(header, name))
    return _rgb(pixels if channels is None else choose(pixels, channels, name), name)


def _check_pixels(size: tuple[int, int], name: str) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise DataError(f"{name}: {height} x {width} pixels; an image needs at least one")
    if width * height > MAX_PIXELS:
        raise DataError(
            f"{name}: {height} x {width} pixels (height x width) are more than the {MAX_PIXELS:,} that are "
            "opened; cut the image into smaller ones"
        )


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
        elif pixels.ndim == 3 and 1 < shape[2] <= MAX_CHANNELS:
            raise choice_needed(shape[2], name)
        else:
            hint = "pass (H, W), (H, W, 3) or (H, W, 4); of more channels, behind, choose three with channels="
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
