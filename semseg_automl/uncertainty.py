"""How sure the figures of a test set are: per image, with bootstrap intervals over images, and two predictors compared.

Everything follows from each image's tallies (`SegmentationMetric.tally`): summed they give the data set's figures, one
by one those of each image, and summed over images drawn with replacement those of a data set that might have been. So
pooled scores, whose images weigh differently, are resampled as rightly as means. Tables are the caller's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from semseg_automl.errors import UnsupportedCombination
from semseg_automl.metrics import SegmentationMetric
from semseg_automl.task import IGNORE_INDEX

RESAMPLES = 1000
SEED = 0
CONFIDENCE = 0.95
_AT_ONCE = 50  # resampled data sets in memory together


class Interval(NamedTuple):
    """A figure and the ends of its 95 % interval."""

    value: float
    low: float
    high: float


class Comparison(NamedTuple):
    """Two predictors' figures, a - b with the ends of its 95 % interval, and the p-value of equal images."""

    a: float
    b: float
    difference: float
    low: float
    high: float
    p: float


class ImageTallies:
    """The tallies of a test set's images, in order; a pooled score of K classes keeps 8 K^2 bytes of each.

    Args:
        metrics: By name, of one task; they are asked for tallies and figures, and stay empty.
        class_names: One per class; a metric with one value per class is named ``name[class]`` for each.
    """

    def __init__(self, metrics: Mapping[str, SegmentationMetric], class_names: Sequence[str]) -> None:
        self.metrics = dict(metrics)
        self.class_names = list(class_names)
        self._counted: list[bool] = []
        self._tallies: dict[str, list[dict[str, Tensor]]] = {name: [] for name in metrics}

    def add(self, scores: Tensor, labels: Tensor, target: Tensor) -> None:
        """Add one image; arguments and errors as in `SegmentationMetric.tally`."""
        for name, metric in self.metrics.items():
            self._tallies[name].append(metric.tally(scores, labels, target))
        self._counted.append(bool((target != IGNORE_INDEX).any()))

    def figures(self) -> dict[str, float]:
        """Return the figures of all images together, by name; NaN where undefined."""
        found: dict[str, float] = {}
        for name, metric in self.metrics.items():
            value = metric.figure({state: each.sum(dim=0) for state, each in self._stacked(name).items()})
            found.update({each: figure.item() for each, figure in self._named(name, value[None]).items()})
        return found

    def per_image(self) -> dict[str, NDArray[np.float64]]:
        """Return each image's own figures, ``(N,)`` by name: the same formula over its pixels alone.

        A pooled score is that of the image's pixels, and its mean over images is another figure. NaN where undefined:
        an image without a pixel to score, a class that is neither in its truth nor in its prediction.
        """
        found: dict[str, NDArray[np.float64]] = {}
        for name, metric in self.metrics.items():
            found.update(self._named(name, metric.figure(self._stacked(name))))
        return found

    def intervals(self) -> dict[str, Interval]:
        """Return each figure with the ends of its percentile bootstrap interval (Efron, 1979), by name.

        1000 data sets of as many images are drawn with replacement, always the same ones; the ends leave 2.5 % of their
        figures out on each side. Data sets in which the figure is undefined are left out. NaN of less than two images.
        """
        resampled = self._resampled()
        return {name: Interval(value, *_ends(resampled[name])) for name, value in self.figures().items()}

    def compared(self, other: ImageTallies) -> dict[str, Comparison]:
        """Compare with another predictor's tallies of the same images, in the same order.

        The interval is that of the difference over the same 1000 draws of images for both, as in `intervals`. p is that
        of Wilcoxon's signed-rank test (1945), two-sided, over the images' own figures: small when one predictor is
        better on most images. Images where a figure is undefined or equal for both are left out; without others p is 1.

        Raises:
            UnsupportedCombination: Other metrics, or another number of images.
        """
        if (list(self.metrics), len(self)) != (list(other.metrics), len(other)):
            raise UnsupportedCombination(
                f"{len(self)} images with {list(self.metrics)} and {len(other)} images with {list(other.metrics)} "
                "cannot be compared; score the same images with the same metrics"
            )
        ours, theirs = self.figures(), other.figures()
        draws, other_draws = self._resampled(), other._resampled()
        images, other_images = self.per_image(), other.per_image()
        return {
            name: Comparison(
                ours[name],
                theirs[name],
                ours[name] - theirs[name],
                *_ends(draws[name] - other_draws[name]),
                _signed_rank(images[name] - other_images[name]),
            )
            for name in ours
        }

    def take(self, rows: Iterable[int]) -> ImageTallies:
        """Return the tallies of the images at positions `rows`, in that order."""
        chosen = [int(row) for row in rows]
        part = ImageTallies(self.metrics, self.class_names)
        part._counted = [self._counted[row] for row in chosen]
        part._tallies = {name: [tallies[row] for row in chosen] for name, tallies in self._tallies.items()}
        return part

    @property
    def counted(self) -> int:
        """The number of images that have a pixel to score."""
        return sum(self._counted)

    def __len__(self) -> int:
        return len(self._counted)

    def _resampled(self) -> dict[str, NDArray[np.float64]]:
        """Figures of data sets drawn with replacement from the images that count, ``(RESAMPLES,)`` by name."""
        counted = np.flatnonzero(self._counted)
        if len(counted) < 2:
            return {name: np.full(RESAMPLES, np.nan) for name in self.figures()}
        rng = np.random.default_rng(SEED)
        times = np.zeros((RESAMPLES, len(self)))
        for draw in times:
            draw += np.bincount(rng.choice(counted, size=len(counted)), minlength=len(self))
        weights = torch.from_numpy(times).split(_AT_ONCE)
        drawn: dict[str, NDArray[np.float64]] = {}
        for name, metric in self.metrics.items():
            tallies = self._stacked(name)
            values = [metric.figure({state: _drawn(each, w) for state, each in tallies.items()}) for w in weights]
            drawn.update(self._named(name, torch.cat(values)))
        return drawn

    def _stacked(self, name: str) -> dict[str, Tensor]:
        """The tallies of the metric called `name`, ``(N, ...)`` by state."""
        states = self.metrics[name].states()
        if not len(self):
            return {state: empty[None][:0] for state, empty in states.items()}
        return {state: torch.stack([tally[state] for tally in self._tallies[name]]) for state in states}

    def _named(self, name: str, values: Tensor) -> dict[str, NDArray[np.float64]]:
        """``values (N,)`` under the metric's name, or ``(N, K)`` under one name per class."""
        if values.ndim == 1:
            return {name: values.numpy()}
        columns = zip(self.class_names, values.numpy().T, strict=True)
        return {f"{name}[{class_name}]": column for class_name, column in columns}


def _drawn(tallies: Tensor, weights: Tensor) -> Tensor:
    """Sums of ``tallies (N, ...)``, each taken as often as a row of ``weights (R, N)`` says, ``(R, ...)``."""
    flat = tallies.to(torch.float64).flatten(start_dim=1) if tallies.ndim > 1 else tallies.to(torch.float64)[:, None]
    return (weights @ flat).view(len(weights), *tallies.shape[1:])


def _ends(values: NDArray[np.float64]) -> tuple[float, float]:
    """The percentiles that leave 5 % of the finite ``values (N,)`` outside; NaN without any."""
    defined = values[np.isfinite(values)]
    if len(defined) == 0:
        return np.nan, np.nan
    low, high = np.quantile(defined, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def _signed_rank(differences: NDArray[np.float64]) -> float:
    """Wilcoxon's two-sided p of ``differences (N,)``; NaN and 0 are left out, 1 without any other."""
    from scipy.stats import wilcoxon  # slow to import, and only comparisons need it

    moved = differences[np.isfinite(differences) & (differences != 0)]
    return float(wilcoxon(moved).pvalue) if len(moved) else 1.0
