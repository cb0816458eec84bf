"""Reading and writing image files: every kind that is read, and an error by name for every kind that is not."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from semseg_automl.data import images
from semseg_automl.data.images import image_size, read_image, read_mask, write_png
from semseg_automl.errors import DataError


def picture(height: int = 40, width: int = 60) -> NDArray[np.uint8]:
    """A smooth picture that survives JPEG, different in every corner and channel."""
    y, x = np.mgrid[0:height, 0:width]
    channels = (4 * x, 255 - 5 * y, (x + y) * 2)
    return np.stack([np.clip(c, 0, 255) for c in channels], axis=-1).astype(np.uint8)


def saved(array: NDArray[Any], path: Path, **options: Any) -> Path:
    Image.fromarray(array).save(path, **options)
    return path


def raw_png(width: int, height: int, depth: int, colour_type: int, rows: bytes, *, chunks: bytes = b"") -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunks + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize("suffix", ["png", "bmp", "tiff", "webp", "jpg"])
def test_read_image__every_format__gives_the_picture(tmp_path: Path, suffix: str) -> None:
    lossless: dict[str, dict[str, Any]] = {"webp": {"lossless": True}, "jpg": {"quality": 100, "subsampling": 0}}
    path = saved(picture(), tmp_path / f"a.{suffix}", **lossless.get(suffix, {}))
    read = read_image(path)
    assert read.dtype == np.uint8
    assert read.flags.c_contiguous
    assert np.abs(read.astype(int) - picture()).max() <= (3 if suffix == "jpg" else 0)
    assert image_size(path) == (40, 60)


def test_read_image__wrong_suffix__goes_by_the_content(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    write_png(tmp_path / "a.png", picture())
    (tmp_path / "a.png").rename(path)
    assert np.array_equal(read_image(path), picture())


@pytest.mark.parametrize("mode", ["L", "1", "LA", "RGBA", "P", "CMYK"])
def test_read_image__other_modes__match_pillows_rgb(tmp_path: Path, mode: str) -> None:
    source = Image.fromarray(picture()).convert(mode)
    suffix = "tiff" if mode == "CMYK" else "png"
    source.save(tmp_path / f"a.{suffix}")
    assert np.array_equal(read_image(tmp_path / f"a.{suffix}"), np.asarray(source.convert("RGB")))


def test_read_image__alpha__is_dropped_not_blended(tmp_path: Path) -> None:
    rgba = np.dstack([picture(), np.zeros((40, 60), np.uint8)])
    path = saved(rgba, tmp_path / "a.png")
    assert np.array_equal(read_image(path), picture())
    assert np.array_equal(read_image(rgba), picture())


def test_read_image__palette_with_transparency__gives_its_colours_without_warning(tmp_path: Path) -> None:
    source = Image.fromarray(np.array([[0, 1], [1, 2]], np.uint8), mode=None).convert("P")
    source.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    source.info["transparency"] = b"\x00\x80\xff"
    source.save(tmp_path / "a.png", transparency=b"\x00\x80\xff")
    assert read_image(tmp_path / "a.png")[0].tolist() == [[10, 20, 30], [40, 50, 60]]


@pytest.mark.parametrize("suffix", [".png", ".tiff"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_read_image__sixteen_bits__are_divided_by_257(tmp_path: Path, suffix: str, channels: int) -> None:
    rng = np.random.default_rng(0)
    deep = rng.integers(0, 65536, (8, 9, channels), dtype=np.uint16)
    deep[0, 0], deep[0, 1] = 0, 65535
    bgr = deep if channels == 1 else deep[:, :, [2, 1, 0, 3][:channels]]
    path = tmp_path / f"a{suffix}"
    path.write_bytes(cv2.imencode(suffix, bgr)[1].tobytes())
    expected = np.rint(deep[:, :, :3] / 257).astype(np.uint8)
    assert np.array_equal(read_image(path), np.broadcast_to(expected, (8, 9, 3)))
    assert np.array_equal(read_image(deep), read_image(path))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff"])
def test_read_image__exif_orientation__is_upright(tmp_path: Path, suffix: str, orientation: int) -> None:
    stored = {
        1: picture(),
        2: picture()[:, ::-1],
        3: picture()[::-1, ::-1],
        4: picture()[::-1],
        5: picture().transpose(1, 0, 2),
        6: np.rot90(picture(), 1),  # the camera was turned: the viewer has to turn clockwise
        7: np.rot90(picture(), 2).transpose(1, 0, 2),
        8: np.rot90(picture(), -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options: dict[str, Any] = {"tiffinfo": {0x0112: orientation}} if suffix == "tiff" else {"exif": exif}
    sharp: dict[str, dict[str, Any]] = {"jpg": {"quality": 100, "subsampling": 0}, "webp": {"lossless": True}}
    options |= sharp.get(suffix, {})
    path = saved(np.ascontiguousarray(stored), tmp_path / f"a.{suffix}", **options)
    assert image_size(path) == (40, 60)
    read = read_image(path)
    assert read.shape == (40, 60, 3)
    assert np.abs(read.astype(int) - picture()).max() <= 3
    with Image.open(path) as opened:
        assert image_size(opened) == (40, 60)
        assert np.abs(read_image(opened).astype(int) - picture()).max() <= 3
        assert image_size(opened) == (40, 60)


def test_read_image__damaged_exif__warns_by_name(tmp_path: Path) -> None:
    path = saved(picture(), tmp_path / "a.jpg", exif=b"Exif\x00\x00no exif at all")
    with pytest.warns(UserWarning, match=r"a\.jpg: its EXIF block is damaged"):
        assert read_image(path).shape == (40, 60, 3)


@pytest.mark.parametrize(
    ("suffix", "options"),
    [
        ("jpg", {}),
        ("jpg", {"progressive": True}),
        ("jpg", {"exif_thumbnail": True}),
        ("png", {}),
        ("bmp", {}),
        ("tiff", {}),
        ("tiff", {"compression": "tiff_lzw"}),
        ("webp", {}),
    ],
)
def test_read_image__truncated_anywhere__raises(tmp_path: Path, suffix: str, options: dict[str, Any]) -> None:
    rng = np.random.default_rng(0)
    noisy = rng.integers(0, 256, (50, 60, 3), dtype=np.uint8)
    if options.pop("exif_thumbnail", False):
        thumbnail = io.BytesIO()
        Image.fromarray(picture(8, 8)).save(thumbnail, "JPEG")
        options["exif"] = b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\x00\x00" + thumbnail.getvalue()
    data = saved(noisy, tmp_path / f"whole.{suffix}", **options).read_bytes()
    path = tmp_path / f"cut.{suffix}"
    for length in [*range(1, 60, 7), *np.linspace(60, len(data) - 2, 25).astype(int)]:
        path.write_bytes(data[:length])
        with pytest.raises(DataError, match=r"cut\.") as caught:
            read_image(path)
        assert "remove the row" in str(caught.value) or "allowed are" in str(caught.value)


@pytest.mark.parametrize("suffix", [".png", ".tiff"])
def test_read_image__truncated_sixteen_bits__raises(tmp_path: Path, suffix: str) -> None:
    deep = np.random.default_rng(0).integers(0, 65536, (50, 60, 3), dtype=np.uint16)
    data = cv2.imencode(suffix, deep)[1].tobytes()
    path = tmp_path / f"cut{suffix}"
    for share in (0.1, 0.3, 0.5, 0.7, 0.9, 0.95):
        path.write_bytes(data[: int(len(data) * share)])
        with pytest.raises(DataError, match="cut"):
            read_image(path)


def test_read_image__flipped_bit_in_png__raises(tmp_path: Path) -> None:
    data = bytearray(saved(picture(), tmp_path / "a.png").read_bytes())
    data[len(data) // 2] ^= 4
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(DataError, match=r"a\.png: truncated or damaged \(a checksum"):
        read_image(tmp_path / "a.png")


def test_read_image__png_with_too_few_rows__raises(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(raw_png(100, 100, 8, 0, bytes(5000)))
    with pytest.raises(DataError, match="truncated or damaged"):
        read_image(tmp_path / "a.png")
    with pytest.raises(DataError, match="truncated or damaged"):
        read_mask(tmp_path / "a.png")


def test_read_image__jpeg_with_bytes_after_the_end__is_read(tmp_path: Path) -> None:
    data = saved(picture(), tmp_path / "a.jpg").read_bytes()
    (tmp_path / "b.jpg").write_bytes(data + b"appended by a phone")
    assert np.array_equal(read_image(tmp_path / "b.jpg"), read_image(tmp_path / "a.jpg"))


@pytest.mark.parametrize("read", [read_image, read_mask, image_size])
def test_read__file_that_is_no_image__says_what_it_is(tmp_path: Path, read: Any) -> None:
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "folder.png").mkdir()
    saved(picture(), tmp_path / "a.gif")
    for name, message in {
        "missing.png": r"missing\.png: no such file; check the path, and base_dir=",
        "empty.png": r"empty\.png: is empty \(0 bytes\)",
        "text.png": r"text\.png: not an image that is read here.*allowed are JPEG, PNG, BMP, TIFF, WebP and .npy",
        "folder.png": r"folder\.png: is a folder",
        "a.gif": r"a\.gif: not an image that is read here",
        "nul\0.png": r"cannot be opened",
    }.items():
        with pytest.raises(DataError, match=message):
            read(tmp_path / name)


def test_read_image__file_longer_than_is_read_at_once__is_read_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3)).astype(np.uint8)
    write_png(tmp_path / "a.png", pixels)
    monkeypatch.setattr(images, "_AT_ONCE", 100)
    assert np.array_equal(read_image(tmp_path / "a.png"), pixels)


def test_read_image__name_given__stands_first_and_the_path_is_kept(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^row 7 \(x\.jpg\), .*gone\.png: no such file"):
        read_mask(tmp_path / "gone.png", name="row 7 (x.jpg)")
    path = str(tmp_path / "gone.png")
    with pytest.raises(DataError) as caught:
        read_image(path, name=f"row 7 ({path})")
    assert str(caught.value).startswith(f"row 7 ({path}): no such file")


def test_read_image__too_many_pixels__is_refused_from_the_header(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bomb.png").write_bytes(raw_png(100_000, 100_000, 8, 0, b""))
    with pytest.raises(DataError, match=r"bomb\.png: 100000 x 100000 pixels .* more than the 400,000,000"):
        read_image(tmp_path / "bomb.png")
    monkeypatch.setattr(images, "MAX_PIXELS", 2399)
    for source in (saved(picture(), tmp_path / "a.png"), picture(), Image.fromarray(picture())):
        with pytest.raises(DataError, match="more than the 2,399"):
            read_image(source)


def test_read_image__more_pixels_than_pillow_likes__only_its_own_formats_raise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    for suffix in ("jpg", "png", "bmp"):
        assert read_image(saved(picture(), tmp_path / f"a.{suffix}")).shape == (40, 60, 3)
    for suffix in ("webp", "tiff"):
        with pytest.raises(DataError, match=r"exceeds limit .*raise PIL\.Image\.MAX_IMAGE_PIXELS"):
            read_image(saved(picture(), tmp_path / f"a.{suffix}"))


def test_read_image__tiff_of_two_pages__is_refused_unless_the_second_is_a_reduced_copy(
    tmp_path: Path,
) -> None:
    first, second = Image.fromarray(picture()), Image.fromarray(picture(20, 30))
    first.save(tmp_path / "stack.tiff", save_all=True, append_images=[second])
    with pytest.raises(DataError, match="a TIFF of 2 pages"):
        read_image(tmp_path / "stack.tiff")
    second.encoderinfo = {"tiffinfo": {254: 1}}
    first.save(tmp_path / "overview.tiff", save_all=True, append_images=[second])
    assert read_image(tmp_path / "overview.tiff").shape == (40, 60, 3)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((4, 6, 5), np.uint8), r"shape \(4, 6, 5\)"),
        (np.zeros((3, 40, 60), np.uint8), "channels first"),
        (np.zeros((2, 4, 6, 3), np.uint8), "a list of images instead of a batch"),
        (np.zeros((4, 6, 3), np.float32), r"type float32; only uint8 \(0 to 255\) and uint16"),
        (np.zeros((4, 6, 3), np.int64), "type int64"),
        (np.zeros((0, 6, 3), np.uint8), "at least one"),
        (np.zeros(6, np.uint8), r"shape \(6,\)"),
    ],
)
def test_read_image__array_of_another_kind__says_what_to_pass(array: NDArray[Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_image(array)


def test_read_image__float_tiff_and_five_channels__raise(tmp_path: Path) -> None:
    saved(np.zeros((4, 6), np.float32), tmp_path / "f.tiff")
    with pytest.raises(DataError, match="type float32"):
        read_image(tmp_path / "f.tiff")


def test_read_image__no_source_at_all__raises() -> None:
    with pytest.raises(DataError, match="int is not an image; pass a path"):
        read_image(3)  # type: ignore[arg-type]


def test_read_image__caller_keeps_the_array__result_is_not_a_view_when_changed() -> None:
    grey = np.zeros((4, 6), np.uint8)
    read_image(grey)[:] = 9
    assert grey.max() == 0


def mask() -> NDArray[np.uint8]:
    return (np.arange(24).reshape(4, 6) % 3).astype(np.uint8)


def test_read_mask__grey_png__gives_the_stored_values(tmp_path: Path) -> None:
    read = read_mask(saved(mask() * 100, tmp_path / "a.png"))
    assert read.dtype == np.uint8
    assert np.array_equal(read, mask() * 100)


def test_read_mask__palette_png__gives_indices_not_colours(tmp_path: Path) -> None:
    source = Image.fromarray(mask()).convert("P")
    source.putpalette([200, 0, 0, 0, 200, 0, 0, 0, 200])
    source = Image.fromarray(mask(), mode=None)
    source = Image.frombytes("P", (6, 4), mask().tobytes())
    source.putpalette([200, 0, 0, 0, 200, 0, 0, 0, 200])
    source.save(tmp_path / "a.png")
    assert np.array_equal(read_mask(tmp_path / "a.png"), mask())
    assert np.array_equal(read_mask(source), mask())


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_read_mask__grey_of_few_bits__gives_the_stored_numbers(tmp_path: Path, depth: int) -> None:
    stored = {1: (b"\x00\xa0", [1, 0, 1, 0]), 2: (b"\x00\x1b", [0, 1, 2, 3]), 4: (b"\x00\x12\x3f", [1, 2, 3, 15])}
    rows, expected = stored[depth]
    (tmp_path / "a.png").write_bytes(raw_png(4, 1, depth, 0, rows))
    assert read_mask(tmp_path / "a.png").tolist() == [expected]


@pytest.mark.parametrize("suffix", [".png", ".tiff"])
def test_read_mask__sixteen_bits__keep_large_values(tmp_path: Path, suffix: str) -> None:
    large = mask().astype(np.uint16) * 1000
    (tmp_path / f"a{suffix}").write_bytes(cv2.imencode(suffix, large)[1].tobytes())
    read = read_mask(tmp_path / f"a{suffix}")
    assert read.dtype == np.int32
    assert np.array_equal(read, large)
    (tmp_path / f"b{suffix}").write_bytes(cv2.imencode(suffix, mask().astype(np.uint16))[1].tobytes())
    assert read_mask(tmp_path / f"b{suffix}").dtype == np.uint8


@pytest.mark.parametrize("dtype", [np.int16, np.int32])
def test_read_mask__negative_values_in_tiff__are_kept(tmp_path: Path, dtype: Any) -> None:
    cv2_free = mask().astype(np.int32) - 1
    if dtype == np.int16:
        pytest.importorskip("PIL")
        data = (mask().astype("<i2") - 1).tobytes()
        tags = {256: 6, 257: 4, 258: 16, 259: 1, 262: 1, 277: 1, 278: 4, 279: len(data), 339: 2}
        entries = sorted({**tags, 273: 8 + 2 + 12 * (len(tags) + 1) + 4}.items())
        ifd = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", t, 4, 1, v) for t, v in entries)
        (tmp_path / "a.tiff").write_bytes(b"II*\0" + struct.pack("<I", 8) + ifd + bytes(4) + data)
    else:
        saved(cv2_free, tmp_path / "a.tiff")
    read = read_mask(tmp_path / "a.tiff")
    assert read.dtype == np.int32
    assert np.array_equal(read, cv2_free)


def test_read_mask__equal_channels__count_as_one(tmp_path: Path) -> None:
    rgb = np.repeat(mask()[:, :, None], 3, axis=2)
    opaque = np.dstack([rgb, np.full((4, 6), 255, np.uint8)])
    for array in (rgb, opaque, mask()[:, :, None], opaque[:, :, 2:]):
        assert np.array_equal(read_mask(array), mask())
    assert np.array_equal(read_mask(saved(rgb, tmp_path / "a.png")), mask())
    assert np.array_equal(read_mask(saved(opaque, tmp_path / "b.png")), mask())


def test_read_mask__colours__are_packed_where_wanted_and_else_refused(tmp_path: Path) -> None:
    colours = np.array([[200, 0, 0], [0, 200, 1]], np.uint8)[mask() % 2]
    packed = np.array([0xC80000, 0x00C801])[mask() % 2]
    for source in (colours, saved(colours, tmp_path / "a.png")):
        assert np.array_equal(read_mask(source, colours=True), packed)
        with pytest.raises(DataError, match=r"a colour mask \(2 colours\) where numbers are expected; write all masks"):
            read_mask(source)
    assert read_mask(np.array([[0, 9]], np.uint8), colours=True).tolist() == [[0, 0x090909]]
    with pytest.raises(DataError, match="the number 300 among colour masks, and grey levels are 0 to 255"):
        read_mask(np.array([[0, 300]]), colours=True)
    with pytest.raises(DataError, match="a colour mask of type uint16"):
        read_mask(colours.astype(np.uint16))


def test_read_mask__varying_transparency__is_refused() -> None:
    hidden = np.zeros((4, 6, 4), np.uint8)
    hidden[:2, :, 3] = 255
    with pytest.raises(DataError, match="varying transparency"):
        read_mask(hidden)


def test_read_mask__arrays_of_other_types__are_whole_numbers_or_refused() -> None:
    assert read_mask(mask() > 0).tolist() == (mask() > 0).astype(int).tolist()
    assert read_mask(mask().astype(np.float64)).dtype == np.uint8
    assert read_mask(mask().astype(np.int64) - 1).dtype == np.int32
    with pytest.raises(DataError, match="fractions"):
        read_mask(mask() / 2)
    with pytest.raises(DataError, match="fractions"):
        read_mask(np.full((2, 2), np.nan))
    with pytest.raises(DataError, match="at most 2147483647"):
        read_mask(np.full((2, 2), 2**40))
    with pytest.raises(DataError, match=r"shape \(2, 2, 7\)"):
        read_mask(np.zeros((2, 2, 7), np.uint8))
    with pytest.raises(DataError, match="use whole numbers"):
        read_mask(np.full((2, 2), "a"))


def test_read_mask__bitmap__is_zero_and_one(tmp_path: Path) -> None:
    Image.fromarray(mask() > 0).save(tmp_path / "a.png")
    assert np.array_equal(read_mask(tmp_path / "a.png"), mask() > 0)
    assert np.array_equal(read_mask(Image.fromarray(mask() > 0)), mask() > 0)


@pytest.mark.parametrize(
    "array",
    [
        mask(),
        picture(),
        np.arange(24, dtype=np.uint16).reshape(4, 6) * 2000,
        picture()[::-1, ::2],
        mask()[:, ::-2],
    ],
)
def test_write_png__read_back__is_equal(tmp_path: Path, array: NDArray[Any]) -> None:
    path = tmp_path / "new" / "folder" / "a.png"
    write_png(path, array)
    read = read_image(path) if array.ndim == 3 else read_mask(path)
    assert np.array_equal(read, array)
    assert [p.name for p in path.parent.iterdir()] == ["a.png"]


def test_write_png__existing_file__is_replaced_only_by_a_whole_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.png"
    write_png(path, mask())

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(DataError, match=r"a\.png: cannot be written \(No space left on device\)"):
        write_png(path, mask() + 1)
    assert np.array_equal(read_mask(path), mask())
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_write_png__array_that_is_no_picture__raises(tmp_path: Path) -> None:
    for array in (mask().astype(np.int32), np.zeros((4, 6, 4), np.uint8), np.zeros((0, 6), np.uint8)):
        with pytest.raises(DataError, match=r"cannot be written as PNG; pass uint8"):
            write_png(tmp_path / "a.png", array)  # type: ignore[arg-type]
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot be written"):
        write_png(tmp_path / "file" / "a.png", mask())


def test_read_image__real_files__equal_pillows_pixels(shared: Any) -> None:
    paths = sorted((shared("data") / "camvid" / "images").glob("*.jpg"))[:3]
    assert paths
    for path in paths:
        with Image.open(path) as opened:
            assert np.array_equal(read_image(path), np.asarray(opened.convert("RGB")))
