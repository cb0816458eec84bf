"""Strata on hand-made images: columns of every kind, object size, distance to a boundary, class."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from semseg_automl.calibration import Judged
from semseg_automl.errors import ConfigError, DataError
from semseg_automl.strata import (
    DISTANCE_NAMES,
    boundary_distance,
    check_stratum,
    column_strata,
    object_share,
    stratified,
)
from semseg_automl.task import SegmentationTask

BINARY = SegmentationTask("binary", (0, 255), ("background", "polyp"))
THREE = SegmentationTask("multiclass", (0, 1, 2), ("sky", "road", "car"), ignore_values=(255,))


def image_of(labels: list[list[int]], target: list[list[int]], task: SegmentationTask = BINARY) -> Judged:
    """An image with the scores that its labels come from."""
    decided = torch.tensor(labels)
    if task.kind == "binary":
        return decided[None].float(), decided, torch.tensor(target)
    return torch.nn.functional.one_hot(decided, 3).permute(2, 0, 1).float(), decided, torch.tensor(target)


def strata_of(column: list[Any], **options: Any) -> dict[Any, list[int]]:
    """Rows by stratum."""
    found = column_strata(pd.Series(column, name="c", **options))
    return {name: rows.tolist() for name, rows in found.items()}


def test_column_strata__words_and_missing_cells__are_sorted_with_missing_last() -> None:
    assert strata_of(["b", None, "a", "b", float("nan")]) == {"a": [2], "b": [0, 3], "missing": [1, 4]}
    assert list(strata_of(["b", None, "a"])) == ["a", "b", "missing"]


def test_column_strata__few_numbers_and_truth_values__are_strata_each() -> None:
    assert strata_of([2, 1, 2]) == {1: [1], 2: [0, 2]}
    assert strata_of([True, False, True]) == {False: [1], True: [0, 2]}
    assert strata_of([2.0, math.nan]) == {2.0: [0], "missing": [1]}


def test_column_strata__many_numbers__are_split_at_the_quartiles() -> None:
    found = strata_of([*range(40, 60), None])
    assert list(found) == ["40.0 to 44.0", "45.0 to 49.0", "50.0 to 54.0", "55.0 to 59.0", "missing"]
    assert [len(rows) for rows in found.values()] == [5, 5, 5, 5, 1]
    assert found["missing"] == [20]


def test_column_strata__many_equal_numbers__stay_together() -> None:
    found = strata_of([0] * 30 + list(range(1, 12)))
    assert found["0 to 0"] == list(range(30))
    assert sum(map(len, found.values())) == 41


def test_column_strata__categories__keep_their_order_without_the_unused() -> None:
    column = pd.Categorical(["low", "high", None], categories=["low", "mid", "high"], ordered=True)
    assert list(strata_of(list(column), dtype=column.dtype)) == ["low", "high", "missing"]


def test_column_strata__mixed_types__come_as_they_are() -> None:
    assert list(strata_of(["b", 3, "a"])) == ["b", 3, "a"]


def test_column_strata__arrays_or_the_word_for_missing__raise() -> None:
    with pytest.raises(DataError, match="'c' holds ndarray"):
        strata_of([np.zeros(2), np.zeros(2)])
    with pytest.raises(DataError, match="the word 'missing' beside cells"):
        strata_of(["missing", None])
    assert strata_of(["missing", "a"]) == {"a": [1], "missing": [0]}


def test_check_stratum__unknown_or_ambiguous__raises() -> None:
    frame = pd.DataFrame({"image": ["a"], "site": [1]})
    with pytest.raises(ConfigError, match=r"'sites'; did you mean 'site'.*image, site, or one of class, object_size"):
        check_stratum("sites", frame, with_metrics=False)
    with pytest.raises(ConfigError, match="by is 3"):
        check_stratum(3, frame, with_metrics=False)
    with pytest.raises(DataError, match="2 columns named 'site'"):
        check_stratum("site", pd.concat([frame, frame], axis=1), with_metrics=False)
    for by in ("class", "boundary_distance"):
        with pytest.raises(ConfigError, match="figures of its own"):
            check_stratum(by, frame, with_metrics=True)
        check_stratum(by, frame.assign(**{by: 1}), with_metrics=True)
    check_stratum("object_size", frame, with_metrics=True)


def test_stratified__column__has_the_figures_of_each_part_alone() -> None:
    images = [
        image_of([[0, 1]], [[0, 1]]),
        image_of([[1, 1]], [[0, 1]]),
        image_of([[0, 0]], [[0, 1]]),
        image_of([[0, 1]], [[255, 255]]),
    ]
    frame = pd.DataFrame({"site": ["x", "x", "y", "y"]})
    found: Any = stratified(images, frame, BINARY, by="site", metrics=["iou", "iou_pooled"])
    assert found.index.names == ["site", "figure"]
    assert found.columns.tolist() == ["images", "value", "low", "high"]
    assert found.loc[("x", "iou"), ["images", "value"]].tolist() == [2, 0.75]
    assert found.loc[("x", "iou"), "low"] == 0.5
    assert found.loc[("x", "iou"), "high"] == 1.0
    assert found.loc[("x", "iou_pooled"), "value"] == pytest.approx(2 / 3)
    # The last image has no labelled pixel and does not count, and one image has no interval.
    assert found.loc[("y", "iou"), ["images", "value"]].tolist() == [1, 0]
    assert math.isnan(found.loc[("y", "iou"), "low"])
    whole: Any = stratified(images, frame.assign(site="all"), BINARY, by="site", metrics=["iou"])
    assert whole.loc[("all", "iou"), ["images", "value"]].tolist() == [3, 0.5]


def test_stratified__column_named_like_a_built_in__is_meant() -> None:
    images = [image_of([[0, 1]], [[0, 1]]), image_of([[1, 1]], [[0, 1]])]
    frame = pd.DataFrame({"class": ["cat", "dog"]})
    found: Any = stratified(images, frame, BINARY, by="class", metrics=["iou"])
    assert found["value"].to_dict() == {("cat", "iou"): 1.0, ("dog", "iou"): 0.5}
    built_in: Any = stratified(images, frame.drop(columns="class"), BINARY, by="class", metrics=["iou"])
    assert built_in.index.get_level_values("class").unique().tolist() == ["background", "polyp"]


def test_object_share__regions__are_counted_by_class_with_corners() -> None:
    target = torch.tensor([[1, 0, 0, 2], [0, 1, 0, 2], [0, 0, 0, 0], [1, 255, 0, 0]])
    assert object_share(target, binary=False) == pytest.approx(5 / 3 / 15)
    assert object_share((target == 1).long(), binary=True) == pytest.approx(3 / 2 / 16)
    assert object_share(torch.zeros(3, 3).long(), binary=True) == 0
    assert object_share(torch.full((3, 3), 255), binary=True) == 0


def test_stratified__object_size__thirds_of_images_with_objects() -> None:
    images = []
    for area in (9, 0, 1, 4, 2, 6, 8):
        target = torch.zeros(4, 4, dtype=torch.int64)
        target.view(-1)[:area] = 1
        labels = target.clone()
        if area < 3:
            labels[3, 3] = 1
        images.append((labels[None].float(), labels, target))
    found: Any = stratified(images, pd.DataFrame(index=range(7)), BINARY, by="object_size", metrics=["iou"])
    assert found["images"].to_dict() == {
        ("small", "iou"): 2,
        ("medium", "iou"): 2,
        ("large", "iou"): 2,
        ("no object", "iou"): 1,
    }
    assert found["value"].tolist() == pytest.approx([(1 / 2 + 2 / 3) / 2, 1, 1, 0])


def test_stratified__no_object_at_all__is_one_stratum() -> None:
    images = [image_of([[0, 0]], [[0, 0]])] * 2
    found: Any = stratified(images, pd.DataFrame(index=range(2)), BINARY, by="object_size", metrics=["iou"])
    assert found["value"].to_dict() == {("no object", "iou"): 1.0}


def test_boundary_distance__two_regions__is_that_of_a_search_over_all_pixels() -> None:
    generator = np.random.default_rng(0)
    target = np.zeros((20, 24), dtype=np.int64)
    target[4:9, 3:12], target[12:, 15:] = 1, 2
    target[generator.random(target.shape) < 0.05] = 255
    found = boundary_distance(torch.from_numpy(target))
    places = np.argwhere(target != 255)
    for y, x in places[::7]:
        others = places[target[tuple(places.T)] != target[y, x]]
        assert found[y, x] == pytest.approx(np.hypot(*(others - (y, x)).T).min() - 0.5, abs=1e-4)


def test_boundary_distance__one_class_beside_ignored_pixels__has_no_boundary() -> None:
    assert np.isinf(boundary_distance(torch.tensor([[0, 0, 255]]))[0, :2]).all()


def test_stratified__boundary_distance__error_rates_by_hand() -> None:
    # A line of 64 pixels, the boundary in its middle: distances 0.5, 1.5, ... 31.5 on both sides.
    target = torch.arange(64)[None] // 32
    labels = target.clone()
    labels[0, 31] = 1  # 0.5 from the boundary
    labels[0, 0] = 1  # 31.5
    void = target.clone()
    void[0, :] = 255
    images = [(labels[None].float(), labels, target), (labels[None].float(), labels, void)]
    found: Any = stratified(images, pd.DataFrame(index=range(2)), BINARY, by="boundary_distance", metrics=["iou"])
    rates, pixels = (found.xs(figure, level="figure") for figure in ("error_rate", "pixels"))
    assert rates.index.tolist() == list(DISTANCE_NAMES)
    assert pixels["value"].tolist() == [4, 6, 10, 20, 24]
    assert rates["value"].tolist() == pytest.approx([1 / 4, 0, 0, 0, 1 / 24])
    assert rates["images"].tolist() == [1] * 5


def test_stratified__boundary_distance_of_one_class__is_all_far() -> None:
    images = [image_of([[0, 1, 0]], [[0, 0, 255]])] * 2
    found: Any = stratified(images, pd.DataFrame(index=range(2)), BINARY, by="boundary_distance", metrics=["iou"])
    rates = found.xs("error_rate", level="figure")
    assert rates.loc[">20 px"].tolist() == [2, 0.5, 0.5, 0.5]
    assert rates["value"].drop(">20 px").isna().all()
    assert rates["images"].drop(">20 px").eq(0).all()


def test_stratified__class__figures_by_hand() -> None:
    images = [
        image_of([[0, 1, 1, 0]], [[0, 1, 0, 255]], THREE),
        image_of([[0, 0, 1, 2]], [[0, 1, 1, 255]], THREE),
    ]
    found: Any = stratified(images, pd.DataFrame(index=range(2)), THREE, by="class", metrics=["miou"])
    values = found["value"].unstack()
    assert values.index.tolist() == ["car", "road", "sky"]
    assert values.loc["road", ["iou", "dice", "precision", "recall", "support"]].tolist() == pytest.approx(
        [2 / 4, 4 / 6, 2 / 3, 2 / 3, 3]
    )
    assert values.loc["sky", ["iou", "precision", "recall"]].tolist() == pytest.approx([2 / 4, 2 / 3, 2 / 3])
    assert values.loc["car", ["iou", "dice", "precision", "recall"]].isna().all()
    assert values.loc["car", "support"] == 0
    assert found["images"].xs("iou", level="figure").to_dict() == {"sky": 2, "road": 2, "car": 0}
    assert found.loc[("road", "recall"), "low"] == 0.5
    assert found.loc[("road", "recall"), "high"] == 1.0


def test_stratified__class_of_a_binary_task__has_both_classes() -> None:
    images = [image_of([[0, 1, 1, 0]], [[0, 1, 0, 0]])] * 2
    found: Any = stratified(images, pd.DataFrame(index=range(2)), BINARY, by="class", metrics=["iou"])["value"]
    assert found[("background", "iou")] == pytest.approx(2 / 3)
    assert found[("polyp", "precision")] == 0.5
    assert found[("polyp", "recall")] == 1.0
