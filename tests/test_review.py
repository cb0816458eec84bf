"""Predicted quality and suspicious masks, on hand-made probabilities."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from semseg_automl.calibration import Judged
from semseg_automl.data.table import MaskTable
from semseg_automl.errors import ConfigError
from semseg_automl.review import Quality, class_confidence, expected_iou, judge_quality, label_issues, review_list
from semseg_automl.task import SegmentationTask

BINARY = SegmentationTask("binary", (0, 255), ("background", "polyp"))
THREE = SegmentationTask("multiclass", (0, 1, 2), ("sky", "road", "car"), ignore_values=(255,))


def blob(radius: float, *, softness: float = 1.0, size: int = 32) -> torch.Tensor:
    """Foreground probability ``(1, H, W)`` of a disc whose edge is `softness` pixels wide."""
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    distance = ((y - size / 2) ** 2 + (x - size / 2) ** 2).sqrt()
    return ((radius - distance) / softness).sigmoid()[None]


def decided(scores: torch.Tensor) -> torch.Tensor:
    """Hard labels."""
    return (scores[0] > 0.5).long() if len(scores) == 1 else scores.argmax(dim=0)


def images_with_masks(masks: dict[int, torch.Tensor], count: int = 6) -> list[Judged]:
    """Discs of growing size, well predicted, with their own masks but for those given."""
    images = []
    for number in range(count):
        scores = blob(4 + number)
        images.append((scores, decided(scores), masks.get(number, decided(scores))))
    return images


def test_class_confidence__several_classes_or_a_low_threshold__is_that_of_the_predicted() -> None:
    scores = torch.tensor([0.2, 0.5, 0.3]).view(3, 1, 1)
    assert class_confidence(scores, decided(scores)).item() == 0.5
    assert class_confidence(torch.tensor([[[0.3]]]), torch.tensor([[1]])).item() == pytest.approx(0.3)


def test_expected_iou__certain_probabilities__is_one() -> None:
    sure = (blob(8) > 0.5).float()
    assert expected_iou(sure, decided(sure)) == 1.0
    empty = torch.zeros(1, 8, 8)
    assert expected_iou(empty, decided(empty)) == 1.0


def test_expected_iou__levels_by_hand__is_their_mean() -> None:
    # Levels 0.005, 0.015 ... 0.995: 20 leave 4 pixels, 40 leave 3, 30 leave 2, 10 leave none, and 3 are predicted.
    scores = torch.tensor([[[0.9, 0.9, 0.6, 0.2]]])
    wanted = (20 * 3 / 4 + 40 * 1 + 30 * 2 / 3 + 10 * 0) / 100
    assert expected_iou(scores, decided(scores)) == pytest.approx(wanted)


def test_expected_iou__empty_prediction__is_how_likely_it_is_to_be_right() -> None:
    scores = torch.tensor([[[0.3, 0.1]]])
    assert expected_iou(scores, decided(scores)) == pytest.approx(0.7)


def test_expected_iou__several_classes__is_the_mean_over_those_predicted() -> None:
    scores = torch.tensor([[0.8, 0.2], [0.2, 0.6], [0.0, 0.2]])[:, None]
    sky = (20 * 1 / 2 + 60 * 1 + 20 * 0) / 100
    road = (20 * 1 / 2 + 40 * 1 + 40 * 0) / 100
    assert expected_iou(scores, decided(scores)) == pytest.approx((sky + road) / 2)


def test_expected_iou__softer_edges__is_lower_and_follows_the_true_iou() -> None:
    expected, true = [], []
    rng = np.random.default_rng(0)
    for softness in np.linspace(0.2, 6, 12):
        scores = blob(8, softness=float(softness))
        expected.append(expected_iou(scores, decided(scores)))
        level = rng.random(200)[:, None, None]
        masks = scores[0].numpy() > level
        guess = decided(scores).numpy() == 1
        true.append(np.mean((masks & guess).sum((1, 2)) / (masks | guess).sum((1, 2))))
    assert expected == sorted(expected, reverse=True)
    np.testing.assert_allclose(expected, true, atol=0.08)
    assert stats.spearmanr(expected, true).statistic > 0.95


def test_judge_quality__hand_case__counts_uncertain_pixels() -> None:
    scores = torch.tensor([[[0.9, 0.6, 0.3, 0.1]]])
    found = judge_quality(scores, decided(scores))
    assert found.confidence == pytest.approx((0.9 + 0.6 + 0.7 + 0.9) / 4)
    assert found.uncertain == 0.5
    assert found.expected_iou == expected_iou(scores, decided(scores))


def test_review_list__worst_first__keeps_the_index_and_the_order_of_equals() -> None:
    images = ("a.png", np.zeros((2, 2, 3), np.uint8), "c.png", "d.png")
    table = MaskTable(images, None, pd.Index(["k", "l", "m", "m"]))
    judged = [Quality(0.9, 0.9, 0.1), Quality(0.2, 0.8, 0.3), Quality(0.5, 0.7, 0.2), Quality(0.2, 0.6, 0.4)]
    found = review_list(table, judged, 3)
    assert found.index.tolist() == ["l", "m", "m"]
    assert found["image"].isna().tolist() == [True, False, False]
    assert found["image"].tolist()[1:] == ["d.png", "c.png"]
    assert found["uncertain"].tolist() == [0.3, 0.4, 0.2]
    assert len(review_list(table, judged, 20)) == 4


@pytest.mark.parametrize("wrong", [0, -1, 2.0, True])
def test_review_list__no_number_of_images__raises(wrong: Any) -> None:
    with pytest.raises(ConfigError, match="number of images"):
        review_list(MaskTable(("a",), None, pd.RangeIndex(1)), [Quality(1, 1, 0)], wrong)


@pytest.mark.parametrize("kind", ["erased", "shifted", "grown", "swapped"])
def test_label_issues__one_wrong_mask__comes_first(kind: str) -> None:
    right = decided(blob(7))
    wrong = {
        "erased": torch.zeros_like(right),
        "shifted": right.roll((10, 6), dims=(0, 1)),
        "grown": decided(blob(14)),
        "swapped": 1 - right,
    }[kind]
    index = pd.Index([f"case {number}" for number in range(6)])
    found = label_issues(images_with_masks({3: wrong}), index, BINARY)
    assert found.index[0] == "case 3"
    assert found["score"].iloc[0] > 2 * found["score"].iloc[1]
    assert found["pixels"].iloc[0] > 30
    assert found["pixels"].iloc[1:].eq(0).all()
    assert found["score"].between(0, 1).all()
    assert sorted(found.index) == sorted(index)
    if kind != "shifted":  # which is wrong both ways
        pair = ("background", "polyp") if kind == "erased" else ("polyp", "background")
        assert (found["given"].iloc[0], found["suggested"].iloc[0]) == pair
    assert found["given"].iloc[1:].isna().all()


def test_label_issues__hand_case__thresholds_are_means_and_figures_follow() -> None:
    # Given background: mean 1 - p = (0.9 + 0.1 + 0.8) / 3 = 0.6; given polyp: mean p = (0.8 + 0.7) / 2 = 0.75. Of the
    # wrong pixel 1, p = 0.9 is above 0.75. It and pixels 3 and 4 are covered by polyp: 1 of 3.
    scores = torch.tensor([[[0.1, 0.9, 0.2, 0.8, 0.7, 0.5]]])
    target = torch.tensor([[0, 0, 0, 1, 1, 255]])
    found = label_issues([(scores, decided(scores), target)], pd.RangeIndex(1), BINARY).iloc[0]
    assert found["pixels"] == 1
    assert found["disagreement"] == pytest.approx(1 / 3)
    agreed = np.array([0.9, 0.1, 0.8, 0.8, 0.7])
    weights = np.exp((1 - agreed) / 0.1)
    assert found["softmin"] == pytest.approx(1 - (weights * agreed).sum() / weights.sum(), abs=1e-6)
    assert found["score"] == max(found["disagreement"], found["softmin"])
    assert (found["given"], found["suggested"]) == ("background", "polyp")


def test_label_issues__doubt_below_the_threshold__is_no_confident_pixel() -> None:
    scores = torch.tensor([[[0.05, 0.6, 0.9, 0.9]]])
    found = label_issues([(scores, decided(scores), torch.tensor([[0, 0, 1, 1]]))], pd.RangeIndex(1), BINARY).iloc[0]
    assert found["pixels"] == 0
    assert found["disagreement"] == 0


def test_label_issues__thresholds_that_differ__that_of_the_predicted_class_decides() -> None:
    # Given background 0.98 nine times and 0.3: mean 0.912. Given polyp: 0.6. The wrong pixel has 0.7 for polyp.
    scores = torch.tensor([[[0.02] * 9 + [0.7, 0.6, 0.6]]])
    target = torch.tensor([[0] * 10 + [1, 1]])
    assert label_issues([(scores, decided(scores), target)], pd.RangeIndex(1), BINARY)["pixels"].tolist() == [1]


def test_label_issues__several_classes__names_the_pair() -> None:
    scores = torch.zeros(3, 4, 6) + 0.05
    truth = (torch.arange(6) // 2).expand(4, 6)
    scores.scatter_(0, truth[None], 0.9)
    given = truth.clone()
    given[:, 2] = 2
    images = [(scores, decided(scores), truth), (scores, decided(scores), given)]
    found = label_issues(images, pd.Index(["right", "wrong"]), THREE)
    assert found.index[0] == "wrong"
    assert (found.loc["wrong", "given"], found.loc["wrong", "suggested"]) == ("car", "road")
    # Of road 4 of 8 pixels are disagreed with, of car 4 of 12, of sky none.
    assert found.loc["wrong", "disagreement"] == pytest.approx((4 / 8 + 4 / 12 + 0) / 3)
    assert found.loc["right", "disagreement"] == 0


def test_label_issues__mask_without_a_labelled_pixel__is_last_and_changes_no_other() -> None:
    right = decided(blob(6))
    void = torch.full_like(right, 255)
    images = images_with_masks({1: right.roll(9, dims=1)})
    alone = label_issues([each for row, each in enumerate(images) if row != 4], pd.Index([0, 1, 2, 3, 5]), BINARY)
    images[4] = (*images[4][:2], void)
    found = label_issues(images, pd.RangeIndex(6), BINARY)
    assert found.index[-1] == 4
    assert math.isnan(found["score"].iloc[-1])
    pd.testing.assert_frame_equal(found.iloc[:-1], alone, check_index_type=False)


def test_label_issues__all_masks_erased__are_all_suspicious() -> None:
    empty = torch.zeros(32, 32, dtype=torch.int64)
    found = label_issues(images_with_masks(dict.fromkeys(range(6), empty)), pd.RangeIndex(6), BINARY)
    assert (found["score"] > 0.5).all()
    assert (found["suggested"] == "polyp").all()
