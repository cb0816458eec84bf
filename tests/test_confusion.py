"""Scores of confusion matrices: agreement with scikit-learn, ignored pixels, many matrices at once."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from sklearn import metrics as sklearn_metrics
from torch import Tensor

from semseg_automl.confusion import (
    balanced_error_rate,
    binary_dice,
    binary_iou,
    class_iou,
    confusion_matrix,
    mean_iou,
    mean_iou_with_absent,
    pixel_accuracy,
)
from semseg_automl.errors import DataError
from semseg_automl.task import IGNORE_INDEX

BINARY = [binary_iou, binary_dice, balanced_error_rate]
ANY = [class_iou, mean_iou, mean_iou_with_absent, pixel_accuracy]


@pytest.mark.parametrize("num_classes", [2, 3, 7])
def test_confusion_metrics__random_images__equal_scikit_learn(num_classes: int) -> None:
    target, labels = torch.randint(num_classes, (40, 30)), torch.randint(num_classes, (40, 30))
    target[torch.rand(40, 30) < 0.2] = IGNORE_INDEX
    y_true, y_pred = target[target != IGNORE_INDEX].numpy(), labels[target != IGNORE_INDEX].numpy()
    classes = list(range(num_classes))
    confusion = confusion_matrix(labels, target, num_classes)
    np.testing.assert_array_equal(confusion.numpy(), sklearn_metrics.confusion_matrix(y_true, y_pred, labels=classes))
    np.testing.assert_allclose(
        class_iou(confusion).numpy(), sklearn_metrics.jaccard_score(y_true, y_pred, average=None), rtol=1e-12
    )
    assert float(mean_iou(confusion)) == pytest.approx(
        sklearn_metrics.jaccard_score(y_true, y_pred, average="macro"), rel=1e-12
    )
    assert float(pixel_accuracy(confusion)) == pytest.approx(sklearn_metrics.accuracy_score(y_true, y_pred), rel=1e-12)


def test_confusion_matrix__label_outside_the_classes__raises_unless_ignored() -> None:
    labels, target = torch.tensor([0, 3]), torch.tensor([0, 1])
    with pytest.raises(DataError, match="labels holds class indices 0 to 3; 0 to 1 are allowed"):
        confusion_matrix(labels, target, 2)
    target[1] = IGNORE_INDEX
    assert confusion_matrix(labels, target, 2).tolist() == [[1, 0], [0, 0]]


def test_confusion_matrix__arguments__are_left_as_they_were() -> None:
    labels, target = torch.randint(3, (5, 6)), torch.randint(3, (5, 6))
    before = labels.clone(), target.clone()
    confusion_matrix(labels, target, 3)
    assert torch.equal(labels, before[0])
    assert torch.equal(target, before[1])


def test_confusion_matrix__8_bit_indices_of_many_classes__do_not_overflow() -> None:
    labels = torch.arange(200, dtype=torch.uint8)
    assert torch.equal(confusion_matrix(labels, labels, 200), torch.eye(200, dtype=torch.int64))


@pytest.mark.parametrize(
    "function", [binary_iou, binary_dice, balanced_error_rate, mean_iou, mean_iou_with_absent, pixel_accuracy]
)
def test_confusion_score__no_pixel__is_nan(function: Callable[[Tensor], Tensor]) -> None:
    assert function(torch.zeros(2, 2, dtype=torch.int64)).isnan()


@pytest.mark.parametrize(("function", "classes"), [*((f, 2) for f in BINARY), *((f, 4) for f in ANY)])
def test_confusion_score__many_matrices__are_scored_one_by_one(
    function: Callable[[Tensor], Tensor], classes: int
) -> None:
    many = torch.randint(0, 9, (3, 5, classes, classes))
    many[0, 0] = 0  # no pixel
    many[0, 1, 1] = many[0, 1, :, 1] = 0  # class 1 absent
    together = function(many)
    for row in range(3):
        for column in range(5):
            torch.testing.assert_close(together[row, column], function(many[row, column]), equal_nan=True)
