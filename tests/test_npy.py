"""NumPy files as images and masks: read like arrays in memory, and refused before anything large is done."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from semseg_automl.data.images import image_size, read_image, read_mask
from semseg_automl.errors import DataError

PLAIN = "a NumPy file whose header is damaged or not one of plain numbers; save whole numbers or bools"


@pytest.mark.parametrize(
    "array",
    [
        np.arange(24, dtype=np.uint8).reshape(4, 6),
        np.asfortranarray(np.arange(24, dtype=np.int64).reshape(4, 6) * 1000 - 1),
        np.arange(24, dtype=">u2").reshape(4, 6),
        np.eye(4, 6, dtype=bool),
        np.arange(24, dtype=np.float32).reshape(4, 6),
    ],
)
def test_read_mask__npy_file__equals_the_array(tmp_path: Path, array: Any) -> None:
    np.save(tmp_path / "a.npy", array)
    assert np.array_equal(read_mask(tmp_path / "a.npy"), array)
    assert read_mask(tmp_path / "a.npy").dtype == read_mask(np.asarray(array)).dtype
    assert image_size(tmp_path / "a.npy") == (4, 6)


def test_read_image__npy_file_whatever_its_suffix__equals_the_array(tmp_path: Path) -> None:
    for array in (np.arange(72, dtype=np.uint8).reshape(4, 6, 3), np.arange(24, dtype=np.uint16).reshape(4, 6) * 2000):
        with open(tmp_path / "image.png", "wb") as stream:
            np.save(stream, array)
        assert np.array_equal(read_image(tmp_path / "image.png"), read_image(array))
        assert image_size(str(tmp_path / "image.png")) == (4, 6)


def header(shape: str, descr: str = "'|u1'") -> bytes:
    """Return the head of a file that promises `shape`."""
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (header("(4, 6)") + bytes(23), r"truncated: shape \(4, 6\) of uint8 takes \d+ bytes, the file has"),
        (header("(1000000, 1000000)"), r"truncated: shape \(1000000, 1000000\)"),
        (header("(24,)") + bytes(24), r".*shape \(24,\)"),
        (header("()") + bytes(24), r".*shape \(\)"),
        (header("(10**5, 10**5)"), PLAIN),
        (header("(-4, -6)") + bytes(24), PLAIN),
        (header("(4, 6)", "'|O'") + bytes(400), PLAIN),
        (header("(4,)", "'<U3'") + bytes(400), PLAIN),
        (header("(4, 6)", "'|i3'") + bytes(400), PLAIN),
        (header("(4, 6)", "[('a', '<i4')]") + bytes(400), PLAIN),
        (b"\x93NUMPY\x01\x00\xff\xff{", PLAIN),
        (b"\x93NUMPY\x09\x00", PLAIN),
        (b"\x93NUMPY", PLAIN),
    ],
)
def test_read__npy_file_that_is_no_picture__says_what_it_is(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "bad.npy").write_bytes(data)
    for read in (read_mask, read_image, image_size):
        with pytest.raises(DataError, match=rf"bad\.npy: {message}"):
            read(tmp_path / "bad.npy")


def test_read_mask__npy_file_of_pickles__runs_nothing(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([[{"a": 1}]], dtype=object))
    with pytest.raises(DataError, match=PLAIN):
        read_mask(tmp_path / "a.npy")
