"""Smoothed and JPEG masks: told from real label masks by where their values are, never by counts alone."""

from __future__ import annotations

import warnings
from typing import Any

import cv2
import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray

from semseg_automl.data.checks import check_rows
from semseg_automl.data.modes import find_modes, snap
from semseg_automl.data.table import MaskTable
from semseg_automl.errors import DataError
from semseg_automl.task import SegmentationTask, infer_task

Mask = NDArray[Any]


def ellipses(values: tuple[int, ...], seed: int, size: tuple[int, int] = (120, 160)) -> Mask:
    """The first value with two ellipses of each of the others."""
    rng = np.random.default_rng(seed)
    mask = np.full(size, values[0], np.uint8)
    for value in values[1:] * 2:
        centre = (int(rng.integers(size[1])), int(rng.integers(size[0])))
        cv2.ellipse(mask, centre, (int(rng.integers(8, 30)), int(rng.integers(8, 30))), 0, 0, 360, value, -1)
    return mask


def jpeg(mask: Mask, quality: int = 75) -> Mask:
    coded = cv2.imencode(".jpg", mask, [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
    return np.asarray(cv2.imdecode(coded, cv2.IMREAD_UNCHANGED))


def halved(mask: Mask) -> Mask:
    small: Mask = cv2.resize(mask, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
    return small


def inferred(masks: list[Mask], **given: Any) -> SegmentationTask:
    images = tuple(np.zeros((*mask.shape[:2], 3), np.uint8) for mask in masks)
    checks = check_rows(MaskTable(images, tuple(masks), pd.RangeIndex(len(masks))), workers=1)
    return infer_task([c.value_counts for c in checks], encodings=[c.encoding for c in checks], **given)


def quietly(masks: list[Mask], **given: Any) -> SegmentationTask:
    """Infer where a warning is a failure."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return inferred(masks, **given)


@pytest.mark.parametrize("quality", [30, 60, 90])
@pytest.mark.parametrize("values", [(0, 255), (40, 200), (0, 128, 255), (0, 80, 160, 240)])
def test_infer_task__jpeg_masks__are_snapped_to_what_was_painted(values: tuple[int, ...], quality: int) -> None:
    clean = [ellipses(values, seed) for seed in range(6)]
    with pytest.warns(UserWarning, match=r"^\d+\.\d% of the pixels lie between the values .*smoothed or saved as JPEG"):
        task = inferred([jpeg(mask, quality) for mask in clean])
    assert task.ignore_values == ()
    assert np.abs(np.array(task.values) - values).max() <= 2  # JPEG shifts even wide areas by a step or two
    assert any("are taken as the nearest" in reason for reason in task.reasons)
    for mask in clean:
        assert np.array_equal(task.encode(mask), np.searchsorted(values, mask))
        assert (task.encode(jpeg(mask, quality)) == task.encode(mask)).mean() > 0.97


def test_infer_task__one_clean_and_one_full_mask_among_jpeg__changes_nothing() -> None:
    masks = [jpeg(ellipses((0, 255), seed)) for seed in range(6)]
    extra = [ellipses((0, 255), 9), np.full((120, 160), 255, np.uint8), np.zeros((120, 160), np.uint8)]
    with pytest.warns(UserWarning, match="lie between the values 0, 255"):
        task = inferred([*masks, *extra])
    assert (task.values, task.snapped) == ((0, 255), True)


def test_infer_task__number_of_classes_given__settles_a_few_levels() -> None:
    masks = [halved(ellipses((0, 255), seed)) for seed in range(4)]
    assert len(quietly(masks).values) == 5  # five greys alone are no evidence
    for given in ({"num_classes": 2}, {"class_names": ["no", "yes"]}, {"class_names": {0: "no", 255: "yes"}}):
        with pytest.warns(UserWarning, match="0, 255 and are taken as the nearest"):
            task = inferred(masks, **given)
        assert (task.values, task.snapped) == ((0, 255), True)


def test_infer_task__thin_classes_named__are_kept_and_the_rest_snapped() -> None:
    masks = [ellipses((0, 255), seed) for seed in range(4)]
    for mask in masks:
        mask[::12] = 120  # lines of one pixel: by their areas alone no class
    with pytest.warns(UserWarning, match="0, 120, 255"):
        task = inferred([jpeg(mask, 95) for mask in masks], class_names={0: "a", 120: "line", 255: "b"})
    assert task.values == (0, 120, 255)
    assert (task.encode(jpeg(masks[0], 95)) == task.encode(masks[0])).mean() > 0.99


def test_infer_task__thin_value_nobody_named__is_an_error_and_not_snapped() -> None:
    masks = [ellipses(tuple(range(0, 200, 20)), seed) for seed in range(4)]
    for mask in masks:
        mask[::20] = 255  # a border of one pixel
    names = {value: f"n{value}" for value in range(0, 200, 20)}
    with pytest.raises(DataError, match=r"hold 11 values, .* but 10 classes were given"):
        quietly(masks, class_names=names)
    with pytest.raises(DataError, match=r"hold 11 values, .* but 10 classes were given"):
        quietly(masks, num_classes=10)
    assert quietly(masks, class_names=names, ignore_label=255).values == tuple(names)


def test_infer_task__real_labels__are_never_snapped() -> None:
    every = [ellipses(tuple(range(64)), seed) for seed in range(4)]
    assert quietly(every).values == tuple(np.unique(every).tolist())
    spread = [ellipses(tuple(range(0, 250, 10)), seed) for seed in range(4)]
    assert quietly(spread).values == tuple(np.unique(spread).tolist())
    thin = [ellipses((0, 1, 2), seed) for seed in range(4)]
    for mask in thin:
        for line in range(7):
            mask[line * 15] = 60 + line
    assert not quietly(thin).snapped
    many = [ellipses(tuple(range(150)), seed) for seed in range(4)]
    assert quietly(many, num_classes=150).values == tuple(range(150))
    with pytest.raises(DataError, match="different values"):
        quietly(many)
    sixteen = [ellipses((0, 255), seed).astype(np.int32) * 200 for seed in range(4)]
    assert quietly(sixteen).values == (0, 51_000)
    noise = np.random.default_rng(0).integers(0, 60, (40, 40)).astype(np.uint8)
    assert quietly([noise]).values == tuple(range(60))


def test_infer_task__modes_side_by_side__are_an_error_until_named() -> None:
    masks = [cv2.GaussianBlur(ellipses((0, 255), 0), (0, 0), 10)]
    masks[0][:, 130:] = 255
    with pytest.raises(DataError, match=r"fill areas, but 0, 1 are too close to take every pixel as the nearest"):
        quietly(masks)
    with pytest.warns(UserWarning, match="between the values 0, 255"):
        task = inferred(masks, class_names={0: "no", 255: "yes"})
    assert (task.values, task.snapped) == ((0, 255), True)
    assert np.array_equal(task.encode(masks[0]), masks[0] > 127)


@pytest.mark.parametrize("channels", [1, 3])
def test_infer_task__photographs_or_too_much_between__are_an_error(channels: int) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (120, 160, channels)).astype(np.uint8)
    photograph = cv2.GaussianBlur(noise, (0, 0), 2).reshape(noise.shape)
    noise[:, :50] = 0
    noise[:, 110:] = 255
    for mask, message in (
        (photograph, r"different (values|colours)"),
        (noise, r"fill areas, but \d+% of the pixels are"),
    ):
        with pytest.raises(DataError, match=message):
            quietly([mask])


def test_find_modes__colours_beyond_those_listed__count_as_moved() -> None:
    pixels = {0: 900, 0xFF0000: 80, **{4 + i: 1 for i in range(10)}}
    modes = find_modes(pixels, {0: 890, 0xFF0000: 70}, colours=True, unlisted=10)
    assert modes is not None
    assert modes.values == (0, 0xFF0000)
    assert modes.pixels == {0: 910, 0xFF0000: 80}
    assert (modes.moved, modes.far, modes.ambiguous) == (0.02, 0.015, False)  # 5 to 8 are within 8 of black
    many = find_modes(pixels, {0: 890, 0xFF0000: 70}, colours=True, unlisted=500)
    assert many is not None
    assert many.ambiguous


def test_snap__colours_and_greys__go_to_the_nearest() -> None:
    nearest, distance = snap([0x100000, 0x0000F0], [0, 0xFF0000, 0x0000FF], colours=True)
    assert nearest.tolist() == [0, 0x0000FF]
    assert distance.tolist() == [16, 15]
    assert snap([127, 128, 64], [0, 255], colours=False)[0].tolist() == [0, 255, 0]
