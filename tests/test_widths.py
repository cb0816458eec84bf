"""How wide objects are: the measure itself, where the check of the rows takes it, and what a plan is told."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray

from semseg_automl.data.checks import MEASURED_ROWS, RowCheck, check_rows, usable_rows
from semseg_automl.data.encodings import NUMBERS, MaskEncoding
from semseg_automl.data.images import ImageSource
from semseg_automl.data.table import MaskTable, read_table
from semseg_automl.data.widths import typical_widths
from semseg_automl.fingerprint import object_widths
from semseg_automl.task import SegmentationTask

BINARY = SegmentationTask("binary", (0, 255), ("background", "crack"), ignore_values=(100,))


def strips(width: int, every: int = 40, side: int = 200) -> NDArray[np.uint8]:
    """Draw strips of 255 across a mask of zeros."""
    mask = np.zeros((side, side), np.uint8)
    for top in range(every // 2, side, every):
        mask[top : top + width] = 255
    return mask


@pytest.mark.parametrize("width", [2, 5, 12])
@pytest.mark.parametrize("turned", [False, True])
def test_typical_widths__strips__are_as_wide_as_they_are(turned: bool, width: int) -> None:
    mask = strips(width)
    found = typical_widths(mask.T.copy() if turned else mask)
    assert found[255] == pytest.approx(width / 200, abs=0.3 / 200)


def test_typical_widths__discs__are_two_thirds_of_the_diameter_whatever_their_number() -> None:
    one, many = (np.zeros((300, 300), np.uint8) for _ in range(2))
    cv2.circle(one, (150, 150), 30, 1, -1)
    for at in range(50, 300, 100):
        cv2.circle(many, (at, at), 30, 1, -1)
    assert typical_widths(one)[1] == pytest.approx(40 / 300, rel=0.06)
    assert typical_widths(many)[1] == pytest.approx(typical_widths(one)[1], rel=0.01)


def test_typical_widths__stray_pixels__count_for_next_to_nothing() -> None:
    mask = np.zeros((200, 200), np.uint8)
    mask[60:140, 60:140] = 1
    clean = typical_widths(mask)[1]
    mask[5:40:7, 5:190:9] = 1
    assert typical_widths(mask)[1] == pytest.approx(clean, rel=0.05)


def test_typical_widths__object_cut_by_the_border__is_not_thinner_there() -> None:
    mask = np.zeros((100, 100), np.uint8)
    mask[:, 20:30] = 1
    assert typical_widths(mask)[1] == pytest.approx(0.1, abs=0.005)
    assert typical_widths(np.full((50, 80), 3, np.uint8)) == {3: 1.0}


def test_typical_widths__large_mask__is_measured_smaller_to_the_same_share() -> None:
    large = np.kron(strips(10), np.ones((8, 8), np.uint8))
    assert large.size > 2**20
    assert typical_widths(large)[255] == pytest.approx(0.05, abs=0.002)


def table_of(masks: list[NDArray[np.uint8]]) -> MaskTable:
    """Make a table of masks in memory, with black images."""
    images: list[ImageSource] = [np.zeros((*mask.shape[:2], 3), np.uint8) for mask in masks]
    labels: list[ImageSource] = list(masks)
    return MaskTable(tuple(images), tuple(labels), pd.RangeIndex(len(masks)))


def test_check_rows__widths_asked__are_measured_in_some_rows_of_many() -> None:
    table = table_of([strips(2, every=8, side=16)] * 250)
    assert not any(check.widths for check in check_rows(table))
    checks = check_rows(table, widths=True)
    measured = [position for position, check in enumerate(checks) if check.widths]
    assert len(measured) == 84 <= MEASURED_ROWS
    assert measured == list(range(0, 250, 3))
    assert len([check for check in usable_rows(table, widths=True)[1] if check.widths]) == 84
    few = check_rows(table.take(range(7)), widths=True)
    assert all(check.widths.keys() == {0, 255} for check in few)


def test_check_rows__colour_masks__are_measured_by_packed_colour() -> None:
    mask = np.zeros((20, 20, 3), np.uint8)
    mask[5:9, :, 0] = 255
    (check,) = check_rows(table_of([mask]), widths=True)
    assert check.widths.keys() == check.value_counts.keys() == {0, 0xFF0000}


def test_check_rows__smoothed_masks__tell_no_widths() -> None:
    gradient = np.tile(np.arange(200, dtype=np.uint8), (20, 1))
    (check,) = check_rows(table_of([gradient]), widths=True)
    assert check.widths == {}


def check_of(widths: dict[int, float], encoding: MaskEncoding = NUMBERS) -> RowCheck:
    """Make what the check of a row found."""
    counts = dict.fromkeys(widths, 5)
    return RowCheck((10, 10), counts, encoding, widths)


def test_object_widths__binary__are_those_of_the_foreground() -> None:
    checks = [check_of({0: 0.9, 255: 0.01 * n, 100: 0.5}) for n in range(1, 12)]
    typical, small = object_widths(BINARY, [*checks, check_of({})]) or (0.0, 0.0)
    assert (typical, small) == pytest.approx((0.06, 0.03))


def test_object_widths__classes__count_once_an_image() -> None:
    task = SegmentationTask("multiclass", (0, 1, 5), ("sky", "road", "pole"))
    checks = [check_of({0: 0.8, 1: 0.4, 5: 0.01}), check_of({0: 0.8, 1: 0.4})]
    assert object_widths(task, checks) == pytest.approx((0.4, 0.322))


def test_object_widths__palette_of_a_task_of_colours__is_looked_up() -> None:
    task = SegmentationTask("binary", (0, 0xFF0000), ("background", "crack"), colours=True)
    encoding = MaskEncoding(palette=(0, 0x00FF00, 0xFF0000))
    assert object_widths(task, [check_of({0: 0.9, 1: 0.7, 2: 0.2}, encoding)]) == (0.2, 0.2)


def test_object_widths__nothing_to_go_by__is_none() -> None:
    smoothed = SegmentationTask("binary", (0, 255), ("background", "crack"), snapped=True)
    assert object_widths(smoothed, [check_of({0: 0.9, 255: 0.1})]) is None
    assert object_widths(BINARY, [check_of({}), check_of({0: 0.9})]) is None


@pytest.mark.parametrize(("name", "low", "high"), [("road_crack", 0.005, 0.02), ("kvasir_polyp", 0.1, 0.3)])
def test_object_widths__real_masks__tell_thin_from_large(
    name: str, low: float, high: float, shared: Callable[[str], Path]
) -> None:
    folder = shared(f"data/{name}")
    checks = check_rows(read_table(folder / "val.csv"), widths=True)
    typical, small = object_widths(SegmentationTask("binary", (0, 255), ("background", "it")), checks) or (0.0, 0.0)
    assert low < small <= typical < high
