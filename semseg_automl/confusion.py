"""Scores of a confusion matrix: IoU, Dice, accuracy, balanced error rate; pure functions, float64, any number at once.

Every score takes ``(..., K, K)`` counts, truth in the rows, and returns one figure per matrix: a thousand resampled
data sets are scored in one call. Not here: accumulation over a data set, which is in `semseg_automl.metrics`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from semseg_automl.errors import DataError
from semseg_automl.task import IGNORE_INDEX


def confusion_matrix(labels: Tensor, target: Tensor, num_classes: int) -> Tensor:
    """Count pixels by true class (row) and predicted class (column); pixels whose target is 255 are left out.

    Args:
        labels: Any shape, integers, predicted class index in [0, num_classes).
        target: Shape of `labels`, integers, true class index in [0, num_classes) or 255.
        num_classes: Number of classes K, at most 255.

    Returns:
        ``(K, K)`` int64.

    Raises:
        DataError: An index that is not ignored is outside [0, num_classes).

    >>> confusion_matrix(torch.tensor([0, 1, 1, 1]), torch.tensor([0, 0, 1, 255]), 2).tolist()
    [[1, 1], [0, 1]]
    """
    valid = target != IGNORE_INDEX
    truth, predicted = target[valid].to(torch.int64), labels[valid].to(torch.int64)
    check_indices("target", truth, num_classes)
    check_indices("labels", predicted, num_classes)
    pairs = truth.mul_(num_classes).add_(predicted)  # in place: indexing has copied
    return torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)


def class_iou(confusion: Tensor) -> Tensor:
    """Intersection over union of each class, ``(..., K)`` float64 from ``(..., K, K)`` confusion matrices.

    A class found neither in truth nor in prediction is absent: NaN. One that is only predicted scores 0.

    >>> class_iou(torch.tensor([[2, 1, 0], [0, 1, 0], [0, 0, 0]])).tolist()
    [0.6666666666666666, 0.5, nan]
    """
    counts = confusion.to(torch.float64)
    intersection = counts.diagonal(dim1=-2, dim2=-1)
    return intersection / (counts.sum(dim=-2) + counts.sum(dim=-1) - intersection)


def mean_iou(confusion: Tensor) -> Tensor:
    """Mean of `class_iou` over the classes that are not absent; NaN without any pixel."""
    return class_iou(confusion).nanmean(dim=-1)


def mean_iou_with_absent(confusion: Tensor) -> Tensor:
    """Mean of `class_iou` over all classes, an absent one counted as 0; NaN without a pixel."""
    return class_iou(confusion).nansum(dim=-1) / (confusion.shape[-1] * _seen(confusion))


def pixel_accuracy(confusion: Tensor) -> Tensor:
    """Share of pixels on the diagonal of ``(..., K, K)`` confusion matrices; NaN without a pixel."""
    counts = confusion.to(torch.float64)
    return counts.diagonal(dim1=-2, dim2=-1).sum(dim=-1) / counts.sum(dim=(-2, -1))


def binary_iou(confusion: Tensor) -> Tensor:
    """Foreground's ``TP / (TP + FP + FN)`` from ``(..., 2, 2)`` confusion matrices, float64.

    1 where neither truth nor prediction has a foreground pixel; NaN without any pixel.

    >>> binary_iou(torch.tensor([[5, 1], [1, 2]])).item(), binary_iou(torch.tensor([[9, 0], [0, 0]])).item()
    (0.5, 1.0)
    """
    iou = class_iou(confusion)[..., 1]
    return iou.masked_fill(iou.isnan() & _seen(confusion), 1.0)


def binary_dice(confusion: Tensor) -> Tensor:
    """Foreground's ``2 TP / (2 TP + FP + FN)``, which is ``2 IoU / (1 + IoU)``; 1 and NaN as `binary_iou`."""
    iou = binary_iou(confusion)
    return 2 * iou / (1 + iou)


def balanced_error_rate(confusion: Tensor) -> Tensor:
    """``100 * (FPR + FNR) / 2`` in percent from ``(..., 2, 2)`` confusion matrices, float64.

    The balanced error rate of Vicente et al., ECCV 2016. The rate of a class that the truth does not have is
    left out: without foreground the score is ``100 * FPR``, without background ``100 * FNR``.

    >>> [balanced_error_rate(torch.tensor(c)).item() for c in ([[3, 1], [1, 1]], [[3, 1], [0, 0]])]
    [37.5, 25.0]
    """
    counts = confusion.to(torch.float64)
    sizes = counts.sum(dim=-1)
    return 100 * ((sizes - counts.diagonal(dim1=-2, dim2=-1)) / sizes).nanmean(dim=-1)


def _seen(confusion: Tensor) -> Tensor:
    """Whether any pixel was counted, bool ``(...)`` of ``(..., K, K)``."""
    return (confusion != 0).flatten(start_dim=-2).any(dim=-1)


def check_indices(name: str, indices: Tensor, num_classes: int) -> None:
    """Raise `DataError` unless all ``indices (N,)`` are in [0, num_classes)."""
    if indices.numel() == 0:
        return
    low, high = (int(bound) for bound in torch.aminmax(indices))
    if low < 0 or high >= num_classes:
        raise DataError(
            f"{name} holds class indices {low} to {high}; 0 to {num_classes - 1} are allowed, {IGNORE_INDEX} "
            "for ignored pixels of the target: encode masks with SegmentationTask.encode"
        )
