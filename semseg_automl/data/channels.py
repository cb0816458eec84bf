"""Which channels of an image are looked at, and TIFF files of more channels than colours take.

Pillow and OpenCV open TIFF of four channels at most. A TIFF of more is given to them as a grey one: its channels lie
either side by side, pixel by pixel, so that it is a grey image so many times as wide, or one behind the other, each a
grey image of its own (TIFF 6.0, section 7, PlanarConfiguration).

Not here: files (:mod:`semseg_automl.data.images`), headers (:mod:`semseg_automl.data.headers`).
"""

from __future__ import annotations

import io
import struct
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL.TiffImagePlugin import ImageFileDirectory_v2, TiffImageFile

from semseg_automl.errors import ConfigError, DataError

Channels: TypeAlias = tuple[int, ...]
"""Three channels, taken as red, green and blue, or one, taken as grey; counted from 0."""

MAX_CHANNELS = 64
"""Arrays and files of more are refused: their last side is rather a width."""

MAX_VALUES = 1_200_000_000
"""Of all channels of one image together; as many as the largest image of three channels has."""

_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC, _FILL_ORDER = 256, 257, 258, 259, 262, 266
_STRIPS, _SAMPLES, _ROWS, _STRIP_BYTES, _PLANAR, _PREDICTOR = 273, 277, 278, 279, 284, 317
_TILE_WIDTH, _TILE_HEIGHT, _TILES, _TILE_BYTES, _FORMAT = 322, 323, 324, 325, 339
_CHUNKY, _PLANES = 1, 2
_DIFFERENCES = 2
# Every other number of a directory fits 16 bits (TIFF 6.0, section 8); the decoders insist on it for some.
_LONG = frozenset({_WIDTH, _HEIGHT, _STRIPS, _ROWS, _STRIP_BYTES, _TILE_WIDTH, _TILE_HEIGHT, _TILES, _TILE_BYTES})
_ENTRY = 12
_BLACK_IS_ZERO = 1
_GREYS = (0, 1)
# None, LZW, deflate, PackBits, deflate under its older number, LZMA, Zstandard: they know nothing of channels.
_COMPRESSIONS = frozenset({1, 5, 8, 32773, 32946, 34925, 50000})


class Tiff(TiffImageFile):
    """A TIFF, whose header is also opened where Pillow knows no mode for its channels."""

    many: int = 0
    """The channels of a TIFF that only :func:`read_channels` reads; 0 for one that Pillow reads."""

    def _setup(self) -> None:
        self.many = 0
        tags = self.tag_v2
        samples, photometric = tags.get(_SAMPLES, 1), tags.get(_PHOTOMETRIC, 0)
        if not (isinstance(samples, int) and (samples > 4 or (samples in (3, 4) and photometric in _GREYS))):
            super()._setup()
            return
        width, height = tags.get(_WIDTH), tags.get(_HEIGHT)
        if not isinstance(width, int) or not isinstance(height, int):
            raise SyntaxError("a TIFF without its sides")
        self._mode = "L"
        self._size = width, height
        self.tile = []
        self.many = samples


def as_channels(asked: Sequence[int] | None) -> Channels | None:
    """Check the channels that a user asks for.

    Raises:
        ConfigError: They are not three whole numbers from 0 on, nor one.

    >>> as_channels([2, 1, 0])
    (2, 1, 0)
    """
    if asked is None:
        return None
    plain = isinstance(asked, (list, tuple)) and all(type(index) is int for index in asked)
    if not plain or len(asked) not in (1, 3) or not all(0 <= index < MAX_CHANNELS for index in asked):
        raise ConfigError(
            f"channels is {asked!r}; give three whole numbers from 0 to {MAX_CHANNELS - 1}, such as (2, 1, 0), to be "
            "taken as red, green and blue, or one, such as (0,), for grey."
        )
    return tuple(asked)


def choose(pixels: NDArray[Any], channels: Channels, name: str) -> NDArray[Any]:
    """Return the chosen channels ``(H, W, len(channels))`` of an image ``(H, W)`` or ``(H, W, C)``.

    Raises:
        DataError: It has another shape, or too few channels.
    """
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    if pixels.ndim != 3 or pixels.shape[2] > MAX_CHANNELS:
        raise DataError(
            f"{name}: an image of shape {pixels.shape}, of which channels {list(channels)} are to be taken; pass "
            f"(H, W) or (H, W, channels) with at most {MAX_CHANNELS}, so array.transpose(1, 2, 0) of channels first"
        )
    check_enough(channels, pixels.shape[2], name)
    return np.ascontiguousarray(pixels[:, :, list(channels)])


def check_enough(channels: Channels, there: int, name: str) -> None:
    """Refuse an image that has not all of the channels.

    Raises:
        DataError: It has too few.
    """
    if max(channels) >= there:
        has = "1 channel, number 0" if there == 1 else f"{there} channels, numbers 0 to {there - 1}"
        raise DataError(
            f"{name}: channels={list(channels)}, but the image has {has}; choose among these with channels=, and give "
            "all images the same"
        )


def choice_needed(there: int, name: str) -> DataError:
    """Return the error for an image of which nobody said which channels are colours."""
    return DataError(
        f"{name}: an image of {there} channels; choose three, or one, with channels=, such as channels=(2, 1, 0): they "
        f"are counted from 0, up to {there - 1} here"
    )


def read_channels(header: Tiff, data: bytes, channels: Channels, name: str) -> NDArray[Any]:
    """Return the chosen channels ``(H, W, len(channels))`` of a TIFF of many, unturned.

    Args:
        header: Of the file.
        data: The file.
        channels: Numbers that the file has.
        name: What errors call the file.

    Raises:
        DataError: The file has too few channels, or stores them in a way that is not read.
        SyntaxError, OSError, ValueError, struct.error: The file is damaged; see :mod:`semseg_automl.data.headers`.
    """
    tags = header.tag_v2
    check_enough(channels, header.many, name)
    width, height = tags[_WIDTH], tags[_HEIGHT]
    _check_layout(tags, header.many, width * height * header.many, name)
    if tags.get(_PLANAR, _CHUNKY) == _PLANES:
        planes = {channel: _grey(tags, data, 1, _parts_of(tags, channel, header.many)) for channel in set(channels)}
        return np.stack([planes[channel] for channel in channels], axis=2)
    wide = _grey(tags, data, header.many, {})
    pixels = wide.reshape(height, width, header.many)
    if tags.get(_PREDICTOR, 1) == _DIFFERENCES:
        step = tags.get(_TILE_WIDTH, width) if _TILES in tags else width
        chosen = pixels[:, :, list(channels)]
        for left in range(0, width, step):
            part = chosen[:, left : left + step]
            np.cumsum(part, axis=1, dtype=part.dtype, out=part)
        return chosen
    return pixels[:, :, list(channels)]


def _check_layout(tags: ImageFileDirectory_v2, samples: int, values: int, name: str) -> None:
    """Refuse what is not read: other numbers than 8 or 16 bits without a sign, compressions that know colours."""
    bits, signs = set(_listed(tags.get(_BITS, 1))), set(_listed(tags.get(_FORMAT, 1)))
    if bits not in ({8}, {16}) or signs != {1}:
        raise DataError(
            f"{name}: a TIFF of {samples} channels of {sorted(bits)} bits and sample format {sorted(signs)}; only "
            "whole numbers without a sign, of 8 or 16 bits, are read: scale and convert them"
        )
    compression, predictor = tags.get(_COMPRESSION, 1), tags.get(_PREDICTOR, 1)
    if compression not in _COMPRESSIONS or predictor not in (1, _DIFFERENCES):
        raise DataError(
            f"{name}: a TIFF of {samples} channels with compression {compression} and predictor {predictor}; write it "
            "without compression, or with LZW or deflate"
        )
    if values > MAX_VALUES or samples > MAX_CHANNELS:
        raise DataError(
            f"{name}: a TIFF of {samples} channels and {values:,} numbers; at most {MAX_CHANNELS} channels and "
            f"{MAX_VALUES:,} numbers are opened: cut the image into smaller ones"
        )


def _parts_of(tags: ImageFileDirectory_v2, plane: int, planes: int) -> dict[int, tuple[int, ...]]:
    """Return where the strips or tiles of one plane are."""
    found = {}
    for tag in (_STRIPS, _STRIP_BYTES, _TILES, _TILE_BYTES):
        if tag in tags:
            places = _listed(tags[tag])
            each = len(places) // planes
            found[tag] = places[plane * each : (plane + 1) * each]
    return found


def _grey(tags: ImageFileDirectory_v2, data: bytes, times: int, places: dict[int, tuple[int, ...]]) -> NDArray[Any]:
    """Decode the strips or tiles of a TIFF as those of a grey one that is `times` as wide, differences left alone."""
    start = b"II*\0" if data[:2] == b"II" else b"MM\0*"
    kept = (*_LONG, _COMPRESSION, _FILL_ORDER, *([_PREDICTOR] if times == 1 else []))
    grey = {tag: places.get(tag, _listed(tags[tag])) for tag in kept if tag in tags}
    grey |= {tag: (grey[tag][0] * times,) for tag in (_WIDTH, _TILE_WIDTH) if tag in grey}
    grey |= {_BITS: _listed(tags[_BITS])[:1], _SAMPLES: (1,), _PHOTOMETRIC: (_BLACK_IS_ZERO,)}
    # The directory goes behind the file, and its place into the first eight bytes, of a BigTIFF's sixteen too.
    order = "<" if data[:2] == b"II" else ">"
    place = len(data) + len(data) % 2
    head = start + struct.pack(f"{order}I", place)
    stream = io.BytesIO(head + data[8:] + bytes(place - len(data)) + _directory(grey, place, order))
    with TiffImageFile(stream) as image:
        pixels = np.asarray(image)
    return pixels.astype(pixels.dtype.newbyteorder("="))


def _directory(tags: Mapping[int, tuple[int, ...]], place: int, order: str) -> bytes:
    """Return a directory of numbers (TIFF 6.0, section 2) that is to stand at `place`."""
    entries, beside = b"", b""
    behind = place + 2 + _ENTRY * len(tags) + 4
    for tag, values in sorted(tags.items()):
        kind, unit = (4, "I") if tag in _LONG else (3, "H")
        packed = struct.pack(f"{order}{len(values)}{unit}", *values)
        if len(packed) > 4:
            packed, beside = struct.pack(f"{order}I", behind + len(beside)), beside + packed
        entries += struct.pack(f"{order}HHI", tag, kind, len(values)) + packed.ljust(4, b"\0")
    return struct.pack(f"{order}H", len(tags)) + entries + bytes(4) + beside


def _listed(value: Any) -> tuple[int, ...]:
    return value if isinstance(value, tuple) else (value,)
