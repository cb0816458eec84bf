"""How far predicted probabilities can be believed, and what makes them believable: temperature and threshold.

Everything is accumulated image by image: sums and histograms of fixed size, or a sample of pixels of fixed size, so
memory is that of one image. Pixels without a label (255) are left out of all of it.

Images come as ``(scores, labels, target)``: scores ``(C, H, W)`` from `semseg_automl.inference`, hard labels and true
class indices ``(H, W)``. Not here: running the network, and what a single image's probabilities say of it, which is in
`semseg_automl.review`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from semseg_automl.confusion import (
    balanced_error_rate,
    binary_dice,
    binary_iou,
    check_indices,
    pixel_accuracy,
)
from semseg_automl.errors import ConfigError, DataError, check_known
from semseg_automl.metrics import METRICS
from semseg_automl.task import IGNORE_INDEX

Judged = tuple[Tensor, Tensor, Tensor]
"""Scores ``(C, H, W)``, hard labels ``(H, W)`` and true class indices ``(H, W)`` of one image."""

TEMPERATURES = (0.05, 20.0)
"""The least and the largest temperature; one of them is returned where the likelihood has no better one."""
SAMPLE = 200_000
"""Pixels that a temperature is fitted to, the same number of each image."""
BINS = 15
"""Bins of the reliability curve, as in Guo et al. (2017)."""

SEED = 0
THRESHOLDS: NDArray[np.float64] = np.arange(1, 1000) / 1000

_LOGIT_BINS, _LOGIT_LIMIT = 4096, 16.7  # in float32 no probability below 1 has a larger logit
_LEAST = 2.0**-24  # from the largest float32 below 1 to 1; a score of exactly 0 or 1 has no logit

_Reduce = Callable[[Tensor], Tensor]
THRESHOLD_METRICS: dict[str, tuple[_Reduce, bool]] = {
    "iou": (binary_iou, False),
    "dice": (binary_dice, False),
    "ber_per_image": (balanced_error_rate, False),
    "iou_pooled": (binary_iou, True),
    "dice_pooled": (binary_dice, True),
    "ber": (balanced_error_rate, True),
    "accuracy": (pixel_accuracy, True),
}
"""Metrics that a threshold can be chosen for: the score of a confusion matrix, and whether images are pooled first."""


def tempered(scores: Tensor, temperature: float) -> Tensor:
    """Divide the logits behind probabilities by a temperature (Guo, Pleiss, Sun, Weinberger, ICML 2017, section 4.2).

    The order of the classes stays, so labels do; equal scores may arise where two differ by rounding alone.

    Args:
        scores: ``(C, H, W)``, one map of foreground probability or one map per class. Those of a decoder with queries
            do not add up to 1; unless the temperature is 1 they are normalised to.
        temperature: above 1 makes probabilities less sure; 1 returns `scores` as they are.

    >>> tempered(torch.tensor([[[0.9, 0.5]]]), 2.0)
    tensor([[[0.7500, 0.5000]]])
    >>> tempered(torch.tensor([0.8, 0.1, 0.1]).view(3, 1, 1), 0.5).flatten()
    tensor([0.9697, 0.0152, 0.0152])
    """
    if temperature == 1.0:
        return scores
    if scores.shape[0] == 1:
        return scores.logit(eps=_LEAST).div_(temperature).sigmoid_()
    return scores.clamp_min(_LEAST).log_().div_(temperature).softmax(dim=0)


def tempered_threshold(threshold: float, temperature: float) -> float:
    """Return the foreground probability that decides as `threshold` did before `tempered`.

    >>> tempered_threshold(0.9, 2.0), tempered_threshold(0.5, 2.0)
    (0.75, 0.5)
    """
    if threshold in (0.0, 0.5, 1.0):
        return threshold
    return float(1 / (1 + ((1 - threshold) / threshold) ** (1 / temperature)))


def check_temperature(temperature: object) -> float:
    """Return what a file holds as a temperature.

    Raises:
        ConfigError: It is no finite number above 0.
    """
    if isinstance(temperature, bool) or not isinstance(temperature, int | float):
        raise ConfigError(f"temperature is {temperature!r}; a number above 0 is needed")
    if not (math.isfinite(temperature) and temperature > 0):
        raise ConfigError(f"temperature is {temperature}; a finite number above 0 is needed, 1 for none")
    return float(temperature)


def class_probabilities(scores: Tensor) -> Tensor:
    """Return ``(K, ...)`` probabilities of all classes from ``(C, ...)`` scores, which `tempered` describes."""
    if scores.shape[0] == 1:
        return torch.cat([1 - scores, scores])
    return scores / scores.sum(dim=0, keepdim=True).clamp_min(_LEAST)


def fit_temperature(images: Iterable[Judged], count: int) -> float:
    """Return the temperature under which the labels of held-out images are likeliest (Guo et al., 2017).

    The mean negative log-likelihood of `SAMPLE` pixels, always the same ones, is minimised within `TEMPERATURES`.

    Args:
        images: predictions, untempered, and their labels.
        count: how many images there are.

    Raises:
        DataError: no pixel has a label.
    """
    from scipy.optimize import minimize_scalar  # slow to import, and only calibration needs it

    generator = torch.Generator().manual_seed(SEED)
    kept: list[Tensor] = []
    truths: list[Tensor] = []
    for scores, _, target in images:
        labelled = (target != IGNORE_INDEX).flatten().nonzero()[:, 0]
        chosen = labelled[torch.randperm(len(labelled), generator=generator)[: max(1, SAMPLE // count)]]
        truth = target.flatten()[chosen]
        probabilities = class_probabilities(scores.flatten(start_dim=1)[:, chosen])
        check_indices("target", truth, len(probabilities))
        kept.append(probabilities.clamp_min(_LEAST).log())
        truths.append(truth)
    if sum(map(len, truths)) == 0:
        raise DataError("no pixel of these masks has a label, so nothing can be calibrated; give labelled images")
    logits, truth = torch.cat(kept, dim=1).T, torch.cat(truths)

    def loss(log_temperature: float) -> float:
        return float(torch.nn.functional.cross_entropy(logits / math.exp(log_temperature), truth))

    bounds = (math.log(TEMPERATURES[0]), math.log(TEMPERATURES[1]))
    found = minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-4})
    return math.exp(float(found.x))


def threshold_confusions(scores: Tensor, target: Tensor) -> Tensor:
    """Count an image's pixels by truth and decision for every threshold at once.

    Args:
        scores: ``(1, H, W)``, foreground probability.
        target: ``(H, W)``, true class indices; 255 is left out.

    Returns:
        ``(T, 2, 2)`` int64 for `THRESHOLDS`, truth in the rows: exactly those of ``scores > threshold``.

    Raises:
        DataError: a target is no class.
    """
    labelled = target != IGNORE_INDEX
    truth = target[labelled]
    check_indices("target", truth, 2)
    # How many thresholds a score is above; compared in the type of the scores, as the decision itself is.
    above = np.searchsorted(THRESHOLDS.astype(np.float32), scores[0][labelled].numpy(), side="left")
    places = len(THRESHOLDS) + 1
    counts = np.bincount(above + places * truth.numpy(), minlength=2 * places).reshape(2, places)
    positive = counts[:, ::-1].cumsum(axis=1)[:, ::-1][:, 1:].T
    negative = counts.sum(axis=1) - positive
    return torch.from_numpy(np.stack([negative, positive], axis=2))


def threshold_figures(images: Iterable[Judged], metric: str) -> NDArray[np.float64]:
    """Return the figure that each of `THRESHOLDS` gives on these images.

    Args:
        images: predictions of a binary task and their labels.
        metric: key of `THRESHOLD_METRICS`.

    Raises:
        ConfigError: the metric is unknown, or cannot be computed from counts of pixels.
        DataError: no pixel has a label.
    """
    check_known("metric of a decision threshold", metric, THRESHOLD_METRICS)
    reduce, pooled = THRESHOLD_METRICS[metric]
    total, seen = torch.zeros(()), 0
    for scores, _, target in images:
        confusions = threshold_confusions(scores, target)
        if bool(confusions.any()):
            seen += 1
            total = total + (confusions if pooled else reduce(confusions))
    if not seen:
        raise DataError("no pixel of these masks has a label, so no threshold can be chosen; give labelled images")
    figures: NDArray[np.float64] = (reduce(total) if pooled else total / seen).numpy()
    return figures


def best_threshold(figures: NDArray[np.float64], metric: str) -> float:
    """Return the threshold with the best of `threshold_figures`; of equals the nearest to 0.5."""
    best = figures.max() if METRICS[metric](2).higher_is_better else figures.min()
    equal = THRESHOLDS[figures == best]
    return float(equal[np.abs(equal - 0.5).argmin()])


def choose_threshold(images: Iterable[Judged], metric: str) -> float:
    """Return the threshold, of 0.001 to 0.999, with the best figure on these images; of equals the nearest to 0.5.

    Args:
        images: predictions of a binary task and their labels.
        metric: key of `THRESHOLD_METRICS`.

    Raises:
        ConfigError: the metric is unknown, or cannot be computed from counts of pixels.
        DataError: no pixel has a label.
    """
    return best_threshold(threshold_figures(images, metric), metric)


class ReliabilityBin(NamedTuple):
    """One point of a reliability curve.

    Attributes:
        low: least probability in the bin.
        high: largest.
        confidence: mean predicted probability; NaN without pixels.
        accuracy: share of pixels for which it came true; NaN without pixels.
        pixels: how many there are.
    """

    low: float
    high: float
    confidence: float
    accuracy: float
    pixels: int


@dataclass(frozen=True)
class Calibration:
    """How probabilities and what came true agree, over all labelled pixels together.

    Binary tasks are judged by the foreground probability and whether the pixel is foreground, others by the
    probability of the likeliest class and whether it is right.

    Attributes:
        ece: expected calibration error: mean distance of confidence and accuracy over bins of equal width, each as
            heavy as its pixels (Naeini et al., AAAI 2015; Guo et al., 2017, eq. 3).
        ece_equal_mass: the same over bins of about as many pixels each (Nixon et al., 2019).
        brier: mean squared distance from the truth: of the foreground probability, or summed over the classes
            (Brier, 1950).
        nll: mean negative log-likelihood of the true class, in nats.
        pixels: how many were judged.
        curve: bins of equal width; ``pandas.DataFrame(curve)`` makes a table of them.
        curve_equal_mass: bins of about as many pixels, fewer where many pixels share one probability.
    """

    ece: float
    ece_equal_mass: float
    brier: float
    nll: float
    pixels: int
    curve: tuple[ReliabilityBin, ...]
    curve_equal_mass: tuple[ReliabilityBin, ...]


def measure_calibration(images: Iterable[Judged], *, bins: int = BINS) -> Calibration:
    """Compare predicted probabilities with what came true.

    Args:
        images: predictions and their labels.
        bins: of both reliability curves.

    Raises:
        ConfigError: `bins` is not 1 to 1000.
        DataError: no pixel has a label.
    """
    if isinstance(bins, bool) or not isinstance(bins, int) or not 1 <= bins <= 1000:
        raise ConfigError(f"bins is {bins!r}; a whole number from 1 to 1000 is needed, such as {BINS}")
    widths = np.linspace(0, 1, bins + 1)
    logits = np.linspace(-_LOGIT_LIMIT, _LOGIT_LIMIT, _LOGIT_BINS + 1)
    fine_edges = np.concatenate([[0.0], 1 / (1 + np.exp(-logits[1:-1])), [1.0]])
    even, fine = np.zeros((3, bins)), np.zeros((3, _LOGIT_BINS))
    brier = nll = 0.0
    for scores, _, target in images:
        labelled = target != IGNORE_INDEX
        truth = target[labelled]
        probabilities = class_probabilities(scores[:, labelled])
        check_indices("target", truth, len(probabilities))
        true = probabilities.gather(0, truth[None])[0].double()
        nll -= float(true.clamp_min(_LEAST).log().sum())
        if scores.shape[0] == 1:
            brier += float((1 - true).square().sum())
            said, came = probabilities[1], truth == 1
        else:
            brier += float(probabilities.double().square().sum() - 2 * true.sum()) + len(truth)
            said, likeliest = probabilities.max(dim=0)
            came = likeliest == truth
        for sums, edges in ((even, widths), (fine, fine_edges)):
            _add(sums, edges, said.double().numpy(), came.numpy())
    pixels = int(even[0].sum())
    if not pixels:
        raise DataError("no pixel of these masks has a label, so nothing can be judged; give labelled images")
    curve = _curve(even, widths)
    massed, edges = _merged(fine, fine_edges, bins)
    equal_mass = _curve(massed, edges)
    return Calibration(_error(curve), _error(equal_mass), brier / pixels, nll / pixels, pixels, curve, equal_mass)


def _add(
    sums: NDArray[np.float64], edges: NDArray[np.float64], said: NDArray[np.float64], came: NDArray[np.bool_]
) -> None:
    """Add pixels to ``sums (3, bins)`` of counts, probabilities and what came true; bins hold their upper edge."""
    place = (np.searchsorted(edges, said, side="left") - 1).clip(0, sums.shape[1] - 1)
    for row, weights in zip(sums, (None, said, came), strict=True):
        row += np.bincount(place, weights=weights, minlength=sums.shape[1])


def _merged(
    fine: NDArray[np.float64], edges: NDArray[np.float64], bins: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Merge neighbouring bins, ``fine (3, N)``, to `bins` of about equal counts, or fewer; also return their edges."""
    before = fine[0].cumsum() - fine[0] / 2  # the middle of each bin's pixels decides where it goes
    group = np.minimum((before * bins / fine[0].sum()).astype(np.int64), bins - 1)
    starts = np.flatnonzero(np.diff(group, prepend=-1))
    return np.add.reduceat(fine, starts, axis=1), np.append(edges[starts], edges[-1])


def _curve(sums: NDArray[np.float64], edges: NDArray[np.float64]) -> tuple[ReliabilityBin, ...]:
    with np.errstate(invalid="ignore"):
        confidence, accuracy = sums[1] / sums[0], sums[2] / sums[0]
    rows = zip(edges[:-1].tolist(), edges[1:].tolist(), confidence.tolist(), accuracy.tolist(), sums[0], strict=True)
    return tuple(ReliabilityBin(*row[:4], int(row[4])) for row in rows)


def _error(curve: tuple[ReliabilityBin, ...]) -> float:
    """Expected calibration error of a reliability curve."""
    filled = [each for each in curve if each.pixels]
    return sum(abs(e.confidence - e.accuracy) * e.pixels for e in filled) / sum(e.pixels for e in filled)
