"""Masks drawn from shapes: the COCO API's rule of filling, order, values, and what is refused."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from semseg_automl.data import drawn as drawn_module
from semseg_automl.data.drawn import DrawnMask, larger_first, polygons, runs
from semseg_automl.data.images import image_size, read_image, read_mask, read_stored_mask
from semseg_automl.errors import DataError

# Polygons and what the COCO API 2.0.11 fills of them (frPyObjects, decode).
LITERAL = [
    ([2, 1, 6, 1, 6, 4, 2, 4], "........ ..####.. ..####.. ..####.. ........ ........"),
    (
        [1.0, 0.5, 9.5, 4.2, 3.3, 7.9],
        "........... .##........ ..####..... ..######... ..#######.. ...####.... ...###..... ...#....... ...........",
    ),
    (  # crosses itself
        [1.5, 1.5, 9.3, 1.7, 1.2, 8.4, 9.9, 8.2],
        "............ ............ ...#####.... ....###..... .....#...... .....##..... ...#####.... ..#######... "
        "............ ............",
    ),
    (  # steep and flat edges, up and down, that pass between two rows
        [7.5, 3.4, 4.9, 11.8, 9.6, 8.7, 5.4, 3.3, 1.6, 11.6],
        ".......... .......... .......... .....#.#.. .....#.... ....##.... ....#..#.. ...##.###. ...#..###. ......##.. "
        ".....##... ..........",
    ),
    ([-1.5, -1, 4.2, 2.3, -0.6, 7.4], "#..... ###... ####.. ###... ##.... #....."),  # begins outside
]


def filled(points: object, size: tuple[int, int], value: int = 1) -> NDArray[Any]:
    return DrawnMask(size, (polygons(value, [points], size),), "m").draw()


@pytest.mark.parametrize(("points", "picture"), LITERAL)
def test_polygons__literal__are_filled_as_by_the_coco_api(points: list[float], picture: str) -> None:
    expected = np.array([[character == "#" for character in row] for row in picture.split()], dtype=np.uint8)
    np.testing.assert_array_equal(filled(points, (expected.shape[0], expected.shape[1])), expected)
    backwards = np.reshape(points, (-1, 2))[::-1].tolist()
    np.testing.assert_array_equal(filled(backwards, (expected.shape[0], expected.shape[1])), expected)


@given(st.integers(0, 20), st.integers(0, 20), st.integers(1, 20), st.integers(1, 20))
@settings(max_examples=60, deadline=None)
def test_polygons__rectangle__has_its_area(x: int, y: int, width: int, height: int) -> None:
    right, bottom = min(x + width, 24), min(y + height, 22)
    corners = [[x, y], [right, y], [right, bottom], [x, bottom]]
    expected = np.zeros((22, 24), np.uint8)
    expected[y:bottom, x:right] = 1
    np.testing.assert_array_equal(filled(corners, (22, 24)), expected)


def test_polygons__many_crossings_at_once_or_in_portions__are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    points = np.random.default_rng(0).uniform(0, 60, (200, 2))
    whole = filled(points, (60, 60))
    monkeypatch.setattr(drawn_module, "_AT_ONCE", 50)
    np.testing.assert_array_equal(filled(points, (60, 60)), whole)
    assert 0.2 < whole.mean() < 0.8


def test_polygons__circle__has_its_area_and_no_border_more() -> None:
    angles = np.linspace(0, 2 * np.pi, 200, endpoint=False)
    points = np.stack([32 + 20 * np.cos(angles), 32 + 20 * np.sin(angles)], axis=1)
    mask = filled(points, (64, 64)).astype(np.uint8)
    assert mask.sum() == pytest.approx(np.pi * 400, rel=0.02)
    with_border = np.zeros((64, 64), np.uint8)
    cv2.fillPoly(with_border, [np.rint((points - 0.5) * 16).astype(np.int32)], (1,), shift=4)
    assert (mask & ~with_border).sum() == 0
    assert cv2.dilate(mask, np.ones((3, 3), np.uint8))[with_border == 1].all()


def test_polygons__two_of_one_object__overlap_stays_filled() -> None:
    shape = polygons(1, [[0, 0, 4, 0, 4, 4, 0, 4], [2, 2, 6, 2, 6, 6, 2, 6]], (6, 6))
    mask = DrawnMask((6, 6), (shape,), "m").draw()
    assert mask.sum() == 16 + 16 - 4
    assert mask[3, 3] == 1


def test_draw__overlapping_objects__later_ones_hide_earlier_ones() -> None:
    large, small = (polygons(v, [[0, 0, s, 0, s, s, 0, s]], (8, 8)) for v, s in ((1, 8), (2, 3)))
    crowd = runs(3, [0, 1, 63], (8, 8))
    assert [shape.value for shape in larger_first([crowd, small, large])] == [1, 2, 3]
    assert (large.area, small.area, crowd.area) == (64, 9, 1)
    mask = DrawnMask((8, 8), larger_first([small, crowd, large]), "m").draw()
    assert [int((mask == value).sum()) for value in (1, 2, 3)] == [55, 8, 1]
    assert (DrawnMask((8, 8), (crowd, small, large), "m").draw() == 1).all()


def test_draw__no_shape_or_wholly_clipped__is_background() -> None:
    assert DrawnMask((3, 4), (), "m").draw().tolist() == [[0] * 4] * 3
    assert not filled([-0.9, 0, -0.2, 3, -0.4, 5, 0.3, 2], (40, 40)).any()


@pytest.mark.parametrize(
    ("value", "kind"), [(255, np.uint8), (256, np.uint16), (65535, np.uint16), (65536, np.int32), (-1, np.int32)]
)
def test_draw__any_value__is_kept(value: int, kind: type) -> None:
    mask = filled([0, 0, 2, 0, 2, 2, 0, 2], (2, 3), value)
    assert mask.dtype == kind
    assert mask.tolist() == [[value, value, 0]] * 2
    assert read_mask(DrawnMask((2, 3), (polygons(value, [[0, 0, 2, 0, 2, 2, 0, 2]], (2, 3)),), "m")).tolist() == [
        [value, value, 0]
    ] * 2


def test_polygons__slightly_outside__is_clipped_as_it_is() -> None:
    clipped = filled([[-2, -2], [4, -2], [4, 4], [-2, 4]], (20, 20))
    np.testing.assert_array_equal(clipped, filled([[0, 0], [4, 0], [4, 4], [0, 4]], (20, 20)))
    slanted = filled([[-2, 10], [10, -2], [-2, -2]], (20, 20))
    assert slanted.sum() == 36  # x + y <= 7 of pixel numbers, cut straight by the image, and not bent at its border


@pytest.mark.parametrize(
    ("rings", "message"),
    [
        ([], "no polygon"),
        ([[1, 1, 2, 2]], "a polygon with 2 points; an area needs 3"),
        ([[]], "a polygon with 0 points"),
        ([[1, 1, 2, 2, 3]], "5 coordinates that are no pairs"),
        ([[[1, 2, 3], [1, 2, 3], [1, 2, 3]]], "9 coordinates that are no pairs"),
        ([[[1, 2], [3]]], "no pairs of numbers"),
        ([["a", 1, 2, 2, 3, 3]], "no pairs of numbers"),
        ([[10**400, 1, 2, 2, 3, 3]], "no pairs of numbers"),
        (["1 2 3"], "a polygon is a str"),
        ([[1, 1, float("nan"), 2, 3, 3]], "not finite"),
        ([[1, 1, float("inf"), 2, 3, 3]], "not finite"),
        ([[1, 1, 30, 2, 3, 3]], r"from \(1, 1\) to \(30, 3\) outside the image of 20 x 10 \(width x height\)"),
        ([[1, 1, 5, -9, 3, 3]], "outside the image"),
        ([[-1, 1, -0.5, 2, -1, 3]], "outside the image"),
        ([[20.5, 1, 21, 2, 21, 3]], "outside the image"),
        ([[1, 10.5, 2, 11, 2, 10.6]], "outside the image"),
    ],
)
def test_polygons__unusable__says_why(rings: list[object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        polygons(1, rings, (10, 20))


def test_polygons__more_points_than_allowed__are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawn_module, "MAX_POINTS", 4)
    filled([1, 1, 2, 1, 2, 2, 1, 2], (4, 4))
    with pytest.raises(DataError, match="a polygon with 5 points; at most 4"):
        filled([1, 1, 2, 1, 2, 2, 1, 2, 1, 1.5], (4, 4))


def test_drawn_mask__in_place_of_a_mask__is_read_and_in_place_of_an_image_refused() -> None:
    mask = DrawnMask((4, 6), (polygons(9, [[1, 1, 3, 1, 3, 3, 1, 3]], (4, 6)),), "shapes of a.jpg")
    assert image_size(mask) == (4, 6)
    assert read_stored_mask(mask).survey()[0] == {0: 20, 9: 4}
    assert read_mask(mask, colours=True)[1, 1] == 0x090909
    with pytest.raises(DataError, match=r"shapes of a\.jpg: a mask drawn from annotations where an image is expected"):
        read_image(mask)
    with pytest.raises(DataError, match="shapes of b: 0 x 6 pixels"):
        read_mask(DrawnMask((0, 6), (), "shapes of b"))
    with pytest.raises(DataError, match="are more than the"):
        read_mask(DrawnMask((10**6, 10**6), (), "shapes of b"))


def test_drawn_mask__text__is_its_name_and_repr_tells_shapes_apart() -> None:
    one, same, other = (
        DrawnMask((4, 6), (polygons(9, [[1, 1, x, 1, 3, 3, 1, 3]], (4, 6)),), "a") for x in (3, 3, 2)
    )
    assert str(one) == "a"
    assert repr(one) == repr(same) != repr(other)
    assert repr(DrawnMask((1, 2), (runs(1, [0, 2], (1, 2)),), "a")) != repr(
        DrawnMask((1, 2), (runs(1, [1, 1], (1, 2)),), "a")
    )
    assert isinstance(Image.fromarray(one.draw()), Image.Image)
