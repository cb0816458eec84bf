"""Weighted F-measure of one soft foreground map; `valid`, `stretch` and errors are those of `semseg_automl.saliency`.

The measure needs, for every pixel outside the mask, the distance to the mask and, close to it, which pixel of the mask
is nearest. It is computed on the processor, whatever the device of its input.
"""

from __future__ import annotations

import math

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from semseg_automl.saliency import level_values, prepared

_EPS = float(np.finfo(np.float64).eps)  # in the denominators of the authors' code
_REACH = 3  # the Gaussian has 7 x 7 taps: this many pixels to each side of the centre
_SIGMA = 5.0
_HALF = 5.0  # pixels; within it the weight of an error covers half of its way from 1 to 2
_STRIP = 128  # rows at a time: what belongs to them stays in the cache, and memory is that of a strip
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
_HALO = _REACH + _PAD  # rows beside a strip: what the Gaussian reaches, and what lends its error to that
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
    if prediction.dtype == torch.uint8:
        table = level_values(prediction, mask, valid, stretch).cpu().numpy()
        values = prediction.cpu().numpy()
    else:
        table, values = None, prepared(prediction, mask, valid, stretch).cpu().numpy()
    inside = (mask if valid is None else mask & valid).cpu().numpy()
    foreground = int(np.count_nonzero(inside))
    if values.size == 0 or (valid is not None and not bool(valid.any())):
        figure = math.nan
    elif foreground == 0:
        figure = 0.0
    else:
        squared, alarm, missed = _squared_distance(inside), 0.0, 0.0
        for first in range(0, len(inside), _STRIP):
            rows = slice(max(0, first - _HALO), first + _STRIP + _HALO)
            error = np.abs((values[rows] if table is None else table[values[rows]]) - inside[rows])
            if valid is not None:
                outside = ~valid[rows].cpu().numpy()
                error[outside], squared[rows][outside] = 0, _FAR  # no alarm, and too far to take over an error
            core = slice(first - rows.start, first - rows.start + _STRIP)
            alarm += float(np.vdot(error[core], _WEIGHTS.take(squared[rows][core])))
            missed += _missed(error, inside[rows], squared[rows], core)
        caught = foreground - missed
        precision, recall = caught / (caught + alarm + _EPS), 1 - missed / foreground
        figure = (1 + beta2) * recall * precision / (recall + beta2 * precision + _EPS)
    return torch.tensor(figure, dtype=torch.float64, device=prediction.device)


def _squared_distance(inside: NDArray[np.bool_]) -> NDArray[np.uint16]:
    """Squared distance in pixels of each pixel to ``inside (H, W)``, which is not empty, but at most `_FAR`."""
    outside = np.logical_not(inside).view(np.uint8)
    distance = cv2.distanceTransform(outside, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    # Rounds to nearest and saturates; the square of a float32 root is within 0.02 of the integer it came from.
    return np.asarray(cv2.multiply(distance, distance, dtype=cv2.CV_16U), dtype=np.uint16)


def _missed(error: NDArray[np.float64], inside: NDArray[np.bool_], squared: NDArray[np.uint16], core: slice) -> float:
    """Sum over the mask in the rows `core` of the smaller of each pixel's error and its Gaussian mean.

    Args:
        error: ``(H, W)``, with `_HALO` rows beside `core` where the image has them.
        inside: ``(H, W)``, the mask.
        squared: ``(H, W)``, squared distance to the mask.
        core: Rows.
    """
    if not inside[core].any():
        return 0.0
    inner = (slice(_PAD, -_PAD), slice(_PAD, -_PAD))
    padded = np.pad(inside, _PAD).reshape(-1)
    spread = np.zeros((inside.shape[0] + 2 * _PAD, inside.shape[1] + 2 * _PAD))
    np.multiply(error, inside, out=spread[inner])
    stride, flat = spread.shape[1], spread.reshape(-1)
    near = np.flatnonzero((squared > 0) & (squared <= 2 * _REACH**2))
    rows, columns = np.divmod(near, squared.shape[1])
    lengths, places = squared.reshape(-1)[near], (rows + _PAD) * stride + columns + _PAD
    for length, steps in _STEPS.items():
        waiting = places[lengths == length]
        for row, column in steps:
            nearest = waiting + (row * stride + column)
            found = padded[nearest]
            flat[waiting[found]] = flat[nearest[found]]
            waiting = waiting[~found]
    smooth = cv2.sepFilter2D(spread, cv2.CV_64F, _KERNEL, _KERNEL, borderType=cv2.BORDER_CONSTANT)[inner]
    chosen = inside[core]
    # Outside the mask `spread` holds what other pixels lent it.
    return float(np.minimum(smooth[core][chosen], error[core][chosen]).sum())
