"""Duplicates: digests of pixels, and copies told from different images by their small pictures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.fft import dctn

from semseg_automl.data import duplicates as module
from semseg_automl.data.duplicates import (
    MAX_DISTANCE,
    find_copies,
    frequencies,
    perceptual_hashes,
    pixel_digest,
    small_picture,
)
from semseg_automl.data.images import read_image

Image = NDArray[np.uint8]


def scene(seed: int, size: tuple[int, int] = (60, 80)) -> Image:
    """Return an image of soft blobs, as different from another seed's as two photographs."""
    coarse = np.random.default_rng(seed).integers(0, 256, (7, 9, 3)).astype(np.uint8)
    return cv2.resize(coarse, size[::-1], interpolation=cv2.INTER_CUBIC).astype(np.uint8)


def pictures(*images: Image) -> Image:
    return np.stack([small_picture(image) for image in images])


def recompressed(image: Image, quality: int = 30) -> Image:
    return np.asarray(cv2.imdecode(cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])[1], 1), np.uint8)


def one_group(number: int) -> NDArray[np.int64]:
    return np.zeros(number, np.int64)


COPIES: dict[str, Callable[[Image], Image]] = {
    "recompressed": recompressed,
    "smaller": lambda image: cv2.resize(image, (31, 22), interpolation=cv2.INTER_AREA).astype(np.uint8),
    "larger": lambda image: cv2.resize(image, (130, 97), interpolation=cv2.INTER_CUBIC).astype(np.uint8),
    "another aspect ratio": lambda image: cv2.resize(image, (64, 64)).astype(np.uint8),
    "brighter": lambda image: np.clip(image.astype(int) + 15, 0, 255).astype(np.uint8),
    "grey": lambda image: np.repeat(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[:, :, None], 3, 2).astype(np.uint8),
}


def test_pixel_digest__one_pixel_differs__differs() -> None:
    image, other = scene(0), scene(0)
    assert pixel_digest(image) == pixel_digest(other)
    other[3, 4, 1] ^= 1
    assert pixel_digest(image) != pixel_digest(other)


def test_pixel_digest__same_bytes_in_another_shape_or_type__differ() -> None:
    flat = np.arange(12, dtype=np.uint8)
    found = {pixel_digest(flat.reshape(3, 4)), pixel_digest(flat.reshape(4, 3)), pixel_digest(flat.view(np.int8)[None])}
    assert len(found) == 3


def test_pixel_digest__rows_of_a_larger_array__is_that_of_a_copy() -> None:
    image = scene(1)
    assert pixel_digest(image[::2, 3:]) == pixel_digest(image[::2, 3:].copy())


@pytest.mark.parametrize("kind", COPIES)
def test_find_copies__copy_of_one_image_among_others__is_found_and_nothing_else(kind: str) -> None:
    images = [scene(seed) for seed in range(12)]
    copies, pairs = find_copies(pictures(*images, COPIES[kind](images[5])), one_group(13))
    assert [(copy.later, copy.earlier, copy.turned) for copy in copies] == [(12, 5, False)]
    assert pairs == 1
    assert copies[0].similarity <= 1.0001


@pytest.mark.parametrize(
    "turn",
    [lambda x: x[:, ::-1], lambda x: x[::-1], lambda x: x[::-1, ::-1], lambda x: np.rot90(x), lambda x: np.rot90(x, 3)],
)
def test_find_copies__mirrored_or_turned__is_found_and_said(turn: Callable[[Image], Image]) -> None:
    images = [scene(seed, (64, 64)) for seed in range(6)]
    copies, _ = find_copies(pictures(*images, np.ascontiguousarray(turn(images[2]))), one_group(7))
    assert [(copy.later, copy.earlier, copy.turned) for copy in copies] == [(6, 2, True)]


def test_find_copies__copies_in_own_and_other_group__gives_the_most_similar_of_each() -> None:
    first = scene(0)
    images = pictures(first, scene(1), recompressed(first, 20), first, recompressed(first, 90))
    copies, pairs = find_copies(images, np.array([0, 0, 1, 1, 1]))
    last = {(copy.later, copy.earlier) for copy in copies if copy.later == 4}
    assert last == {(4, 0), (4, 3)}
    assert pairs == 6


def test_find_copies__flat_images__are_like_nothing() -> None:
    flat = np.full((40, 40, 3), 90, np.uint8)
    assert find_copies(pictures(flat, flat, flat), one_group(3)) == ([], 0)
    assert find_copies(np.zeros((0, 32, 32), np.uint8), one_group(0)) == ([], 0)


def test_find_copies__more_than_one_block__is_as_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    images = pictures(*[scene(seed % 7) for seed in range(20)])
    whole, pairs = find_copies(images, one_group(20))
    monkeypatch.setattr(module, "_BLOCK", 3)
    parted, again = find_copies(images, one_group(20))
    assert pairs == again == 19
    assert [copy.later for copy in parted] == [copy.later for copy in whole] == list(range(7, 20))
    assert all((copy.later - copy.earlier) % 7 == 0 for copy in (*whole, *parted))


def test_frequencies__random_pictures__are_the_lowest_of_scipys_cosine_transform() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (5, 32, 32)).astype(np.uint8)
    waves = dctn(noise.astype(np.float64), axes=(1, 2), norm="ortho")[:, :12, :12]
    found = frequencies(noise)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, waves, atol=0.01)
    assert np.abs(waves).max() > 1000


def test_perceptual_hashes__copies_and_others__are_near_and_far() -> None:
    images = [scene(seed) for seed in range(20)]
    own = perceptual_hashes(frequencies(pictures(*images)))
    copied = perceptual_hashes(frequencies(pictures(*[recompressed(image) for image in images])))
    distances = np.bitwise_count(own[:, None] ^ copied[None])
    assert np.diag(distances).max() <= MAX_DISTANCE
    assert distances[~np.eye(20, dtype=bool)].min() > MAX_DISTANCE


@pytest.mark.parametrize("folder", ["leaf_disease", "nuclei"])
def test_find_copies__real_images_and_smaller_recompressed_copies__finds_each_and_no_other(
    shared: Callable[[str], Path], folder: str
) -> None:
    files = sorted(shared(f"data/{folder}/images").iterdir())[:40]
    images = [read_image(path) for path in files]
    smaller = [recompressed(np.asarray(cv2.resize(x, None, fx=0.6, fy=0.6), np.uint8), 50) for x in images]
    together = pictures(*images, *smaller)
    told = int((together[:40].reshape(40, -1).std(axis=1) >= module.FLAT).sum())
    copies, pairs = find_copies(together, np.repeat([0, 1], 40))
    assert {copy.later - copy.earlier for copy in copies} == {40}
    assert len(copies) == pairs == told


@pytest.mark.parametrize("changed", [(0, 0, 40), (slice(None), slice(None), 40), (slice(0, 24), slice(None), 7)])
def test_pixel_digest__masks_of_other_values_or_outlines__differ(changed: tuple[slice | int, slice | int, int]) -> None:
    mask = np.zeros((32, 32), np.uint8)
    mask[16:] = 7
    other = mask.copy()
    other[changed[0], changed[1]] = changed[2]
    assert pixel_digest(other) != pixel_digest(mask)
    assert pixel_digest(mask) == pixel_digest(np.repeat(mask[:, :, None], 3, axis=2))
