"""A quick look at an image: less of it, but nothing overlooked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from semseg_automl.data.completeness import jpeg_pixel_data
from semseg_automl.data.duplicates import THUMBNAIL, find_copies, small_picture
from semseg_automl.data.images import glance, read_image, write_png
from semseg_automl.errors import DataError


def picture(height: int = 70, width: int = 140) -> NDArray[np.uint8]:
    y, x = np.mgrid[0:height, 0:width]
    waves = [128 + 100 * np.sin(x / a + y / b) for a, b in ((9.0, 30.0), (25.0, 8.0), (14.0, 14.0))]
    return np.stack(waves, axis=-1).astype(np.uint8)


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_glance__jpeg__is_smaller_upright_and_looks_the_same(
    tmp_path: Path, mode: str, progressive: bool, orientation: int
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(picture()).convert(mode)
    image.save(tmp_path / "a.jpg", quality=95, progressive=progressive, exif=exif)
    whole = read_image(tmp_path / "a.jpg")
    for side, scale in ((8, 8), (9, 4), (17, 4), (18, 2), (35, 2), (36, 1)):
        seen = glance(tmp_path / "a.jpg", side)
        assert seen.size == whole.shape[:2]
        colours = () if scale > 1 else (3,)
        assert seen.pixels.shape == (*(-(-length // scale) for length in whole.shape[:2]), *colours)
        assert bool(seen.coded) is (scale > 1)


@pytest.mark.parametrize("size", [(256, 300), (512, 130), (600, 520)])
def test_glance__jpeg_for_a_small_picture__gives_the_same_one(tmp_path: Path, size: tuple[int, int]) -> None:
    Image.fromarray(picture(*size)).save(tmp_path / "a.jpg", quality=90)
    seen = glance(tmp_path / "a.jpg", 2 * THUMBNAIL)
    assert seen.coded
    pictures = np.stack([small_picture(seen.pixels), small_picture(read_image(tmp_path / "a.jpg"))])
    ((_, _, similarity, turned),) = find_copies(pictures, np.zeros(2, np.int64))[0]
    assert similarity > 0.995
    assert not turned


def test_glance__other_kinds_and_chosen_channels__are_read_whole(tmp_path: Path) -> None:
    write_png(tmp_path / "a.png", picture())
    Image.fromarray(picture()).convert("CMYK").save(tmp_path / "c.jpg")
    Image.fromarray(picture()).save(tmp_path / "a.jpg")
    for source in (tmp_path / "a.png", tmp_path / "c.jpg", picture(), Image.fromarray(picture())):
        seen = glance(source, 8)
        assert np.array_equal(seen.pixels, read_image(source))
        assert seen.coded == b""
    seen = glance(tmp_path / "a.jpg", 8, channels=(2, 1, 0))
    assert np.array_equal(seen.pixels, read_image(tmp_path / "a.jpg", channels=(2, 1, 0)))


def test_glance__same_pixels_with_other_camera_data__has_the_same_code(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x010E] = "a description"
    image = Image.fromarray(picture())
    image.save(tmp_path / "plain.jpg", quality=90)
    image.save(tmp_path / "told.jpg", quality=90, exif=exif, comment=b"hello", icc_profile=b"profile")
    exif[0x0112] = 3
    image.save(tmp_path / "turned.jpg", quality=90, exif=exif)
    image.save(tmp_path / "coarse.jpg", quality=89)
    plain, told, turned, coarse = (
        glance(tmp_path / f"{n}.jpg", 8).coded for n in ("plain", "told", "turned", "coarse")
    )
    assert plain == told
    assert len({plain, turned, coarse}) == 3


@pytest.mark.parametrize("keep", [0.05, 0.3, 0.6, 0.9, 0.999])
@pytest.mark.parametrize("progressive", [False, True])
def test_glance__truncated_jpeg__is_refused_as_reading_does(tmp_path: Path, keep: float, progressive: bool) -> None:
    Image.fromarray(picture()).save(tmp_path / "a.jpg", progressive=progressive)
    data = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(data[: int(len(data) * keep)])
    looks: list[Callable[[Path], object]] = [lambda path: glance(path, 8), read_image]
    for look in looks:
        with pytest.raises(DataError, match=r"a\.jpg: truncated or damaged"):
            look(tmp_path / "a.jpg")


@pytest.mark.parametrize("tail", [b"", b"\xff\xe1\xff", b"\xff\xe1\x00\x00ab", b"ab"])
def test_jpeg_pixel_data__bytes_of_nothing__ends(tail: bytes) -> None:
    assert len(jpeg_pixel_data(b"\xff\xd8" + tail)) <= len(tail)
