"""Weighted F-measure of one soft foreground map; `valid`, `stretch` and errors are those of `semseg_automl.saliency`.

The measure needs, for every pixel outside the mask, the distance to the mask and, close to it, which pixel of the mask
is nearest. It is computed on the processor, whatever the device of its input. The two halves, errors inside and outside
the mask, do not need each other: where OpenCV has more than one thread, large images take two. What an image scores
does not depend on that.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from semseg_automl.soft_map import LEVELS, SoftMap

__all__ = ["WeightedErrors", "takes_two_threads", "weighted_errors", "weighted_f_measure", "weighted_f_measure_of"]

Numbers = NDArray[np.uint8] | NDArray[np.float64]

_EPS = float(np.finfo(np.float64).eps)  # in the denominators of the authors' code
_REACH = 3  # the Gaussian has 7 x 7 taps: this many pixels to each side of the centre
_SIGMA = 5.0
_HALF = 5.0  # pixels; within it the weight of an error covers half of its way from 1 to 2
_STRIP = 64  # rows at a time: what belongs to them stays in the cache
_WORTH_A_THREAD = 2**17  # pixels; below it starting one costs more than it saves
_COLLIDES = 256  # columns, of 4 bytes: a width that is a multiple of this is widened by `_GAP`
_GAP = 16
_BEYOND = 200  # pixels; the weight there is 2 to within 1e-12
_FAR = 2**16 - 1  # squared pixels, the last that 16 bits hold; there the weight is 2 to within 1e-15


def _gaussian() -> NDArray[np.float64]:
    """One axis of the 7 x 7 Gaussian, ``(7,)``; its sum is 1, so that the sum of the outer product is."""
    taps = np.exp(-(np.arange(-_REACH, _REACH + 1) ** 2) / (2 * _SIGMA**2))
    return np.asarray(taps / taps.sum(), dtype=np.float64)


def _offsets() -> dict[int, list[tuple[int, int]]]:
    """Steps ``(row, column)`` by squared length, as far as a mask pixel can be within the Gaussian's reach.

    Of several nearest pixels the authors' results depend on the one chosen. The order is that of an exact distance
    transform that scans columns first: the leftmost, then the uppermost; scipy and pysodmetrics choose the same.
    """
    steps: dict[int, list[tuple[int, int]]] = {}
    furthest = 2 * _REACH**2
    side = range(-math.isqrt(furthest), math.isqrt(furthest) + 1)
    for column in side:
        for row in side:
            if 0 < row**2 + column**2 <= furthest:
                steps.setdefault(row**2 + column**2, []).append((row, column))
    return steps


_KERNEL = _gaussian()
_STEPS = _offsets()
_PAD = max(column for steps in _STEPS.values() for _, column in steps)
_HALO = _REACH + _PAD  # pixels beside an error: what the Gaussian reaches, and what lends its error to that
_WINDOW = np.ones((2 * _REACH + 1, 2 * _REACH + 1), dtype=np.uint8)
# By squared distance in pixels; 0 for distance 0, the mask itself, which is weighed elsewhere.
_WEIGHTS = np.append(0.0, 2 - np.exp2(-np.sqrt(np.arange(1, _FAR + 1)) / _HALF))


def weighted_f_measure(
    prediction: Tensor, mask: Tensor, *, beta2: float = 1.0, valid: Tensor | None = None, stretch: bool = True
) -> Tensor:
    """Weighted F-measure, 1 for a perfect prediction (Margolin, Zelnik-Manor, Tal, CVPR 2014).

    ``(1 + beta2) P R / (R + beta2 P)``. In R, errors inside the mask count less where their surroundings are right:
    the smaller of the error and its Gaussian mean, for which each pixel outside the mask takes over the error of the
    nearest pixel of the mask. In P, errors outside the mask count ``2 - 0.5 ** (distance / 5)``.

    An empty mask scores 0, whatever the prediction, as in pysodmetrics: an empty one too.

    Args:
        prediction: ``(H, W)``, foreground probability in [0, 1], or uint8.
        mask: ``(H, W)``, bool.
        beta2: Weight of R against P; the field's is 1, the code of Conv-LoRA's paper has 0.3.
        valid: ``(H, W)``, bool; the other pixels are left out, as mask and as error.
        stretch: Map the prediction's range to [0, 1] first.

    Returns:
        0-d float64 tensor; NaN without a valid pixel.

    Raises:
        DataError: A shape, a type or a range is not as above.

    >>> mask = torch.tensor([[False, True], [False, True]])
    >>> round(weighted_f_measure(mask.double(), mask).item(), 6)
    1.0
    """
    return weighted_f_measure_of(SoftMap(prediction, mask, valid=valid, stretch=stretch), beta2=beta2)


def weighted_f_measure_of(image: SoftMap, *, beta2: float = 1.0) -> Tensor:
    """`weighted_f_measure` of a map whose tensors are in one object; answer and errors as there."""
    return weighted_errors(image).f_measure(beta2)


@dataclass(frozen=True)
class WeightedErrors:
    """What the weighted F-measure of an image is made of, for any beta2.

    Attributes:
        image: the map and its mask.
        alarm: sum of the weighted errors outside the mask, in pixels; NaN for an empty mask, which has no distance.
        missed: sum of those inside, likewise.
    """

    image: SoftMap
    alarm: float
    missed: float

    def f_measure(self, beta2: float) -> Tensor:
        """Return the measure as `weighted_f_measure` does."""
        foreground = self.image.foreground
        if self.image.pixels == 0:
            figure = math.nan
        elif foreground == 0:
            figure = 0.0
        else:
            caught = foreground - self.missed
            precision, recall = caught / (caught + self.alarm + _EPS), 1 - self.missed / foreground
            figure = (1 + beta2) * recall * precision / (recall + beta2 * precision + _EPS)
        return torch.tensor(figure, dtype=torch.float64, device=self.image.prediction.device)


def weighted_errors(image: SoftMap, meanwhile: Callable[[], None] = lambda: None) -> WeightedErrors:
    """Weigh the errors of an image.

    Args:
        image: prediction and mask.
        meanwhile: other work on the same image, done in this thread while a second one measures distances, which take
            more than half of the time; without a second thread, done first.

    Raises:
        DataError: as for `weighted_f_measure`.
    """
    false_alarm, miss, unit = _errors(image)
    inside = image.inside.cpu().numpy()
    if image.foreground == 0:
        meanwhile()
        return WeightedErrors(image, math.nan, 0.0)
    present = None if image.valid is None else image.valid.cpu().numpy()
    if not takes_two_threads(image):
        meanwhile()
        return WeightedErrors(image, _alarm(false_alarm, inside) / unit, _missed(miss, inside, present) / unit)
    with ThreadPoolExecutor(1) as beside:
        distances = beside.submit(_alarm, false_alarm, inside)
        meanwhile()
        missed = _missed(miss, inside, present) / unit
        return WeightedErrors(image, distances.result() / unit, missed)


def takes_two_threads(image: SoftMap) -> bool:
    """Whether a second thread shortens the wait: OpenCV may use two (`cv2.setNumThreads`), and the image is large."""
    return image.mask.numel() >= _WORTH_A_THREAD and cv2.getNumThreads() > 1


def _errors(image: SoftMap) -> tuple[Numbers, Numbers, int]:
    """Return ``(false_alarm, miss, unit)``: two arrays ``(H, W)`` in `unit`-ths of an error.

    `false_alarm` is the prediction's height above its floor, the error of the pixels outside the mask; `miss` the error
    of those inside, 0 elsewhere. Both are 0 at pixels that are not valid. An 8-bit prediction keeps whole levels, whose
    sums need no float64 until they are weighed.
    """
    if not image.has_levels:
        above, below = image.values, 1 - image.values
        if image.valid is not None:
            above = torch.where(image.valid, above, 0)
        # A product is faster, but would keep NaN.
        return above.cpu().numpy(), torch.where(image.inside, below, 0).cpu().numpy(), 1
    low, high = (int(bound) for bound in image.bounds)
    floor, top = (low, high) if image.stretch and low < high else (0, LEVELS - 1)
    # Not by torch, whose threads go on spinning for a while, on the processor that the second half needs. Wraps around
    # only where a pixel is not valid.
    levels = image.prediction.cpu().numpy()
    alarm, miss = levels - np.uint8(floor), (np.uint8(top) - levels) * image.inside.cpu().numpy()
    return alarm if image.valid is None else alarm * image.valid.cpu().numpy(), miss, top - floor


def _alarm(false_alarm: Numbers, inside: NDArray[np.bool_]) -> float:
    """Sum over the pixels outside ``inside (H, W)``, which is not empty, of their errors by their distance from it."""
    left, top, width, height = cv2.boundingRect(inside.view(np.uint8))
    rows = slice(max(0, top - _BEYOND), top + height + _BEYOND)
    near = rows, slice(max(0, left - _BEYOND), left + width + _BEYOND)
    far = cv2.sumElems(false_alarm)[0] - cv2.sumElems(false_alarm[near])[0]
    return _weighed(false_alarm[near], inside[near]) + 2 * far


def _weighed(false_alarm: Numbers, inside: NDArray[np.bool_]) -> float:
    """Compute `_alarm` by the distance of every pixel."""
    height, width = inside.shape
    # OpenCV walks down columns, and rows a power of two apart compete for the same lines of the cache, which costs it
    # a sixth of its time. More columns outside the mask change no distance.
    outside = np.ones((height, width + (0 if width % _COLLIDES else _GAP)), dtype=np.uint8)
    np.logical_not(inside, out=outside[:, :width], casting="unsafe")
    distance = cv2.distanceTransform(outside, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)[:, :width]
    total = 0.0
    for first in range(0, height, _STRIP):
        strip = slice(first, first + _STRIP)
        # Rounds to nearest and saturates; the square of a float32 root is within 0.02 of the integer it came from.
        squared = cv2.multiply(distance[strip], distance[strip], dtype=cv2.CV_16U)
        weights = _WEIGHTS.take(squared.astype(np.intp), mode="clip")  # "clip" skips a check that no 16 bits fail
        # Not np.vdot: its library wakes threads of its own, which costs several times what they save.
        weights *= false_alarm[strip]
        total += float(weights.sum())
    return total


def _missed(miss: Numbers, inside: NDArray[np.bool_], valid: NDArray[np.bool_] | None) -> float:
    """Sum over the mask of the smaller of each pixel's error and its Gaussian mean.

    Args:
        miss: ``(H, W)``, the errors inside the mask, 0 outside.
        inside: ``(H, W)``, the mask.
        valid: ``(H, W)``, or None; the others are lent no error.
    """
    wrong = (miss > 0).view(np.uint8)
    left, top, width, height = cv2.boundingRect(wrong)
    if width == 0:
        return 0.0
    # Where a pixel's own error is 0 it is the smaller one, so that nothing beyond this box matters.
    box = (slice(max(0, top - _HALO), top + height + _HALO), slice(max(0, left - _HALO), left + width + _HALO))
    miss, inside = miss[box], inside[box]
    waiting = (cv2.dilate(wrong[box], _WINDOW) > 0) & ~inside
    if valid is not None:
        waiting &= valid[box]
    spread = _lent(miss, inside, waiting)
    total = 0.0
    for first in range(0, len(miss), _STRIP):
        error = miss[first : first + _STRIP].astype(np.float64)
        # From `_REACH` rows above the strip to as many below it, which the padding always has.
        around = spread[first + _PAD - _REACH : first + _PAD + len(error) + _REACH]
        smooth = cv2.sepFilter2D(around, cv2.CV_64F, _KERNEL, _KERNEL, borderType=cv2.BORDER_CONSTANT)
        total += float(np.minimum(error, smooth[_REACH:-_REACH, _PAD:-_PAD], out=error).sum())
    return total


def _lent(miss: Numbers, inside: NDArray[np.bool_], waiting: NDArray[np.bool_]) -> Numbers:
    """Return `miss` with `_PAD` zeros on all sides and, outside the mask, the errors of the nearest pixels of the mask.

    Args:
        miss: ``(H, W)``, errors inside the mask, 0 outside.
        inside: ``(H, W)``, the mask.
        waiting: ``(H, W)``, pixels outside the mask that take over an error if a mask pixel is within reach.
    """
    spread = np.pad(np.asarray(miss), _PAD)
    padded = np.pad(inside, _PAD).reshape(-1)
    stride, flat = spread.shape[1], spread.reshape(-1)
    places = np.flatnonzero(np.pad(waiting, _PAD))
    for length in sorted(_STEPS):
        done = np.zeros(len(places), dtype=np.bool_)
        for row, column in reversed(_STEPS[length]):  # so that the step that comes first is written last
            nearest = places + (row * stride + column)
            found = padded.take(nearest)
            hits = np.flatnonzero(found)
            flat[places.take(hits)] = flat.take(nearest.take(hits))
            done |= found
        places = places[~done]
    return spread
