"""What to look at: how good a prediction is likely to be without its truth, and which masks are likely to be wrong.

One image at a time, small figures kept of each. Not here: making probabilities believable, which is in
`semseg_automl.calibration`, and drawing pictures.
"""

from __future__ import annotations

from collections.abc import Iterable
from os import PathLike, fspath
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from semseg_automl.calibration import Judged, class_probabilities
from semseg_automl.confusion import check_indices
from semseg_automl.data.table import MaskTable
from semseg_automl.errors import ConfigError
from semseg_automl.task import IGNORE_INDEX, SegmentationTask

LEVELS = 100
"""Steps of the probability at which `expected_iou` and confident disagreement are counted."""
UNCERTAIN = 0.75
"""Probability of the predicted class below which a pixel is uncertain: half way from a toss-up to certainty."""
SOFTMIN_TEMPERATURE = 0.1
"""Of Lad and Mueller (2023): how much the least believable pixels of a mask outweigh the others."""


class Quality(NamedTuple):
    """What the probabilities of one image say of its prediction.

    Attributes:
        expected_iou: `expected_iou`.
        confidence: mean probability of the predicted class.
        uncertain: share of pixels whose predicted class is less probable than `UNCERTAIN`.
    """

    expected_iou: float
    confidence: float
    uncertain: float


def class_confidence(scores: Tensor, labels: Tensor) -> Tensor:
    """Return the probability of the predicted class, ``(H, W)``, of scores ``(C, H, W)`` and hard labels ``(H, W)``.

    >>> class_confidence(torch.tensor([[[0.9, 0.2]]]), torch.tensor([[1, 0]]))
    tensor([[0.9000, 0.8000]])
    """
    return class_probabilities(scores).gather(0, labels[None])[0]


def expected_iou(scores: Tensor, labels: Tensor) -> float:
    """Predict the IoU of a prediction from its own probabilities.

    A true mask is imagined as all pixels more probable than a level, the same one in the whole image, and every level
    as equally likely; the IoU with the prediction is averaged over levels. This keeps each pixel's probability and lets
    errors be neighbours, as they are. Were they independent, small doubts in a wide background would add up to a
    large union: on polyps the sum of probabilities inside by the sum of all ranked images worse, the more so the softer
    the probabilities. An image without foreground, predicted so, scores 1 at levels that leave it so.

    Args:
        scores: ``(C, H, W)``.
        labels: ``(H, W)``, the hard decision.

    Returns:
        Of the foreground in a binary task; else the mean over the classes that are predicted.

    >>> round(expected_iou(torch.tensor([[[1.0, 1.0, 0.5, 0.0]]]), torch.tensor([[1, 1, 0, 0]])), 4)  # 2/3 or 1
    0.8333
    """
    probabilities = class_probabilities(scores)
    classes = [1] if scores.shape[0] == 1 else labels.unique().tolist()
    found = []
    for index in classes:
        # Levels are at (i + 0.5) / LEVELS: how many of them each pixel is above.
        level = (probabilities[index] * LEVELS - 0.5).ceil().to(torch.int64).flatten()
        inside = (labels == index).flatten()
        above = [_above(level), _above(level[inside])]
        union = above[0] - above[1] + int(inside.sum())
        found.append(float((above[1] / union.clamp_min(1)).masked_fill(union == 0, 1.0).mean()))
    return sum(found) / len(found)


def judge_quality(scores: Tensor, labels: Tensor) -> Quality:
    """Return what the probabilities of one image say of its prediction; arguments as for `expected_iou`."""
    confidence = class_confidence(scores, labels)
    uncertain = (confidence < UNCERTAIN).double().mean()
    return Quality(expected_iou(scores, labels), float(confidence.double().mean()), float(uncertain))


def _above(levels: Tensor) -> Tensor:
    """How many pixels are above each of `LEVELS` levels, of the number of levels each pixel is above; float64."""
    counts = torch.bincount(levels, minlength=LEVELS + 1)
    return counts.flip(0).cumsum(0).flip(0)[1:].to(torch.float64)


def review_list(table: MaskTable, judged: Iterable[Quality], n: int) -> pd.DataFrame:
    """Return the `n` images whose predictions are likely to be the worst, the worst first.

    Args:
        table: the images.
        judged: one for each of them, in order.
        n: how many to return; all where there are fewer.

    Returns:
        The table's own index, ``image`` (its path; missing for an image in memory) and the fields of `Quality`.

    Raises:
        ConfigError: `n` is not a whole number above 0.
    """
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise ConfigError(f"n is {n!r}; the number of images to review, 1 or more, is needed")
    paths = [fspath(image) if isinstance(image, str | PathLike) else None for image in table.images]
    found = pd.DataFrame(judged, index=table.index, columns=list(Quality._fields))
    found.insert(0, "image", paths)
    return found.sort_values("expected_iou", kind="stable").head(n)


class _Doubts(NamedTuple):
    """What is kept of one mask: sums of fixed size, and a histogram for each pair of classes that disagree."""

    pixels: int
    true: NDArray[np.int64]  # (K,) pixels of each class
    disagreeing: dict[tuple[int, int], NDArray[np.int64]]  # (given, predicted) to (LEVELS + 1,) by confidence
    softmin: float


def label_issues(images: Iterable[Judged], index: pd.Index[Any], task: SegmentationTask) -> pd.DataFrame:
    """Rank masks by how much the predictions speak against them.

    A pixel is confidently disagreed with when its predicted class is not the given one and at least as probable as that
    class is on average where it is given (the class's threshold of confident learning: Northcutt, Jiang, Chuang, JAIR
    2021, eq. 2; here rounded down to a hundredth). ``disagreement`` counts these pixels against all that are, or
    confidently should be, of the class: 1 less an IoU, of the foreground or averaged over classes. ``softmin`` is 1
    less the mean probability of the given classes, weighted by a softmin over the pixels (Lad and Mueller, 2023). The
    score is the larger of the two: they find different mistakes, an erased object and a shifted one.

    Args:
        images: predictions and their labels.
        index: names of the rows, in the order of `images`.
        task: kind and names of the classes.

    Returns:
        One row per mask, the most suspicious first; ``score``, ``disagreement`` and ``softmin`` in [0, 1], 0 for a mask
        without doubt and NaN without a labelled pixel; ``pixels`` confidently disagreed with; ``given`` and
        ``suggested``, the pair of classes behind most of them, missing without any.

    Raises:
        DataError: an image or mask cannot be used.
    """
    self_confidence, pixels = np.zeros(task.num_classes), np.zeros(task.num_classes)
    doubts = []
    for scores, labels, target in images:
        found, confidence = _doubts(scores, labels, target)
        self_confidence += confidence
        pixels += found.true
        doubts.append(found)
    given = pixels > 0
    # A class that no mask has is judged by the threshold of the others.
    known = self_confidence[given] / pixels[given]
    thresholds = np.full(task.num_classes, known.mean() if len(known) else 1.0)
    thresholds[given] = known
    rows = [_issue(each, thresholds, task) for each in doubts]
    columns = ["score", "disagreement", "softmin", "pixels", "given", "suggested"]
    table = pd.DataFrame(rows, index=index, columns=columns)
    return table.sort_values("score", ascending=False, kind="stable", na_position="last")


def _doubts(scores: Tensor, labels: Tensor, target: Tensor) -> tuple[_Doubts, NDArray[np.float64]]:
    """Count one mask's disagreements; also return the sum of each class's probability where it is given, ``(K,)``."""
    labelled = target != IGNORE_INDEX
    truth, predicted = target[labelled], labels[labelled]
    probabilities = class_probabilities(scores[:, labelled])
    classes = len(probabilities)
    check_indices("target", truth, classes)
    given = probabilities.gather(0, truth[None])[0].double()
    confidence = torch.bincount(truth, weights=given, minlength=classes).numpy()
    wrong = predicted != truth
    level = (probabilities.gather(0, predicted[None])[0][wrong] * LEVELS).to(torch.int64)
    pairs, which = torch.unique(truth[wrong] * classes + predicted[wrong], return_inverse=True)
    counts = torch.bincount(which * (LEVELS + 1) + level, minlength=len(pairs) * (LEVELS + 1))
    histograms = counts.view(len(pairs), LEVELS + 1).numpy()
    disagreeing = {divmod(int(pair), classes): row for pair, row in zip(pairs, histograms, strict=True)}
    softmin = torch.nan
    if len(given):
        weights = ((1 - given) / SOFTMIN_TEMPERATURE).softmax(dim=0)
        softmin = 1 - float((weights * given).sum())
    true = torch.bincount(truth, minlength=classes).numpy()
    return _Doubts(len(given), true, disagreeing, softmin), confidence


def _issue(
    doubts: _Doubts, thresholds: NDArray[np.float64], task: SegmentationTask
) -> tuple[float, float, float, int, str | None, str | None]:
    """Score one mask under the thresholds of all."""
    from_class, to_class = np.zeros(len(thresholds)), np.zeros(len(thresholds))
    worst, largest = None, 0
    for (given, predicted), counts in doubts.disagreeing.items():
        confident = int(counts[int(thresholds[predicted] * LEVELS) :].sum())
        from_class[given] += confident
        to_class[predicted] += confident
        if confident > largest:
            worst, largest = (given, predicted), confident
    if not doubts.pixels:
        return np.nan, np.nan, np.nan, 0, None, None
    covered = doubts.true + to_class
    judged = covered > 0
    if task.kind == "binary":
        judged[0] = False
    shares = ((from_class + to_class)[judged] / covered[judged]) if judged.any() else np.zeros(1)
    disagreement = float(shares.mean())
    names = (None, None) if worst is None else (task.class_names[worst[0]], task.class_names[worst[1]])
    return max(disagreement, doubts.softmin), disagreement, doubts.softmin, int(to_class.sum()), *names
