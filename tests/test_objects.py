"""Objects: connected areas per value, and which of them vanish at the model's input."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from semseg_automl.data import objects as module
from semseg_automl.data.objects import Extent, count_small, extents


def test_extents__two_values_with_several_areas__gives_sizes_and_numbers() -> None:
    mask = np.zeros((12, 20), np.uint8)
    mask[1:4, 2:8] = 5
    mask[6:9, 2:8] = 5
    mask[10, 15] = 5
    mask[2, 12:14] = 9
    found = extents(mask)
    assert found[5] == (Extent(1, 1, 1), Extent(3, 6, 2))
    assert found[9] == (Extent(1, 2, 1),)
    assert found[0] == (Extent(12, 20, 1),)


def test_extents__pixels_touching_at_a_corner__are_one_object() -> None:
    assert extents(np.eye(5, dtype=np.uint8))[1] == (Extent(5, 5, 1),)


def test_extents__numbers_beyond_eight_bits__are_kept_apart() -> None:
    mask = np.array([[70_000, 70_000, -1], [0, 0, -1]], np.int32)
    assert extents(mask) == {70_000: (Extent(1, 2, 1),), -1: (Extent(2, 1, 1),), 0: (Extent(1, 2, 1),)}


@pytest.mark.parametrize("dtype", [np.uint8, np.int32])
@pytest.mark.parametrize("block", [1, 2, 5])
def test_extents__noise_and_blocks__are_those_of_each_value_alone(dtype: type, block: int) -> None:
    rng = np.random.default_rng(block)
    for _ in range(20):
        height, width, kinds = rng.integers(1, 16, 3)
        small = rng.integers(-3 if dtype is np.int32 else 0, kinds, (height, width))
        mask: NDArray[Any] = np.kron(small, np.ones((block, block), np.int64)).astype(dtype)
        expected: dict[int, list[Extent]] = {}
        for value in np.unique(mask).tolist():
            stats = cv2.connectedComponentsWithStats((mask == value).astype(np.uint8), connectivity=8)[2][1:]
            sizes, numbers = np.unique(stats[:, [3, 2]], axis=0, return_counts=True)
            expected[value] = [Extent(*map(int, row)) for row in np.column_stack([sizes, numbers])]
        assert {value: list(found) for value, found in extents(mask).items()} == expected


def test_extents__mask_of_noise__is_measured_value_by_value_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = np.kron(np.random.default_rng(0).integers(0, 3, (6, 6)), np.ones((9, 9), np.int64)).astype(np.uint8)
    by_runs = extents(mask)
    monkeypatch.setattr(module, "_joined", None)
    with pytest.raises(TypeError):
        extents(mask)
    monkeypatch.setattr(module, "MOST_RUNS", 3)
    assert extents(mask) == by_runs


def test_count_small__object_of_the_limit__is_not_small() -> None:
    objects = (Extent(16, 16, 2), Extent(15, 15, 3))
    assert count_small(objects, (400, 400), (100, 100)) == (3, 5)


@pytest.mark.parametrize(("extent", "small"), [(Extent(100, 2, 1), 0), (Extent(2, 100, 1), 0), (Extent(2, 2, 1), 1)])
def test_count_small__long_and_thin__is_no_small_object(extent: Extent, small: int) -> None:
    assert count_small([extent], (400, 400), (100, 100)) == (small, 1)


def test_count_small__image_of_another_aspect_ratio__each_side_has_its_scale() -> None:
    assert count_small([Extent(6, 6, 1)], (100, 400), (100, 100)) == (0, 1)
    assert count_small([Extent(3, 15, 1)], (100, 400), (100, 100)) == (1, 1)
