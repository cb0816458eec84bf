"""COCO's run lengths: literal strings of the COCO API, round trips, and everything that damage can do to them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from semseg_automl.data.drawn import DrawnMask, runs
from semseg_automl.data.rle import check_counts, decode_counts
from semseg_automl.errors import DataError

# Written by the COCO API 2.0.11 (frPyObjects).
LITERAL = [
    ([6, 1, 40, 4, 5, 4, 5, 4, 21], "61X13mN000`0"),
    ([0, 5, 2, 2, 2, 5], "052M03"),
    ([100000, 200000, 100000, 50000, 150000], "PeQ3PZS6PeQ3``]K`j`1"),
    ([1000, 3, 997, 3, 997, 3, 7], "Xo03Uo0000RQO"),
]


def compressed(counts: list[int]) -> str:
    """Write run lengths as the description says: differences from the fourth on, five bits a character, low first."""
    text = ""
    for position, count in enumerate(counts):
        number = count - counts[position - 2] if position > 2 else count
        while True:
            bits, number = number & 0x1F, number >> 5
            done = number == (-1 if bits & 0x10 else 0)
            text += chr(48 + bits + (0 if done else 0x20))
            if done:
                break
    return text


def drawn(counts: Any, size: tuple[int, int]) -> np.ndarray[Any, Any]:
    return DrawnMask(size, (runs(1, counts, size),), "m").draw()


@pytest.mark.parametrize(("counts", "text"), LITERAL)
def test_decode_counts__string_of_the_coco_api__gives_its_counts(counts: list[int], text: str) -> None:
    assert decode_counts(text).tolist() == counts
    assert compressed(counts) == text


@given(st.lists(st.integers(0, 2**30), min_size=1, max_size=40))
@settings(max_examples=200, deadline=None)
def test_decode_counts__any_counts__come_back(counts: list[int]) -> None:
    assert decode_counts(compressed(counts)).tolist() == counts


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**32 - 1))
@settings(max_examples=100, deadline=None)
def test_runs__any_mask__is_drawn_column_by_column(height: int, width: int, seed: int) -> None:
    mask = np.random.default_rng(seed).integers(0, 2, (height, width), dtype=np.uint8)
    flat = mask.T.ravel().tolist()
    counts, value = [0], 0
    for pixel in flat:
        if pixel != value:
            counts.append(0)
            value = pixel
        counts[-1] += 1
    np.testing.assert_array_equal(drawn(counts, (height, width)), mask)
    np.testing.assert_array_equal(drawn(compressed(counts), (height, width)), mask)


def test_runs__hand_made__starts_with_background_and_goes_down() -> None:
    assert drawn([1, 3, 2], (2, 3)).tolist() == [[0, 1, 0], [1, 1, 0]]
    assert drawn([0, 2, 4], (2, 3)).tolist() == [[1, 0, 0], [1, 0, 0]]
    assert drawn([1, 1, 0, 2, 2], (2, 3)).tolist() == [[0, 1, 0], [1, 1, 0]]  # an empty run between two
    assert drawn([6], (2, 3)).tolist() == [[0, 0, 0], [0, 0, 0]]


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ([1, 2, 2], r"its counts sum to 5, but 2 x 3 pixels are 6"),
        ([1, 2, 4], r"its counts sum to 7, but 2 x 3 pixels are 6"),
        ([], r"sum to 0, but 2 x 3"),
        ([9, -3], r"from -3 to 9; run lengths are 0 to H x W"),
        ([2**70, 6], r"run lengths are 0 to H x W"),
        ([1.5, 4.5], r"its counts are a list, not whole numbers"),
        ([True, 5], r"not whole numbers"),
        (None, r"its counts are a NoneType"),
        ("", r"an empty string"),
        ("06é", r"a character that is not ASCII"),
        ("0 6", r"its counts hold ' '"),
        ("06\x7f", r"its counts hold '\\x7f'"),
        ("0X", r"end in the middle of a number"),
        ("P" * 9 + "0", r"a number of more than 40 bits"),
        (compressed([8]) + compressed([-2]), r"the negative run length -2"),
    ],
)
def test_check_counts__damaged__says_what_is_wrong(counts: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        check_counts(counts, (2, 3))
