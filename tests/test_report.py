"""Pictures: sizes of the grid, colours where a class is and nothing where none is."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from semseg_automl.report import (
    BLUE,
    HEADER,
    ORANGE,
    PALETTE,
    TILE,
    WHITE,
    confidence_map,
    error_map,
    overlay,
    overlay_grid,
)
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


def test_overlay_grid__titles__are_the_columns() -> None:
    labels = [np.full((20, 20), index, np.uint8) for index in (0, 1, 1)]
    grid = overlay_grid([(grey(20, 20), *labels)], binary=True, class_names=["a", "b"], titles=("image", "t", "x", "y"))
    assert grid.shape == (2 * HEADER + TILE, 4 * TILE, 3)
    middle = grid[HEADER + TILE // 2, [TILE // 2 + i * TILE for i in range(4)]]
    assert middle.tolist() == [[100] * 3, [100] * 3, tinted(100, 0), tinted(100, 0)]


def nearest_of(pixel: NDArray[np.uint8], colours: dict[str, tuple[int, int, int]]) -> str:
    """Name the colour that a pixel is tinted with."""
    return min(colours, key=lambda name: int(np.abs(pixel.astype(int) - colours[name]).sum()))


@pytest.mark.parametrize("level", [0, 100, 255])
def test_error_map__binary__tells_false_missed_found_and_unlabelled_apart(level: int) -> None:
    truth = np.array([[0, 0, 1, 1, IGNORE_INDEX]], np.uint8)
    prediction = np.array([[0, 1, 0, 1, 1]], np.uint8)
    (row,) = error_map(grey(1, 5, level), truth, prediction, binary=True)
    plain = int(0.45 * level + 80)
    assert row[0].tolist() == [plain] * 3, "rightly background"
    colours = {"orange": ORANGE, "blue": BLUE, "white": WHITE}
    assert [nearest_of(pixel, colours) for pixel in row[1:4]] == ["orange", "blue", "white"]
    assert row[4].max() < 60


def test_error_map__several_classes__tints_only_what_is_wrong() -> None:
    truth = np.array([[0, 2, 1, IGNORE_INDEX]], np.uint8)
    (row,) = error_map(grey(1, 4), truth, np.array([[0, 2, 2, 0]], np.uint8), binary=False)
    assert row[0].tolist() == row[1].tolist() == [125] * 3
    assert nearest_of(row[2], {"orange": ORANGE, "blue": BLUE, "plain": (125, 125, 125)}) == "orange"
    assert row[3].max() < 60


def test_confidence_map__from_least_to_certain__runs_from_dark_blue_to_yellow() -> None:
    (row,) = confidence_map(np.array([[0.2, 0.5, 0.75, 1.0]], np.float32), lowest=0.5)
    assert row[0].tolist() == row[1].tolist()
    brightness = row.sum(axis=1).tolist()
    assert brightness[1] < brightness[2] < brightness[3]
    assert row[1][2] > row[1][1], "blue"
    assert min(row[3][0], row[3][1]) > 200 > row[3][2], "yellow"
