"""Training crops: where they lie, which classes they show, and what lies outside of an image."""

from __future__ import annotations

import numpy as np
import pytest

from semseg_automl.data.crops import BALANCED_SHARE, CropRule, cut, draw_corner
from semseg_automl.task import IGNORE_INDEX


def corners(mask: np.ndarray[tuple[int, int], np.dtype[np.uint8]], rule: CropRule, count: int) -> list[tuple[int, int]]:
    """Draw crops, each from a seed of its own."""
    return [draw_corner(mask, rule, np.random.default_rng([7, i])) for i in range(count)]


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("size", [(30, 20), (30, 60), (64, 20), (40, 50), (64, 64)])
def test_draw_corner__any_size__lies_inside_or_holds_the_whole_image(balanced: bool, size: tuple[int, int]) -> None:
    mask = np.zeros((40, 50), np.uint8)
    mask[11, 13] = 1
    found = corners(mask, CropRule(size, balanced), 200)
    for axis, length in enumerate(mask.shape):
        starts = {corner[axis] for corner in found}
        low, high = sorted((0, length - size[axis]))
        assert low <= min(starts) <= max(starts) <= high
        assert len(starts) == 1 or max(starts) - min(starts) > 0.9 * (high - low), "anywhere between"
    assert found == corners(mask, CropRule(size, balanced), 200)


def test_draw_corner__rare_class__comes_up_as_often_as_promised() -> None:
    mask = np.zeros((200, 300), np.uint8)
    mask[150, 20:22] = 3
    mask[:, 290:] = IGNORE_INDEX
    rule = CropRule((20, 20), balanced=True)

    def share(rule: CropRule) -> float:
        return float(np.mean([(cut(mask, corner, rule.size) == 3).any() for corner in corners(mask, rule, 400)]))

    assert share(CropRule((20, 20))) < 0.05
    assert share(rule) == pytest.approx(BALANCED_SHARE / 2, abs=0.08), "one of two classes in the balanced crops"


def test_draw_corner__pixel_of_a_class__lies_anywhere_in_the_crop() -> None:
    mask = np.full((100, 100), IGNORE_INDEX, np.uint8)
    mask[50, 60] = 0
    places = []
    for corner in corners(mask, CropRule((20, 20), balanced=True), 600):
        found = np.argwhere(cut(mask, corner, (20, 20)) == 0)
        places += found.tolist()
    assert len(places) > 0.4 * 600
    rows, columns = np.array(places).T
    assert set(rows) == set(columns) == set(range(20))


def test_draw_corner__pixels_of_a_class__are_all_drawn() -> None:
    mask = np.full((9, 9), IGNORE_INDEX, np.uint8)
    for place in [(0, 0), (0, 8), (3, 3), (3, 4), (8, 8)]:
        mask[place] = 1
    found = {corner for corner in corners(mask, CropRule((1, 1), balanced=True), 600) if mask[corner] == 1}
    assert found == {(0, 0), (0, 8), (3, 3), (3, 4), (8, 8)}


def test_draw_corner__mask_without_any_class__is_cut_anywhere() -> None:
    mask = np.full((40, 40), IGNORE_INDEX, np.uint8)
    assert len(set(corners(mask, CropRule((10, 10), balanced=True), 50))) > 30


def test_cut__inside__is_the_part_itself() -> None:
    image = np.arange(60, dtype=np.uint8).reshape(6, 10)
    assert np.array_equal(cut(image, (2, 3), (3, 4)), image[2:5, 3:7])
    image.flags.writeable = False
    assert np.array_equal(cut(image, (-1, 0), (2, 2), fill=9), [[9, 9], [0, 1]])


@pytest.mark.parametrize("shape", [(1, 1, 3), (3, 5, 3), (8, 2, 3)])
def test_cut__small_image__is_mirrored_and_its_mask_ignored_outside(shape: tuple[int, int, int]) -> None:
    image = np.random.default_rng(0).integers(0, 255, shape, dtype=np.uint8)
    mask = np.ones(shape[:2], np.uint8)
    corner = (-2, -3)
    size = (shape[0] + 9, shape[1] + 8)
    found = cut(image, corner, size)
    assert np.array_equal(found, np.pad(image, ((2, 7), (3, 5), (0, 0)), mode="reflect"))
    filled = cut(mask, corner, size, fill=IGNORE_INDEX)
    assert np.array_equal(filled, np.pad(mask, ((2, 7), (3, 5)), constant_values=IGNORE_INDEX))
    coloured = cut(image, corner, size, fill=4)
    assert (coloured[0] == 4).all()
