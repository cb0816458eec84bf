"""The only reader and writer of image files: pixels in, pixels out, or an error that names the file.

Only JPEG, PNG, BMP, TIFF, WebP and NumPy's .npy are opened. Pillow reads the header, so a size is known and checked
before anything is decoded; the common kinds of JPEG and PNG are then decoded by OpenCV, which is faster, the others by
Pillow. What decoders would fill with grey or black without a word is found before
(:mod:`semseg_automl.data.completeness`).

Not here: formats and headers (:mod:`semseg_automl.data.headers`), what mask values mean (:mod:`semseg_automl.task`),
resizing (:mod:`semseg_automl.data.transforms`), how masks store classes (:mod:`semseg_automl.data.encodings`), tables
(:mod:`semseg_automl.data.table`).
"""

from __future__ import annotations

import io
import os
import secrets
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile

from semseg_automl.data import completeness
from semseg_automl.data.drawn import DrawnMask
from semseg_automl.data.encodings import StoredMask, plain_mask
from semseg_automl.data.headers import DAMAGE, amount_flaw, damaged, open_header, orientation
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
_TIFF_BITS_PER_SAMPLE = 258


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
    if isinstance(source, DrawnMask):
        raise DataError(f"{name}: a mask drawn from annotations where an image is expected; check image= and label=")
    if isinstance(source, np.ndarray):
        return _rgb(source, name)
    if not isinstance(source, Image.Image) and _is_npy(source, name):
        return _rgb(read_npy(source, name), name)
    if isinstance(source, Image.Image):
        _check_pixels(source.size, name)
        return _rgb(_pixels_of(_upright(source, name), name, as_stored=False), name)
    data, header = _open(source, name)
    return _rgb(_orient(_decode(header, data, name), orientation(header, name)), name)


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
    if isinstance(source, Image.Image):
        _check_pixels(source.size, name)
        pixels = _pixels_of(_upright(source, name), name, as_stored=True)
        palette = palette_of(source)
    elif isinstance(source, DrawnMask):
        _check_pixels(source.size[::-1], name)
        pixels = source.draw()
    elif isinstance(source, np.ndarray) or _is_npy(source, name):
        pixels = source if isinstance(source, np.ndarray) else read_npy(source, name)
    else:
        data, header = _open(source, name)
        deep = _is_deep(header, data)
        pixels = _decode_deep(data, name) if deep else _pixels_of(header, name, as_stored=True, data=data)
        palette = palette_of(header)
        if isinstance(header, PngImageFile) and data[25] == 0 and data[24] in (2, 4):
            # Pillow spreads 2 and 4 bits of grey over 0..255; the file stores 0..3 and 0..15.
            pixels = pixels // (255 // (2 ** data[24] - 1))
        pixels = _orient(pixels, orientation(header, name))
    if pixels.ndim in (2, 3):
        _check_pixels((pixels.shape[1], pixels.shape[0]), name)
    return StoredMask(plain_mask(pixels, name), palette)


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
    path: str | os.PathLike[str], array: NDArray[np.uint8] | NDArray[np.uint16], *, palette: Sequence[int] = ()
) -> None:
    """Write uint8 ``(H, W)``, uint8 RGB ``(H, W, 3)`` or uint16 ``(H, W)`` as PNG, whole or not at all.

    The file is written beside its place under another name and renamed, so an interrupted program leaves no
    half file. Missing folders are created; an existing file is replaced.

    Args:
        path: Of the file.
        array: The pixels.
        palette: The packed colour of each index of a uint8 ``(H, W)`` array, for a palette image.

    Raises:
        DataError: The array has another shape or type, or the file cannot be written.
    """
    grey = array.ndim == 2 and array.dtype in (np.uint8, np.uint16)
    if array.size == 0 or not (grey or (array.ndim == 3 and array.shape[2] == 3 and array.dtype == np.uint8)):
        raise DataError(
            f"{path}: an array of {array.dtype} and shape {array.shape} cannot be written as PNG; "
            "pass uint8 (H, W) or (H, W, 3), or uint16 (H, W)"
        )
    if palette:
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
    if data.startswith(completeness.PNG_START) and (flaw := completeness.png_flaw(data)):
        raise damaged(name, flaw)
    header = open_header(io.BytesIO(data), name)
    _check_pixels(header.size, name)
    if flaw := amount_flaw(header, data):
        raise damaged(name, flaw)
    return data, header


def _check_pixels(size: tuple[int, int], name: str) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise DataError(f"{name}: {height} x {width} pixels; an image needs at least one")
    if width * height > MAX_PIXELS:
        raise DataError(
            f"{name}: {height} x {width} pixels (height x width) are more than the {MAX_PIXELS:,} that are "
            "opened; cut the image into smaller ones"
        )


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
    return _pixels_of(header, name, as_stored=False, data=data)


def _opencv(data: bytes, flags: int, name: str) -> NDArray[Any]:
    try:
        pixels = cv2.imdecode(np.frombuffer(data, dtype=np.uint8), flags)
    except cv2.error as error:
        raise damaged(name, error) from error
    if pixels is None:
        raise damaged(name, "OpenCV could not decode it")
    return pixels


def _pixels_of(image: Image.Image, name: str, *, as_stored: bool, data: bytes = b"") -> NDArray[Any]:
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


def _upright(image: Image.Image, name: str) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except DAMAGE as error:
        raise damaged(name, error) from error


def _orient(pixels: NDArray[Any], turned: int) -> NDArray[Any]:
    """Undo an EXIF orientation (CIPA DC-008, 4.6.4): 5 to 8 are mirrored along the diagonal as well."""
    if turned >= 5:
        pixels = pixels.swapaxes(0, 1)
    if turned in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if turned in (2, 3, 6, 7):
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
