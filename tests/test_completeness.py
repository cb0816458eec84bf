"""Files that are too short or contradict themselves: refused with a reason, never filled with grey or black."""

from __future__ import annotations

import io
import struct
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from semseg_automl.data.completeness import exif_orientation, tiff_flaw
from semseg_automl.data.images import read_image, read_mask
from semseg_automl.errors import DataError


def noise(*shape: int) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def png(
    width: int,
    height: int,
    depth: int,
    colour: int,
    rows: bytes,
    *,
    interlaced: int = 0,
    chunks: dict[str, bytes] | None = None,
) -> bytes:
    """Write a PNG with right checksums; `chunks` come before the pixels."""
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced)
    extra = [(kind.encode(), body) for kind, body in (chunks or {}).items()]
    parts = [(b"IHDR", head), *extra, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    joined = (struct.pack(">I", len(b)) + k + b + struct.pack(">I", zlib.crc32(k + b)) for k, b in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(joined)


def jpeg(size: tuple[int, int], **options: Any) -> bytes:
    """Write a JPEG of 32 x 32 noisy pixels whose header says that it is of another height and width."""
    stream = io.BytesIO()
    Image.fromarray(noise(32, 32, 3)).save(stream, "JPEG", **options)
    data = bytearray(stream.getvalue())
    frame = max(data.find(b"\xff\xc0"), data.find(b"\xff\xc2"))
    data[frame + 5 : frame + 9] = struct.pack(">HH", *size)
    return bytes(data)


def tiff(array: NDArray[np.uint8], changed: dict[int, tuple[int, int, int]], **options: Any) -> bytes:
    """Write a TIFF and change type, count and value of some entries of its directory."""
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, "TIFF", **options)
    data = bytearray(stream.getvalue())
    (start,) = struct.unpack_from("<I", data, 4)
    (entries,) = struct.unpack_from("<H", data, start)
    for place in range(start + 2, start + 2 + 12 * entries, 12):
        (tag,) = struct.unpack_from("<H", data, place)
        if tag in changed:
            struct.pack_into("<HII", data, place + 2, *changed[tag])
    return bytes(data)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}])
def test_read_image__short_jpeg_of_huge_size__is_refused_before_it_is_decoded(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    (tmp_path / "a.jpg").write_bytes(jpeg((19_000, 20_000), **options))
    start = time.perf_counter()
    for read in (read_image, read_mask):
        with pytest.raises(DataError, match=r"a\.jpg: .* too few for a JPEG of 19000 x 20000 pixels"):
            read(tmp_path / "a.jpg")
    assert time.perf_counter() - start < 1  # decoding takes ten times as long


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"optimize": True}, {"quality": 1}])
def test_read_image__jpeg_of_one_colour__is_long_enough(tmp_path: Path, mode: str, options: dict[str, Any]) -> None:
    Image.new(mode, (1600, 1200)).save(tmp_path / "a.jpg", **options)
    assert read_image(tmp_path / "a.jpg").shape == (1200, 1600, 3)


@pytest.mark.parametrize(
    ("depth", "colour", "bits"), [(1, 0, 1), (2, 0, 2), (8, 0, 8), (8, 2, 24), (8, 4, 16), (8, 3, 8)]
)
def test_read_mask__png_with_whole_rows_missing__is_refused(
    tmp_path: Path, depth: int, colour: int, bits: int
) -> None:
    chunks = {"PLTE": bytes(range(6))} if colour == 3 else {}
    row = bytes(1 + -(-9 * bits // 8))
    (tmp_path / "whole.png").write_bytes(png(9, 10, depth, colour, 10 * row, chunks=chunks))
    assert read_mask(tmp_path / "whole.png").shape == (10, 9)
    (tmp_path / "short.png").write_bytes(png(9, 10, depth, colour, 7 * row, chunks=chunks))
    with pytest.raises(DataError, match=r"short\.png: .*fewer pixels than its header says"):
        read_mask(tmp_path / "short.png")


def test_read_image__palette_png_with_whole_rows_missing__is_refused(tmp_path: Path) -> None:
    (tmp_path / "short.png").write_bytes(png(9, 10, 8, 3, bytes(7 * 10), chunks={"PLTE": bytes(range(6))}))
    with pytest.raises(DataError, match="fewer pixels"):
        read_image(tmp_path / "short.png")


def test_read_image__transparency_behind_the_pixels__is_dropped_without_a_warning(tmp_path: Path) -> None:
    whole = png(9, 10, 8, 3, bytes(100), chunks={"PLTE": bytes([7, 8, 9, 1, 1, 1])})
    behind = b"tRNS\x00\x80"
    behind = struct.pack(">I", 2) + behind + struct.pack(">I", zlib.crc32(behind))
    (tmp_path / "a.png").write_bytes(whole[:-12] + behind + whole[-12:])
    assert read_image(tmp_path / "a.png")[9, 8].tolist() == [7, 8, 9]


def test_read_mask__interlaced_png__is_read_where_every_pass_is_there(tmp_path: Path) -> None:
    # 8 x 8: passes of 1x1, 1x1, 2x1, 2x2, 4x2, 4x4 and 8x4 pixels, each row with a byte for its filter.
    (tmp_path / "a.png").write_bytes(png(8, 8, 8, 0, bytes(2 + 2 + 3 + 6 + 10 + 20 + 36), interlaced=1))
    assert read_mask(tmp_path / "a.png").shape == (8, 8)
    (tmp_path / "b.png").write_bytes(png(8, 8, 8, 0, bytes(2 + 2 + 3 + 6 + 10 + 20), interlaced=1))
    with pytest.raises(DataError, match=r"b\.png: truncated or damaged"):
        read_mask(tmp_path / "b.png")
    (tmp_path / "c.png").write_bytes(png(1, 1, 8, 0, bytes(2), interlaced=1))  # passes without a column have no rows
    assert read_mask(tmp_path / "c.png").shape == (1, 1)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (png(2, 2, 8, 0, bytes(6), chunks={"acTL": bytes(8)}), "the animation of the PNG"),
        (png(2, 2, 8, 0, bytes(6), chunks={"IHDR": struct.pack(">IIBBBBB", 2, 1, 8, 0, 0, 0, 0)}), "two headers"),
        (b"\x89PNG\r\n\x1a\n" + bytes(4) + b"gAMA" + bytes(30), "does not begin with its header"),
    ],
)
@pytest.mark.parametrize("read", [read_image, read_mask])
def test_read__png_that_contradicts_itself__is_refused_without_a_warning(
    tmp_path: Path, read: Callable[[Path], Any], data: bytes, reason: str
) -> None:
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(DataError, match=rf"a\.png: .*{reason}"):
        read(tmp_path / "a.png")


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({258: (3, 3, 10**6)}, "entry 258 of the TIFF ends outside the file"),
        ({270: (2, 2**32 - 1, 8)}, "entry 270 of the TIFF ends outside the file"),
        ({259: (3, 2, 1)}, "entry 259 of the TIFF has 2 numbers"),
        ({257: (4, 1, 60)}, "the TIFF has 1 of 3 strips"),
    ],
)
@pytest.mark.parametrize("read", [read_image, read_mask])
def test_read__tiff_that_contradicts_itself__is_refused_without_a_warning(
    tmp_path: Path, read: Callable[[Path], Any], changed: dict[int, tuple[int, int, int]], reason: str
) -> None:
    whole = tiff(noise(24, 32, 3), {}, tiffinfo={270: "a longer description"})
    (tmp_path / "whole.tiff").write_bytes(whole)
    assert read_image(tmp_path / "whole.tiff").shape == (24, 32, 3)
    (tmp_path / "a.tiff").write_bytes(tiff(noise(24, 32, 3), changed, tiffinfo={270: "a longer description"}))
    with pytest.raises(DataError, match=rf"a\.tiff: .*{reason}"):
        read(tmp_path / "a.tiff")


def test_tiff_flaw__directories_in_a_ring_or_without_end__is_an_answer() -> None:
    ring = struct.pack("<2sHIHI", b"II", 42, 8, 0, 8)
    assert tiff_flaw(io.BytesIO(ring)) == ""
    chain = b"".join(struct.pack("<HI", 0, 8 + 6 * (page + 1)) for page in range(2000))
    assert "more than 1024 pages" in tiff_flaw(io.BytesIO(struct.pack("<2sHI", b"II", 42, 8) + chain))


@pytest.mark.parametrize("options", [{"big_tiff": True}, {"compression": "tiff_lzw"}, {"compression": "jpeg"}, {}])
def test_read_image__whole_tiff_of_every_kind__is_read(tmp_path: Path, options: dict[str, Any]) -> None:
    Image.fromarray(noise(70, 300, 3)).save(tmp_path / "a.tiff", **options)
    assert read_image(tmp_path / "a.tiff").shape == (70, 300, 3)
    Image.fromarray(noise(70, 300)).save(tmp_path / "b.tiff", strip_size=900, **options)
    assert read_image(tmp_path / "b.tiff").shape == (70, 300, 3)


@pytest.mark.parametrize("order", ["<", ">"])
def test_exif_orientation__block_of_either_order__is_read_or_damaged(order: str) -> None:
    start = b"II*\0" if order == "<" else b"MM\0*"
    block = start + struct.pack(f"{order}IHHHIHH", 8, 1, 0x0112, 3, 1, 6, 0) + bytes(4)
    assert exif_orientation(block) == exif_orientation(b"Exif\0\0" + block) == 6
    exif = Image.Exif()
    exif[0x0112] = 8
    exif[0x0110] = "a camera"
    assert exif_orientation(exif.tobytes()) == 8
    assert exif_orientation(block[:18]) is None
    assert exif_orientation(b"no exif at all") is None
    assert exif_orientation(start + struct.pack(f"{order}IH", 8, 0)) == 1
    assert exif_orientation(start + struct.pack(f"{order}IHHHIHH", 8, 1, 0x0112, 3, 1, 99, 0)) == 1


def test_read_image__exif_with_an_entry_outside__is_turned_without_a_warning(tmp_path: Path) -> None:
    entries = struct.pack(">HHIHH", 0x0112, 3, 1, 6, 0) + struct.pack(">HHII", 0x0131, 2, 400, 9000)
    exif = b"Exif\0\0MM\0*" + struct.pack(">IH", 8, 2) + entries + bytes(4)
    Image.fromarray(noise(8, 12, 3)).save(tmp_path / "a.jpg", exif=exif)
    assert read_image(tmp_path / "a.jpg").shape == (12, 8, 3)
    data = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "camera.jpg").write_bytes(data[:2] + data[20:])  # cameras write EXIF alone, without JFIF before it
    assert read_image(tmp_path / "camera.jpg").shape == (12, 8, 3)


def test_read_image__large_tiff_where_warnings_are_errors__is_refused_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.fromarray(noise(8, 12, 3)).save(tmp_path / "a.tiff")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 90)
    with pytest.raises(DataError, match=r"a\.tiff: .*raise PIL\.Image\.MAX_IMAGE_PIXELS"):
        read_image(tmp_path / "a.tiff")
