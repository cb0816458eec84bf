"""Metrics of a data set, fed one image at a time; `METRICS` is the only registry.

Pure functions from a confusion matrix to a score, and thin classes that accumulate, all behind one interface,
`SegmentationMetric`. States are sums (float64, counts int64), so adding up the states of two processes, or of
two halves of the data in any order, gives the state of the whole. Memory is that of one image.

Shared by all metrics: pixels whose target is `IGNORE_INDEX` (255) are left out of every sum, saliency scores
included; an image without any other pixel is not counted; no image at all computes to NaN without a warning.

To add a metric: one class here and one line in `METRICS`. Soft scores of one image live in
`semseg_automl.saliency`. Not here: turning logits into scores or labels, choosing the resolution.
"""

from __future__ import annotations

import functools
import warnings
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar, Self

import torch
from torch import Tensor

from semseg_automl import saliency
from semseg_automl.errors import ConfigError, DataError, UnsupportedCombination, nearest
from semseg_automl.task import IGNORE_INDEX
from semseg_automl.third_party import torchmetrics


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
    _check_indices("target", truth, num_classes)
    _check_indices("labels", predicted, num_classes)
    pairs = truth.mul_(num_classes).add_(predicted)  # in place: indexing has copied
    return torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)


def class_iou(confusion: Tensor) -> Tensor:
    """Intersection over union of each class, ``(K,)`` float64 from a ``(K, K)`` confusion matrix.

    A class found neither in truth nor in prediction is absent: NaN. One that is only predicted scores 0.

    >>> class_iou(torch.tensor([[2, 1, 0], [0, 1, 0], [0, 0, 0]])).tolist()
    [0.6666666666666666, 0.5, nan]
    """
    counts = confusion.to(torch.float64)
    intersection = counts.diagonal()
    return intersection / (counts.sum(dim=0) + counts.sum(dim=1) - intersection)


def mean_iou(confusion: Tensor) -> Tensor:
    """Mean of `class_iou` over the classes that are not absent; 0-d float64, NaN without any pixel."""
    return class_iou(confusion).nanmean()


def mean_iou_with_absent(confusion: Tensor) -> Tensor:
    """Mean of `class_iou` over all classes, an absent one counted as 0; 0-d float64, NaN without a pixel."""
    return class_iou(confusion).nansum() / (len(confusion) * confusion.any())


def pixel_accuracy(confusion: Tensor) -> Tensor:
    """Share of pixels on the diagonal of a ``(K, K)`` confusion matrix, 0-d float64; NaN without a pixel."""
    counts = confusion.to(torch.float64)
    return counts.diagonal().sum() / counts.sum()


def binary_iou(confusion: Tensor) -> Tensor:
    """Foreground's ``TP / (TP + FP + FN)`` from a ``(2, 2)`` confusion matrix, 0-d float64.

    1 where neither truth nor prediction has a foreground pixel; NaN without any pixel.

    >>> binary_iou(torch.tensor([[5, 1], [1, 2]])).item(), binary_iou(torch.tensor([[9, 0], [0, 0]])).item()
    (0.5, 1.0)
    """
    iou = class_iou(confusion)[1]
    return iou.masked_fill(iou.isnan() & confusion.any(), 1.0)


def binary_dice(confusion: Tensor) -> Tensor:
    """Foreground's ``2 TP / (2 TP + FP + FN)``, which is ``2 IoU / (1 + IoU)``; 1 and NaN as `binary_iou`."""
    iou = binary_iou(confusion)
    return 2 * iou / (1 + iou)


def balanced_error_rate(confusion: Tensor) -> Tensor:
    """``100 * (FPR + FNR) / 2`` in percent from a ``(2, 2)`` confusion matrix, 0-d float64.

    The balanced error rate of Vicente et al., ECCV 2016. The rate of a class that the truth does not have is
    left out: without foreground the score is ``100 * FPR``, without background ``100 * FNR``.

    >>> [balanced_error_rate(torch.tensor(c)).item() for c in ([[3, 1], [1, 1]], [[3, 1], [0, 0]])]
    [37.5, 25.0]
    """
    counts = confusion.to(torch.float64)
    sizes = counts.sum(dim=1)
    return 100 * ((sizes - counts.diagonal()) / sizes).nanmean()


def _check_indices(name: str, indices: Tensor, num_classes: int) -> None:
    """Raise `DataError` unless all ``indices (N,)`` are in [0, num_classes)."""
    if indices.numel() == 0:
        return
    low, high = (int(bound) for bound in torch.aminmax(indices))
    if low < 0 or high >= num_classes:
        raise DataError(
            f"{name} holds class indices {low} to {high}; 0 to {num_classes - 1} are allowed, {IGNORE_INDEX} "
            "for ignored pixels of the target: encode masks with SegmentationTask.encode"
        )


class SegmentationMetric(torchmetrics.Metric):
    """What every metric owes: one image per `update`, `compute` in float64.

    A subclass names its `tasks` and `higher_is_better`, adds states with ``dist_reduce_fx="sum"`` in
    ``__init__``, and implements ``_add`` and ``compute``.
    """

    tasks: ClassVar[frozenset[str]]  # kinds the metric is defined for, of "binary" and "multiclass"
    higher_is_better: bool = True
    full_state_update = False

    def __init__(self, num_classes: int = 2) -> None:
        """Set up an empty state.

        Args:
            num_classes: Number of classes with the background, 2 to 255; 2 for a binary task.

        Raises:
            ConfigError: `num_classes` is out of range.
        """
        if not 2 <= num_classes <= IGNORE_INDEX:
            raise ConfigError(
                f"num_classes is {num_classes}; 2 to {IGNORE_INDEX} are allowed, the background "
                "counted: use 2 for a binary task"
            )
        # No cache: merge_state would leave the value from before the merge in it.
        super().__init__(compute_with_cache=False)
        self.num_classes = num_classes

    def update(self, scores: Tensor, labels: Tensor, target: Tensor) -> None:
        """Add one image.

        Args:
            scores: ``(C, H, W)``, floating; binary C = 1, the foreground's probability in [0, 1];
                multi-class C = num_classes.
            labels: ``(H, W)``, integers; the hard decision as class index.
            target: ``(H, W)``, integers; class index, 255 for an ignored pixel.

        Raises:
            DataError: A shape, a type or a value is not as above.
        """
        channels = {1 if kind == "binary" else self.num_classes for kind in self.tasks}
        if scores.ndim != 3 or scores.shape[0] not in channels or not scores.is_floating_point():
            raise DataError(
                f"scores are {scores.dtype} of shape {tuple(scores.shape)}; a floating (C, H, W) tensor "
                f"with C in {sorted(channels)} is needed: pass one image at a time"
            )
        for name, indices in (("labels", labels), ("target", target)):
            integers = not indices.is_floating_point() and indices.dtype != torch.bool
            if indices.shape != scores.shape[1:] or not integers:
                raise DataError(
                    f"{name} is {indices.dtype} of shape {tuple(indices.shape)}; integer class indices of "
                    f"shape {tuple(scores.shape[1:])} are needed: the size of the scores, without a channel"
                )
        if bool((target != IGNORE_INDEX).any()):
            self._add(scores, labels, target)

    @abstractmethod
    def _add(self, scores: Tensor, labels: Tensor, target: Tensor) -> None:
        """Add one image that has at least one pixel that is not ignored; arguments as in `update`."""

    def _wrap_compute(self, compute: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Compute an empty state to NaN in silence, where torchmetrics warns that there was no update yet."""
        wrapped = super()._wrap_compute(compute)

        @functools.wraps(compute)
        def quiet() -> Tensor:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "The ``compute`` method of metric", category=UserWarning)
                value: Tensor = wrapped()
            return value

        return quiet

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> Self:
        """Follow ``.to(device)``, but keep the states' types: ``.to(torch.bfloat16)`` must not round sums."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(fn(torch.zeros((), device=tensor.device)).device)

        super()._apply(move, exclude_state)
        return self


class _PooledMetric(SegmentationMetric):
    """`reduce` of one confusion matrix over all pixels of the data set."""

    tasks = frozenset({"multiclass"})
    reduce: ClassVar[Callable[..., Tensor]]
    confusion: Tensor

    def __init__(self, num_classes: int = 2) -> None:
        super().__init__(num_classes)
        empty = torch.zeros(num_classes, num_classes, dtype=torch.int64)
        self.add_state("confusion", default=empty, dist_reduce_fx="sum")

    def _add(self, scores: Tensor, labels: Tensor, target: Tensor) -> None:
        self.confusion = self.confusion + confusion_matrix(labels, target, self.num_classes)

    def compute(self) -> Tensor:
        """Return the score of all pixels so far, float64; NaN where there is none."""
        return type(self).reduce(self.confusion)


class _ImageMean(SegmentationMetric):
    """The mean over images of a score of one image."""

    tasks = frozenset({"binary"})
    total: Tensor
    images: Tensor

    def __init__(self, shape: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.add_state("total", default=torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("images", default=torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def _add(self, scores: Tensor, labels: Tensor, target: Tensor) -> None:
        self.total = self.total + self._score(scores, labels, target)
        self.images = self.images + 1

    def compute(self) -> Tensor:
        """Return the mean over images, 0-d float64; NaN where no image was counted."""
        return self.total / self.images

    @abstractmethod
    def _score(self, scores: Tensor, labels: Tensor, target: Tensor) -> Tensor:
        """Score one image, in float64 and of the shape of ``total``."""


class _ConfusionMean(_ImageMean):
    """The mean over images of `reduce` of each image's confusion matrix."""

    reduce: ClassVar[Callable[..., Tensor]]

    def _score(self, scores: Tensor, labels: Tensor, target: Tensor) -> Tensor:
        return type(self).reduce(confusion_matrix(labels, target, self.num_classes))


class ImageIoU(_ConfusionMean):
    """`binary_iou` of each image, averaged over images; empty mask and empty prediction score 1."""

    reduce = staticmethod(binary_iou)


class ImageDice(_ConfusionMean):
    """`binary_dice` of each image, averaged over images; empty mask and empty prediction score 1."""

    reduce = staticmethod(binary_dice)


class ImageBalancedErrorRate(_ConfusionMean):
    """`balanced_error_rate` of each image, averaged over images, in percent, as in the Conv-LoRA code."""

    higher_is_better = False
    reduce = staticmethod(balanced_error_rate)


class PooledIoU(_PooledMetric):
    """`binary_iou` over the pixels of all images together, so that large objects weigh more."""

    tasks = frozenset({"binary"})
    reduce = staticmethod(binary_iou)


class BalancedErrorRate(_PooledMetric):
    """`balanced_error_rate` over the pixels of all images together, in percent, as in the shadow field."""

    tasks = frozenset({"binary"})
    higher_is_better = False
    reduce = staticmethod(balanced_error_rate)


class MeanIoU(_PooledMetric):
    """`mean_iou` of the data set's confusion matrix; a class in neither truth nor prediction is left out."""

    reduce = staticmethod(mean_iou)


class MeanIoUWithAbsent(_PooledMetric):
    """As `MeanIoU`, but an absent class counts as 0, as in some papers."""

    reduce = staticmethod(mean_iou_with_absent)


class ClassIoU(_PooledMetric):
    """`class_iou` of one confusion matrix over the data set: ``(num_classes,)``, NaN for absent classes."""

    reduce = staticmethod(class_iou)


class PixelAccuracy(_PooledMetric):
    """`pixel_accuracy` over the pixels of all images together."""

    tasks = frozenset({"binary", "multiclass"})
    reduce = staticmethod(pixel_accuracy)


class _SaliencyMean(_ImageMean):
    """The mean over images of a soft score of one foreground map, from `semseg_automl.saliency`."""

    measure: ClassVar[Callable[..., Tensor]]
    shape: ClassVar[tuple[int, ...]] = ()

    def __init__(self, *, stretch: bool = True) -> None:
        """Set up an empty state.

        Args:
            stretch: Map each prediction's own range to [0, 1] first, the field's habit.
        """
        super().__init__(self.shape)
        self.stretch = stretch

    def _score(self, scores: Tensor, labels: Tensor, target: Tensor) -> Tensor:
        valid = target != IGNORE_INDEX
        _check_indices("target", target[valid], 2)
        everywhere = None if bool(valid.all()) else valid
        return type(self).measure(scores[0], target == 1, valid=everywhere, stretch=self.stretch)


class SMeasure(_SaliencyMean):
    """`semseg_automl.saliency.s_measure`, averaged over images."""

    measure = staticmethod(saliency.s_measure)


class EMeasure(_SaliencyMean):
    """`semseg_automl.saliency.e_measure`, the mean over 256 thresholds, averaged over images."""

    measure = staticmethod(saliency.e_measure)


class MaxEMeasure(_SaliencyMean):
    """The best of 256 thresholds of the E-measure after averaging over images: one threshold for them all."""

    measure = staticmethod(saliency.e_measure_curve)
    shape = (256,)

    def compute(self) -> Tensor:
        """Return the maximum of the mean curve, 0-d float64."""
        return super().compute().max()


class AdaptiveEMeasure(_SaliencyMean):
    """`semseg_automl.saliency.e_measure_adaptive`, at twice each prediction's mean, averaged over images."""

    measure = staticmethod(saliency.e_measure_adaptive)


class MeanAbsoluteError(_SaliencyMean):
    """`semseg_automl.saliency.mean_absolute_error`, averaged over images."""

    higher_is_better = False
    measure = staticmethod(saliency.mean_absolute_error)


METRICS: dict[str, Callable[[int], SegmentationMetric]] = {
    "iou": lambda num_classes: ImageIoU(),
    "dice": lambda num_classes: ImageDice(),
    "iou_pooled": lambda num_classes: PooledIoU(),
    "s_measure": lambda num_classes: SMeasure(),
    "e_measure": lambda num_classes: EMeasure(),
    "e_measure_max": lambda num_classes: MaxEMeasure(),
    "e_measure_adaptive": lambda num_classes: AdaptiveEMeasure(),
    "ber": lambda num_classes: BalancedErrorRate(),
    "ber_per_image": lambda num_classes: ImageBalancedErrorRate(),
    "mae": lambda num_classes: MeanAbsoluteError(),
    "accuracy": PixelAccuracy,
    "miou": MeanIoU,
    "miou_with_absent": MeanIoUWithAbsent,
    "iou_per_class": ClassIoU,
}
"""Name to a factory that takes the number of classes; metrics of a binary foreground have no use for it."""

DEFAULT_METRICS: dict[str, tuple[str, ...]] = {
    "binary": ("iou", "dice", "iou_pooled", "s_measure", "e_measure", "ber", "mae"),
    "multiclass": ("miou", "accuracy", "iou_per_class"),
}
"""Kind of task to the names `evaluate` reports unless told otherwise."""


def build_metrics(names: Sequence[str], *, kind: str, num_classes: int) -> dict[str, SegmentationMetric]:
    """Build the metrics called `names`, empty, in that order.

    Args:
        names: Keys of `METRICS`.
        kind: "binary" or "multiclass".
        num_classes: Number of classes with the background; 2 for a binary task.

    Raises:
        ConfigError: An unknown kind or name, a name twice, or a number of classes out of range.
        UnsupportedCombination: A metric of the other kind of task.

    >>> metrics = build_metrics(["iou", "ber"], kind="binary", num_classes=2)
    >>> scores = torch.tensor([[[0.9, 0.8], [0.2, 0.1]]])
    >>> for metric in metrics.values():
    ...     metric.update(scores, (scores[0] > 0.5).long(), torch.tensor([[1, 0], [0, 255]]))
    >>> {name: metric.compute().item() for name, metric in metrics.items()}
    {'iou': 0.5, 'ber': 25.0}
    """
    if kind not in DEFAULT_METRICS:
        raise ConfigError(f"kind is {kind!r}; one of {', '.join(DEFAULT_METRICS)} is needed")
    if kind == "binary" and num_classes != 2:
        raise ConfigError(f"num_classes is {num_classes} in a binary task; 2 is needed: count the background")
    if isinstance(names, str):
        raise ConfigError(f"names is the string {names!r}; a sequence is needed, such as [{names!r}]")
    built = {name: make(num_classes) for name, make in METRICS.items()}
    fitting = {name: metric for name, metric in built.items() if kind in metric.tasks}
    for name in names:
        if name not in METRICS:
            raise ConfigError(
                f"unknown metric {name!r}{nearest(name, fitting)}; a {kind} task has: {', '.join(fitting)}"
            )
        if name not in fitting:
            raise UnsupportedCombination(
                f"metric {name!r} is not defined for a {kind} task; those that are: {', '.join(fitting)}"
            )
    if len(set(names)) < len(names):
        raise ConfigError(f"metrics are named more than once: {', '.join(names)}; name each once")
    return {name: fitting[name] for name in names}
