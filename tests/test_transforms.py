"""Image and mask go the same way, and the way back is known."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from semseg_automl.data import transforms
from semseg_automl.data.transforms import AUGMENTATIONS, Augmentation, Geometry, augment, resize, resize_mask
from semseg_automl.errors import ConfigError, DataError

STRENGTHS = sorted(AUGMENTATIONS)


def blob_pair(height: int, width: int, seed: int = 0) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """A mask with an irregular blob, and an image that is green where the mask is 1 and magenta elsewhere."""
    rng = np.random.default_rng(seed)
    mask = np.zeros((height, width), np.uint8)
    centre = (int(width * rng.uniform(0.3, 0.7)), int(height * rng.uniform(0.3, 0.7)))
    axes = (int(width * 0.3), int(height * 0.22))
    cv2.ellipse(mask, centre, axes, float(rng.uniform(0, 90)), 0, 360, (1,), -1)
    cv2.rectangle(mask, (0, 0), (width // 5, height // 6), (1,), -1)
    colours = np.array([[190, 60, 190], [60, 190, 60]], np.uint8)
    return colours[mask], mask


@pytest.mark.parametrize("original", [(53, 41), (8, 9), (1, 1), (5, 300)])
def test_geometry__rows_of_undo__are_those_of_the_whole(original: tuple[int, int]) -> None:
    geometry = Geometry(original_size=original, input_size=(16, 24))
    for shape in [(3, 16, 24), (1, 4, 6), (2, 1, 1)]:
        scores = torch.rand(shape)
        whole = geometry.undo(scores)
        bounds = sorted({0, 1, original[0] // 3, original[0] - 1, original[0]})
        parts = [geometry.undo_rows(scores, a, b) for a, b in itertools.pairwise(bounds)]
        torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="scores of one image"):
        geometry.undo_rows(torch.zeros(1, 1, 4, 4), 0, 1)


def greener(image: NDArray[np.uint8]) -> NDArray[np.bool_]:
    levels = image.astype(int)
    return np.asarray(levels[:, :, 1] > (levels[:, :, 0] + levels[:, :, 2]) // 2)


@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("size", [(300, 360), (500, 200), (97, 131), (700, 900)])
def test_augment__coloured_blob__colour_and_mask_agree(strength: str, size: tuple[int, int]) -> None:
    agreement = []
    for seed in range(12):
        image, mask = blob_pair(*size, seed=seed)
        moved, moved_mask = augment(image, mask, (128, 160), strength, np.random.default_rng(seed))
        assert moved.shape == (128, 160, 3)
        assert moved_mask.shape == (128, 160)
        assert moved.dtype == moved_mask.dtype == np.uint8
        agreement.append((greener(moved) == (moved_mask == 1)).mean())
    assert min(agreement) > 0.97


@pytest.mark.parametrize("strength", STRENGTHS)
def test_augment__same_seed__same_result_and_inputs_untouched(strength: str) -> None:
    image, mask = blob_pair(120, 150)
    before = image.copy(), mask.copy()
    first = augment(image, mask, (64, 64), strength, np.random.default_rng(5))
    second = augment(image, mask, (64, 64), strength, np.random.default_rng(5))
    assert np.array_equal(first[0], second[0])
    assert np.array_equal(first[1], second[1])
    assert np.array_equal(image, before[0])
    assert np.array_equal(mask, before[1])
    if strength != "none":
        others = [augment(image, mask, (64, 64), strength, np.random.default_rng(s))[1] for s in range(20)]
        assert any(not np.array_equal(first[1], other) for other in others)


@pytest.mark.parametrize("strength", STRENGTHS)
def test_augment__mask_values__are_never_invented(strength: str) -> None:
    rng = np.random.default_rng(0)
    values = np.array([0, 3, 7, 255], np.uint8)
    for seed in range(20):
        mask = cv2.resize(rng.choice(values, (9, 11)), (150, 120), interpolation=cv2.INTER_NEAREST)
        moved = augment(np.zeros((120, 150, 3), np.uint8), np.asarray(mask), (64, 80), strength, rng)[1]
        assert set(np.unique(moved).tolist()) <= set(values.tolist()), seed


def test_augment__none_and_flip__equal_the_validation_resize_mirrored_or_not() -> None:
    image, mask = blob_pair(211, 307)
    straight = resize(image, (96, 128))[0], resize_mask(mask, (96, 128))
    mirrored = (
        resize(np.ascontiguousarray(image[:, ::-1]), (96, 128))[0],
        resize_mask(np.ascontiguousarray(mask[:, ::-1]), (96, 128)),
    )
    seen = set()
    for seed in range(20):
        plain = augment(image, mask, (96, 128), "none", np.random.default_rng(seed))
        assert all(np.array_equal(a, b) for a, b in zip(plain, straight, strict=True))
        flipped = augment(image, mask, (96, 128), "flip", np.random.default_rng(seed))
        matches = [
            all(np.array_equal(a, b) for a, b in zip(flipped, pair, strict=True)) for pair in (straight, mirrored)
        ]
        assert any(matches)
        seen.add(matches.index(True))
    assert seen == {0, 1}


@pytest.mark.parametrize(
    ("orientation", "expected"),
    [
        ((True, False, 0), lambda a: a[:, ::-1]),
        ((False, True, 0), lambda a: a[::-1]),
        ((False, False, 2), lambda a: a[::-1, ::-1]),
        ((False, False, 1), np.rot90),
        ((False, False, 3), lambda a: np.rot90(a, 3)),
        ((True, False, 1), lambda a: np.rot90(a[:, ::-1])),
    ],
)
def test_source_map__flips_and_quarter_turns__hit_pixel_centres(
    orientation: tuple[bool, bool, int], expected: Callable[[NDArray[Any]], NDArray[Any]]
) -> None:
    source = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    turned = expected(source)
    size = (turned.shape[0], turned.shape[1])
    settings = Augmentation(translation=1e-12)
    rng = np.random.default_rng(0)
    image, mask = transforms._warp(source, np.ascontiguousarray(source[:, :, 0]), size, settings, orientation, rng)
    assert np.array_equal(image, turned)
    assert np.array_equal(mask, turned[:, :, 0])
    assert np.array_equal(transforms._reorient(source, *orientation), turned)


def test_warp__large_source__keeps_fine_texture_from_aliasing() -> None:
    stripes = np.zeros((600, 600, 3), np.uint8)
    stripes[:, ::2] = 255  # far finer than a pixel of the result: its honest value is mid-grey
    settings = Augmentation(translation=1e-12)
    mask = np.zeros((600, 600), np.uint8)
    image, _ = transforms._warp(stripes, mask, (100, 100), settings, (False, False, 0), np.random.default_rng(0))
    assert np.abs(image.astype(int) - 128).max() <= 2


def test_warp__odd_sizes_shrunk_by_blocks__stay_where_the_resize_puts_them() -> None:
    y, x = np.mgrid[0:503, 0:701]
    ramp = np.stack([x * 255 / 700, y * 255 / 502, (x + y) * 255 / 1202], axis=-1).astype(np.uint8)
    settings = Augmentation(translation=1e-12)
    mask = np.zeros((503, 701), np.uint8)
    image, _ = transforms._warp(ramp, mask, (64, 96), settings, (False, False, 0), np.random.default_rng(0))
    inner = (slice(2, -2), slice(2, -2))
    assert np.abs(image[inner].astype(int) - resize(ramp, (64, 96))[0][inner].astype(int)).max() <= 2


def test_augment__one_pixel_and_tiny_images__work() -> None:
    for shape in ((1, 1), (1, 7), (3, 2)):
        for strength in STRENGTHS:
            mask = np.ones(shape, np.uint8)
            image, moved = augment(
                np.full((*shape, 3), 99, np.uint8), mask, (16, 16), strength, np.random.default_rng(0)
            )
            assert image.shape == (16, 16, 3)
            assert (moved == 1).all()


def test_augment__unknown_strength__names_the_nearest() -> None:
    image, mask = blob_pair(20, 20)
    with pytest.raises(ConfigError, match="'lihgt' is unknown; did you mean 'light'"):
        augment(image, mask, (8, 8), "lihgt", np.random.default_rng(0))


def test_augment__mask_of_another_kind__raises() -> None:
    image, mask = blob_pair(20, 20)
    for wrong in (mask.astype(np.int32), mask[:10], mask[:, :, None]):
        with pytest.raises(DataError, match="encode the mask to uint8 class indices"):
            augment(image, wrong, (8, 8), "flip", np.random.default_rng(0))  # type: ignore[arg-type]


def test_augmentation__colour_of_each_strength__stays_within_its_ranges() -> None:
    grey = np.full((32, 32, 3), 128, np.uint8)
    mask = np.zeros((32, 32), np.uint8)
    for strength, settings in AUGMENTATIONS.items():
        levels = [augment(grey, mask, (32, 32), strength, np.random.default_rng(s))[0].mean() for s in range(30)]
        largest = 255 * settings.brightness + 255 * abs(0.5 ** (1 / settings.gamma) - 0.5) * settings.contrast
        assert np.abs(np.array(levels) - 128).max() <= largest + 3
        assert (np.std(levels) > 1) == settings.recolours


def test_augmentation__saturation__leaves_grey_grey_and_hue_in_order() -> None:
    settings = Augmentation(saturation=2.0, gamma=1.5, contrast=1.3)
    colour = np.broadcast_to(np.array([180, 120, 60], np.uint8), (4, 4, 3)).copy()
    grey = np.full((4, 4, 3), 90, np.uint8)
    for seed in range(20):
        pixel = transforms._recolour(colour, settings, np.random.default_rng(seed))[0, 0].astype(int)
        assert pixel[0] >= pixel[1] >= pixel[2]
        assert np.ptp(transforms._recolour(grey, settings, np.random.default_rng(seed))[0, 0]) <= 1


def test_augmentation__blur_and_noise__change_the_image_only() -> None:
    image, _ = blob_pair(64, 64)
    blurred = transforms._degrade(image, Augmentation(blur=1.0), np.random.default_rng(0))
    noisy = transforms._degrade(image, Augmentation(noise=1.0), np.random.default_rng(0))
    assert np.abs(np.diff(blurred.astype(int), axis=1)).max() < np.abs(np.diff(image.astype(int), axis=1)).max()
    assert 1.5 < (noisy.astype(float) - image).std() < 12.5


@pytest.mark.parametrize("size", [(30, 40), (16, 200), (128, 16), (64, 64), (1, 1)])
def test_resize__any_size__is_squashed_and_remembered(size: tuple[int, int]) -> None:
    image = np.full((*size, 3), 77, np.uint8)
    out, geometry = resize(image, (64, 48))
    assert out.shape == (64, 48, 3)
    assert (out == 77).all()
    assert geometry == Geometry(original_size=size, input_size=(64, 48))


def test_resize__shrinking__averages_areas_and_enlarging__is_bicubic() -> None:
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    means = image.reshape(16, 4, 16, 4, 3).mean(axis=(1, 3))
    assert np.abs(resize(image, (16, 16))[0] - means).max() <= 1
    # torch's bicubic has the same kernel (a = -0.75) and the same pixel edges
    tensor = torch.from_numpy(image).permute(2, 0, 1)[None].double()
    expected = torch.nn.functional.interpolate(tensor, size=(150, 128), mode="bicubic", align_corners=False)
    enlarged = torch.from_numpy(resize(image, (150, 128))[0]).permute(2, 0, 1).double()
    assert (enlarged - expected[0].clamp(0, 255)).abs().max() <= 1


def test_resize_mask__any_factor__takes_the_nearest_pixel_centre() -> None:
    mask = np.random.default_rng(0).integers(0, 5, (37, 53)).astype(np.uint8)
    for height, width in ((16, 16), (37, 53), (80, 120), (10, 200)):
        rows = np.floor((np.arange(height) + 0.5) * 37 / height).astype(int)
        columns = np.floor((np.arange(width) + 0.5) * 53 / width).astype(int)
        assert np.array_equal(resize_mask(mask, (height, width)), mask[np.ix_(rows, columns)])


def test_geometry__undo_of_smooth_scores__round_trips() -> None:
    y, x = np.mgrid[0:90, 0:140]
    picture = np.stack([128 + 100 * np.sin(x / 30), 128 + 100 * np.cos(y / 25), (x + y) / 2], axis=-1)
    small, geometry = resize(picture.astype(np.uint8), (64, 64))
    scores = torch.from_numpy(small).permute(2, 0, 1).float()
    back = geometry.undo(scores).permute(1, 2, 0).numpy()
    assert back.shape == (90, 140, 3)
    assert np.abs(back - picture)[3:-3, 3:-3].max() < 4


def test_geometry__undo_at_a_stride__keeps_pixel_edges() -> None:
    left_half = torch.zeros(1, 8, 8)
    left_half[:, :, :4] = 1
    back = Geometry(original_size=(50, 100), input_size=(32, 32)).undo(left_half)
    assert back.shape == (1, 50, 100)
    assert (back[:, :, :50] > 0.5).all()
    assert (back[:, :, 50:] < 0.5).all()


def test_geometry__undo_of_a_batch__raises() -> None:
    with pytest.raises(ValueError, match=r"\(1, 3, 4, 4\); pass the scores of one image"):
        Geometry((8, 8), (4, 4)).undo(torch.zeros(1, 3, 4, 4))
