"""Images and masks in NumPy's ``.npy`` files: plain numbers only, checked against the header before they are read.

The header is matched against what ``np.save`` writes for plain numbers, not evaluated as NumPy's own reader does, which
raises errors of many kinds, and warnings, on damaged ones. Format: numpy.lib.format, versions 1.0 and 2.0.

Not here: what an array's shape and type may be (:mod:`semseg_automl.data.images`).
"""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from semseg_automl.data.channels import MAX_CHANNELS
from semseg_automl.errors import DataError

NPY_START = b"\x93NUMPY"
"""The first bytes of every ``.npy`` file."""

NPY_SUFFIX = ".npy"

_HEADER = re.compile(
    rb"\{'descr': '([<>|](?:b1|[ui][1248]|f[248]))', 'fortran_order': (True|False), "
    rb"'shape': \(((?:\d{1,12}, ?){0,4}\d{0,12})\), \} *\n"
)
_LENGTH_BYTES = {b"\x01\x00": 2, b"\x02\x00": 4}
_MAX_HEADER = 2**16


@dataclass(frozen=True)
class _Header:
    dtype: np.dtype[Any]
    fortran_order: bool
    shape: tuple[int, ...]


def npy_shape(path: str | os.PathLike[str], name: str) -> tuple[int, ...]:
    """Return the shape of the array in a file, from the header alone.

    Raises:
        DataError: The header is damaged, the array holds no plain numbers, or the file is shorter than it says.
    """
    try:
        with open(path, "rb") as stream:
            return _header(stream, name).shape
    except OSError as error:
        raise DataError(f"{name}: cannot be read ({error.strerror}); check its permissions and the disk") from error


def holds_image(path: str | os.PathLike[str]) -> bool:
    """Whether a file's header is an image's: uint8 or uint16, ``(H, W)`` or with 1 to 64 channels behind."""
    try:
        with open(path, "rb") as stream:
            if stream.read(len(NPY_START)) != NPY_START:
                return False
            stream.seek(0)
            header = _stated(stream, os.fspath(path))
    except (OSError, DataError):
        return False
    if header.dtype.newbyteorder("=") not in (np.uint8, np.uint16):
        return False
    return len(header.shape) == 2 or (len(header.shape) == 3 and 0 < header.shape[2] <= MAX_CHANNELS)


def read_npy(path: str | os.PathLike[str], name: str) -> NDArray[Any]:
    """Return the array in a file, which is no larger than the file itself.

    Raises:
        DataError: As in :func:`npy_shape`.
    """
    try:
        with open(path, "rb") as stream:
            header = _header(stream, name)
            flat = np.fromfile(stream, dtype=header.dtype, count=math.prod(header.shape))
    except OSError as error:
        raise DataError(f"{name}: cannot be read ({error.strerror}); check its permissions and the disk") from error
    array = flat.reshape(header.shape, order="F" if header.fortran_order else "C")
    return array.astype(header.dtype.newbyteorder("="), copy=False)


def _stated(stream: BinaryIO, name: str) -> _Header:
    """Read the header and leave `stream` at the first number."""
    stream.read(len(NPY_START))
    length = int.from_bytes(stream.read(_LENGTH_BYTES.get(stream.read(2), 0)), "little")
    found = _HEADER.fullmatch(stream.read(min(length, _MAX_HEADER)))
    if found is None:
        raise DataError(
            f"{name}: a NumPy file whose header is damaged or not one of plain numbers; save whole numbers or bools "
            "with np.save"
        )
    shape = tuple(int(part) for part in found[3].split(b",") if part.strip())
    return _Header(np.dtype(found[1].decode()), found[2] == b"True", shape)


def _header(stream: BinaryIO, name: str) -> _Header:
    """Read the header, leave `stream` at the first number, and check that the file has them all."""
    header = _stated(stream, name)
    shape, dtype = header.shape, header.dtype
    promised = stream.tell() + math.prod(shape) * dtype.itemsize
    size = os.fstat(stream.fileno()).st_size
    if size < promised:
        raise DataError(
            f"{name}: truncated: shape {shape} of {dtype} takes {promised:,} bytes, the file has {size:,}; "
            "copy the file again or remove the row"
        )
    return header
