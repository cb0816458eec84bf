"""Palettes of Pillow images, in and out.

Not here: files (:mod:`semseg_automl.data.images`).
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from semseg_automl.data.colours import pack, unpack
from semseg_automl.errors import DataError


def palette_of(image: Image.Image) -> tuple[int, ...]:
    """Return the packed colours of a decoded palette image; a bitmap counts as one of black and white."""
    if image.mode == "1":
        return 0x000000, 0xFFFFFF
    entries = image.getpalette("RGB") if image.mode in ("P", "PA") else None
    if not entries:
        return ()
    return tuple(pack(np.array(entries, np.uint8).reshape(1, -1, 3))[0].tolist())


def palette_png(array: NDArray[Any], palette: Sequence[int], path: str) -> bytes:
    """Return uint8 indices ``(H, W)`` as the bytes of a palette PNG.

    Args:
        array: The indices.
        palette: The packed colour of each index.
        path: What errors call the file.

    Raises:
        DataError: The array has another shape or type, or an index has no colour.
    """
    if array.ndim != 2 or array.dtype != np.uint8 or int(array.max()) >= len(palette) or len(palette) > 256:
        raise DataError(
            f"{path}: an array of {array.dtype} and shape {array.shape} with a palette of {len(palette)} colours; "
            "pass uint8 (H, W) and a colour for each index, at most 256"
        )
    image = Image.frombytes("P", (array.shape[1], array.shape[0]), array.tobytes())
    image.putpalette(unpack(palette).tobytes())
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()
