"""Pictures: sizes of the grid, colours where a class is, and nothing where none is."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from semseg_automl.report import HEADER, PALETTE, TILE, overlay, overlay_grid
from semseg_automl.task import IGNORE_INDEX

Image = NDArray[np.uint8]


def grey(height: int, width: int, level: int = 100) -> Image:
    """Return an image of one grey level."""
    return np.full((height, width, 3), level, dtype=np.uint8)


def half_and_half(left: int, right: int, size: tuple[int, int] = (20, 30)) -> Image:
    """Return labels that change in the middle column."""
    labels = np.full(size, left, dtype=np.uint8)
    labels[:, size[1] // 2 :] = right
    return labels


def tinted(level: int, index: int) -> list[int]:
    """Return the colour of a painted grey pixel."""
    return [int(0.5 * level + 0.5 * channel) for channel in PALETTE[index]]


def test_palette__colours__are_all_different() -> None:
    assert len({tuple(colour) for colour in PALETTE.tolist()}) == len(PALETTE)


def test_overlay__binary__colours_the_foreground_and_leaves_the_background() -> None:
    image = grey(20, 30)
    painted = overlay(image, half_and_half(0, 1), binary=True)
    assert np.array_equal(painted[:, :15], image[:, :15])
    assert (painted[:, 17:] == tinted(100, 0)).all()
    assert (painted[:, 15] == PALETTE[0]).all(), "a full line along the border"
    assert np.array_equal(image, grey(20, 30)), "the image itself is left alone"


def test_overlay__several_classes__colours_each_its_own_way() -> None:
    painted = overlay(grey(20, 30), half_and_half(0, 2), binary=False)
    assert (painted[:, :14] == tinted(100, 0)).all()
    assert (painted[:, 16:] == tinted(100, 2)).all()
    assert (painted[:, 14] == PALETTE[0]).all()
    assert (painted[:, 15] == PALETTE[2]).all()


@pytest.mark.parametrize("binary", [True, False])
def test_overlay__ignored_pixels__stay_uncoloured(binary: bool) -> None:
    image = grey(20, 30)
    painted = overlay(image, half_and_half(IGNORE_INDEX, 1), binary=binary)
    assert np.array_equal(painted[:, :15], image[:, :15])
    assert (painted[:, 17:] == tinted(100, 0 if binary else 1)).all()
    untouched = overlay(image, half_and_half(IGNORE_INDEX, IGNORE_INDEX), binary=binary)
    assert np.array_equal(untouched, image)


def test_overlay__more_classes_than_colours__starts_over() -> None:
    labels = np.full((4, 4), len(PALETTE) + 1, dtype=np.uint8)
    assert (overlay(grey(4, 4), labels, binary=False) == tinted(100, 1)).all()


@pytest.mark.parametrize("sizes", [[], [(40, 60)], [(600, 300), (1, 1), (7, 900)]])
def test_overlay_grid__any_number_and_size_of_images__is_one_line_each(sizes: list[tuple[int, int]]) -> None:
    rows = [(grey(*size), np.zeros(size, np.uint8), np.ones(size, np.uint8)) for size in sizes]
    grid = overlay_grid(rows, binary=True)
    assert grid.shape == (HEADER + TILE * len(sizes), 3 * TILE, 3)
    assert grid.dtype == np.uint8
    assert (grid[:HEADER] < 128).any(), "the header is written"


def test_overlay_grid__image_truth_and_prediction__stand_side_by_side() -> None:
    size = (60, 60)
    grid = overlay_grid([(grey(*size), np.ones(size, np.uint8), np.zeros(size, np.uint8))], binary=True)
    middle = grid[HEADER + TILE // 2, [TILE // 2, TILE + TILE // 2, 2 * TILE + TILE // 2]]
    assert middle.tolist() == [[100] * 3, tinted(100, 0), [100] * 3]


def test_overlay_grid__wide_image__keeps_its_aspect_on_white() -> None:
    size = (30, 90)
    grid = overlay_grid([(grey(*size), np.zeros(size, np.uint8), np.zeros(size, np.uint8))], binary=True)
    tile = grid[HEADER:, :TILE]
    rows, columns = np.nonzero((tile == 100).all(axis=-1))
    height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
    assert width == pytest.approx(3 * height, abs=3)
    assert width > 0.9 * TILE
    assert (tile[: TILE // 4] == 255).all()


def test_overlay_grid__class_names__are_a_legend_below() -> None:
    row = (np.zeros((30, 40, 3), np.uint8), np.zeros((30, 40), np.uint8), np.zeros((30, 40), np.uint8))
    plain = overlay_grid([row], binary=False)
    named = overlay_grid([row], binary=False, class_names=[f"class {i}" for i in range(7)])
    assert np.array_equal(named[: len(plain)], plain)
    assert len(named) == len(plain) + 2 * HEADER
    for i in range(6):
        assert (named[len(plain) : len(plain) + HEADER] == PALETTE[i]).all(axis=-1).any()
    assert len(overlay_grid([row], binary=True, class_names=["background", "polyp"])) == len(plain) + HEADER
