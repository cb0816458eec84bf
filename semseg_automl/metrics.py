"""Metrics of a data set, fed one image at a time; `METRICS` is the only registry.

Thin classes that accumulate pure functions, all behind one interface, `SegmentationMetric`. What an image adds is its
*tally*; states are sums of tallies (float64, counts int64), so adding up the states of two processes, or of two halves
of the data in any order, gives the state of the whole. Memory is that of one image.

Shared by all metrics: pixels whose target is `IGNORE_INDEX` (255) are left out of every sum, saliency scores
included; an image without any other pixel is not counted; no image at all computes to NaN without a warning.

To add a metric: one class here and one line in `METRICS`. Soft scores of one image live in `semseg_automl.saliency` and
`semseg_automl.weighted_f`, scores of hard decisions in `semseg_automl.confusion` and
`semseg_automl.boundaries`, intervals in `semseg_automl.uncertainty`. Not here: turning logits into scores or labels,
choosing the resolution.
"""

from __future__ import annotations

import copy
import functools
import warnings
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, Self

import torch
from torch import Tensor

from semseg_automl import saliency
from semseg_automl.boundaries import boundary_counts, boundary_iou
from semseg_automl.confusion import (
    balanced_error_rate,
    binary_dice,
    check_indices,
    class_iou,
    mean_iou,
    mean_iou_with_absent,
    pixel_accuracy,
)
from semseg_automl.confusion import binary_iou as binary_iou  # this form: the two are imported from here, too
from semseg_automl.confusion import confusion_matrix as confusion_matrix
from semseg_automl.errors import ConfigError, DataError, UnsupportedCombination, nearest
from semseg_automl.soft_map import SoftMap, shared_map
from semseg_automl.task import IGNORE_INDEX
from semseg_automl.third_party import torchmetrics
from semseg_automl.weighted_f import weighted_f_measure_of


class SegmentationMetric(torchmetrics.Metric):
    """What every metric owes: one image per `update`, `compute` in float64.

    A subclass names its `tasks` and `higher_is_better`, adds states with ``dist_reduce_fx="sum"`` in ``__init__``, and
    implements `_tally`, what an image adds to each of them, and `figure`, the score of sums.
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
        """Add the `tally` of one image, with its arguments and errors."""
        for name, part in self.tally(scores, labels, target).items():
            setattr(self, name, getattr(self, name) + part)

    def tally(self, scores: Tensor, labels: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Return what one image adds to each state, by its name; the states stay as they are.

        Args:
            scores: ``(C, H, W)``, floating; binary C = 1, foreground probability; multi-class C = num_classes.
            labels: ``(H, W)``, integers; the hard decision as class index.
            target: ``(H, W)``, integers; class index, 255 for an ignored pixel.

        Returns:
            By state; zeros for an image that is ignored as a whole.

        Raises:
            DataError: A shape, a type or a value is not as above. NaN is found where scores are used; `labels` alone
                decide the scores of hard decisions.
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
            return self._tally(scores, labels, target)
        return {name: torch.zeros_like(state) for name, state in self.states().items()}

    def compute(self) -> Tensor:
        """Return the score of all images so far, float64; NaN where there is none."""
        return self.figure(self.states())

    def states(self) -> dict[str, Tensor]:
        """Return the sums so far, by name."""
        return {name: getattr(self, name) for name in self.metric_state}

    @abstractmethod
    def figure(self, sums: Mapping[str, Tensor]) -> Tensor:
        """Return the score of summed tallies, float64.

        Args:
            sums: By state; leading dimensions, the same for every state, are data sets to be scored one by one.
        """

    @abstractmethod
    def _tally(self, scores: Tensor, labels: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Return the tally of an image that has at least one pixel that is not ignored; arguments as in `tally`."""

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

    def _tally(self, scores: Tensor, labels: Tensor, target: Tensor) -> dict[str, Tensor]:
        return {"confusion": confusion_matrix(labels, target, self.num_classes)}

    def figure(self, sums: Mapping[str, Tensor]) -> Tensor:
        return type(self).reduce(sums["confusion"])


class _ImageMean(SegmentationMetric):
    """The mean over images of a score of one image."""

    tasks = frozenset({"binary"})
    total: Tensor
    images: Tensor

    def __init__(self, shape: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.add_state("total", default=torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("images", default=torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def _tally(self, scores: Tensor, labels: Tensor, target: Tensor) -> dict[str, Tensor]:
        score = self._score(scores, labels, target)
        return {"total": score, "images": torch.ones((), dtype=torch.int64, device=score.device)}

    def figure(self, sums: Mapping[str, Tensor]) -> Tensor:
        total, images = sums["total"], sums["images"]
        return total / images.reshape(images.shape + (1,) * (total.ndim - images.ndim))

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


class PooledDice(_PooledMetric):
    """`binary_dice` over the pixels of all images together, so that large objects weigh more."""

    tasks = frozenset({"binary"})
    reduce = staticmethod(binary_dice)


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


class ImageBoundaryIoU(_ImageMean):
    """Foreground's `boundary_iou` of each image, averaged over images; empty mask and empty prediction score 1."""

    def _score(self, scores: Tensor, labels: Tensor, target: Tensor) -> Tensor:
        return boundary_iou(boundary_counts(labels, target, 2))[1].nan_to_num(nan=1.0)


class MeanBoundaryIoU(SegmentationMetric):
    """Mean over classes of `boundary_iou`, each class's rims pooled over the data set; absent classes are left out."""

    tasks = frozenset({"multiclass"})
    counts: Tensor

    def __init__(self, num_classes: int = 2) -> None:
        super().__init__(num_classes)
        self.add_state("counts", default=torch.zeros(2, num_classes, dtype=torch.int64), dist_reduce_fx="sum")

    def _tally(self, scores: Tensor, labels: Tensor, target: Tensor) -> dict[str, Tensor]:
        return {"counts": boundary_counts(labels, target, self.num_classes)}

    def figure(self, sums: Mapping[str, Tensor]) -> Tensor:
        """Return the mean over the classes that are not absent."""
        return boundary_iou(sums["counts"]).nanmean(dim=-1)


class _SaliencyMean(_ImageMean):
    """The mean over images of a soft score of one foreground map; within `shared_maps`, they share what they can."""

    measure: ClassVar[Callable[..., Tensor]]
    shape: ClassVar[tuple[int, ...]] = ()

    def __init__(self, *, stretch: bool = True) -> None:
        """Set up an empty state; `stretch` maps each prediction's own range to [0, 1] first, the field's habit."""
        super().__init__(self.shape)
        self.stretch = stretch
        self.options: dict[str, float] = {}

    def _score(self, scores: Tensor, labels: Tensor, target: Tensor) -> Tensor:
        def make() -> SoftMap:
            valid = target != IGNORE_INDEX
            check_indices("target", target[valid], 2)
            return SoftMap(scores[0], target == 1, valid=None if bool(valid.all()) else valid, stretch=self.stretch)

        return type(self).measure(shared_map((scores, target, self.stretch), make), **self.options)


class SMeasure(_SaliencyMean):
    """`semseg_automl.saliency.s_measure`, averaged over images."""

    measure = staticmethod(saliency.s_measure_of)


class EMeasure(_SaliencyMean):
    """`semseg_automl.saliency.e_measure`, the mean over 256 thresholds, averaged over images."""

    measure = staticmethod(saliency.e_measure_of)


class MaxEMeasure(_SaliencyMean):
    """The best of 256 thresholds of the E-measure after averaging over images: one threshold for them all."""

    measure = staticmethod(saliency.e_measure_curve_of)
    shape = (256,)

    def figure(self, sums: Mapping[str, Tensor]) -> Tensor:
        """Return the maximum of the mean curve."""
        return super().figure(sums).amax(dim=-1)


class AdaptiveEMeasure(_SaliencyMean):
    """`semseg_automl.saliency.e_measure_adaptive`, at twice each prediction's mean, averaged over images."""

    measure = staticmethod(saliency.e_measure_adaptive_of)


class MeanAbsoluteError(_SaliencyMean):
    """`semseg_automl.saliency.mean_absolute_error`, averaged over images."""

    higher_is_better = False
    measure = staticmethod(saliency.mean_absolute_error_of)


class WeightedFMeasure(_SaliencyMean):
    """`semseg_automl.weighted_f.weighted_f_measure`, averaged over images; an empty mask scores 0."""

    measure = staticmethod(weighted_f_measure_of)

    def __init__(self, *, beta2: float = 1.0, stretch: bool = True) -> None:
        """Set up an empty state.

        Args:
            beta2: Weight of recall against precision: 1 in the field, 0.3 in the code of Conv-LoRA's paper.
            stretch: As for every saliency score.
        """
        super().__init__(stretch=stretch)
        self.options["beta2"] = beta2


MetricChoice = str | SegmentationMetric
"""A key of `METRICS`, or a metric with settings of its own, which goes by the name of its class."""

METRICS: dict[str, Callable[[int], SegmentationMetric]] = {
    "iou": lambda num_classes: ImageIoU(),
    "dice": lambda num_classes: ImageDice(),
    "iou_pooled": lambda num_classes: PooledIoU(),
    "dice_pooled": lambda num_classes: PooledDice(),
    "boundary_iou": lambda num_classes: ImageBoundaryIoU(),
    "s_measure": lambda num_classes: SMeasure(),
    "e_measure": lambda num_classes: EMeasure(),
    "e_measure_max": lambda num_classes: MaxEMeasure(),
    "e_measure_adaptive": lambda num_classes: AdaptiveEMeasure(),
    "wf": lambda num_classes: WeightedFMeasure(),
    "wf_03": lambda num_classes: WeightedFMeasure(beta2=0.3),
    "ber": lambda num_classes: BalancedErrorRate(),
    "ber_per_image": lambda num_classes: ImageBalancedErrorRate(),
    "mae": lambda num_classes: MeanAbsoluteError(),
    "accuracy": PixelAccuracy,
    "miou": MeanIoU,
    "miou_with_absent": MeanIoUWithAbsent,
    "iou_per_class": ClassIoU,
    "boundary_miou": MeanBoundaryIoU,
}
"""Name to a factory that takes the number of classes; metrics of a binary foreground have no use for it."""

DEFAULT_METRICS: dict[str, tuple[str, ...]] = {
    "binary": ("iou", "dice", "iou_pooled", "s_measure", "e_measure", "ber", "mae"),
    "multiclass": ("miou", "accuracy", "iou_per_class"),
}
"""Kind of task to the names `evaluate` reports unless told otherwise."""


def build_metrics(choices: Sequence[MetricChoice], *, kind: str, num_classes: int) -> dict[str, SegmentationMetric]:
    """Build the metrics in `choices`, empty, in that order.

    Args:
        choices: Keys of `METRICS`, or metrics, of which empty copies on the processor are made.
        kind: "binary" or "multiclass".
        num_classes: Number of classes with the background; 2 for a binary task.

    Raises:
        ConfigError: An unknown kind or name, a name twice, no name, or a number of classes out of range.
        UnsupportedCombination: A metric of the other kind of task, or of another number of classes.

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
    if isinstance(choices, str) or not choices:
        raise ConfigError(f"metrics are {choices!r}; a sequence of one at least is needed, such as ['iou']")
    registered = {name: make(num_classes) for name, make in METRICS.items()}
    fitting = [name for name, metric in registered.items() if kind in metric.tasks]
    known = ", ".join(fitting)
    names = [choice if isinstance(choice, str) else type(choice).__name__ for choice in choices]
    if len(set(names)) < len(names):
        raise ConfigError(f"metrics are named more than once: {', '.join(names)}; name each once")
    built = {}
    for name, choice in zip(names, choices, strict=True):
        if isinstance(choice, str) and choice not in METRICS:
            raise ConfigError(f"unknown metric {name!r}{nearest(name, fitting)}; a {kind} task has: {known}")
        metric = registered[choice] if isinstance(choice, str) else copy.deepcopy(choice).cpu()
        if kind not in metric.tasks or metric.num_classes != (2 if metric.tasks == {"binary"} else num_classes):
            raise UnsupportedCombination(
                f"metric {name!r} is not defined for a {kind} task of {num_classes} classes; those that are: {known}"
            )
        metric.reset()
        built[name] = metric
    return built
