"""The rules: each finds what it is for, at its level, and nothing in a set without fault."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray

from semseg_automl.data.survey import survey_tables
from semseg_automl.data.table import read_table
from semseg_automl.findings import (
    Finding,
    LabelledRow,
    Place,
    Split,
    class_findings,
    class_of_values,
    duplicates,
    labelled_rows,
    mask_copies,
    mask_findings,
    object_classes,
    small_objects,
    unknown_values,
)
from semseg_automl.task import SegmentationTask, infer_task

Array = NDArray[Any]
BINARY = SegmentationTask("binary", values=(0, 255), class_names=("background", "polyp"))
THREE = SegmentationTask("multiclass", values=(0, 1, 2), class_names=("sky", "road", "car"), ignore_values=(255,))


def scene(seed: int, side: int = 48) -> NDArray[np.uint8]:
    coarse = np.random.default_rng(seed).integers(0, 256, (7, 9, 3)).astype(np.uint8)
    return cv2.resize(coarse, (side, side), interpolation=cv2.INTER_CUBIC).astype(np.uint8)


def blob(seed: int, value: int = 255, side: int = 48) -> NDArray[np.uint8]:
    """Return a mask with one rectangle of its own."""
    rng = np.random.default_rng(seed)
    top, left, height, width = rng.integers(8, 20, 4)
    mask = np.zeros((side, side), np.uint8)
    mask[top : top + height, left : left + width] = value
    return mask


def split_of(name: str, images: list[Array], masks: list[Array]) -> Split:
    table = read_table(pd.DataFrame({"image": images, "label": masks}))
    return Split(name, table, survey_tables([table], workers=1)[0])


def usual(name: str, seeds: range) -> Split:
    return split_of(name, [scene(seed) for seed in seeds], [blob(seed) for seed in seeds])


def told(found: list[Finding]) -> list[tuple[str, int | None, str, str]]:
    return [(each.place.split, each.place.row, each.level, each.kind) for each in found]


def test_rules__set_without_fault__find_nothing() -> None:
    splits = [usual("train", range(24)), usual("test", range(100, 106))]
    rows = labelled_rows(BINARY, splits)
    assert len(rows) == 30
    found = unknown_values(BINARY, splits) + class_findings(BINARY, rows, ["train", "test"])
    found += mask_findings(BINARY, rows) + mask_copies(splits, rows) + duplicates(splits)
    found += small_objects(BINARY, rows, (48, 48))[0]
    assert found == []


def test_labelled_rows__ignored_and_unknown_values__count_as_no_class() -> None:
    mask = np.zeros((48, 48), np.uint8)
    mask[:4], mask[4:6], mask[6] = 2, 255, 9
    (row,) = labelled_rows(THREE, [split_of("train", [scene(0)], [mask])])
    assert row.pixels == (41 * 48, 0, 4 * 48)
    assert row.ignored == 2 * 48
    assert row.objects is not None
    assert [2, 4, 48, 1] in row.objects.tolist()
    assert row.classes[2] == 2
    assert 9 not in row.classes


def test_labelled_rows__unusable_row__is_left_out() -> None:
    split = split_of("train", [scene(0), scene(1)], [blob(0), blob(1)[:40]])
    assert [row.place for row in labelled_rows(BINARY, [split])] == [Place("train", 0)]


def test_class_of_values__colours_palettes_and_snapped__are_understood() -> None:
    colours = np.zeros((48, 48, 3), np.uint8)
    colours[5:30, 5:30] = (255, 0, 0)
    split = split_of("train", [scene(0), scene(1)], [colours, np.zeros((48, 48, 3), np.uint8)])
    mask = split.rows[0].mask
    assert mask is not None
    task = infer_task([mask.counts], encodings=[mask.encoding])
    assert class_of_values(task, mask) == {0: 0, 0xFF0000: 1}
    black = split.rows[1].mask  # stored as one grey channel
    assert black is not None
    assert class_of_values(task, black) == {0: 0}
    snapped = SegmentationTask("binary", values=(0, 255), class_names=("no", "yes"), snapped=True)
    grey = blob(0)
    grey[0, :5] = (10, 100, 140, 200, 250)
    soft = split_of("train", [scene(0)], [grey]).rows[0].mask
    assert soft is not None
    assert class_of_values(snapped, soft) == {0: 0, 10: 0, 100: 0, 140: 1, 200: 1, 250: 1, 255: 1}
    assert labelled_rows(snapped, [split_of("train", [scene(0)], [grey])])[0].objects is None


def test_unknown_values__value_of_no_class__is_an_error_with_its_pixels() -> None:
    mask = blob(0)
    mask[0, :3] = 7
    found = unknown_values(BINARY, [usual("train", range(2)), split_of("test", [scene(9)], [mask])])
    assert told(found) == [("test", 0, "error", "unknown value")]
    assert "7 (3 pixels)" in found[0].message


def test_unknown_values__mask_of_numbers_among_colours__is_an_error_not_raised() -> None:
    colours = np.zeros((48, 48, 3), np.uint8)
    colours[5:30, 5:30] = (255, 0, 0)
    train = split_of("train", [scene(0)], [colours])
    mask = train.rows[0].mask
    assert mask is not None
    task = infer_task([mask.counts], encodings=[mask.encoding])
    test = split_of("test", [scene(1)], [np.full((48, 48), 700, np.uint16)])
    assert told(unknown_values(task, [train, test])) == [("test", 0, "error", "unknown value")]
    assert [sum(row.pixels) for row in labelled_rows(task, [train, test])] == [48 * 48, 0]


def test_class_findings__class_only_outside_training__is_an_error() -> None:
    train = split_of("train", [scene(0), scene(1)], [blob(0, 1), blob(1, 1)])
    val = split_of("val", [scene(2), scene(3)], [blob(2, 2), blob(3, 1)])
    found = class_findings(THREE, labelled_rows(THREE, [train, val]), ["train", "val"])
    assert told(found) == [("train", None, "error", "class not trained")]
    assert "car (value 2)" in found[0].message
    assert "1 of val" in found[0].message


def test_class_findings__class_in_one_training_image__is_a_note() -> None:
    train = split_of("train", [scene(0), scene(1), scene(2)], [blob(0, 1), blob(1, 1), blob(2, 2)])
    found = class_findings(THREE, labelled_rows(THREE, [train]), ["train"])
    assert told(found) == [("train", None, "note", "rare class")]
    assert "car" in found[0].message


def test_mask_findings__empty_full_and_unlabelled__are_told_apart() -> None:
    task = SegmentationTask("binary", values=(0, 1), class_names=("background", "polyp"), ignore_values=(255,))
    masks = [blob(seed, 1) for seed in range(12)]
    masks[3] = np.zeros((48, 48), np.uint8)
    masks[5] = np.ones((48, 48), np.uint8)
    masks[7] = np.full((48, 48), 255, np.uint8)
    found = mask_findings(task, labelled_rows(task, [split_of("train", [scene(i) for i in range(12)], masks)]))
    assert sorted(told(found)) == [
        ("train", 3, "note", "empty mask"),
        ("train", 5, "warning", "full mask"),
        ("train", 7, "warning", "no label"),
    ]


def test_mask_findings__many_full_masks__are_usual() -> None:
    masks = [np.full((48, 48), 255, np.uint8) if seed < 4 else blob(seed) for seed in range(12)]
    rows = labelled_rows(BINARY, [split_of("train", [scene(i) for i in range(12)], masks)])
    assert mask_findings(BINARY, rows) == []


def test_mask_findings__inverted_mask_among_others__is_far_from_them() -> None:
    masks = [blob(seed) for seed in range(24)]
    masks[6] = 255 - blob(6)
    split = split_of("train", [scene(i) for i in range(24)], masks)
    found = mask_findings(BINARY, labelled_rows(BINARY, [split]))
    assert told(found) == [("train", 6, "note", "unusual share")]
    few = split_of("train", [scene(i) for i in range(10)], masks[:10])
    assert mask_findings(BINARY, labelled_rows(BINARY, [few])) == []


def test_mask_copies__mask_with_the_pixels_of_its_image__is_an_error() -> None:
    picture = cv2.cvtColor(scene(3), cv2.COLOR_RGB2GRAY)
    split = split_of("train", [scene(0), np.repeat(picture[:, :, None], 3, 2)], [blob(0), picture])
    assert told(mask_copies([split], [])) == [("train", 1, "error", "mask is image")]


def test_mask_copies__one_mask_for_different_images__is_a_warning_for_all_but_the_first() -> None:
    split = split_of("train", [scene(0), scene(1), scene(2), scene(3)], [blob(9), blob(1), blob(9), blob(9)])
    found = mask_copies([split], labelled_rows(BINARY, [split]))
    assert told(found) == [("train", 2, "warning", "repeated mask"), ("train", 3, "warning", "repeated mask")]
    assert found[0].other == Place("train", 0)
    assert "3 images share it" in found[0].message


def test_mask_copies__copies_of_an_image_empty_masks_and_specks__may_share_one() -> None:
    brighter = np.clip(scene(0).astype(int) + 10, 0, 255).astype(np.uint8)
    empty, speck = np.zeros((48, 48), np.uint8), np.zeros((48, 48), np.uint8)
    speck[5:9, 5:9] = 255
    images = [scene(0), brighter, scene(1), scene(2), scene(3), scene(4)]
    split = split_of("train", images, [blob(0), blob(0), empty, empty, speck, speck])
    assert mask_copies([split], labelled_rows(BINARY, [split])) == []


def test_duplicates__same_image_across_splits__is_an_error_naming_both() -> None:
    splits = [usual("train", range(4)), split_of("test", [scene(50), scene(2)], [blob(50), blob(2)])]
    (found,) = duplicates(splits)
    assert told([found]) == [("test", 1, "error", "leak")]
    assert found.other == Place("train", 2)
    assert "train row 2" in found.message
    assert "another mask" not in found.message


def test_duplicates__same_image_within_a_split__is_a_warning_and_says_when_masks_differ() -> None:
    images = [scene(0), scene(1), scene(0), scene(1)]
    split = split_of("train", images, [blob(0), blob(1), blob(0), blob(7)])
    found = duplicates([split])
    assert told(found) == [("train", 2, "warning", "duplicate"), ("train", 3, "warning", "conflicting masks")]
    assert "with another mask" in found[1].message


def test_duplicates__image_in_all_splits_twice__is_told_within_and_across() -> None:
    splits = [split_of(name, [scene(0), scene(0)], [blob(0), blob(0)]) for name in ("train", "val")]
    assert told(duplicates(splits)) == [
        ("train", 1, "warning", "duplicate"),
        ("val", 0, "error", "leak"),
        ("val", 1, "error", "leak"),
        ("val", 1, "warning", "duplicate"),
    ]


def test_duplicates__smaller_copy__is_an_error_across_and_a_note_within() -> None:
    smaller = cv2.resize(scene(2), (24, 24), interpolation=cv2.INTER_AREA).astype(np.uint8)
    mask = blob(2)[::2, ::2]
    train = split_of("train", [scene(1), scene(2), smaller], [blob(1), blob(2), mask])
    test = split_of("test", [np.ascontiguousarray(scene(1)[:, ::-1])], [blob(8)])
    found = duplicates([train, test])
    assert told(found) == [("train", 2, "note", "near duplicate"), ("test", 0, "error", "leak of a copy")]
    assert "mirrored" in found[1].message
    assert "mirrored" not in found[0].message


def test_duplicates__unusable_mask__the_image_is_compared_all_the_same() -> None:
    test = split_of("test", [scene(0)], [blob(0)[:30]])
    assert told(duplicates([usual("train", range(2)), test])) == [("test", 0, "error", "leak")]


def test_duplicates__pictures_of_a_fixed_camera__are_one_note() -> None:
    rng = np.random.default_rng(0)
    base = scene(0).astype(int)
    images = [np.clip(base + rng.integers(-6, 7, base.shape), 0, 255).astype(np.uint8) for _ in range(22)]
    splits = [
        split_of("train", images[:15], [blob(i) for i in range(15)]),
        split_of("test", images[15:], [blob(i) for i in range(15, 22)]),
    ]
    assert told(duplicates(splits)) == [("train", None, "note", "alike images")]


@pytest.mark.parametrize(("specks", "level"), [(1, "note"), (12, "warning")])
def test_small_objects__specks_beside_objects__level_follows_their_share(specks: int, level: str) -> None:
    mask = np.zeros((64, 64), np.uint8)
    for index in range(12):
        mask[5 * index : 5 * index + 4, 30:40] = 255
    for index in range(specks):
        mask[5 * index, 2] = 255
    rows = labelled_rows(BINARY, [split_of("train", [scene(0, 64)], [mask])])
    (found,), counts = small_objects(BINARY, rows, (64, 64))
    assert (found.level, found.kind) == (level, "small objects")
    assert counts["train"][1] == (specks, 12 + specks, 1)
    assert "64 x 64" in found.message
    bigger, _ = small_objects(BINARY, rows, (256, 256))
    assert bigger == []


def test_small_objects__several_splits_and_kinds_of_masks__are_counted_by_class() -> None:
    masks = [np.zeros((64, 64), np.uint8) for _ in range(4)]
    masks[0][0, 0], masks[0][9, 9:20] = 1, 2  # a speck of class 1, and a line of class 2
    masks[1][0, :20:2] = 2  # ten specks of class 2
    masks[2][:2, :2], masks[2][50, 50] = 1, 9  # as small, and of no class
    masks[3][5, 5] = 255  # without a label
    images = [scene(seed, 64) for seed in range(4)]
    splits = [split_of("train", images[:3], masks[:3]), split_of("val", images[3:], masks[3:])]
    _, counts = small_objects(THREE, labelled_rows(THREE, splits), (64, 64))
    assert counts == {"train": [(0, 3, 0), (2, 2, 2), (10, 11, 1)], "val": [(0, 1, 0), (0, 0, 0), (0, 0, 0)]}


def test_object_classes__background__is_no_object() -> None:
    named = SegmentationTask("multiclass", values=(0, 1, 2), class_names=("Background", "a", "b"))
    assert [list(object_classes(task)) for task in (BINARY, THREE, named)] == [[1], [0, 1, 2], [1, 2]]


def test_foreground__row_without_labels__is_nan() -> None:
    (row,) = labelled_rows(THREE, [split_of("train", [scene(0)], [np.full((48, 48), 255, np.uint8)])])
    assert isinstance(row, LabelledRow)
    assert np.isnan(row.foreground)
