"""Counting: values, areas and runs, and that each is looked for once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from semseg_automl.data import counting as module
from semseg_automl.data.counting import Values, count_areas, count_values


def areas_of(values: int, dtype: type = np.uint8) -> NDArray[Any]:
    """Return squares of nine pixels of so many values, in the order of chance."""
    small = np.random.default_rng(values).permutation(36).reshape(6, 6) % values
    mask: NDArray[Any] = np.kron(small, np.ones((9, 9), np.int64)).astype(dtype)
    return mask


def noise(values: int, dtype: type = np.uint8) -> NDArray[Any]:
    """Return pixels of so many values, in the order of chance."""
    mask: NDArray[Any] = (np.random.default_rng(values).permutation(48 * 40).reshape(48, 40) % values).astype(dtype)
    return mask


@pytest.mark.parametrize("dtype", [np.uint8, np.int32])
def test_runs__random_areas__are_counted_as_pixels_are(dtype: type) -> None:
    rng = np.random.default_rng(3)
    for values in (1, 2, 3, 9) * 8:
        height, width = rng.integers(1, 9, 2)
        small = rng.integers(-2 if dtype is np.int32 else 0, values, (height, width))
        mask: NDArray[Any] = np.kron(small, np.ones((rng.integers(1, 4), rng.integers(8, 12)), np.int64)).astype(dtype)
        runs = Values(mask).runs
        assert runs is not None
        numbers = dict(zip(*(found.tolist() for found in np.unique(mask, return_counts=True)), strict=True))
        assert runs.counts() == count_values(mask) == numbers
        assert runs.areas() == count_areas(mask)


def test_count_values__few_pixels_of_other_values__are_not_overlooked() -> None:
    mask = np.zeros((100, 100), np.uint8)
    mask[50:] = 9
    assert count_values(mask) == {0: 5000, 9: 5000}
    mask[10, 11] = 4
    assert count_values(mask) == {0: 4999, 4: 1, 9: 5000}


@pytest.mark.parametrize("dtype", [np.uint8, np.int32])
@pytest.mark.parametrize("values", [1, 2, 3, 9])
@pytest.mark.parametrize("make", [areas_of, noise])
def test_values__areas_and_noise__are_counted_as_numpy_does(make: Any, values: int, dtype: type) -> None:
    mask = make(values, dtype)
    seen = Values(mask)
    numbers = dict(zip(*(found.tolist() for found in np.unique(mask, return_counts=True)), strict=True))
    assert seen.counts == numbers
    assert seen.areas == count_areas(mask)
    assert seen.noisy is (make is noise and values > 1)
    assert (seen.runs is None) is seen.noisy


def test_values__many_values__looks_for_runs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    plain = module.Runs

    def counted(*parts: Any) -> module.Runs:
        made.append(1)
        return plain(*parts)

    monkeypatch.setattr(module, "Runs", counted)
    seen = Values(areas_of(9))
    assert len(seen.counts) == len(seen.areas) == 9
    seen.digest()
    assert made == [1]


@pytest.mark.parametrize("values", [1, 2, 9])
def test_values__noise__is_looked_at_once(values: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """That there are no runs is remembered as the runs would be."""
    asked: list[int] = []
    plain = np.count_nonzero

    def counted(array: NDArray[Any]) -> int:
        asked.append(1)
        return int(plain(array))

    monkeypatch.setattr(np, "count_nonzero", counted)
    seen = Values(noise(values))
    _ = seen.noisy, seen.runs, seen.runs, seen.noisy
    assert len(asked) == 1


@pytest.mark.parametrize("values", [1, 2, 9])
def test_values_where__any_number_of_values__keeps_two_places_at_most(values: int) -> None:
    mask = areas_of(values)
    seen = Values(mask)
    for _ in range(2):
        for value in range(values + 1):
            np.testing.assert_array_equal(seen.where(value), mask == value)
    assert seen.where(0) is seen.where(0)
    assert len(seen._places) == 2, "of a large mask, all of them would take more memory than it"


def test_values_digest__other_values_shapes_and_places__differ() -> None:
    masks: list[NDArray[Any]] = []
    for make in (areas_of, noise):
        for values in (1, 2, 3, 9):
            mask = make(values)
            moved, other = mask.copy(), mask.copy()
            moved[0, 0] = 1 - min(1, moved[0, 0])
            other[other == values - 1] = 77
            masks += [mask, moved, other, mask.T.copy(), mask[:-1], mask.astype(np.int32)]
    flat = np.zeros((3, 4), np.uint8)
    masks += [flat, flat.reshape(4, 3), flat + 1, flat.reshape(1, 12)]
    digests: dict[str, NDArray[Any]] = {}
    for mask in masks:
        same = digests.setdefault(Values(mask).digest(), mask)
        assert same.dtype == mask.dtype
        assert np.array_equal(same, mask)
        assert Values(mask).digest() == Values(np.asfortranarray(mask)).digest()
    assert len(digests) > 40


@pytest.mark.parametrize("changed", [(0, 0, 40), (slice(None), slice(None), 40), (slice(0, 24), slice(None), 7)])
def test_values_digest__mask_that_differs_in_little__differs(changed: tuple[slice | int, slice | int, int]) -> None:
    mask = np.zeros((32, 32), np.uint8)
    mask[16:] = 7
    other = mask.copy()
    other[changed[0], changed[1]] = changed[2]
    assert Values(other).digest() != Values(mask).digest()
    assert Values(mask).digest() == Values(mask.copy()).digest()
