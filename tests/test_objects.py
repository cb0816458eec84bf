"""Objects: connected areas per value, and which of them vanish at the model's input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from semseg_automl.data import counting
from semseg_automl.data import objects as module
from semseg_automl.data.counting import Values
from semseg_automl.data.objects import are_small, extents


def test_extents__two_values_with_several_areas__gives_sizes_and_numbers() -> None:
    mask = np.zeros((12, 20), np.uint8)
    mask[1:4, 2:8] = 5
    mask[6:9, 2:8] = 5
    mask[10, 15] = 5
    mask[2, 12:14] = 9
    assert extents(Values(mask)).tolist() == [[0, 12, 20, 1], [5, 1, 1, 1], [5, 3, 6, 2], [9, 1, 2, 1]]


def test_extents__pixels_touching_at_a_corner__are_one_object() -> None:
    assert extents(Values(np.eye(5, dtype=np.uint8)))[-1].tolist() == [1, 5, 5, 1]


def test_extents__numbers_beyond_eight_bits__are_kept_apart() -> None:
    mask = np.array([[70_000, 70_000, -1], [0, 0, -1]], np.int32)
    assert extents(Values(mask)).tolist() == [[-1, 2, 1, 1], [0, 1, 2, 1], [70_000, 1, 2, 1]]


@pytest.mark.parametrize("dtype", [np.uint8, np.int32])
@pytest.mark.parametrize("block", [1, 2, 5])
def test_extents__noise_and_blocks__are_those_of_each_value_alone(dtype: type, block: int) -> None:
    rng = np.random.default_rng(block)
    for _ in range(20):
        height, width, kinds = rng.integers(1, 16, 3)
        small = rng.integers(-3 if dtype is np.int32 else 0, kinds, (height, width))
        mask: NDArray[Any] = np.kron(small, np.ones((block, block), np.int64)).astype(dtype)
        found = extents(Values(mask))
        assert found.dtype == np.int32
        assert found.tolist() == each_alone(mask)


def each_alone(mask: NDArray[Any]) -> list[list[int]]:
    """Return the extents as OpenCV's labelling of one value after the other has them."""
    found = []
    for value in np.unique(mask).tolist():
        stats = cv2.connectedComponentsWithStats((mask == value).astype(np.uint8), connectivity=8)[2][1:]
        sizes, numbers = np.unique(stats[:, [3, 2]], axis=0, return_counts=True)
        found += [[value, *map(int, row)] for row in np.column_stack([sizes, numbers])]
    return found


def one_by_one(measure: Callable[[Values, int], NDArray[np.int32]], mask: NDArray[Any]) -> list[list[int]]:
    """Return what is measured of one value after the other."""
    return [row for value in np.unique(mask).tolist() for row in measure(Values(mask), value).tolist()]


def rings(side: int, values: int) -> NDArray[np.uint8]:
    """Return squares within squares, each a pixel wide and of the next value."""
    row, column = np.indices((side, side))
    depth = np.minimum(np.minimum(row, side - 1 - row), np.minimum(column, side - 1 - column))
    return (depth % values).astype(np.uint8)


def dotted(height: int, width: int) -> NDArray[np.uint8]:
    """Return single pixels, some at the border."""
    mask = np.zeros((height, width), np.uint8)
    mask[::4, ::12] = 1
    return mask


def wide(mask: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return a mask whose runs are long enough for outlines and runs to be looked at."""
    return np.repeat(mask, 8, axis=1)


ODD = {
    "one pixel": np.full((1, 1), 3, np.uint8),
    "one value": np.full((7, 9), 3, np.uint8),
    "one row": np.array([[0] * 9 + [1] * 9 + [0] * 9], np.uint8),
    "one column": np.array([[0] * 9 + [1] * 9 + [0] * 9], np.uint8).T,
    "hole": wide(np.pad(np.zeros((3, 3), np.uint8), 2, constant_values=1)),
    "nested": wide(rings(21, 2)),
    "nested, three values": wide(rings(21, 3)),
    "nested, seven values": wide(rings(29, 7)),
    "dots": dotted(13, 49),
    "chequered": wide(np.indices((9, 9)).sum(0).astype(np.uint8) % 2),
    "corners": wide(np.eye(9, dtype=np.uint8)),
    "holes at corners": wide(1 - np.eye(9, dtype=np.uint8)),
}


@pytest.mark.parametrize("name", ODD)
def test_extents__odd_masks__are_the_same_by_outlines_runs_and_labels(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mask = ODD[name]
    expected = each_alone(mask)
    assert extents(Values(mask)).tolist() == expected
    assert one_by_one(module._outlined, mask) == expected
    assert one_by_one(module._boxes, mask) == expected
    monkeypatch.setattr(counting, "SHORT_RUNS", 1)
    runs = Values(mask).runs
    assert runs is not None
    assert module._extents_of_runs(runs).tolist() == expected


@pytest.mark.parametrize("values", [2, 4, 5, 9])
def test_extents__random_areas__are_the_same_by_outlines_runs_and_labels(values: int) -> None:
    rng = np.random.default_rng(values)
    for _ in range(25):
        height, width = rng.integers(1, 12, 2)
        tall, long = rng.integers(1, 5), rng.integers(9, 14)
        mask = np.kron(rng.integers(0, values, (height, width)), np.ones((tall, long), np.int64)).astype(np.uint8)
        runs = Values(mask).runs
        assert runs is not None
        expected = each_alone(mask)
        assert extents(Values(mask)).tolist() == expected
        assert module._extents_of_runs(runs).tolist() == expected
        assert one_by_one(module._outlined, mask) == expected


@pytest.mark.parametrize(
    ("values", "unused"), [(2, ("_boxes", "_extents_of_runs")), (9, ("_boxes", "_outlined")), (0, ("_outlined",))]
)
def test_extents__few_values_many_or_noise__are_measured_each_in_its_way(
    values: int, unused: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in unused:
        monkeypatch.setattr(module, name, None)
    rng = np.random.default_rng(0)
    areas = np.kron(rng.integers(0, values or 1, (6, 6)), np.ones((9, 9), np.int64)).astype(np.uint8)
    mask = areas if values else rng.integers(0, 2, (40, 40)).astype(np.uint8)
    assert extents(Values(mask)).tolist() == each_alone(mask)


def test_extents__more_runs_than_memory_is_for__are_measured_value_by_value(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = np.kron(np.random.default_rng(0).integers(0, 3, (6, 6)), np.ones((9, 9), np.int64)).astype(np.uint8)
    monkeypatch.setattr(counting, "MOST_RUNS", 3)
    monkeypatch.setattr(module, "_outlined", None)
    assert extents(Values(mask)).tolist() == each_alone(mask)


def small_ones(objects: list[tuple[int, int]], size: tuple[int, int]) -> list[bool]:
    """Return which objects of an image are small at an input of 100 x 100 pixels."""
    told = np.array([(1, *object_size, 1) for object_size in objects], np.int32)
    return [bool(small) for small in are_small(told, np.array(size), (100, 100))]


def test_are_small__object_of_the_limit__is_not_small() -> None:
    assert small_ones([(16, 16), (15, 15)], (400, 400)) == [False, True]


def test_are_small__long_and_thin__is_no_small_object() -> None:
    assert small_ones([(100, 2), (2, 100), (2, 2)], (400, 400)) == [False, False, True]


def test_are_small__image_of_another_aspect_ratio__each_side_has_its_scale() -> None:
    assert small_ones([(6, 6), (3, 15)], (100, 400)) == [False, True]


def test_are_small__images_of_several_sizes__each_object_has_its_own() -> None:
    objects = np.array([[0, 15, 15, 2], [0, 15, 15, 3], [7, 20, 3, 1]], np.int32)
    sizes = np.array([[400, 400], [100, 400], [800, 100]])
    assert are_small(objects, sizes, (100, 100)).tolist() == [True, False, True]
    assert are_small(objects, sizes, (100, 100), limit=2.0).tolist() == [False, False, False]
